"""The pairs of a run, read once and kept on disk: a file of any length takes no more memory than a short one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from submission.data.scratch import key_of, scratch
from submission.data.tables import PAIR_COLUMNS, checked, digest_pairs, stream_table
from submission.types import Pair

_BLOCK = 100  # rows that are stored together: each statement gives up the interpreter's lock, and waits for it
_BLOCK_CHARS = 10_000_000  # that end a block early: they are in memory together


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
        self._blocks = scratch("CREATE TABLE blocks (number INTEGER PRIMARY KEY, ids BLOB, texts BLOB)")
        self._count = 0
        self.digest = digest_pairs(self._read(path, encoding))
        self._count = min(self._count, limit or self._count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Pair]:
        return islice(self._read_all(), self._count)

    @property
    def ids(self) -> Iterable[str]:
        """Their ids, in file order, to be gone through as often as wanted."""
        return _Ids(self._blocks, self._count)

    def _read_all(self) -> Iterator[Pair]:
        for ids, texts in self._blocks.execute("SELECT ids, texts FROM blocks ORDER BY number"):
            for row_id, (original, rewritten) in zip(json.loads(ids), json.loads(texts), strict=True):
                yield Pair(row_id, original, rewritten)

    def _read(self, path: Path, encoding: str) -> Iterator[Pair]:
        rows = (Pair(*row.cells) for row in checked(path, stream_table(path, PAIR_COLUMNS, encoding)))
        while block := list(_block(rows)):
            ids = _stored([row.id for row in block])
            texts = _stored([(row.original_text, row.rewritten_text) for row in block])
            self._blocks.execute("INSERT INTO blocks (ids, texts) VALUES (?, ?)", (ids, texts))
            self._count += len(block)
            yield from block


@dataclass(frozen=True, slots=True)
class _Ids:
    blocks: sqlite3.Connection
    count: int

    def __iter__(self) -> Iterator[str]:
        return islice(self._read_all(), self.count)

    def _read_all(self) -> Iterator[str]:
        for (ids,) in self.blocks.execute("SELECT ids FROM blocks ORDER BY number"):
            yield from json.loads(ids)


def _block(rows: Iterator[Pair]) -> Iterator[Pair]:
    size = 0
    for row in islice(rows, _BLOCK):
        yield row
        size += len(row.original_text) + len(row.rewritten_text)
        if size > _BLOCK_CHARS:
            return


def _stored(cells: list[Any]) -> bytes:
    return key_of(json.dumps(cells, ensure_ascii=False))
