"""A model of any size, computed in 32 bits with one of its layers in memory at a time.

    streamed_logits(Path("gemma-7b-it"), Path("runs/a/adapter"), [[2, 651, 4320]])

A model of 7B parameters takes 34 GB in 32 bits; this takes as much as its largest layer (about 1 GB), and reads the
weights once for all rows together. It is for comparing models, not for answering with them.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends.transformers.loading import load_config, load_model, with_adapter
from submission.data.tables import some
from submission.errors import UserError, first_line
from train.shards import OtherTensors, Shards, check_tensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ROWS = 8192  # of the vocabulary that are multiplied at a time
_IGNORED = r"rotary_emb\.inv_freq"  # old checkpoints hold it, and transformers computes it
_WRAPPED = "base_model.model."  # PEFT puts it before a module's name


def skeleton(folder: Path) -> Any:
    """The model of a folder without its weights, which take no memory.

    Raises:
        UserError: transformers does not know such a model, or it is quantised.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"model {folder} is quantised: name the folder with its weights in 16 or 32 bits")
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model {folder} cannot be set up by transformers: {first_line(error)}") from error
    model.tie_weights()
    return model.eval()


def skeleton_with_adapter(model: Any, adapter: Path) -> Any:
    """A skeleton with an adapter, whose own weights are there, in 32 bits.

    Raises:
        UserError: see `with_adapter`.
    """
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing can be copied to a module without weights
        model = with_adapter(model, adapter)
    # PEFT keeps an adapter where its base is, which is nowhere.
    weights = {re.sub(r"(\.lora_(?:embedding_)?[AB])", r"\1.default", name): tensor.float()
               for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}  # fmt: skip
    model.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name, one in model.named_parameters() if ".lora_" in name and one.is_meta]
    if missing:
        raise UserError(f"adapter {adapter} does not fit: {some(missing)} cannot be set")
    return model.eval()


def tensor_names(model: Any, shards: Shards) -> dict[str, str]:
    """Names of a skeleton's parameters, and those of their tensors on disk, where one tensor may serve two.

    Raises:
        OtherTensors: the files hold other tensors than the model has, or of other shapes.
    """
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for names in by_identity.values():
        there = [name for name in names if name in shards.tensors]
        found |= {name: name if name in there else there[0] if there else name for name in names}
    own = model.state_dict()
    persistent = [name for name in own if name not in found and name in shards.tensors]
    shapes = {found.get(name, name): tuple(tensor.shape) for name, tensor in own.items()}
    check_tensors(shards, kept_names(model, shards), [*found.values(), *persistent], shapes)
    return found


def kept_names(model: Any, shards: Shards) -> tuple[str, ...]:
    """The tensors on disk, without those that transformers passes over: patterns name them, and the model has none."""
    patterns = [_IGNORED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    own = set(model.state_dict())
    return tuple(
        name for name in shards.tensors if name in own or not any(re.search(pattern, name) for pattern in patterns)
    )


def shared_names(model: Any) -> set[str]:
    """Names of a skeleton's parameters that serve two layers, such as tied embeddings, however they are stored."""
    named = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    times = Counter(identity for _, identity in named)
    return {name for name, identity in named if times[identity] > 1}


def plain_name(name: str) -> str:
    """The base's name of a module or parameter that PEFT has wrapped."""
    return name.removeprefix(_WRAPPED).replace(".base_layer", "")


def logits_of(folder: Path, adapter: Path | None, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """As `streamed_logits`; a model whose tensors are unusual is loaded whole, in 32 bits."""
    import torch

    try:
        return streamed_logits(folder, adapter, rows)
    except OtherTensors:
        model = load_model(folder, adapter, device="cpu", dtype="float32", load_in_4bit=False)
        with torch.inference_mode():
            return [model(torch.tensor([row])).logits[0].numpy() for row in rows]


def streamed_logits(folder: Path, adapter: Path | None, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Logits of a model, or of base and adapter, which are not merged.

    Args:
        folder: of the model, 16 or 32 bits.
        adapter: PEFT folder; None for none.
        rows: token ids.

    Returns:
        for each row an array of shape (tokens, vocabulary).

    Raises:
        UserError: the model is quantised, or the adapter does not fit; `OtherTensors` if its tensors are unusual.
    """
    import torch

    shards, model = Shards(folder), skeleton(folder)
    names = tensor_names(model, shards)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if adapter is not None:
        model = skeleton_with_adapter(model, adapter)
    _stream(model, shards, names, *ends)
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [logits[place, : len(row)].float().numpy() for place, row in enumerate(rows)]


def _stream(model: Any, shards: Shards, names: dict[str, str], embedding: Any, head: Any) -> None:
    """Have every part of a skeleton read its weights before it runs, and drop them after it."""
    from torch import nn

    blocks: list[Any] = []  # layers of the model, each with all that is in it
    within: set[Any] = {embedding, head}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in within:
            blocks += module
            within.update(part for block in module for part in block.modules())
    parts = [*blocks, *(module for module in model.modules() if module not in within)]
    full = {id(module): plain_name(name) for name, module in model.named_modules()}
    for part in parts:
        own = [(module, key, names[f"{full[id(module)]}.{key}".removeprefix(".")])
               for module in (part.modules() if part in within else [part])
               for key, parameter in module.named_parameters(recurse=False) if parameter.is_meta]  # fmt: skip
        if own:
            _read_before(part, own, shards)
    _look_up_rows(embedding, shards, names[f"{full[id(embedding)]}.weight"])
    if head is not None:
        bias = names.get(f"{full[id(head)]}.bias")
        _multiply_rows(head, shards, names[f"{full[id(head)]}.weight"], bias)


def _read_before(part: Any, own: Sequence[tuple[Any, str, str]], shards: Shards) -> None:
    from torch import nn

    empty = [module._parameters[key] for module, key, _ in own]

    def fill(*_: Any) -> None:
        for module, key, name in own:
            module._parameters[key] = nn.Parameter(shards.read(name).float().clone(), requires_grad=False)

    def drop(*_: Any) -> None:
        for (module, key, _name), nothing in zip(own, empty, strict=True):
            module._parameters[key] = nothing

    part.register_forward_pre_hook(fill)
    part.register_forward_hook(drop)


def _look_up_rows(embedding: Any, shards: Shards, name: str) -> None:
    """Read the rows of the vocabulary that occur, and no others."""
    from torch import nn

    def fill(module: Any, arguments: Any) -> Any:
        tokens, places = arguments[0].unique(return_inverse=True)
        module._parameters["weight"] = nn.Parameter(shards.read(name)[tokens].float(), requires_grad=False)
        return (places, *arguments[1:])

    embedding.padding_idx = None  # a row of its own is needed in training only
    embedding.register_forward_pre_hook(fill)


def _multiply_rows(head: Any, shards: Shards, name: str, bias: str | None) -> None:
    """Multiply by some rows of the vocabulary at a time."""
    import torch

    def forward(states: Any) -> Any:
        weight = shards.read(name)
        parts = [states @ weight[start : start + _ROWS].float().T for start in range(0, len(weight), _ROWS)]
        logits = torch.cat(parts, dim=-1)
        return logits if bias is None else logits + shards.read(bias).float()

    head.forward = forward
