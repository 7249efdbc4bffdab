"""The exceptions of the project, as one small tree.

    PromptRecoveryError
    ├── UserError         the input, an option or the installation is wrong: printed as is, exit 2
    │   └── MissingExtra  a package is not installed: carries the pip command that brings it
    └── BackendError      a backend could not answer a request: the row is retried, then counted

Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations


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
        brackets = f"[{extra}]" if extra else ""
        super().__init__(
            f"{what} needs the package {package}, which is not installed.\n"
            f"Install it with: pip install 'prompt-recovery{brackets}'"
        )


class BackendError(PromptRecoveryError):
    """A backend failed on a request; rows are retried in smaller batches, then take the fallback."""


def first_line(error: BaseException) -> str:
    """An error of somebody else's in one line: its kind and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")
