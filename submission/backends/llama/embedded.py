"""The embedded model in the encoding that this CPU computes fastest, made once.

The packaged Q4_1 weights are slow at prompts: llama.cpp has no fast kernels for them. They are encoded anew into
`$XDG_CACHE_HOME/prompt-recovery/models`. Likelihoods of 120 real prompts and rewrites (18,800 tokens), as the
difference of the log-probability per token to what the very weights give in 32-bit arithmetic:

    encoding   true prompt under the pair   rewrite under its prompt   rows/s (48 rows, zero-shot)
    Q4_1       -0.010 +- 0.007              -0.002 +- 0.001            0.8
    BF16        0.000 +- 0.001               0.000 +- 0.000            2.2
    F16        as BF16 or nearer                                       1.6
    Q8_0       +0.012 +- 0.007              -0.005 +- 0.002            1.8
    Q4_0       -0.074 +- 0.048              -0.243 +- 0.020            2.0
    IQ4_NL     -0.198 +- 0.049              -0.192 +- 0.016            2.0

llama.cpp rounds activations to 8 bits beside 8- and 4-bit weights, and not beside 16-bit ones. An adapter beside the
weights costs 30 % of the speed, however small it is; so that of `embedded-tuned` is added to them. The sum is kept
in F16: 169 greedy answers of 170 are those of transformers; in BF16 163, and the score is 0.004 less.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from submission.backends.common import thread_count
from submission.backends.llama.library import encode_weights, library
from submission.backends.models import EMBEDDED, resolve_gguf
from submission.data.files import atomic_path, atomic_writer, cache_folder, remove_leftovers
from submission.data.hashing import content_hash
from submission.progress import print_line

_FILE_TYPES = {"BF16": 32, "F16": 1}  # llama_ftype in llama.h


@functools.cache
def fast_embedded(adapter: Path | None = None) -> tuple[Path, Path | None]:
    """The embedded model's fast file, and what adapter is left to be loaded beside it.

    Args:
        adapter: GGUF LoRA that is added to the weights; left where the package gguf cannot be imported.

    Returns:
        The packaged file where no other can be written.

    Raises:
        MissingExtra: the package that brings the model is not installed.
    """
    source = resolve_gguf(EMBEDDED)
    name = "F16" if adapter else _encoding()
    made_of = [source, adapter] if adapter else [source]
    hashes = "-".join(content_hash(file)[:12] for file in made_of)
    target = cache_folder("models") / f"{source.stem}-{hashes}-{name}.gguf"
    mark = target.with_suffix(".sha256")
    try:
        if target.is_file() and mark.is_file() and mark.read_text(encoding="ascii") == content_hash(target):
            return target, None
        if adapter is not None:
            import gguf  # noqa: F401
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target, idle=600)  # two first runs at once do not take each other's away
        what = "the embedded model with its adapter" if adapter else "the embedded model"
        print_line(f"{what} is encoded as {name}, once, which this CPU computes faster: {target}", sys.stderr)
        with atomic_path(target) as temporary:
            if not encode_weights(source, temporary, _FILE_TYPES[name], thread_count(0)):
                raise OSError("llama.cpp could not encode it")
            if adapter is not None:
                _add(adapter, source, temporary)
        with atomic_writer(mark) as file:
            file.write(content_hash(target))
    except ImportError as error:
        print_line(f"the adapter is computed beside the embedded model, which is slower: {error}", sys.stderr)
        return fast_embedded()[0], adapter
    except OSError as error:
        print_line(
            f"the packaged weights of the embedded model are used as they are, which is slower: {error}", sys.stderr
        )
        return source, adapter
    return target, None


def _add(adapter: Path, source: Path, encoded: Path) -> None:
    """Add a LoRA to the weights of a GGUF file that was encoded from `source`: W + alpha / rank * B A, rounded once."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize, quantize

    lora = GGUFReader(adapter)
    alpha = float(lora.fields["adapter.lora.alpha"].contents())
    factors = {tensor.name: tensor.data.astype(np.float32) for tensor in lora.tensors}
    exact = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    for tensor in GGUFReader(encoded, "r+").tensors:
        if f"{tensor.name}.lora_a" not in factors:
            continue
        a, b = factors.pop(f"{tensor.name}.lora_a"), factors.pop(f"{tensor.name}.lora_b")  # (rank, in), (out, rank)
        weights = dequantize(exact[tensor.name].data, exact[tensor.name].tensor_type)
        tensor.data[:] = quantize(weights + alpha / len(a) * (b @ a), tensor.tensor_type)
    if factors:
        raise OSError(f"{adapter.name} has weights for {min(factors)}, which {source.name} lacks")


def _encoding() -> str:
    """BF16 where the CPU multiplies such numbers, F16 elsewhere: nothing smaller is as good as the packaged file."""
    features = library().llama_print_system_info().decode("ascii", "replace")
    return "BF16" if "AVX512_BF16 = 1" in features and "LLAMAFILE = 1" in features else "F16"
