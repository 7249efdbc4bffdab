"""Tables of any kind as records: CSV, Parquet, JSONL, and Kaggle datasets by `kaggle:owner/name`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from submission.backends import require
from submission.data.files import atomic_folder, cache_folder, files_in, is_folder, on_store, open_binary
from submission.data.tables import header_of, stream_table
from submission.errors import UserError

LOG = logging.getLogger(__name__)

KAGGLE = "kaggle:"
_TABLES = (".csv", ".parquet", ".jsonl", ".ndjson")

Record = Mapping[str, str]


def read_records(path: Path, wanted: Collection[str]) -> tuple[list[str], Iterator[Record]]:
    """The names of a table's columns, and its rows one by one, as text by column; nulls become blanks.

    Args:
        path: CSV, Parquet or JSONL; the columns of JSONL are those of its first line.
        wanted: columns to read, as far as there are such.

    Raises:
        UserError: it is missing, not a table, or one of the columns does not hold texts; names the line. Of a row it is
            raised when that row is read.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = _read_jsonl(path, wanted)
        first = next(lines, None)
        if first is None:
            return [], iter(())
        return first[0], (record for _, record in chain([first], lines))
    names = header_of(path)
    columns = [name for name in dict.fromkeys(names) if name in wanted]
    rows = stream_table(path, columns) if columns else iter(())
    return names, (dict(zip(columns, row.cells, strict=True)) for row in rows)


def resolve(source: str) -> list[Path]:
    """The files that a source names: a file, a folder of tables, or a Kaggle dataset, which is downloaded once.

    Raises:
        UserError: there is no such file or folder, or the download failed; says what to do.
    """
    path = _download(source.removeprefix(KAGGLE)) if source.startswith(KAGGLE) else Path(source).expanduser()
    if is_folder(path):
        files = [file for file in files_in(path) if file.suffix.lower() in _TABLES]
        if not files:
            raise UserError(f"{source} holds no CSV, Parquet or JSONL file")
        return files
    if not path.is_file() and not on_store(path):
        raise UserError(f"source {source} does not exist")
    return [path]


def _read_jsonl(path: Path, wanted: Collection[str]) -> Iterator[tuple[list[str], Record]]:
    """All names of a line and what is wanted of it, line by line."""
    try:
        with open_binary(path) as content, TextIOWrapper(content, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except RecursionError:
                    raise UserError(f"{path}: line {number} is nested too deeply") from None
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise UserError(f"{path}: line {number} is not a JSON object")
                nested = [key for key in wanted if isinstance(record.get(key), dict | list)]
                if nested:
                    raise UserError(f"{path}: line {number}: {nested[0]} does not hold a text but nested values")
                yield list(record), {key: _text(record[key]) for key in wanted if key in record}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _text(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # JSON can spell halves of characters, which no file can hold


def _download(name: str) -> Path:
    """The folder of a Kaggle dataset; a download that fails leaves none."""
    require("kaggle", "kaggle", f"source {KAGGLE}{name}")
    if name.count("/") != 1:
        raise UserError(f"source {KAGGLE}{name}: write it as {KAGGLE}owner/name")
    folder = cache_folder("datasets") / name
    if folder.is_dir():
        return folder
    LOG.info(f"downloading {KAGGLE}{name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as part:
        # The client ends the process when credentials are missing, so it has one of its own.
        done = subprocess.run(
            [sys.executable, "-m", "kaggle", "datasets", "download", "-d", name, "-p", str(part), "--unzip", "-q"],
            capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode != 0 or not any(part.iterdir()):
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise UserError(
                f"source {KAGGLE}{name} cannot be downloaded: {said[0] if said else 'no answer'}\n"
                "It needs the network and Kaggle credentials (KAGGLE_API_TOKEN, or ~/.kaggle)."
            )
    return folder
