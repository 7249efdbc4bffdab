"""An adapter merged into its base: weights that load in stock transformers, and convert to GGUF.

    python -m train merge runs/a/adapter -o merged

The base is loaded in 16 or 32 bits, never in 4: what is merged into 4-bit weights is rounded away.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from submission.backends import require
from submission.backends.models import NOTE, check_peft_adapter, template_of
from submission.backends.transformers.loading import (
    load_config,
    load_model,
    load_tokenizer,
    stay_offline_and_quiet,
    with_adapter,
)
from submission.data.files import read_json
from submission.data.hashing import content_hash
from submission.data.outputs import check_apart, check_folder, made_folder, write_manifest
from submission.errors import UserError, first_line
from train.bases import base_folder

LOG = logging.getLogger(__name__)

_PROBES = (
    "The quick brown fox",
    "Rewrite this text as a sea shanty:",
    "Original text:\nIt rained.\n\nRewritten text:\n",
)
_MOST_APART = 1e-3  # of logits, in 32 bits
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_MOST = 6e4  # that a float16 holds


def merge(adapter: Path, output: Path, *, base: str = "", dtype: str = "auto") -> None:
    """Merge an adapter and write the model, whole or not at all.

    Args:
        adapter: a PEFT folder.
        output: the folder to write; what an earlier merge left there is replaced.
        base: of the adapter; "" takes what the adapter names.
        dtype: of the written weights; auto is the base's own where that has 16 bits, and float16 for a base of 32 bits,
            whose weights it rounds eight times more finely than bfloat16.

    Raises:
        UserError: something is missing or wrong, the adapter is of another base, or the merged model's logits are not
            those of base and adapter.
    """
    for package in ("torch", "transformers", "peft"):
        require(package, "train", "train merge")
    check_peft_adapter(adapter)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype!r} must be one of: {', '.join(_DTYPES)}")
    check_folder(output)
    folder = base_folder(base or named_base(adapter))
    check_apart(output, [output], (("adapter", adapter), ("base", folder)))
    stay_offline_and_quiet()
    import torch

    LOG.info(f"base {folder}, adapter {adapter}")
    plain = load_model(folder, None, device="cpu", dtype="float32", load_in_4bit=False)
    model = with_adapter(plain, adapter).eval()
    tokenizer = load_tokenizer(folder)
    before = _logits(model, tokenizer)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # not a number
        raise UserError(f"adapter {adapter} cannot be merged: {first_line(error)}") from error
    apart = max(float((a - b).abs().max()) for a, b in zip(before, _logits(merged, tokenizer), strict=True))
    if not apart <= _MOST_APART:
        raise UserError(f"the merged model's logits are {apart:.2g} apart from those of base and adapter: not written")
    largest = max(float(weight.abs().max()) for weight in merged.parameters())
    if dtype == "auto":
        own = load_config(folder).dtype
        dtype = "bfloat16" if own == torch.bfloat16 or largest > _MOST else "float16"
    elif dtype == "float16" and largest > _MOST:
        raise UserError(f"--dtype float16 cannot hold the largest weight, {largest:.3g}: take bfloat16")
    with made_folder(output) as part:
        merged.to(getattr(torch, dtype)).save_pretrained(part)
        tokenizer.save_pretrained(part)
        merged.generation_config.save_pretrained(part)
        (part / "README.md").write_text(_card(folder, adapter, dtype), encoding="utf-8")
        template = template_of(adapter)
        if template:
            (part / NOTE).write_text(json.dumps({"template": template, "base": str(folder)}))
    write_manifest(output, {"base": str(folder), "base_hash": content_hash(folder), "adapter": str(adapter),
                            "made_from": made_from(adapter), "dtype": dtype, "logits_apart": apart})  # fmt: skip
    LOG.info(f"written to {output}: logits within {apart:.1e} of base and adapter (32 bits), weights in {dtype}")


def made_from(adapter: Path) -> dict[str, str]:
    """What decides merged weights; see `submission.data.outputs.up_to_date`."""
    return {"adapter": content_hash(adapter)}


def named_base(adapter: Path) -> str:
    """The base that an adapter names: as the recipe did, or as PEFT noted it."""
    for file, key in ((NOTE, "base"), ("adapter_config.json", "base_model_name_or_path")):
        try:
            name = read_json(adapter / file).get(key)
        except (UserError, AttributeError):
            continue
        if isinstance(name, str) and name:
            return name
    raise UserError(f"adapter {adapter} names no base: give it with --base")


def _logits(model: Any, tokenizer: Any) -> list[Any]:
    import torch

    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).logits.clone() for text in _PROBES]


def _card(base: Path, adapter: Path, dtype: str) -> str:
    return (
        f"# {adapter.parent.name}\n\nA LoRA adapter merged into `{base.name}` by prompt-recovery ({dtype} weights). It "
        "predicts the instruction that made a language model rewrite one text into another:\n\n"
        "    python -m submission predict test.csv -o submission.csv --backend transformers --model THIS_FOLDER\n\n"
        "The licence is that of the base model.\n"
    )
