"""Triplets on their way to sets, on disk as far as they outgrow a cache: memory does not grow with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from submission.data.scratch import key_of, scratch, text_of
from train.cleaning import DataRow

_COLUMNS = tuple(DataRow.__dataclass_fields__)


class RowStore:
    """Rows by number, in the order in which they came.

    Attributes:
        sources: the source of each row.
    """

    def __init__(self) -> None:
        self.sources: list[str] = []
        self._table = scratch(f"CREATE TABLE rows (number INTEGER PRIMARY KEY, {' BLOB, '.join(_COLUMNS)} BLOB)")
        self._add = f"INSERT INTO rows VALUES (?{', ?' * len(_COLUMNS)})"

    def __len__(self) -> int:
        return len(self.sources)

    def add(self, row: DataRow) -> int:
        """Keep a row; returns its number.

        Raises:
            UserError: there is no room on the disk.
        """
        number = len(self)
        self._table.execute(self._add, (number, *(key_of(getattr(row, column)) for column in _COLUMNS)))
        self.sources.append(row.source)
        return number

    def row(self, number: int) -> DataRow:
        """The row of a number."""
        cells = self._table.execute(f"SELECT {', '.join(_COLUMNS)} FROM rows WHERE number = ?", (number,)).fetchone()
        return DataRow(*map(text_of, cells))


class Rows(Sequence[DataRow]):
    """Some rows of a store, read when they are asked for.

    Attributes:
        numbers: of the rows, in order.
    """

    def __init__(self, store: RowStore, numbers: Sequence[int]) -> None:
        self._store, self.numbers = store, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> DataRow: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> DataRow | Rows:
        if isinstance(place, slice):
            return Rows(self._store, self.numbers[place])
        return self._store.row(self.numbers[place])
