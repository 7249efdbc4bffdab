"""Damage: to bytes, and to values of JSON and TOML."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

TEXTS = (
    "",
    " ",
    "nan",
    "None",
    "a",
    "é",
    "\x1b]0;title\x07\x1b[31m",
    "a\rb",
    "a\nb",
    "\u202e",
    "x" * 5000,
    "\ufeff",
    "<|im_end|>",
    "=1+1",
    "../../x",
    "/etc/passwd",
    "~",
    "s3://",
    "none.gguf",
    "a\tb",
    "\u0000",
    "-1",
    "1e999",
)
BYTES = (
    b"\0",
    b'"',
    b"\r",
    b"\n",
    b"\r\n",
    b",",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\x1b[2J",
    b"\xed\xa0\x80",
    b"PAR1",
    b"GGUF",
    b"PK\x03\x04",
    b"\x1f\x8b\x08",
    b"BZh9",
    b"\xfd7zXZ\0",
    b"[" * 3000,
    b"{" * 3000,
    b"9" * 10_000,
)
# Names of files that belong to nobody but the user, some of them where a command would like to write.
NAMES = (
    "thesis.txt",
    "out.csv",
    "out.csv.run.json",
    "out.csv.calls.jsonl",
    ".out.csv.mine.tmp",
    "README.md",
    "report.html",
    "sets/train.parquet",
    "sets/README.md",
    "sets/data.run.json",
    "out.parquet",
)


def damage(draw: random.Random, content: bytes) -> bytes:
    """Bytes with a few changes of any kind."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        place = draw.randrange(len(found) + 1)
        how = draw.randrange(6)
        if how == 0 and found:
            found[min(place, len(found) - 1)] ^= 1 << draw.randrange(8)
        elif how == 1:
            found[place:place] = draw.choice(BYTES)
        elif how == 2:
            del found[place : place + draw.choice((1, 4, 100, 5000))]
        elif how == 3:
            found[place:place] = draw.randbytes(draw.choice((1, 8, 300)))
        elif how == 4:
            found[place:place] = found[draw.randrange(len(found) + 1) :][:200]
        elif draw.random() < 0.3:
            del found[place:]
    return bytes(found)


def value(draw: random.Random) -> Any:
    """A value that nobody expects."""
    return draw.choice(
        (
            None,
            True,
            False,
            0,
            -1,
            1,
            3,
            10**9,
            2**31,
            2**63,
            10**30,
            -(10**18),
            0.5,
            -0.5,
            1e308,
            float("nan"),
            float("inf"),
            draw.choice(TEXTS),
            draw.choice(TEXTS),
            [],
            [1],
            ["a"],
            [[1]],
            {},
            {"a": 1},
            [None],
            _deep(draw),
            date(2026, 1, 1),
        )
    )


def altered(draw: random.Random, content: Any, depth: int = 0) -> Any:
    """A copy of nested values in which one is another, missing, or new."""
    if depth > 6 or draw.random() < 0.25:
        return value(draw)
    if isinstance(content, dict) and content:
        found = dict(content)
        key = draw.choice(list(found))
        how = draw.randrange(8)
        if how == 0:
            del found[key]
        elif how == 1:
            found[draw.choice((*TEXTS, "model", "colour"))] = value(draw)
        else:
            found[key] = altered(draw, found[key], depth + 1)
        return found
    if isinstance(content, list) and content:
        items = list(content)
        place = draw.randrange(len(items))
        items[place] = altered(draw, items[place], depth + 1)
        return items
    return value(draw)


def json_bytes(draw: random.Random, content: Any) -> bytes:
    """Nested values as JSON, altered or damaged."""
    if draw.random() < 0.1:
        return draw.choice(
            (b"", b"null", b"[]", b"{}", b"[" * 200_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff", b'"\\ud800"')
        )
    text = json.dumps(altered(draw, content), default=str).encode()
    return damage(draw, text) if draw.random() < 0.3 else text


def toml_bytes(draw: random.Random, content: dict[str, Any]) -> bytes:
    """Tables as TOML, altered or damaged."""
    if draw.random() < 0.1:
        return draw.choice(
            (
                b"",
                b"a = " + b"[" * 5000,
                b"a" + b".a" * 5000 + b" = 1",
                b"a = " + b"9" * 10_000,
                b"\xff = 1",
                b"a = 0x" + b"f" * 10_000,
                b"a = '\x1b[2J'",
                b"[a]\n[a]\n",
            )
        )
    altered_content = content
    for _ in range(draw.choice((1, 1, 2, 3))):
        altered_content = altered(draw, altered_content)
        if not isinstance(altered_content, dict):
            altered_content = {"x": altered_content}
    text = "\n".join(_toml_lines(altered_content)).encode("utf-8", "replace")
    return damage(draw, text) if draw.random() < 0.3 else text


def user_files(draw: random.Random, folder: Path, names: Sequence[str] = NAMES) -> None:
    """A few files of the user's."""
    for name in draw.sample(list(names), draw.choice((0, 1, 1, 2))):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(draw.choice((b"mine", b'{"mine": 1}', b"[1]", b"PAR1mine", b"id\n1\n")))


def _deep(draw: random.Random) -> Any:
    found: Any = 1
    for _ in range(draw.choice((5, 50))):
        found = [found]
    return found


def _toml_lines(content: dict[str, Any]) -> list[str]:
    lines = [f"{json.dumps(str(key))} = {_toml(item)}" for key, item in content.items() if not _is_table(item)]
    for key, item in content.items():
        if _is_table(item):
            for table in item if isinstance(item, list) else [item]:
                lines.append(f"[[{json.dumps(str(key))}]]" if isinstance(item, list) else f"[{json.dumps(str(key))}]")
                lines += [f"{json.dumps(str(name))} = {_toml(one)}" for name, one in table.items()]
    return lines


def _is_table(item: Any) -> bool:
    return (isinstance(item, dict) and bool(item)) or (
        isinstance(item, list) and bool(item) and all(isinstance(one, dict) for one in item)
    )


def _toml(item: Any) -> str:
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, float):
        return {"inf": "inf", "nan": "nan", "-inf": "-inf"}.get(str(item), repr(item))
    if isinstance(item, list):
        return f"[{', '.join(map(_toml, item))}]"
    if isinstance(item, dict):
        return f"{{{', '.join(f'{json.dumps(str(key))} = {_toml(one)}' for key, one in item.items())}}}"
    if item is None:
        return '""'
    return json.dumps(item) if isinstance(item, str) else str(item)
