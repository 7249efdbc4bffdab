"""Is a submission valid for its input? Read back from disk, as the grader would.

python -m submission validate submission.csv test.csv
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from submission.answers import is_blank
from submission.errors import UserError
from submission.tables import PREDICTION_COLUMNS, Row, is_parquet, read_table


def validate(submission: Path, ids: Sequence[str], encoding: str = "utf-8") -> list[str]:
    """List what is wrong with a submission, one sentence each; an empty list means valid.

    Args:
        submission: the CSV with the columns `id,rewrite_prompt`.
        ids: the ids of the input, in order.
        encoding: of the submission.
    """
    if submission.is_file() and is_parquet(submission):
        return [f"{submission} is a Parquet file: a submission is a CSV"]
    try:
        rows = read_table(submission, PREDICTION_COLUMNS, encoding, exact=True)
    except UserError as error:
        return [str(error)]
    return list(_problems(submission, rows, ids))


def _problems(submission: Path, rows: Sequence[Row], ids: Sequence[str]) -> Iterator[str]:
    expected = set(ids)
    seen: dict[str, str] = {}
    for row in rows:
        where, (row_id, prompt) = row.where, row.cells
        if not row_id.strip():
            yield f"{submission}: {where}: the id is null"
        elif row_id in seen:
            yield f"{submission}: {where}: id {row_id!r} is a duplicate of {seen[row_id]}"
        elif row_id not in expected:
            yield f"{submission}: {where}: id {row_id!r} is not in the input"
        seen.setdefault(row_id, where)
        if is_blank(prompt) or "\0" in prompt:
            yield f"{submission}: {where}: rewrite_prompt of id {row_id!r} is blank or reads as null"
    for row_id in ids:
        if row_id not in seen:
            yield f"{submission}: id {row_id!r} of the input is missing"
    if len(rows) == len(ids) and expected == set(seen):
        for row, wanted in zip(rows, ids, strict=True):
            if row.cells[0] != wanted:
                yield f"{submission}: {row.where}: order differs: id {row.cells[0]!r}, the input has {wanted!r}"
                return
