"""Makes an OpenVINO folder of a GGUF file, in a process of its own: a damaged file may end it.

    python -m submission.backends.openvino.convert SOURCE TARGET '[ADAPTER, SCALE, EXACT]' PARENT

OpenVINO GenAI reads the weights; the tokenizer is written as a tokenizer.json beside them. A GGUF LoRA adapter is added
to the weights, W + scale * alpha / rank * B A, which are then kept in 16 bits, and so is what the reader does not take.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from submission.backends.common import end_with
from submission.data.files import atomic_folder, write_json
from submission.errors import UserError, first_line, last_line

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # of GenAI's reader
_READ = {"F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"}
# What the reader makes use of, or what says nothing of how to compute: anything else would be left out without a word.
_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
    "attention.key_length", "attention.value_length",
}  # fmt: skip
_TENSOR = re.compile(
    r"(token_embd|output|output_norm|blk\.\d+\.(attn_norm|ffn_norm|attn_q|attn_k|attn_v|attn_output|attn_q_norm|attn_k_norm|"
    r"ffn_gate|ffn_up|ffn_down))\.weight|blk\.\d+\.attn_[qkv]\.bias"
)
_LEAST_ROOM = 64 << 20  # bytes free, below which a failure is one of the disk
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_FILE_F16 = 1  # general.file_type

# How llama.cpp cuts text before it merges (tokenizer.ggml.pre): words, then digits one by one where it does so.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NEWER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    "smollm": (r"\p{N}", _WORDS), "gpt-2": (_WORDS,), "llama-bpe": (_NEWER % "{1,3}",), "qwen2": (_NEWER % "",),
}  # fmt: skip
# Ends of an answer beside the one that the file names, as llama.cpp knows them.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "</s>", "<|end|>")


def convert(
    source: Path, target: Path, adapter: Path | None = None, scale: float = 1.0, *, exact: bool = False
) -> None:
    """Write the OpenVINO folder of a GGUF file, whole or not at all.

    Args:
        source: GGUF file.
        target: the folder.
        adapter: GGUF LoRA file that is added to the weights.
        scale: its strength.
        exact: keep quantised weights as 16-bit floats, so that nothing but their values decides an answer.

    Raises:
        UserError: what of the file cannot be converted.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"model {source} is of architecture {architecture!r}, which OpenVINO does not read from GGUF files "
            f"(it reads {', '.join(ARCHITECTURES)}): use --backend llama_cpp"
        )
    _check_read(source, str(architecture), fields, [tensor.name for tensor in reader.tensors])
    with atomic_folder(target) as folder:
        _write_tokenizer(folder, source, str(architecture), fields)
        file = folder / "model.gguf"
        if adapter or exact or {tensor.tensor_type.name for tensor in reader.tensors} - _READ:
            _write_16_bits(file, source, reader, adapter, scale)
        else:
            file.symlink_to(source.resolve())
        import openvino_genai

        openvino_genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True)
        for made in (file, *folder.glob("openvino_tokenizer.*"), *folder.glob("openvino_detokenizer.*")):
            made.unlink()


def _check_read(source: Path, architecture: str, fields: Mapping[str, Any], tensors: Sequence[str]) -> None:
    """Refuse a file with something that decides its answers and that the reader takes no notice of."""
    own = {
        name.removeprefix(f"{architecture}."): value
        for name, value in fields.items()
        if name.startswith(f"{architecture}.")
    }
    ignored = [f"{architecture}.{name}" for name in own if name not in _KEYS]
    ignored += [name for name in tensors if not _TENSOR.fullmatch(name)]
    heads = own.get("attention.head_count")
    if isinstance(heads, int) and heads > 0:
        size = own.get("attention.key_length") or own.get("embedding_length", 0) // heads
        if own.get("rope.dimension_count", size) != size:
            ignored.append(f"{architecture}.rope.dimension_count")
    if ignored:
        raise UserError(
            f"model {source} has {ignored[0]}, which OpenVINO leaves out of GGUF files: use --backend llama_cpp"
        )


def _write_16_bits(file: Path, source: Path, reader: Any, adapter: Path | None, scale: float) -> None:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    factors: dict[str, Any] = {}
    strength = 0.0
    if adapter is not None:
        try:
            lora = GGUFReader(adapter)
            factors = {tensor.name: tensor.data.astype(np.float32) for tensor in lora.tensors}
            strength = scale * float(lora.fields["adapter.lora.alpha"].contents())
        except Exception as error:  # it may hold anything
            raise UserError(f"adapter {adapter} cannot be read: {first_line(error)}") from error
    writer = GGUFWriter(file, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        part = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=part)
    writer.add_file_type(_FILE_F16)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        if f"{tensor.name}.lora_a" in factors:
            a, b = factors.pop(f"{tensor.name}.lora_a"), factors.pop(f"{tensor.name}.lora_b", None)  # (r, in), (out, r)
            if b is None or (len(b), a.shape[-1]) != weights.shape or b.shape[-1] != len(a):
                raise UserError(f"adapter {adapter} does not fit this model: its {tensor.name} has another shape")
            weights = weights + strength / len(a) * (b @ a)
        with np.errstate(over="ignore"):
            kept = weights.astype(np.float32 if weights.ndim == 1 else np.float16)
        if not np.isfinite(kept).all():
            raise UserError(f"model {source}: {tensor.name} has numbers that 16 bits do not hold{_with(adapter)}")
        writer.add_tensor(tensor.name, kept)
    if factors:
        raise UserError(f"adapter {adapter} does not fit this model: it has weights for {min(factors)}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _with(adapter: Path | None) -> str:
    return f" with {adapter} added at this adapter_scale" if adapter else ""


def _write_tokenizer(folder: Path, source: Path, architecture: str, fields: dict[str, Any]) -> None:
    """tokenizer.json, tokenizer_config.json, generation_config.json and config.json as Hugging Face lays them out."""
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in _CUTS:
        raise UserError(
            f"model {source} has a tokenizer ({kind}, {cut}) that is read by llama.cpp alone: use --backend llama_cpp"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    special = {number: of == _CONTROL for number, of in enumerate(types) if of in (_CONTROL, _USER_DEFINED)}
    bos, eos = (_token(fields.get(f"tokenizer.ggml.{name}_token_id"), tokens) for name in ("bos", "eos"))
    begins: dict[str, Any] | None = None
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe"):
        layout = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        begins = {"type": "TemplateProcessing", "single": layout, "pair": layout,
                  "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}}  # fmt: skip
    pattern = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
               for regex in _CUTS[cut]]  # fmt: skip
    plain = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [
            {"id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": control}
            for number, control in special.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pattern, {"type": "ByteLevel", **plain}]},
        "post_processor": begins,
        "decoder": {"type": "ByteLevel", **plain},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": cut == "llama-bpe",
                  "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges},
    })  # fmt: skip
    ends = [number for number in special if tokens[number] in (*_ENDS, eos)]
    config = {"chat_template": fields.get("tokenizer.chat_template"), "bos_token": bos, "eos_token": eos}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    context = fields.get(f"{architecture}.context_length")
    write_json(folder / "config.json", {"model_type": architecture, "max_position_embeddings": context})


def _token(number: Any, tokens: list[str]) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def main() -> int:
    """Convert what the command line names; says in one line of JSON what is wrong with it (2) or with the disk (3)."""
    source, target, how, parent = sys.argv[1:]
    end_with(int(parent))
    adapter, scale, exact = json.loads(how)
    try:
        convert(Path(source), Path(target), Path(adapter) if adapter else None, scale, exact=exact)
    except UserError as error:
        print(json.dumps(str(error)))
        return 2
    except Exception as error:  # a file may hold anything
        full = shutil.disk_usage(Path(target).parent).free < _LEAST_ROOM
        if full or isinstance(error, OSError):
            words = getattr(error, "strerror", None) or first_line(error)
            print(json.dumps("no space is left there" if full else words))
            return 3
        print(json.dumps(f"model {source} cannot be converted for OpenVINO: {last_line(error)}"))
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # freeing a large model takes seconds
