"""Transformers folders by vLLM, on a GPU or with its CPU build, optionally in 4 bits and with a PEFT adapter.

    python -m submission predict test.csv -o submission.csv --backend vllm --model FOLDER --adapter PEFT_FOLDER

The engine is stepped here, in the worker's own process, so that every answer is told as it is finished. vLLM sees token
ids only: prompts are encoded, and answers decoded, by the tokenizer of this project.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from submission.backends.common import END_MARKERS, PendingRequest, scorable
from submission.backends.folder_tokenizer import FolderTokenizer, folder_encoder
from submission.backends.hardware import nvidia_smi
from submission.backends.models import check_peft_adapter, folder_fingerprint, resolve_folder
from submission.backends.vllm.engine import Engine
from submission.backends.vllm.jobs import SampleJob, TextJob
from submission.backends.vllm.options import Options, adapter_rank, check_gpus, check_options, text_config
from submission.errors import BackendError, PromptRecoveryError, UserError, first_line
from submission.prompts.encoding import ChatEncoder
from submission.types import Chat, Completion, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    from submission.backends import ModelSpec


def check(spec: ModelSpec) -> None:
    """Refuse a model or adapter that this backend does not load, and a GPU that the model does not run on."""
    from submission.backends import require

    options = spec.options
    path = resolve_folder(spec.model)
    if path.is_file():
        raise UserError(
            f"backend vllm takes a transformers folder, and {path} is a GGUF file: name a folder with --model, or "
            "leave --backend out"
        )
    check_peft_adapter(spec.adapter)
    if options.load_in_4bit:
        require("bitsandbytes", "hf", "--load-in-4bit")
    check_options(options)
    if spec.adapter is not None:
        adapter_rank(spec.adapter)
    check_gpus(path, options.dtype, nvidia_smi("compute_cap,name") or [])


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """See `folder_fingerprint`."""
    options = spec.options
    return folder_fingerprint(
        spec.model, spec.adapter, context=options.context, dtype=options.dtype, load_in_4bit=options.load_in_4bit
    )


def load(spec: ModelSpec) -> Vllm:
    """Load model, adapter and tokenizer from disk; never from a hub."""
    try:
        return Vllm(resolve_folder(spec.model), spec.adapter, spec.options)
    except PromptRecoveryError:
        raise
    except Exception as error:  # of whatever in it does not suit
        raise UserError(f"model {spec.model} cannot be loaded by vLLM: {first_line(error)}") from error


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """Load the tokenizer only."""
    return _encoder(resolve_folder(spec.model), spec.options.context)[0]


class Vllm:
    """A model of vLLM.

    Args:
        model: folder of its weights.
        adapter: PEFT folder.
        options: see there.
    """

    def __init__(self, model: Path, adapter: Path | None, options: Options) -> None:
        self.encoder, self.tokenizer = _encoder(model, options.context)
        names = (name for name in END_MARKERS if name in self.tokenizer.specials)
        self.tokenizer.ends |= {self.tokenizer.specials[name].id for name in names}
        self._engine = Engine(model, adapter, options, self.encoder.context)

    def forget(self) -> None:
        """Let go of prompts that were computed, for measurements."""
        self._engine.forget()

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]:
        """See `submission.types.Backend`; samples have a random stream each, by seed, key and number."""
        without: list[tuple[str, Failure]] = []  # prompts that cannot be fed

        def jobs() -> Iterator[SampleJob]:
            for request in requests:
                try:
                    encoded = self.encoder.encode_for(request.chat, request.sampling.max_new_tokens)
                except BackendError as error:
                    without.append((request.key, Failure(first_line(error))))
                    continue
                asked = PendingRequest(request, encoded)
                yield from (SampleJob(asked, number, self.tokenizer) for number in range(request.sampling.n))

        for job in self._engine.run(jobs()):
            yield from job.asked.take(job.number, Failure(job.failure) if job.failure else job.completion())
        yield from without

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`."""
        without: list[tuple[str, LogLikelihood | Failure]] = []  # what needs no computing
        texts = (TextJob(key, ids, begin) for key, ids, begin in scorable(items, self.encoder, without))
        for job in self._engine.run(texts):
            yield job.key, Failure(job.failure) if job.failure else job.likelihood()
        yield from without


def _encoder(model: Path, context: int) -> tuple[ChatEncoder, FolderTokenizer]:
    return folder_encoder(model, context, text_config(model))
