"""GGUF files of a model, quantised and checked.

    python -m train gguf merged -o files/merged.gguf --quantization BF16,Q8_0,Q4_0
    python -m train gguf runs/a/adapter -o files/adapter.gguf --adapter

The logits of an F16 file are compared with those of transformers, and every other file with the F16 file: mean
Kullback-Leibler divergence of the next token and perplexity on probe texts. A file that fails is not written.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from submission.backends import require
from submission.backends.common import thread_count
from submission.backends.llama.library import encode_weights, library
from submission.backends.models import check_peft_adapter, resolve_folder, template_of
from submission.backends.transformers.loading import load_tokenizer, stay_offline_and_quiet
from submission.data.files import atomic_path
from submission.data.hashing import content_hash
from submission.data.outputs import check_output, claim, up_to_date, write_manifest
from submission.errors import UserError
from train.bases import base_folder
from train.converter import Converter, find_converter
from train.divergence import LONGEST, MOST_DIVERGENCE, PROBES, compare, log_softmax
from train.merge import named_base
from train.streamed import logits_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gguf:
    """The section [gguf] of a recipe.

    Attributes:
        quantizations: files to write of the merged model, such as F16 or Q4_K_M.
        adapter: whether the adapter is written too, as a GGUF LoRA file.
        llama_cpp: a checkout of llama.cpp; "" takes the source of the installed llama-cpp-python.
    """

    quantizations: tuple[str, ...] = ("F16",)
    adapter: bool = True
    llama_cpp: str = ""

    def check(self) -> None:
        """Refuse unknown names.

        Raises:
            UserError: lists those that exist.
        """
        require("llama_cpp", "llama", "train gguf")
        if not self.quantizations:
            raise UserError("[gguf] names no quantisation")
        for name in self.quantizations:
            _file_type(name)

    def converter(self) -> Converter:
        """The one it names; see `find_converter`."""
        return find_converter(Path(self.llama_cpp) if self.llama_cpp else None)

    @staticmethod
    def file(quantization: str) -> str:
        """The name of a file of the merged model."""
        return f"merged-{quantization.lower()}.gguf"


_WHOLE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # what the converter writes itself
# Mean KL divergence a token, in nats, from transformers to llama.cpp, both with a base in 32 bits: what an adapter
# costs in 16 bits.
_MOST_DIVERGENCE_32 = 1e-4
_SMALL = 2e9  # bytes of a base that is converted just to check an adapter
ADAPTER = "adapter.gguf"  # as `train run` calls it


@dataclass(frozen=True, slots=True)
class Checked:
    """A file beside the F16 one.

    Attributes:
        file, quantization, megabytes: what it is.
        divergence: mean KL(F16 || this) of the next token on the probe texts, nats.
        perplexity: of the probe texts.
        tokens_per_second: of prompts, on this machine.
    """

    file: str
    quantization: str
    megabytes: float
    divergence: float
    perplexity: float
    tokens_per_second: float


def export(config: Gguf, merged: Path, adapter: Path, output: Path, *, fresh: bool) -> None:
    """Write what a recipe asks for to a folder; files made of the same are left as they are.

    Raises:
        UserError: see `make_gguf` and `make_adapter`.
    """
    config.check()
    converter = config.converter()
    files = {name: output / config.file(name) for name in config.quantizations}
    missing = [name for name, path in files.items() if fresh or not up_to_date(path, _made_from(merged))]
    if missing:
        for line in table(make_gguf(str(merged), {name: files[name] for name in missing}, converter)):
            LOG.info(line)
    if config.adapter:
        export_adapter(adapter, output, converter, fresh=fresh)


def export_adapter(adapter: Path, output: Path, converter: Converter, *, fresh: bool) -> Path:
    """Write an adapter as `output/adapter.gguf` unless that is made of the same; see `make_adapter`."""
    file = output / ADAPTER
    if fresh or not up_to_date(file, _made_from(adapter)):
        make_adapter(adapter, file, converter)
    return file


def _made_from(source: Path) -> dict[str, str]:
    """What decides a GGUF file: a merged model, or an adapter."""
    return {"source": content_hash(source)}


def make_gguf(model: str, files: Mapping[str, Path], converter: Converter) -> list[Checked]:
    """Convert a model to GGUF files.

    Args:
        model: transformers folder.
        files: what to write, by quantisation, such as BF16, Q8_0, Q4_K_M.
        converter: of llama.cpp.

    Raises:
        UserError: something is missing or wrong, or a file is not what it should be; that one is not written.
    """
    require("llama_cpp", "llama", "train gguf")
    kinds = {name: _file_type(name) for name in files}
    folder = resolve_folder(model)
    if not folder.is_dir():
        raise UserError(f"model {model} is a GGUF file already: name a transformers folder")
    for path in files.values():
        check_output(path, [("model", folder)])
    stay_offline_and_quiet()
    checked = []
    whole = "F16"  # beside BF16 weights llama.cpp rounds activations too, and logits move by 0.3
    beside = next(iter(files.values())).parent
    with TemporaryDirectory(dir=beside, prefix=".f16-", suffix=".tmp") as scratch:
        reference = Path(scratch) / f"{whole}.gguf"
        LOG.info(f"converting {folder} to {whole}")
        converter.model(folder, reference, _WHOLE[whole])
        divergence, exact, ids = _compare_with_transformers(folder, reference)
        LOG.info(f"{divergence:.1e} nats a token from transformers, on {sum(map(len, ids))} tokens")
        for name, kind in sorted(kinds.items(), key=lambda item: item[0] == whole):  # it is moved away, so comes last
            with atomic_path(files[name]) as target:
                LOG.info(f"writing {name}")
                if name == whole:
                    os.replace(reference, target)
                elif name in _WHOLE:
                    converter.model(folder, target, _WHOLE[name])
                elif not encode_weights(reference, target, kind, thread_count(0)):
                    raise UserError(f"llama.cpp cannot quantise {model} to {name}")
                checked.append(_check(files[name], name, target, exact, ids))
                claim(files[name], [files[name]])
    checked.sort(key=lambda one: list(kinds).index(one.quantization))
    for one in checked:
        write_manifest(Path(one.file), {
            "model": str(folder), "made_from": _made_from(folder), "converter": converter.fingerprint,
            "template": template_of(folder), "from_transformers": divergence, **asdict(one),
        })  # fmt: skip
    return checked


def make_adapter(
    adapter: Path,
    output: Path,
    converter: Converter,
    *,
    base: str = "",
    base_gguf: Path | None = None,
) -> None:
    """Convert a PEFT folder to a GGUF LoRA file, and compare base and adapter with transformers.

    Args:
        adapter: PEFT folder.
        output: file to write.
        converter: of llama.cpp.
        base: of the adapter; "" takes what the adapter names.
        base_gguf: file of the base to check the adapter beside, F32 or F16; without one, a base of up to 2 GB is
            converted for the check, and an adapter of a larger one is not checked.

    Raises:
        UserError: something is missing or wrong; the file is not written.
    """
    check_peft_adapter(adapter)
    base = base or named_base(adapter)
    folder = base_folder(base)
    check_output(output, (("adapter", adapter), ("base", folder)))
    stay_offline_and_quiet()
    divergence: float | None = None
    with atomic_path(output) as target, TemporaryDirectory(dir=output.parent, prefix=".base-", suffix=".tmp") as name:
        converter.adapter(adapter, folder, target)
        most = MOST_DIVERGENCE
        if base_gguf is None and sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= _SMALL:
            # In 32 bits, so that what is seen is the adapter: 16 bits of a base alone may move logits by 0.03.
            base_gguf, most = Path(name) / "base.gguf", _MOST_DIVERGENCE_32
            converter.model(folder, base_gguf, "f32")
        if base_gguf is not None:
            divergence, _, ids = _compare_with_transformers(folder, base_gguf, adapter, target, most=most)
            LOG.info(
                f"{divergence:.1e} nats a token from transformers, base and adapter, on {sum(map(len, ids))} tokens"
            )
        else:
            LOG.info(
                "not loaded beside its base, which is large: name an F32 or F16 file of it with --base-gguf to check"
            )
        claim(output, [output])
    write_manifest(output, {"adapter": str(adapter), "made_from": _made_from(adapter), "base": base,
                            "template": template_of(adapter), "converter": converter.fingerprint,
                            "from_transformers": divergence})  # fmt: skip
    LOG.info(f"written to {output}: {output.stat().st_size / 1e6:.1f} MB")


def table(checked: Sequence[Checked]) -> Iterator[str]:
    """Lines to print."""
    yield f"{'quantisation':<14}{'MB':>9}{'KL to F16':>15}{'perplexity':>13}{'tokens/s':>10}"
    for one in checked:
        yield (
            f"{one.quantization:<14}{one.megabytes:>9.1f}{one.divergence:>15.4f}{one.perplexity:>13.2f}"
            f"{one.tokens_per_second:>10.0f}"
        )


def _file_type(name: str) -> int:
    lib = library()
    known = {key.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_"): getattr(lib, key)
             for key in dir(lib) if key.startswith("LLAMA_FTYPE_") and key != "LLAMA_FTYPE_GUESSED"}  # fmt: skip
    if name not in known:
        raise UserError(f"unknown quantisation {name!r}; there are: {', '.join(sorted(known))}")
    return int(known[name])


def _compare_with_transformers(
    folder: Path, file: Path, adapter: Path | None = None, lora: Path | None = None, *, most: float = MOST_DIVERGENCE
) -> tuple[float, list[NDArray[np.float32]], list[list[int]]]:
    """Mean KL divergence from transformers in 32 bits, the file's logits by probe, and the probes' ids.

    Raises:
        UserError: they differ too much, or the tokenizers do.
    """
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer(text, add_special_tokens=True).input_ids[:LONGEST] for text in PROBES]
    expected = logits_of(folder, adapter, ids)
    lib, llama = library(), _open(file, lora)
    template = lib.llama_model_chat_template(llama.model, None)
    theirs = template.decode("utf-8", "replace") if template else ""
    if theirs != (tokenizer.chat_template or ""):
        raise UserError(f"the chat template of the file is not that of {folder}")
    ends = {lib.llama_vocab_eos(llama._model.vocab), lib.llama_vocab_eot(llama._model.vocab)}
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        raise UserError(f"the end-of-text token of the file is not that of {folder}")
    for text, row in zip(PROBES, ids, strict=True):
        bos = tokenizer.bos_token_id is not None and row[:1] == [tokenizer.bos_token_id]
        if llama.tokenize(text.encode(), add_bos=bos, special=False) != row:
            raise UserError(f"the file tokenises {text[:40]!r} otherwise than {folder}")
    found = [_logits(llama, row)[0] for row in ids]
    divergence = compare(expected, found).divergence
    if not divergence <= most:
        raise UserError(
            f"its probabilities diverge from those of transformers by {divergence:.2g} nats a token, more than "
            f"{most:g}: not written\n"
            "Written in 16 bits it does not compute the same: use its folder as it is, with --backend transformers."
        )
    return divergence, found, ids


def _check(
    path: Path, name: str, file: Path, exact: Sequence[NDArray[np.float32]], ids: Sequence[Sequence[int]]
) -> Checked:
    import numpy as np

    llama = _open(file)
    found, losses, seconds = [], [], 0.0
    for row in ids:
        logits, spent = _logits(llama, row)
        seconds += spent
        found.append(logits)
        ours = log_softmax(logits)
        losses += [-float(ours[place, token]) for place, token in enumerate(row[1:])]
    if not np.isfinite(losses).all():
        raise UserError(f"the file of {name} gives numbers that are not finite: not written")
    tokens = sum(map(len, ids))
    return Checked(
        str(path), name, file.stat().st_size / 1e6, compare(exact, found).divergence, math.exp(float(np.mean(losses))),
        tokens / seconds,
    )  # fmt: skip


def _open(file: Path, lora: Path | None = None) -> Any:
    library()
    from llama_cpp import Llama

    try:
        return Llama(
            str(file), lora_path=str(lora) if lora else None, n_ctx=LONGEST, logits_all=True, verbose=False,
            n_threads=thread_count(0), type_k=0, type_v=0,  # 32-bit floats: weights are compared, not the cache
        )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"llama.cpp cannot load what was written: {error}") from error


def _logits(llama: Any, ids: Sequence[int]) -> tuple[NDArray[np.float32], float]:
    llama.reset()
    began = time.perf_counter()
    llama.eval(list(ids))
    return llama.scores[: len(ids)].copy(), time.perf_counter() - began
