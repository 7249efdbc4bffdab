"""An adapter merged into its base: weights that load in stock transformers, and convert to GGUF.

    python -m train merge runs/a/adapter -o merged

One tensor at a time is read, merged by PEFT in 32 bits, rounded once and written, so that a model of any size takes
little memory. The base is never of 4 bits: what is merged into 4-bit weights is rounded away.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends import require
from submission.backends.models import NOTE, check_peft_adapter, template_of
from submission.backends.transformers.loading import load_config, load_tokenizer, stay_offline_and_quiet
from submission.data.files import read_json
from submission.data.hashing import content_hash
from submission.data.outputs import check_apart, check_folder, made_folder, write_manifest
from submission.errors import UserError, first_line
from train.bases import base_folder
from train.divergence import LONGEST, MOST_DIVERGENCE, PROBES, Apart, compare
from train.shards import Shards, write_shards
from train.streamed import (
    kept_names,
    plain_name,
    shared_names,
    skeleton,
    skeleton_with_adapter,
    streamed_logits,
    tensor_names,
)

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger(__name__)

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_MOST = 6e4  # that a float16 holds
_LEAST_SAME = 0.9  # share of tokens; near-ties may turn
_GENERATION = "generation_config.json"
# Keys of adapter_config.json that merging knows, and those that say nothing of the weights.
_MERGED = {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
           "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "lora_dropout"}  # fmt: skip
_NOTES = {"task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
          "inference_mode"}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base as it is


class _TooLarge(Exception):
    """A weight that a float16 does not hold."""


def merge(adapter: Path, output: Path, *, base: str = "", dtype: str = "auto") -> None:
    """Merge an adapter and write the model, whole or not at all.

    Args:
        adapter: a PEFT folder.
        output: the folder to write; what an earlier merge left there is replaced.
        base: of the adapter; "" takes what the adapter names.
        dtype: of the written weights; auto is the base's own where that has 16 bits, and float16 for a base of 32 bits,
            whose weights it rounds eight times more finely than bfloat16.

    Raises:
        UserError: something is missing or wrong, the adapter is of another base or cannot be merged, or the merged
            model's probabilities are not those of base and adapter.
    """
    for package in ("torch", "transformers", "peft", "accelerate"):
        require(package, "train", "train merge")
    check_peft_adapter(adapter)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype!r} must be one of: {', '.join(_DTYPES)}")
    check_folder(output)
    folder = base_folder(base or named_base(adapter))
    check_apart(output, [output], (("adapter", adapter), ("base", folder)))
    stay_offline_and_quiet()
    LOG.info(f"base {folder}, adapter {adapter}")
    _check_plain(adapter)
    plan = _plan(folder, adapter)
    tokenizer = load_tokenizer(folder)
    with made_folder(output) as part:
        dtype = _write_weights(plan, part, dtype)
        _write_rest(folder, adapter, part, tokenizer, dtype)
        apart = _check(folder, adapter, part, tokenizer)
    write_manifest(output, {"base": str(folder), "base_hash": content_hash(folder), "adapter": str(adapter),
                            "made_from": made_from(adapter), "dtype": dtype, "divergence": apart.divergence,
                            "same_first": apart.same_first})  # fmt: skip
    LOG.info(
        f"written to {output}, weights in {dtype}: {apart.divergence:.1e} nats a token from base and adapter in 32 "
        f"bits, the same most probable token at {apart.same_first:.0%} of {apart.tokens}"
    )


def check_mergeable(folder: Path) -> None:
    """Refuse a base that no adapter can be merged into; nothing is loaded.

    Raises:
        UserError: it is quantised, or its files hold other tensors than transformers' model has.
    """
    tensor_names(skeleton(folder), Shards(folder))


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


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is merged.

    Attributes:
        shards: of the base.
        names: of the tensors to write.
        layers: PEFT's layers with their adapters, by the name of the base's tensor.
    """

    shards: Shards
    names: tuple[str, ...]
    layers: dict[str, Any]


def _check_plain(adapter: Path) -> None:
    """Refuse an adapter with more than products of two matrices beside weights.

    Raises:
        UserError: names the feature.
    """
    from peft import LoraConfig

    config = read_json(adapter / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"adapter {adapter} is no LoRA adapter: its adapter_config.json must say peft_type LORA")
    usual = LoraConfig().to_dict()
    for key, value in config.items():
        unusual = value not in (None, False, {}, []) and value != usual.get(key)
        if key == "init_lora_weights":
            unusual = value not in _PLAIN_STARTS
        if unusual and key not in (_MERGED | _NOTES):
            raise UserError(
                f"adapter {adapter} has {key}={json.dumps(value)}, which `train merge` does not merge: use base and "
                "adapter as they are, with --backend transformers --adapter, or merge them with PEFT"
            )


def _plan(folder: Path, adapter: Path) -> _Plan:
    from peft.tuners.lora import LoraLayer

    shards, model = Shards(folder), skeleton(folder)
    names = tensor_names(model, shards)
    kept, shared = kept_names(model, shards), shared_names(model)
    layers: dict[str, Any] = {}
    for name, module in skeleton_with_adapter(model, adapter).named_modules():
        if isinstance(module, LoraLayer):
            weight = f"{plain_name(name)}.weight"
            if weight in shared:
                raise UserError(
                    f"adapter {adapter} changes {weight}, which the base uses for two layers: it cannot be merged, use "
                    "base and adapter as they are, with --backend transformers --adapter"
                )
            layers[names[weight]] = module
    return _Plan(shards, kept, layers)


def _write_weights(plan: _Plan, part: Path, dtype: str) -> str:
    """Returns the dtype that was written, where `auto` was asked for."""
    own = {info.code for info in plan.shards.tensors.values()}
    chosen = ("bfloat16" if "BF16" in own else "float16") if dtype == "auto" else dtype
    try:
        _write_as(plan, part, chosen)
    except _TooLarge as error:
        if dtype != "auto":
            raise UserError(f"--dtype float16 cannot hold the weight {error}: take bfloat16") from None
        chosen = "bfloat16"
        _write_as(plan, part, chosen)
    return chosen


def _write_as(plan: _Plan, part: Path, dtype: str) -> None:
    import torch

    wanted = getattr(torch, dtype)

    def written(name: str) -> torch.Tensor:
        tensor = plan.shards.read(name)
        if name in plan.layers:
            tensor = _merged(plan.layers[name], tensor, name)
        if not tensor.is_floating_point():
            return tensor
        if wanted == torch.float16 and tensor.dtype != torch.float16 and float(tensor.abs().max()) > _MOST:
            raise _TooLarge(f"{name}, up to {float(tensor.abs().max()):.3g}")
        return tensor.to(wanted)

    kinds = {"F64", "F32", "F16", "BF16"}
    dtypes = {name: wanted if plan.shards.tensors[name].code in kinds else plan.shards.read(name).dtype
              for name in plan.names}  # fmt: skip
    write_shards(part, plan.shards, dtypes, written)


def _merged(layer: Any, weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight with its adapter in it, in 32 bits; the layer is without weight again afterwards.

    Raises:
        UserError: the adapter holds something that is no number.
    """
    from torch import nn

    base = layer.get_base_layer()
    empty = base.weight
    base.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
    try:
        layer.merge(safe_merge=True)
        return base.weight.data  # type: ignore[no-any-return]
    except ValueError as error:  # not a number
        raise UserError(f"the adapter cannot be merged into {name}: {first_line(error)}") from error
    finally:
        base.weight = empty
        layer.merged_adapters.clear()


def _write_rest(folder: Path, adapter: Path, part: Path, tokenizer: Any, dtype: str) -> None:
    import torch

    config = load_config(folder)
    config.dtype = getattr(torch, dtype)
    config.save_pretrained(part)
    if (folder / _GENERATION).is_file():
        shutil.copyfile(folder / _GENERATION, part / _GENERATION)
    tokenizer.save_pretrained(part)
    (part / "README.md").write_text(_card(folder, adapter, dtype), encoding="utf-8")
    template = template_of(adapter)
    if template:
        (part / NOTE).write_text(json.dumps({"template": template, "base": str(folder)}))


def _check(folder: Path, adapter: Path, merged: Path, tokenizer: Any) -> Apart:
    """Compare a merged model, as it was written, with base and adapter.

    Raises:
        UserError: they differ by more than 16 bits explain.
    """
    rows = [tokenizer(text).input_ids[:LONGEST] for text in PROBES]
    apart = compare(streamed_logits(folder, adapter, rows), streamed_logits(merged, None, rows))
    if not (apart.divergence <= MOST_DIVERGENCE and apart.same_first >= _LEAST_SAME):
        raise UserError(
            f"the merged model's probabilities diverge from those of base and adapter by {apart.divergence:.2g} nats a "
            f"token (at most {MOST_DIVERGENCE:g} is expected of 16 bits), and its most probable token is the same at "
            f"{apart.same_first:.0%} (at least {_LEAST_SAME:.0%}): not written\n"
            "With --dtype float32 nothing is rounded."
        )
    return apart


def _card(base: Path, adapter: Path, dtype: str) -> str:
    return (
        f"# {adapter.parent.name}\n\nA LoRA adapter merged into `{base.name}` by prompt-recovery ({dtype} weights). It "
        "predicts the instruction that made a language model rewrite one text into another:\n\n"
        "    python -m submission predict test.csv -o submission.csv --backend transformers --model THIS_FOLDER\n\n"
        "The licence is that of the base model.\n"
    )
