"""Is a submission valid for its input? Read back from disk, as the grader would.

python -m submission validate submission.csv test.csv
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from submission.data.files import display_path
from submission.data.tables import PREDICTION_COLUMNS, Row, is_parquet, read_table, stream_table
from submission.errors import UserError
from submission.prompts.answers import is_blank


def validate(submission: Path, ids: Iterable[str], encoding: str = "utf-8") -> list[str]:
    """List what is wrong with a submission, one sentence each; an empty list means valid.

    Args:
        submission: a table with the columns `id,rewrite_prompt`; a CSV unless its name ends in `.parquet`.
        ids: of the input, in order; they are gone through more than once.
        encoding: of the submission.
    """
    try:
        if submission.suffix != ".parquet" and is_parquet(submission):
            return [f"{display_path(submission)} is a Parquet file: a submission is a CSV"]
        if _is_valid(submission, ids, encoding):
            return []
        rows = read_table(submission, PREDICTION_COLUMNS, encoding, exact=True)
    except UserError as error:
        return [str(error)]
    return list(_problems(submission, rows, list(ids)))


def _is_valid(submission: Path, ids: Iterable[str], encoding: str) -> bool:
    """Row by row, so that a long file takes no memory; what is wrong is for `_problems` to say."""
    rows = stream_table(submission, PREDICTION_COLUMNS, encoding, exact=True)
    return all(
        row is not None and wanted is not None and row.cells[0] == wanted and wanted.strip() and _says(row.cells[1])
        for row, wanted in zip_longest(rows, ids)
    )


def _says(prompt: str) -> bool:
    return not is_blank(prompt) and "\0" not in prompt


def _problems(submission: Path, rows: Sequence[Row], ids: Sequence[str]) -> Iterator[str]:
    expected = set(ids)
    seen: dict[str, str] = {}
    for row in rows:
        where, (row_id, prompt) = row.where, row.cells
        if not row_id.strip():
            yield f"{display_path(submission)}: {where}: the id is null"
        elif row_id in seen:
            yield f"{display_path(submission)}: {where}: id {row_id!r} is a duplicate of {seen[row_id]}"
        elif row_id not in expected:
            yield f"{display_path(submission)}: {where}: id {row_id!r} is not in the input"
        seen.setdefault(row_id, where)
        if not _says(prompt):
            yield f"{display_path(submission)}: {where}: rewrite_prompt of id {row_id!r} is blank or reads as null"
    for row_id in ids:
        if row_id not in seen:
            yield f"{display_path(submission)}: id {row_id!r} of the input is missing"
    if len(rows) == len(ids) and expected == set(seen):
        for row, wanted in zip(rows, ids, strict=True):
            if row.cells[0] != wanted:
                where = f"{display_path(submission)}: {row.where}"
                yield f"{where}: order differs: id {row.cells[0]!r}, the input has {wanted!r}"
                return
