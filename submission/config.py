"""Options as frozen dataclasses: filled from TOML or `--set key=value`, with errors that name the key.

python -m submission predict test.csv -o submission.csv --set threads=4
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from submission.errors import UserError

T = TypeVar("T")

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_duration(text: str, option: str) -> float:
    """Seconds of `8h30m`, `20s`, `90` or `1.5h`.

    Raises:
        UserError: not a duration, or not above zero.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = (
        sum(float(value) * unit for value, unit in zip(match.groups(), _UNITS.values(), strict=True) if value)
        if match
        else 0.0
    )
    if seconds <= 0:
        raise UserError(f"{option} {text!r} is not a duration: write it as 8h30m, 20m or 45s")
    return seconds


def read_toml(path: Path, option: str) -> dict[str, Any]:
    """A TOML file as a dictionary.

    Raises:
        UserError: missing or not TOML; names the option that asked for it.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{option} {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{option} {path} is not a readable TOML file: {error}") from None


def from_settings(cls: type[T], settings: Iterable[str], what: str) -> T:
    """Build an options dataclass from `key=value` strings; see `from_mapping`."""
    values = {key.replace("-", "_"): value for key, value in split_settings(settings).items()}
    return from_mapping(cls, values, what)


def split_settings(settings: Iterable[str]) -> dict[str, str]:
    """Values by key of `key=value` strings, as --set takes them.

    Raises:
        UserError: one is written otherwise.
    """
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting!r}: write it as key=value")
        values[key.strip()] = value.strip()
    return values


def split_list(text: str) -> list[str]:
    """The parts of a list with commas; blank ones do not count."""
    return [part.strip() for part in text.split(",") if part.strip()]


def from_mapping(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Build an options dataclass; strings are converted to the type of each field's default.

    Raises:
        UserError: an unknown key or a bad value; names the key, the value and what is allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [key for key in values if key not in fields]
    if unknown:
        allowed = ", ".join(fields) or "none"
        raise UserError(f"unknown option {unknown[0]!r} for {what}; allowed: {allowed}")
    return cls(**{key: _convert(key, value, fields[key].default, what) for key, value in values.items()})


def _convert(key: str, value: Any, default: Any, what: str) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            lowered = str(value).lower()
            if lowered in _TRUE + _FALSE:
                return lowered in _TRUE
            raise ValueError
        if kind in (int, float) and not isinstance(value, bool):
            number = kind(value)
            if number < 0 or number != (value if isinstance(value, float) else number):  # neither 2.5 steps nor nan
                raise ValueError
            return number
        if kind is str and isinstance(value, str):
            return value
        if kind is tuple and isinstance(value, str):
            value = split_list(value)
        if (
            kind is tuple
            and isinstance(value, list | tuple)
            and all(isinstance(item, str | int | float) for item in value)
        ):
            return tuple(value)
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        allowed = {bool: "true or false", int: "a whole number from 0", float: "a number from 0", tuple: "a list"}.get(
            kind, "a text"
        )
        raise UserError(f"option {key}={value!r} for {what} must be {allowed}") from None
