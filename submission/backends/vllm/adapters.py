"""Whether a PEFT adapter fits a model, by the names and shapes in their files: vLLM passes over what has no place."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from submission.data.files import read_json
from submission.data.tables import some
from submission.errors import UserError, first_line

_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


def check_fit(model: Path, adapter: Path) -> None:
    """Refuse an adapter of which a tensor has no place in the model.

    Args:
        model: folder of weights.
        adapter: PEFT folder.

    Raises:
        UserError: names the tensors.
    """
    places: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for file in sorted(model.glob("*.safetensors")):
        for name, shape in _shapes(file).items():
            places[_in_layer(name.removesuffix(".weight"))].add(shape)
    packed = "quantization_config" in read_json(model / "config.json", "model configuration")  # shapes say nothing
    homeless = []
    for name, shape in _shapes(adapter / "adapter_model.safetensors").items():
        match = _LORA.fullmatch(name)
        there = places.get(_in_layer(match[1])) if match else None
        if match is None or there is None or not (packed or any(_fits(match[2], shape, one) for one in there)):
            homeless.append(name)
    if homeless:
        raise UserError(
            f"adapter {adapter} does not fit this model, which has no place for {len(homeless)} of its tensors: "
            f"{some(sorted(homeless))}\nWas it trained on another base?"
        )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # of whatever it holds
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def _in_layer(module: str) -> str:
    """A module's name from its layer on: what stands before differs between a model and its wrappers."""
    return module[found.start() :] if (found := re.search(r"\blayers\.\d+\.", module)) else module


def _fits(half: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether half of a LoRA pair, A of shape (rank, inputs) or B (outputs, rank), goes with (outputs, inputs)."""
    if len(shape) != 2 or len(weight) != 2:
        return False
    return shape[1] == weight[1] if half == "A" else shape[0] == weight[0]
