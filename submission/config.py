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

from submission.errors import UserError, first_line

T = TypeVar("T")

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_LONGEST = 10_000 * 3600.0  # seconds of a duration; more is a slip of the hand
_MOST = 2**31 - 1  # of a whole number: libraries in C take no more
_SHOWN = 80  # characters of a bad value that an error shows


def parse_duration(text: str, option: str) -> float:
    """Seconds of `8h30m`, `20s`, `90` or `1.5h`.

    Raises:
        UserError: not a duration, not above zero, or more than 10,000 hours.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = (
        sum(float(value) * unit for value, unit in zip(match.groups(), _UNITS.values(), strict=True) if value)
        if match
        else 0.0
    )
    if seconds <= 0:
        raise UserError(f"{option} {text[:_SHOWN]!r} is not a duration: write it as 8h30m, 20m or 45s")
    if seconds > _LONGEST:
        raise UserError(f"{option} {text[:_SHOWN]!r} is too long: at most {_LONGEST / 3600:.0f}h")
    return seconds


def read_toml(path: Path, option: str) -> dict[str, Any]:
    """A TOML file as a dictionary.

    Raises:
        UserError: missing or not TOML; names the option that asked for it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        repr(content)  # a number in hexadecimal may have more digits than can be shown: it is no option's value
        return content
    except FileNotFoundError:
        raise UserError(f"{option} {path} does not exist") from None
    except RecursionError:
        raise UserError(f"{option} {path} is not a readable TOML file: its values are nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not TOML, or a number of too many digits
        raise UserError(f"{option} {path} is not a readable TOML file: {first_line(error)}") from None


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
    return cls(**{key: _convert(fields[key], value, what) for key, value in values.items()})


def _convert(field: dataclasses.Field[Any], value: Any, what: str) -> Any:
    kind: type[Any] = type(field.default)
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
            if kind is int and number > _MOST:
                raise ValueError
            return number
        if kind is str and isinstance(value, str) and "\0" not in value:
            return value
        if kind is tuple:
            return _convert_list(split_list(value) if isinstance(value, str) else value, field)
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        allowed = {
            bool: "true or false", int: f"a whole number from 0 to {_MOST}", float: "a number from 0",
            tuple: f"a list of {'whole numbers' if _holds_numbers(field) else 'texts'}",
        }.get(kind, "a text")  # fmt: skip
        raise UserError(f"option {field.name}={_shown(value)} for {what} must be {allowed}") from None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists a thousand deep
        text = f"({type(value).__name__})"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _holds_numbers(field: dataclasses.Field[Any]) -> bool:
    return "int" in str(field.type)


def _convert_list(value: Any, field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    if _holds_numbers(field):
        if not all(isinstance(item, str) or type(item) is int for item in value):
            raise TypeError
        numbers = tuple(int(item) for item in value)
        if any(not 0 <= number <= _MOST for number in numbers):
            raise ValueError
        return numbers
    if not all(isinstance(item, str) and "\0" not in item for item in value):
        raise TypeError
    return tuple(value)
