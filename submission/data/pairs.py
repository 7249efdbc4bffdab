"""The pairs of a run, read once and kept on disk: a file of any length takes no more memory than a short one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from submission.data.scratch import key_of, scratch, text_of
from submission.data.tables import PAIR_COLUMNS, checked, digest_pairs, stream_table
from submission.types import Pair

_BLOCK = 100  # rows that are stored with one statement


class Pairs:
    """Pairs in file order, to be gone through as often as wanted, also after their file has changed.

    Attributes:
        digest: of all pairs of the file; see `submission.data.tables.digest_pairs`.
    """

    def __init__(self, path: Path, encoding: str = "utf-8", limit: int = 0) -> None:
        """Read a table.

        Args:
            path: as in `submission.data.tables.stream_table`.
            encoding: of a CSV file.
            limit: first rows only, once all are checked; 0 for all.

        Raises:
            UserError: as `submission.data.tables.read_pairs`.
        """
        self._rows = scratch("CREATE TABLE pairs (number INTEGER PRIMARY KEY, id BLOB, original BLOB, rewritten BLOB)")
        self._count = 0
        self.digest = digest_pairs(self._read(path, encoding))
        self._count = min(self._count, limit or self._count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Pair]:
        asked = "SELECT id, original, rewritten FROM pairs WHERE number <= ? ORDER BY number"
        for cells in self._rows.execute(asked, (self._count,)):
            yield Pair(*map(text_of, cells))

    @property
    def ids(self) -> Iterable[str]:
        """Their ids, in file order, to be gone through as often as wanted."""
        return _Ids(self._rows, self._count)

    def _read(self, path: Path, encoding: str) -> Iterator[Pair]:
        rows = checked(path, stream_table(path, PAIR_COLUMNS, encoding))
        while block := list(islice(rows, _BLOCK)):
            cells = ((number, *map(key_of, row.cells)) for number, row in enumerate(block, self._count + 1))
            self._rows.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?)", cells)
            self._count += len(block)
            for row in block:
                yield Pair(*row.cells)


@dataclass(frozen=True, slots=True)
class _Ids:
    rows: sqlite3.Connection
    count: int

    def __iter__(self) -> Iterator[str]:
        for (key,) in self.rows.execute("SELECT id FROM pairs WHERE number <= ? ORDER BY number", (self.count,)):
            yield text_of(key)
