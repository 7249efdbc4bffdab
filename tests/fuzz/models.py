"""Models and adapters: GGUF headers, GGUF LoRA files, PEFT folders, transformers folders."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.tables import invoke

_PAIRS = "id,original_text,rewritten_text\n1,An original text.,Another one!\n"
_TEMPLATES = (
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "{{ undefined.x.y }}",
    "{{ raise_exception('no') }}",
    "{% for",
    "{{ messages }}" * 500,
    "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
)


def gguf_case(draw: random.Random, folder: Path) -> Callable[[], object]:
    """A GGUF model whose header is altered, or whose bytes are damaged."""
    (folder / "pairs.csv").write_text(_PAIRS)
    path = folder / "model.gguf"
    header: dict[str, Any] = {}
    for _ in range(draw.choice((0, 1, 1, 2))):
        header[draw.choice(_KEYS)] = draw.choice((0, 1, 2, 3, 7, 2**31 - 1, 2**32 - 1, 10**9, 65_536))
    if draw.random() < 0.15:
        header["template"] = draw.choice(_TEMPLATES)
    write_gguf(path, header)
    if not header or draw.random() < 0.3:
        content = bytearray(path.read_bytes())
        if draw.random() < 0.7:  # within the header: the numbers of tensors and keys, lengths, types
            for _ in range(draw.choice((1, 2, 4))):
                place = draw.randrange(4, 600)
                content[place] = draw.choice((0, 1, 2, 8, 255, content[place] ^ (1 << draw.randrange(8))))
            path.write_bytes(bytes(content))
        else:
            path.write_bytes(mutate.damage(draw, bytes(content)))
    more = ["--limit", "1", "--max-new-tokens", "3", "--set", f"context={draw.choice((128, 256))}"]
    return invoke("submission", "predict", "pairs.csv", "-o", "out.csv", "--model", "model.gguf", *more)


def adapter_case(draw: random.Random, folder: Path) -> Callable[[], object]:
    """An adapter that is damaged, or of another base; or a transformers folder that is."""
    (folder / "pairs.csv").write_text(_PAIRS)
    more = ["--limit", "1", "--max-new-tokens", "3", "--set", "context=128"]
    if draw.random() < 0.5:
        write_gguf(folder / "model.gguf", {})
        write_lora(folder / "lora.gguf", draw)
        if draw.random() < 0.5:
            (folder / "lora.gguf").write_bytes(mutate.damage(draw, (folder / "lora.gguf").read_bytes()))
        return invoke(
            "submission",
            "predict",
            "pairs.csv",
            "-o",
            "out.csv",
            "--model",
            "model.gguf",
            "--adapter",
            "lora.gguf",
            *more,
        )
    base, adapter = _base(), _adapter()
    which = draw.choice(("adapter", "adapter", "base"))
    for source, name in ((base, "base"), (adapter, "adapter")):
        (folder / name).mkdir()
        for file, content in source.items():
            changed = content
            if name == which and draw.random() < 0.6:
                if file.endswith("config.json"):
                    changed = mutate.json_bytes(draw, json.loads(content))
                elif file.endswith(".safetensors"):
                    changed = _tensors(draw, content)
            (folder / name / file).write_bytes(changed)
    return invoke(
        "submission",
        "predict",
        "pairs.csv",
        "-o",
        "out.csv",
        "--backend",
        "transformers",
        "--model",
        "base",
        "--adapter",
        "adapter",
        *more,
    )


_KEYS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "head_count",
    "head_count_kv",
    "rope_dimension_count",
    "bos",
    "eos",
    "tokens",
    "layers",
    "key_length",
    "expert_count",
)


def write_gguf(path: Path, header: dict[str, Any]) -> None:
    """A llama of two narrow layers with a vocabulary of bytes; `header` replaces what its metadata say."""
    import gguf
    import numpy as np

    width, hidden, heads, vocabulary = 32, 48, 4, 280
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(header.get("context_length", 256))
    writer.add_embedding_length(header.get("embedding_length", width))
    writer.add_block_count(header.get("block_count", 2))
    writer.add_feed_forward_length(header.get("feed_forward_length", hidden))
    writer.add_head_count(header.get("head_count", heads))
    writer.add_head_count_kv(header.get("head_count_kv", heads))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(header.get("rope_dimension_count", width // heads))
    if "key_length" in header:
        writer.add_key_length(header["key_length"])
    if "expert_count" in header:
        writer.add_expert_count(header["expert_count"])
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrst"]
    tokens = tokens[:vocabulary]
    writer.add_token_list(tokens[: header.get("tokens", vocabulary)])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(header.get("bos", 1))
    writer.add_eos_token_id(header.get("eos", 2))
    writer.add_chat_template(header.get("template", _TEMPLATES[0]))
    numbers = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return numbers.normal(0, 0.05, shape).astype(np.float32)

    writer.add_tensor("token_embd.weight", weights(vocabulary, width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(min(header.get("layers", 2), 4)):
        for name, shape in (
            ("attn_q", (width, width)),
            ("attn_k", (width, width)),
            ("attn_v", (width, width)),
            ("attn_output", (width, width)),
            ("ffn_gate", (hidden, width)),
            ("ffn_up", (hidden, width)),
            ("ffn_down", (width, hidden)),
        ):
            writer.add_tensor(f"blk.{layer}.{name}.weight", weights(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    _close(writer)


def write_lora(path: Path, draw: random.Random) -> None:
    """A GGUF LoRA file for `write_gguf`'s model, or for one of another shape."""
    import gguf
    import numpy as np

    layers, width, rank = draw.choice((0, 1, 2, 2, 3)), draw.choice((32, 32, 32, 16)), draw.choice((1, 4))
    writer = gguf.GGUFWriter(path, draw.choice(("llama", "llama", "llama", "qwen2")))
    writer.add_type(draw.choice(("adapter", "adapter", "adapter", "model")))
    writer.add_string("adapter.type", draw.choice(("lora", "lora", "lora", "x")))
    writer.add_float32("adapter.lora.alpha", draw.choice((8.0, 8.0, 0.0, float("nan"), 1e38)))
    for layer in range(layers):
        name = draw.choice(("attn_q", "attn_q", "attn_q", "bogus"))
        writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", np.ones((rank, width), np.float32))
        if draw.random() < 0.9:
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", np.ones((width, rank), np.float32))
    _close(writer)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with its header altered, or damaged."""
    if draw.random() < 0.4:
        return mutate.damage(draw, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = mutate.json_bytes(draw, json.loads(content[8 : 8 + length]))
    size = draw.choice((len(header), len(header), 2**63 - 1, 0))
    return struct.pack("<Q", size) + header + content[8 + length :]


@cache
def _base() -> dict[str, bytes]:
    """A tiny transformers folder with a tokenizer of bytes, as names and contents; made once, before any fork."""
    import tempfile

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{c: n + 2 for n, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(alphabet) + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    with tempfile.TemporaryDirectory() as name:
        LlamaForCausalLM(config).save_pretrained(name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(name)
        return {file.name: file.read_bytes() for file in Path(name).iterdir()}


@cache
def _adapter() -> dict[str, bytes]:
    """A PEFT folder for it."""
    import tempfile

    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as name:
        for file, content in _base().items():
            (Path(base) / file).write_bytes(content)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(base), lora).save_pretrained(name)
        return {file.name: file.read_bytes() for file in Path(name).iterdir() if file.suffix != ".md"}


def prepare() -> None:
    """Import and make what all cases share, before any process is forked."""
    _base()
    _adapter()
