"""Memory and minutes of a bundle on Kaggle's machines, computed from the sizes of the models that it attaches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submission import kernel
from submission.config import read_toml
from submission.errors import UserError
from submission.predict.capacity import MACHINES, Fit, ModelShape, Precision, Work, fit, shown, together
from submission.publish.attachable import shape_of

ROWS, PROMPT_TOKENS = 1400, 500  # of the hidden test set, about
_LORA_BYTES = 100e6  # of an adapter whose file is not looked at


@dataclass(frozen=True, slots=True)
class _Source:
    """A model of the kernel and what it is asked; `by_hardware`: the kernel chooses 4 bits by the GPU's memory."""

    name: str
    shape: ModelShape
    work: Work
    precision: Precision
    by_hardware: bool = False

    def held(self, memory: float) -> Precision:
        """How it is held on a GPU: the kernel takes 4 bits where the weights would take more than half of it."""
        tight = self.by_hardware and 2.0 * self.shape.parameters > memory / 2
        return replace(self.precision, bits=4) if tight else self.precision


def forecast(bundle: Path, handles: Sequence[str]) -> Iterator[str]:
    """Lines to print; none where the sizes of no attached model are known.

    Raises:
        UserError: kernel.toml or the file of recover_config cannot be read.
    """
    try:
        settings = kernel.read_settings(bundle / kernel.SETTINGS)
    except kernel.KernelFailure as error:
        raise UserError(str(error)) from None
    sources = list(_sources(settings, bundle, handles))
    totals: list[list[Fit]] = []
    for source in sources:
        fits = [fit(machine, source.shape, source.work, source.held(machine.gpu.memory)) for machine in MACHINES]
        totals.append(fits)
        yield f"forecast   {source.name}: {_words(source)}"
        yield from (f"           {line}" for line in shown(fits, settings.deadline / 60))
    if len(sources) > 1:
        yield f"forecast   all {len(sources)} sources, one after the other"
        yield from (f"           {line}" for line in shown(map(together, zip(*totals, strict=True)),
                                                           settings.deadline / 60))  # fmt: skip
    if not sources and settings.recover != "constant" and any(map(shape_of, handles)):
        yield "forecast   none: no [[source]] that can be read here names an attached model"
    if sources:
        yield "           computed from the models' sizes; none of it was measured on such a machine"


def _sources(settings: kernel.Settings, bundle: Path, handles: Sequence[str]) -> Iterator[_Source]:
    shapes = {handle: shape for handle in handles if (shape := shape_of(handle)) is not None}
    if not shapes or settings.recover == "constant":
        return
    if ":" not in settings.recover:
        handle = next(iter(shapes))
        adapter = any(bundle.glob("*adapter_model.safetensors"))
        yield _Source(handle, shapes[handle], Work(ROWS, PROMPT_TOKENS, settings.max_new_tokens),
                      _precision(settings.settings, adapter=adapter), by_hardware=True)  # fmt: skip
        return
    name = settings.recover_config.removeprefix("find:")
    config = read_toml(bundle / name, "recover_config") if name and (bundle / name).is_file() else {}
    for entry in config.get("source", []):
        model = str(entry.get("model", "")).removeprefix("find:").lower()
        handle = next((one for one in shapes if model and _names(model, one)), "")
        if handle:
            answers = _number(entry, "n", 8) + bool(entry.get("greedy", True))
            work = Work(ROWS, PROMPT_TOKENS, _number(entry, "max_new_tokens", 40), answers)
            precision = _precision(entry.get("settings", []), adapter=bool(entry.get("adapter")))
            yield _Source(str(entry.get("name") or handle), shapes[handle], work, precision)


def _names(model: str, handle: str) -> bool:
    """Whether "find:MODEL" leads to an attached model: any end of the folders above it does."""
    folders = handle.lower().split("/")
    return any("/".join(folders[start:end]) == model for start in range(5) for end in range(start + 1, 6))


def _precision(settings: Sequence[object] | str, *, adapter: bool) -> Precision:
    given = settings.split(",") if isinstance(settings, str) else settings
    bits = 4 if any(map(kernel.in_4_bits, given)) else 16
    dtype = dict(map(kernel.option_of, given)).get("dtype", "auto")
    return Precision(bits, _LORA_BYTES if adapter else 0.0, dtype)


def _words(source: _Source) -> str:
    work = source.work
    return (f"{work.rows} rows of {work.prompt_tokens} tokens, {work.answers} answers of up to {work.new_tokens} each"
            f"{', adapter' if source.precision.adapter_bytes else ''}")  # fmt: skip


def _number(entry: dict[str, Any], key: str, default: int) -> int:
    value = entry.get(key, default)
    if type(value) is not int or value < 0:
        raise UserError(f"recover_config: {key} = {json.dumps(value, default=str)} must be a whole number")
    return value
