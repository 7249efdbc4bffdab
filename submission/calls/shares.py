"""A model as one worker loads it, with its share of a machine."""

from __future__ import annotations

from dataclasses import fields, replace

from submission.backends import ModelSpec
from submission.backends.hardware import ALONE


def one_of(spec: ModelSpec, **share: int) -> ModelSpec:
    """The model in one copy.

    Args:
        spec: the model.
        share: values of options, such as threads, for those that it has and that nobody set.
    """
    names = {item.name for item in fields(spec.options)}
    part = {name: value for name, value in share.items() if name in names and not getattr(spec.options, name)}
    return replace(spec, placement=ALONE, options=replace(spec.options, **part))
