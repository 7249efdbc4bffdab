"""Working tables that may be larger than memory: a private SQLite database, on disk as far as it outgrows its cache.

It has no name in the file system and is gone with its connection. SQLite puts it under $SQLITE_TMPDIR, $TMPDIR,
/var/tmp or /tmp.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from submission.errors import UserError

_CACHE_KIB = 8_000


class Scratch(sqlite3.Connection):
    """A connection whose trouble is that of the disk, and is said so."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        """As of a connection.

        Raises:
            UserError: the disk of temporary files is full, or failed.
        """
        return self._tried(super().execute, arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        """As of a connection; errors as of `execute`."""
        return self._tried(super().executemany, arguments)

    def _tried(self, execute: Callable[..., sqlite3.Cursor], arguments: tuple[Any, ...]) -> sqlite3.Cursor:
        try:
            return execute(*arguments)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"no room for working tables: {error}\n"
                "Make room for temporary files, or name another folder in SQLITE_TMPDIR."
            ) from error


_MAYBE_BITS = 21  # 2 MB: of a million numbers 38 % are looked for in vain


class MaybeThere:
    """Whether a number may have been added, so that a table is not asked for what it cannot have; in 2 MB."""

    def __init__(self) -> None:
        self._places = bytearray(1 << _MAYBE_BITS)

    def add(self, number: int) -> None:
        """Remember a number, by its last bits."""
        self._places[number & ((1 << _MAYBE_BITS) - 1)] = 1

    def __contains__(self, number: int) -> bool:
        return bool(self._places[number & ((1 << _MAYBE_BITS) - 1)])


def scratch(schema: str) -> Scratch:
    """An empty database with this schema, for any thread."""
    # Autocommit with one open transaction: nothing is to survive, so nothing has to be safe on disk.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False, factory=Scratch)
    for line in (f"PRAGMA cache_size = -{_CACHE_KIB}", "PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF"):
        database.execute(line)
    database.execute(schema)
    database.execute("BEGIN")
    return database


def key_of(text: str) -> bytes:
    """A text as it is stored: to the letter, whatever is in it."""
    return text.encode("utf-8", "surrogatepass")


def text_of(key: bytes) -> str:
    """What was stored."""
    return key.decode("utf-8", "surrogatepass")
