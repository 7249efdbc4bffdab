"""A model's share of the cores and the memory of a machine, where several workers hold it."""

from __future__ import annotations

from dataclasses import fields, replace

from submission.backends import ModelSpec
from submission.backends.common import memory_budget
from submission.backends.hardware import ALONE


def divided(spec: ModelSpec, count: int, cores: int) -> ModelSpec:
    """The model as one of `count` workers loads it, beside the others, on a machine with so many cores."""
    names = {item.name for item in fields(spec.options)}
    part: dict[str, int] = {}
    if count > 1 and "threads" in names and not spec.options.threads:
        part["threads"] = max(1, cores // count)
    if count > 1 and "memory" in names and not spec.options.memory:
        part["memory"] = max(64, memory_budget() // count // 1_000_000)
    return replace(spec, fleet=ALONE, options=replace(spec.options, **part))
