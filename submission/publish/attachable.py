"""Models of Kaggle that a kernel attaches: by a short name of attachable.toml, or by their whole handle.

python -m submission bundle -o bundle --attach gemma-7b-it --attach YOU/recovery/transformers/7b/1
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from submission.errors import UserError
from submission.predict.capacity import ModelShape
from submission.publish.metadata import check_model


@dataclass(frozen=True, slots=True)
class Attached:
    """A copy of a model that a rehearsal mounts as Kaggle does.

    Attributes:
        path: folder or file.
        handle: owner/model/framework/variation/VERSION; "" for a model of no name.
    """

    path: Path
    handle: str = ""


def attached_copies(given: Sequence[str], handles: Sequence[str]) -> list[Attached]:
    """The copies that `--model` names: [NAME=]PATH, those without a name in the order of the kernel's models.

    Raises:
        UserError: there is no such model, or no such path.
    """
    copies: list[Attached] = []
    for text in given:
        name, equals, place = text.partition("=")
        handle = "" if not equals or Path(text).expanduser().exists() else handle_of(name, "--model")
        path = Path(place if handle else text).expanduser()
        if not path.exists():
            raise UserError(f"--model {text}: {path} does not exist")
        if handle and any(handle == one.handle for one in copies):
            raise UserError(f"--model {text}: {name} was given already")
        copies.append(Attached(path, handle))
    named = {one.handle for one in copies}
    rest = iter([handle for handle in handles if handle not in named])
    return [one if one.handle else Attached(one.path, next(rest, "")) for one in copies]


@cache
def known() -> dict[str, dict[str, Any]]:
    """Handle and sizes of each model by its short name."""
    return tomllib.loads(resources.files("submission.publish").joinpath("attachable.toml").read_text("utf-8"))


def handle_of(name: str, option: str = "--attach") -> str:
    """The handle of a model, for `model_sources`.

    Args:
        name: a short name, or a handle owner/model/framework/variation/VERSION.
        option: that gave it, for errors.

    Raises:
        UserError: it is neither.
    """
    if name in known():
        return str(known()[name]["handle"])
    if wrong := check_model(name):
        raise UserError(f"{option} {name}: {wrong}; short names are {', '.join(known())}")
    return name


def shape_of(handle: str) -> ModelShape | None:
    """The sizes of a model, whatever its version; None if they are not known here."""
    for about in known().values():
        if handle.rpartition("/")[0].lower() == str(about["handle"]).rpartition("/")[0]:
            return ModelShape.from_config(about)
    return None
