"""What a test set shares with the training set: a score on shared rows tells nothing about new ones.

`python -m eval baselines` and `compare --train` count shared prompts and texts, to the letter and nearly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.encoders import Encoder
from eval.grouping import near_pairs, plain_text
from eval.words import near_to
from submission.data.tables import TRIPLET_COLUMNS, has_columns, has_text, read_table
from submission.errors import UserError
from submission.types import Pair

_COLUMNS = {"rewrite_prompt": "prompts", "original_text": "original texts", "rewritten_text": "rewritten texts"}


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows of the test set, by what they share with the training set.

    Attributes:
        rows: of the test set that have such a text.
        exact: the training set has it too, but for case, punctuation and blanks.
        near: the training set has a near-duplicate (see `eval.grouping` and `eval.words`), exact ones included.
    """

    rows: int
    exact: int
    near: int


def shared(train: Path, test: Path, encoder: Encoder) -> dict[str, Shared]:
    """Count what two tables share, by column; columns that either lacks are left out.

    Raises:
        UserError: a table cannot be read.
    """
    found = {}
    for column in TRIPLET_COLUMNS[1:]:
        if has_columns(train, [column]) and has_columns(test, [column]):
            known, asked = ([row.cells[0] for row in read_table(path, [column])] for path in (train, test))
            found[column] = _count(known, asked, encoder if column == "rewrite_prompt" else None)
    return found


def lines(found: Mapping[str, Shared]) -> Iterator[str]:
    """Lines to print: one for each column, or a single one when nothing is shared."""
    clean = True
    for column, count in found.items():
        if count.near:
            clean = False
            yield (
                f"warning    {count.near} of {count.rows} {_COLUMNS[column]} of the test set are in the training set "
                f"({count.exact} to the letter): scores on them tell little about new rows"
            )
    if clean and found:
        yield f"leaks      none: {', '.join(_COLUMNS[column] for column in found)} are disjoint from the training set"


def figures(found: Mapping[str, Shared]) -> dict[str, dict[str, int]]:
    """The figures, for JSON."""
    return {column: {"rows": c.rows, "exact": c.exact, "near": c.near} for column, c in found.items()}


def marks(pairs: Iterable[Pair], prompts: Iterable[str]) -> dict[str, list[str]]:
    """Hashes of pairs and prompts, for a file that must tell what it was fitted on and hold no text of the data."""
    return {
        "pairs": sorted({_hash(pair.original_text, pair.rewritten_text) for pair in pairs}),
        "prompts": sorted({_hash(plain_text(prompt)) for prompt in prompts}),
    }


def check_unseen(file: Path | str, seen: Any, ours: Mapping[str, Sequence[str]]) -> None:
    """Refuse what was fitted on one of these rows.

    Args:
        file: that was fitted.
        seen: the marks in it, which may be damaged.
        ours: the marks of the rows.

    Raises:
        UserError: they share a pair or a prompt.
    """
    for what, wanted in ours.items():
        listed = seen.get(what) if isinstance(seen, dict) else None
        known = {mark for mark in listed if isinstance(mark, str)} if isinstance(listed, list) else set()
        if common := len(known & set(wanted)):
            raise UserError(
                f"{file} was fitted on {common} of the {what} of these rows: its score here would be no measure\n"
                "Fit it on rows that share nothing with them."
            )


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _count(train: Sequence[str], test: Sequence[str], encoder: Encoder | None) -> Shared:
    """Near-duplicates by embedding, or by their words without an encoder."""
    train, test = ([text for text in texts if has_text(text)] for texts in (train, test))
    known = {plain_text(text) for text in train}
    exact = {index for index, text in enumerate(test) if plain_text(text) in known}
    distinct = list(dict.fromkeys(train))
    nearly = near_pairs(test, distinct, encoder)[0].tolist() if encoder else near_to(test, distinct)
    return Shared(len(test), len(exact), len(exact | set(nearly)))
