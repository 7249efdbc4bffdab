"""Writes a GGUF file of Llama 3.2 1B's shape with random weights, to measure speed without a download.

    python -m tests.bench.random_gguf /tmp/1b-q8.gguf --type Q8_0
    python -m eval throughput examples/test.csv --model /tmp/1b-q8.gguf --no-transformers --rows 8

Speed and memory do not depend on the values of weights. The tokenizer is that of the embedded model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from submission.backends.models import EMBEDDED, resolve_gguf
from submission.data.files import atomic_path

_LAYERS, _WIDTH, _HIDDEN, _HEADS, _KV_HEADS = 16, 2048, 8192, 32, 8


def write(path: Path, kind: GGMLQuantizationType) -> None:
    """Write the file; see the module."""
    reader = GGUFReader(resolve_gguf(EMBEDDED))
    tokens = len(reader.fields["tokenizer.ggml.tokens"].contents())
    writer = GGUFWriter(path, "llama", use_temp_file=True)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            part = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=part)
    writer.add_context_length(8192)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(tokens)
    writer.add_file_type({GGMLQuantizationType.F16: 1, GGMLQuantizationType.Q8_0: 7}[kind])
    for name, weights in _tensors(tokens):
        exact = GGMLQuantizationType.F32 if weights.ndim == 1 else kind
        writer.add_tensor(name, quantize(weights, exact), raw_dtype=exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(tokens: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    numbers = np.random.default_rng(0)

    def weights(*shape: int) -> NDArray[np.float32]:
        return numbers.standard_normal(shape, np.float32) * np.float32(0.02)

    kv = _WIDTH // _HEADS * _KV_HEADS
    yield "token_embd.weight", weights(tokens, _WIDTH)
    yield "output_norm.weight", np.ones(_WIDTH, np.float32)
    shapes = {
        "attn_q": (_WIDTH, _WIDTH), "attn_k": (kv, _WIDTH), "attn_v": (kv, _WIDTH), "attn_output": (_WIDTH, _WIDTH),
        "ffn_gate": (_HIDDEN, _WIDTH), "ffn_up": (_HIDDEN, _WIDTH), "ffn_down": (_WIDTH, _HIDDEN),
    }  # fmt: skip
    for layer in range(_LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(_WIDTH, np.float32)
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", weights(*shape)


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", default="Q8_0", choices=("F16", "Q8_0"))
    asked: Any = parser.parse_args()
    with atomic_path(asked.path) as temporary:
        write(temporary, GGMLQuantizationType[asked.type])
    print(f"{asked.path}: {asked.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
