"""Kaggle's image, as far as it is known here: its Python and the packages that need not be brought."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Image:
    """Attributes:
    python: version, such as 3.12.
    glibc, glibcxx: versions of the C and C++ libraries; what is compiled for newer ones does not load there.
    packages: version by name.
    """

    python: str
    glibc: str
    glibcxx: str
    packages: Mapping[str, str]


def kaggle_image() -> Image:
    """The image, from image.toml."""
    content = tomllib.loads(resources.files("submission.publish").joinpath("image.toml").read_text("utf-8"))
    return Image(content["python"], content["glibc"], content["glibcxx"], content["packages"])
