"""Working tables that may be larger than memory: a private SQLite database, on disk as far as it outgrows its cache.

It has no name in the file system and is gone with its connection. SQLite puts it under $SQLITE_TMPDIR, $TMPDIR,
/var/tmp or /tmp.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from submission.errors import PromptRecoveryError

_CACHE_KIB = 8_000


def scratch(schema: str) -> sqlite3.Connection:
    """An empty database with this schema, for any thread."""
    # Autocommit with one open transaction: nothing is to survive, so nothing has to be safe on disk.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
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


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Say what there was no room for, and where room is needed.

    Raises:
        PromptRecoveryError: the disk of temporary files is full, or failed.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise PromptRecoveryError(
            f"no room for {what}: {error}\nMake room for temporary files, or name another folder in SQLITE_TMPDIR."
        ) from error
