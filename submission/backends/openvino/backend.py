"""Models on the CPU by OpenVINO: the embedded ones, GGUF files that it reads, and OpenVINO folders.

    python -m submission predict test.csv -o submission.csv --backend openvino --model openvino_folder

`optimum-cli export openvino --model MODEL FOLDER` makes such a folder of any transformers model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from submission.backends.common import (
    PendingRequest,
    check_context,
    fast_dtype,
    memory_budget,
    scorable,
    thread_count,
)
from submission.backends.models import (
    OPENVINO_MODEL,
    PACKAGED,
    adapter_of,
    check_gguf_adapter,
    is_openvino_folder,
    resolve_gguf,
)
from submission.backends.openvino.weights import made_folder
from submission.backends.sampling import PendingAnswer
from submission.data.hashing import content_hash
from submission.errors import UserError
from submission.prompts.encoding import ChatEncoder
from submission.types import Chat, Completion, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    from submission.backends import ModelSpec
    from submission.backends.folder_tokenizer import FolderTokenizer
    from submission.backends.openvino.schedule import Answer, Work

_STREAMS = 24  # answers on their way at once: more gain nothing, and each takes memory
_CELLS = 256  # tokens of the cache for each of so many; longer ones are fewer at a time
_MOST_STREAMS = 128
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    threads: 0 means every core this process may use.
    batch: tokens that are computed together.
    streams: answers that are computed together at most; 0 means what measured best.
    memory: megabytes that the KV cache may take; 0 means a quarter of what is free.
    dtype: float32, bfloat16, or auto: what is fastest here. Settled when the options are made, so that workers on other
        machines compute in it too.
    adapter_scale: strength of the LoRA adapter.
    """

    context: int = 2048
    threads: int = 0
    batch: int = 512
    streams: int = 0
    memory: int = 0
    dtype: str = "auto"
    adapter_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_of(self.dtype))


def check(spec: ModelSpec) -> None:
    """Refuse a model or adapter that is not what this backend loads."""
    options = spec.options
    if options.dtype not in _DTYPES:
        raise UserError(f"option dtype={options.dtype!r} for backend openvino is none of auto, {', '.join(_DTYPES)}")
    check_context(options.context, "openvino")
    for name, least in (("batch", 1), ("streams", 0), ("threads", 0), ("memory", 0)):
        if getattr(options, name) < least:
            raise UserError(f"option {name} for backend openvino must be at least {least}")
    if options.streams > _MOST_STREAMS:
        raise UserError(f"option streams for backend openvino must be at most {_MOST_STREAMS}")
    if not math.isfinite(options.adapter_scale):
        raise UserError(f"option adapter_scale={options.adapter_scale} for backend openvino is no number")
    folder = _folder(spec)
    if folder is None:
        resolve_gguf(spec.model)
        check_gguf_adapter(adapter_of(spec.model, spec.adapter))
        return
    if spec.adapter is not None:
        raise UserError(
            "backend openvino loads no adapter beside an OpenVINO folder: merge it before the export "
            "(python -m train merge), or use --backend transformers"
        )
    file = (folder / OPENVINO_MODEL).with_suffix(".bin")
    if not file.is_file():
        raise UserError(f"model {folder} is not whole: it has {OPENVINO_MODEL} and no {file.name}")


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """What decides the answers: weights, adapter, its scale, the precision and the room for a prompt."""
    folder = _folder(spec)
    marks = {
        "model": content_hash(folder or resolve_gguf(spec.model)),
        "context": str(spec.options.context),
        "dtype": spec.options.dtype,
    }
    if adapter := adapter_of(spec.model, spec.adapter):
        marks["adapter"] = f"{content_hash(adapter)} x {spec.options.adapter_scale!r}"
    if spec.model in PACKAGED:
        marks["weights"] = "16 bits"  # the same file by its path is computed as it is quantised
    return marks


def load(spec: ModelSpec) -> OpenVino:
    """Load the model."""
    with opened(spec) as folder:
        return OpenVino(folder, spec.options)


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """Load the tokenizer only."""
    with opened(spec) as folder:
        return _encoder(folder, spec.options.context)[0]


class OpenVino:
    """A model of an OpenVINO folder.

    Args:
        folder: of the model.
        options: see there.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        from submission.backends.openvino.engine import BLOCK, Engine
        from submission.backends.openvino.schedule import Scheduler

        self.encoder, self.tokenizer = _encoder(folder, options.context)
        threads = thread_count(options.threads)
        streams = options.streams or _STREAMS
        engine = Engine(
            folder, options.dtype, threads,
            cache_bytes=options.memory * 1_000_000 or memory_budget(),
            least_tokens=2 * (self.encoder.context + BLOCK), most_tokens=streams * _CELLS,
        )  # fmt: skip
        if engine.vocabulary <= self.tokenizer.largest:
            raise UserError(
                f"the tokenizer of {folder} has tokens up to {self.tokenizer.largest}, and the model "
                f"{engine.vocabulary}: they do not belong together"
            )
        pool = ThreadPoolExecutor(threads, thread_name_prefix="sample")
        self._scheduler = Scheduler(engine, options.batch, streams, pool.map)

    def forget(self) -> None:
        """Let go of prompts that were computed, for measurements."""
        self._scheduler.forget()

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]:
        """See `submission.types.Backend`."""
        import numpy as np

        from submission.backends.openvino.schedule import Work

        def work() -> Iterator[Work]:
            for request in requests:
                sampling = request.sampling
                encoded = self.encoder.encode_for(request.chat, sampling.max_new_tokens)
                asked = PendingRequest(request, encoded)
                answers: deque[Answer] = deque(PendingAnswer(asked, n, self.tokenizer) for n in range(sampling.n))
                yield Work(np.array(encoded.ids, np.int32), asked, sampling.max_new_tokens, answers)

        for answer in self._scheduler.run(work()):
            assert isinstance(answer, PendingAnswer)
            yield from answer.asked.take(answer.number, answer.completion())

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`."""
        from submission.backends.openvino.schedule import Work

        without: list[tuple[str, LogLikelihood | Failure]] = []  # what needs no computing
        texts = (
            Work(ids, key, scored_from=scored_from) for key, ids, scored_from in scorable(items, self.encoder, without)
        )
        for work in self._scheduler.run(texts):
            assert isinstance(work, Work)
            yield work.payload, LogLikelihood(work.total, len(work.ids) - work.scored_from, work.scored_from)
        yield from without


def _folder(spec: ModelSpec) -> Path | None:
    """The OpenVINO folder that was named; None for a GGUF file."""
    path = Path(spec.model).expanduser()
    return path if spec.model not in PACKAGED and is_openvino_folder(path) else None


@contextmanager
def opened(spec: ModelSpec) -> Iterator[Path]:
    """The OpenVINO folder to load."""
    if folder := _folder(spec):
        yield folder
        return
    source, adapter = resolve_gguf(spec.model), adapter_of(spec.model, spec.adapter)
    scale = spec.options.adapter_scale
    with made_folder(source, adapter if scale else None, scale, exact=spec.model in PACKAGED) as made:
        yield made


def _encoder(folder: Path, context: int) -> tuple[ChatEncoder, FolderTokenizer]:
    from submission.backends.folder_tokenizer import folder_encoder, read_table

    return folder_encoder(folder, context, read_table(folder / "config.json"))


def dtype_of(asked: str) -> str:
    """The precision that is computed in: what was asked for, or what this processor does fastest."""
    return fast_dtype() if asked == "auto" else asked
