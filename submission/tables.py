"""The one reader and writer of tables for the whole project: CSV or Parquet in, CSV out.

A real row of the competition's public test set, shortened:

    id,original_text,rewritten_text
    -1,"The competition dataset comprises text passages ...","Here is your shanty: (Verse 1) ..."

Ids are text, kept to the letter (`-1`, `007`, UUIDs); texts are never interpreted (`NA` is a word).
"""

from __future__ import annotations

import csv
import difflib
import glob
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from submission.errors import UserError
from submission.types import Pair, Triplet

PAIR_COLUMNS = ("id", "original_text", "rewritten_text")
TRIPLET_COLUMNS = (*PAIR_COLUMNS, "rewrite_prompt")
PREDICTION_COLUMNS = ("id", "rewrite_prompt")

_PARQUET = b"PAR1"
_SHOWN = 5  # how many offending lines an error lists


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
    rows = read_table(path, PAIR_COLUMNS, encoding)
    check_ids(path, rows)
    return [Pair(*row.cells) for row in rows]


def read_triplets(path: Path, encoding: str = "utf-8") -> list[Triplet]:
    """Read pairs with their known prompts; rows whose prompt or rewritten text is blank are left out.

    Raises:
        UserError: as `read_pairs`, or when no row is left.
    """
    rows = read_table(path, TRIPLET_COLUMNS, encoding)
    check_ids(path, rows)
    triplets = [
        Triplet(Pair(*row.cells[:3]), row.cells[3]) for row in rows if row.cells[2].strip() and row.cells[3].strip()
    ]
    if not triplets:
        raise UserError(f"{path}: no row has both a rewritten_text and a rewrite_prompt")
    return triplets


def read_table(path: Path, columns: Sequence[str], encoding: str = "utf-8", *, exact: bool = False) -> list[Row]:
    """Read `columns` of a CSV or Parquet file (told apart by content) as text; nulls become blanks.

    Args:
        path: the file, or a folder of Parquet files, which are read in the order of their names.
        columns: names of the columns to read, in the order wanted.
        encoding: of a CSV file.
        exact: refuse a table with other columns, or another order of them.

    Raises:
        UserError: see `read_pairs`.
    """
    if path.is_dir():
        return [
            Row(f"{part.relative_to(path)}, {row.where}", row.cells)
            for part in _parts(path)
            for row in read_table(part, columns, encoding, exact=exact)
        ]
    content = _read_bytes(path)
    if content.startswith(_PARQUET):
        return _parse_parquet(path, content, columns, exact=exact)
    for magic, kind, tool in ((b"PK\x03\x04", "a zip archive", "unzip"), (b"\x1f\x8b", "gzipped", "gunzip")):
        if content.startswith(magic):
            raise UserError(f"{path} is {kind}, not a CSV or Parquet file: {tool} it first")
    return _parse_csv(path, _decode(path, content, encoding), columns, exact=exact)


def header_of(path: Path) -> list[str]:
    """The column names of a CSV or Parquet file.

    Raises:
        UserError: it cannot be read.
    """
    content = _read_bytes(_parts(path)[0] if path.is_dir() else path)
    if not content.startswith(_PARQUET):
        reader = csv.reader(io.StringIO(_decode(path, content, "utf-8"), newline=""))
        return next((cells for cells in reader if cells), [])
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names: list[str] = pq.read_schema(pa.BufferReader(content)).names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    return names


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether a table has all these columns; raises as `header_of`."""
    return set(columns) <= set(header_of(path))


def is_parquet(path: Path) -> bool:
    """True if the file begins with Parquet's magic bytes."""
    with path.open("rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET


def check_ids(path: Path, rows: Sequence[Row]) -> None:
    """Refuse null ids and ids that appear twice; the first cell of each row is its id.

    Raises:
        UserError: names the lines, and for a duplicate the line of its first appearance.
    """
    null = [row.where for row in rows if not row.cells[0].strip()]
    if null:
        raise UserError(f"{path}: null id on {some(null)}\nEvery row needs an id; fill it in or drop the row.")
    first: dict[str, str] = {}
    duplicates = [
        f"{row.where} (id {row.cells[0]!r}, first on {first[row.cells[0]]})"
        for row in rows
        if first.setdefault(row.cells[0], row.where) != row.where
    ]
    if duplicates:
        raise UserError(f"{path}: duplicate id on {some(duplicates)}\nEvery id must appear once.")


def write_predictions(path: Path, predictions: Iterable[tuple[str, str]]) -> None:
    """Write `(id, rewrite_prompt)` rows as a CSV that appears whole or not at all."""
    write_table(path, PREDICTION_COLUMNS, predictions)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a UTF-8 CSV that appears whole or not at all; reading it back gives the same cells."""
    with atomic_writer(path) as file:
        plain = csv.writer(file, lineterminator="\n")
        # The csv module leaves a lone carriage return bare, which reads back as a line break.
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(columns)
        for row in rows:
            (quoted if any("\r" in cell for cell in row) else plain).writerow(row)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The name of an empty file beside `path` that takes its place, synced to disk, when the block ends well."""
    handle, temporary = _temporary_beside(path)
    os.close(handle)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place when the block ends well; what was there before goes."""
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as content:
                    os.fsync(content.fileno())
        part.chmod(0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[str]]:
    """Open a text file beside `path` that takes its place, synced to disk, when the block ends well."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON file for people and programs, whole or not at all; `default` as in `json.dump`."""
    with atomic_writer(path) as file:
        json.dump(content, file, indent=2, default=default)
        file.write("\n")


def _temporary_beside(path: Path) -> tuple[int, Path]:
    """A new file, open for writing, under a name that `remove_leftovers` knows."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    return handle, Path(name)


def remove_leftovers(path: Path) -> None:
    """Remove what `atomic_path` left beside `path`, or files named after it, when its process was killed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*tmp"):
        leftover.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse an output path that could not be written at the end of a run.

    Raises:
        UserError: the path is a folder, its folder does not exist or cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"output {path} is a folder: name a file, such as {path / 'submission.csv'}")
    if path.exists() and not path.is_file():
        raise UserError(f"output {path} is a device or a pipe: the output must be a file that can appear as a whole")
    if not path.parent.is_dir():
        raise UserError(f"output folder {path.parent} does not exist: create it with mkdir -p {path.parent}")
    try:
        handle, temporary = _temporary_beside(path)
        os.close(handle)
        temporary.unlink(missing_ok=True)
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from error


def says_something(text: str) -> bool:
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
    parts = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    if not parts:
        raise UserError(f"{folder} is a folder without *.parquet files: name a CSV or Parquet file, or such a folder")
    return parts


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UserError(f"{path} is empty: a header line with {', '.join(PAIR_COLUMNS)} is expected")
    return content


def _decode(path: Path, content: bytes, encoding: str) -> str:
    try:
        # "utf-8-sig" is UTF-8 that also takes a byte order mark.
        return content.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise UserError(f"unknown --encoding {encoding!r}: try utf-8, cp1252, latin-1 or utf-16") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        guess = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise UserError(
            f"{path}: line {line}, byte offset {error.start}: {content[error.start : error.start + 1]!r} "
            f"is not valid {encoding}\nIf the file has another encoding, name it: --encoding {guess}"
        ) from None
    except UnicodeError as error:
        raise UserError(f"{path} is not valid {encoding}: {error}") from None


def _parse_csv(path: Path, text: str, columns: Sequence[str], *, exact: bool) -> list[Row]:
    # The standard module tells line numbers and takes NUL, CRLF, embedded newlines and megabyte cells.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    line = 1
    try:
        header = next(reader)
        while not header:
            header = next(reader)
        where = _columns_in(path, header, columns, exact=exact)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{path}: line {line} has {len(cells)} fields, the header has {len(header)}\n"
                    "Texts that hold commas, quotes or newlines must be quoted."
                )
            if cells:
                rows.append(Row(f"line {line}", tuple(cells[index] for index in where)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: the row that starts on line {line} is not valid CSV: {error}") from None
    except StopIteration:
        raise UserError(f"{path} is empty: a header line with {', '.join(columns)} is expected") from None
    return rows


def _parse_parquet(path: Path, content: bytes, columns: Sequence[str], *, exact: bool) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _columns_in(path, file.schema_arrow.names, columns, exact=exact)
        table = file.read(columns=list(columns))
        cells = [[_text(value) for value in table.column(name).to_pylist()] for name in columns]
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    return [Row(f"row {number}", row) for number, row in enumerate(zip(*cells, strict=True), start=1)]


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
        raise UserError(f"{path}: missing column {', '.join(missing)}\nFound: {found}{hints}")
    twice = [name for name in columns if list(header).count(name) > 1]
    if twice:
        raise UserError(f"{path}: column {', '.join(twice)} appears more than once in the header")
    if exact and list(header) != list(columns):
        raise UserError(
            f"{path}: the columns must be {','.join(columns)} and no others\nFound: {','.join(header[:20])}"
        )
    return [list(header).index(name) for name in columns]


def some(items: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
