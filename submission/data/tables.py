"""The one reader and writer of tables for the whole project: CSV or Parquet, here or on an object store.

A real row of the competition's public test set, shortened:

    id,original_text,rewritten_text
    -1,"The competition dataset comprises text passages ...","Here is your shanty: (Verse 1) ..."

Ids are text, kept to the letter (`-1`, `007`, UUIDs); texts are never interpreted (`NA` is a word).
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

from submission.data.files import atomic_path, display_path, files_in, is_folder, open_binary
from submission.data.scratch import key_of, scratch
from submission.errors import UserError, first_line
from submission.types import Pair, Triplet

PAIR_COLUMNS = ("id", "original_text", "rewritten_text")
TRIPLET_COLUMNS = (*PAIR_COLUMNS, "rewrite_prompt")
PREDICTION_COLUMNS = ("id", "rewrite_prompt")

_PARQUET = b"PAR1"
_CHUNK = 1 << 20  # bytes
_BLOCK = 2048  # rows of Parquet that are in memory at once
_SHOWN = 5  # how many offending lines an error lists
_COMPRESSED = (
    (b"PK\x03\x04", "a zip archive", "unzip"), (b"\x1f\x8b", "gzipped", "gunzip"),
    (b"\xfd7zXZ\0", "compressed with xz", "unxz"), (b"BZh", "compressed with bzip2", "bunzip2"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unzstd"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
)  # fmt: skip
# Codecs of Python that decode something else than the text of a file.
_NO_ENCODINGS = {"unicode-escape", "raw-unicode-escape", "idna", "punycode", "undefined", "charmap", "mbcs", "oem"}


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a table: where it stands (`line 7`, `row 6`) and its cells, in the order asked for."""

    where: str
    cells: tuple[str, ...]


def read_pairs(path: Path, encoding: str = "utf-8") -> list[Pair]:
    """Read the pairs of a CSV or Parquet file, in file order.

    Raises:
        UserError: the file is missing, empty, undecodable or malformed, a column is missing, an id is
            null or appears twice. The message names the lines.
    """
    return [Pair(*row.cells) for row in checked(path, stream_table(path, PAIR_COLUMNS, encoding))]


def read_triplets(path: Path, encoding: str = "utf-8") -> list[Triplet]:
    """Read pairs with their known prompts; rows whose prompt or rewritten text is blank are left out.

    Raises:
        UserError: as `read_pairs`, or when no row is left.
    """
    rows = checked(path, stream_table(path, TRIPLET_COLUMNS, encoding))
    triplets = [
        Triplet(Pair(*row.cells[:3]), row.cells[3]) for row in rows if row.cells[2].strip() and row.cells[3].strip()
    ]
    if not triplets:
        raise UserError(f"{display_path(path)}: no row has both a rewritten_text and a rewrite_prompt")
    return triplets


def read_table(path: Path, columns: Sequence[str], encoding: str = "utf-8", *, exact: bool = False) -> list[Row]:
    """All rows of a table; see `stream_table`."""
    return list(stream_table(path, columns, encoding, exact=exact))


def stream_table(path: Path, columns: Sequence[str], encoding: str = "utf-8", *, exact: bool = False) -> Iterator[Row]:
    """Read `columns` of a CSV or Parquet file (told apart by content) as text, row by row; nulls become blanks.

    Args:
        path: the file, or a folder of Parquet files, which are read in the order of their names; here or on an
            object store.
        columns: names of the columns to read, in the order wanted.
        encoding: of a CSV file.
        exact: refuse a table with other columns, or another order of them.

    Raises:
        UserError: see `read_pairs`.
    """
    if is_folder(path):
        for part in _parts(path):
            for row in stream_table(part, columns, encoding, exact=exact):
                yield Row(f"{part.relative_to(path)}, {row.where}", row.cells)
        return
    with open_binary(path) as file:
        magic = _first_bytes(path, file)
        if magic.startswith(_PARQUET):
            yield from _parquet_rows(path, file, columns, exact=exact)
            return
        for mark, kind, tool in _COMPRESSED:
            if magic.startswith(mark):
                raise UserError(f"{display_path(path)} is {kind}, not a CSV or Parquet file: {tool} it first")
        with _decoded(path, file, encoding) as text:
            yield from _csv_rows(path, text, columns, exact=exact)


def header_of(path: Path) -> list[str]:
    """The column names of a CSV or Parquet file.

    Raises:
        UserError: it cannot be read.
    """
    with open_binary(_parts(path)[0] if is_folder(path) else path) as file:
        if not _first_bytes(path, file).startswith(_PARQUET):
            with _decoded(path, file, "utf-8") as text:
                return _csv_header(path, csv.reader(text))
        import pyarrow.parquet as pq

        with _parquet_errors(path):
            names: list[str] = pq.read_schema(file).names
            return names


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether a table has all these columns; raises as `header_of`."""
    return set(columns) <= set(header_of(path))


def is_parquet(path: Path) -> bool:
    """True if the file begins with Parquet's magic bytes."""
    with open_binary(path) as file:
        return file.read(len(_PARQUET)) == _PARQUET


def check_ids(path: Path, rows: Iterable[Row]) -> None:
    """Refuse null ids and ids that appear twice; the first cell of each row is its id.

    Raises:
        UserError: names the lines, and for a duplicate the line of its first appearance.
    """
    for _ in checked(path, rows):
        pass


def checked(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, with their ids checked when the last one was taken; see `check_ids`."""
    first = scratch("CREATE TABLE first (id BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")
    null, twice = Listed(), Listed()
    for row in rows:
        row_id = row.cells[0]
        if not row_id.strip():
            null.add(row.where)
        elif not first.execute("INSERT OR IGNORE INTO first VALUES (?, ?)", (key_of(row_id), row.where)).rowcount:
            (place,) = first.execute("SELECT place FROM first WHERE id = ?", (key_of(row_id),)).fetchone()
            twice.add(f"{row.where} (id {row_id!r}, first on {place})")
        yield row
    if null:
        raise UserError(f"{display_path(path)}: null id on {null}\nEvery row needs an id; fill it in or drop the row.")
    if twice:
        raise UserError(f"{display_path(path)}: duplicate id on {twice}\nEvery id must appear once.")


def write_predictions(path: Path, predictions: Iterable[tuple[str, str]]) -> None:
    """Write `(id, rewrite_prompt)` rows as a table that appears whole or not at all."""
    write_table(path, PREDICTION_COLUMNS, predictions)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table of texts that appears whole or not at all; reading it back gives the same cells.

    Args:
        path: Parquet if its name ends in `.parquet`, else a UTF-8 CSV; here or on an object store.
        columns: their names.
        rows: are taken one by one.
    """
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, columns, rows)
        else:
            _write_csv(temporary, columns, rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        plain = csv.writer(file, lineterminator="\n")
        # The csv module leaves a lone carriage return bare, which reads back as a line break.
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(columns)
        for row in rows:
            (quoted if any("\r" in cell for cell in row) else plain).writerow(row)


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in columns])
    source = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while block := list(islice(source, _BLOCK)):
            cells = zip(*block, strict=True)
            writer.write_table(pa.table([pa.array(column, pa.string()) for column in cells], schema=schema))


def has_text(text: str) -> bool:
    """Whether a text holds more than blanks and NULs."""
    return bool(text.replace("\0", "").strip())


def digest_pairs(pairs: Iterable[Pair]) -> str:
    """SHA-256 over ids and texts in order: the same for a CSV and a Parquet file of the same rows."""
    digest = hashlib.sha256()
    for pair in pairs:
        for cell in (pair.id, pair.original_text, pair.rewritten_text):
            content = cell.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()


def _parts(folder: Path) -> list[Path]:
    """The Parquet files of a folder, as programs for large data write them."""
    parts = [path for path in files_in(folder) if path.name.endswith(".parquet")]
    if not parts:
        raise UserError(
            f"{display_path(folder)} is a folder without *.parquet files: name a CSV or Parquet file, or such a folder"
        )
    return parts


def _first_bytes(path: Path, file: BinaryIO) -> bytes:
    """The first bytes, enough to tell what it is; the file is at its beginning again.

    Raises:
        UserError: there is nothing in it but blanks, or it cannot be read.
    """
    try:
        first = file.read(_CHUNK)
        more = first
        while more and not more.strip():
            more = file.read(_CHUNK)
        file.seek(0)
    except OSError as error:
        raise UserError(f"{display_path(path)} cannot be read: {error.strerror or first_line(error)}") from error
    if not more:
        raise UserError(f"{display_path(path)} is empty: a header line with {', '.join(PAIR_COLUMNS)} is expected")
    return first[:8]


@contextmanager
def _decoded(path: Path, file: BinaryIO, encoding: str) -> Iterator[IO[str]]:
    """The file as text, line breaks as they are; what is not in this encoding is an error that says where."""
    name = encoding.lower().replace("_", "-")
    # "utf-8-sig" is UTF-8 that also takes a byte order mark.
    codec = "utf-8-sig" if name in ("utf-8", "utf8") else encoding
    try:
        if name in _NO_ENCODINGS:
            raise LookupError
        text = io.TextIOWrapper(file, codec, newline="")
    except (LookupError, ValueError):  # ValueError: a NUL in its name
        raise UserError(f"unknown --encoding {encoding!r}: try utf-8, cp1252, latin-1 or utf-16") from None
    try:
        yield text
    except UnicodeError:
        raise UserError(_undecodable(path, file, codec, encoding)) from None
    except OSError as error:
        raise UserError(f"{display_path(path)} cannot be read: {error.strerror or first_line(error)}") from error
    finally:
        text.detach()  # the file is for its owner to close


def _undecodable(path: Path, file: BinaryIO, codec: str, encoding: str) -> str:
    """Where a file is not in an encoding, found by reading it again."""
    decoder = codecs.getincrementaldecoder(codec)()
    file.seek(0)
    lines, start, mark = 1, 0, b""
    while True:
        chunk = file.read(_CHUNK)
        mark = mark or chunk[:2]
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # What the decoder looked at ends where the chunk does, and may begin before it.
            offset = start + len(chunk) - len(error.object) + error.start
            line = lines + chunk.count(b"\n", 0, max(0, offset - start))
            guess = "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
            wrong = error.object[error.start : error.start + 1]
            return (
                f"{display_path(path)}: line {line}, byte offset {offset}: {wrong!r} "
                f"is not valid {encoding}\nIf the file has another encoding, name it: --encoding {guess}"
            )
        except UnicodeError as error:
            return f"{display_path(path)} is not valid {encoding}: {error}"
        if not chunk:
            return f"{display_path(path)} is not valid {encoding}"
        lines += chunk.count(b"\n")
        start += len(chunk)


def _csv_rows(path: Path, text: IO[str], columns: Sequence[str], *, exact: bool) -> Iterator[Row]:
    # The standard module tells line numbers and takes NUL, CRLF, embedded newlines and megabyte cells.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, strict=True)
    line = 1
    try:
        header = next((cells for cells in reader if cells), None)
        if header is None:
            raise UserError(f"{display_path(path)} is empty: a header line with {', '.join(columns)} is expected")
        where = _columns_in(path, header, columns, exact=exact)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{display_path(path)}: line {line} has {len(cells)} fields, the header has {len(header)}\n"
                    "Texts that hold commas, quotes or newlines must be quoted."
                )
            if cells:
                yield Row(f"line {line}", tuple(cells[index] for index in where))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{display_path(path)}: the row that starts on line {line} is not valid CSV: {error}") from None


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        return next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise UserError(f"{display_path(path)}: the row that starts on line 1 is not valid CSV: {error}") from None


def _parquet_rows(path: Path, file: BinaryIO, columns: Sequence[str], *, exact: bool) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    with _parquet_errors(path):
        table = pq.ParquetFile(file, buffer_size=_CHUNK, pre_buffer=False)
        _columns_in(path, table.schema_arrow.names, columns, exact=exact)
        _check_flat(path, table.schema_arrow, columns)
        for batch in table.iter_batches(_BLOCK, columns=list(columns)):
            cells = ([_text(value) for value in batch.column(name).to_pylist()] for name in columns)
            for row in zip(*cells, strict=True):
                number += 1
                yield Row(f"row {number}", row)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    # KeyError and TypeError: of a schema whose types contradict each other.
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError, MemoryError) as error:
        raise UserError(f"{display_path(path)} is not a readable Parquet file: {first_line(error)}") from None


def _check_flat(path: Path, schema: Any, columns: Sequence[str]) -> None:
    """Refuse columns of lists and records: what they should be as text is not for us to guess."""
    import pyarrow as pa

    nested = [f"{name} ({schema.field(name).type})" for name in columns if pa.types.is_nested(schema.field(name).type)]
    if nested:
        raise UserError(f"{display_path(path)}: column {', '.join(nested)} does not hold texts but nested values")


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return str(value)


def _columns_in(path: Path, header: Sequence[str], columns: Sequence[str], *, exact: bool) -> list[int]:
    missing = [name for name in columns if name not in header]
    if missing:
        close = {name: difflib.get_close_matches(name, header, n=1, cutoff=0.7) for name in missing}
        hints = "".join(f"; is {match[0]!r} meant to be {name!r}?" for name, match in close.items() if match)
        found = ", ".join(repr(name[:60]) for name in header[:20])
        raise UserError(f"{display_path(path)}: missing column {', '.join(missing)}\nFound: {found}{hints}")
    twice = [name for name in columns if list(header).count(name) > 1]
    if twice:
        raise UserError(f"{display_path(path)}: column {', '.join(twice)} appears more than once in the header")
    if exact and list(header) != list(columns):
        raise UserError(
            f"{display_path(path)}: the columns must be {','.join(columns)} and no others\n"
            f"Found: {','.join(header[:20])}"
        )
    return [list(header).index(name) for name in columns]


def some(items: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    listed = Listed()
    for item in items:
        listed.add(item)
    return str(listed)


class Listed:
    """Things to be named in an error: the first few, and how many more there are."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0

    def add(self, item: str) -> None:
        """One more."""
        self._count += 1
        if self._count <= _SHOWN:
            self._first.append(item)

    def __len__(self) -> int:
        return self._count

    def __str__(self) -> str:
        more = f" and {self._count - _SHOWN} more" if self._count > _SHOWN else ""
        return ", ".join(self._first) + more
