"""Candidates: what several answers say about each pair, with their sources and how likely each was.

    candidates.parquet: id, original_text, rewritten_text, candidate, answers

A row for each distinct candidate of a pair; `answers` is a JSON list of [source, number, log-probability, tokens]. A
pair without any candidate has one row whose candidate is blank and whose answers are [].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.encoders import Encoder
from eval.grouping import near_duplicate_groups, plain_text
from submission.data.tables import PAIR_COLUMNS, read_table, write_table
from submission.errors import UserError
from submission.prompts.answers import is_blank
from submission.types import Pair

COLUMNS = (*PAIR_COLUMNS, "candidate", "answers")
NEAR = 0.95
"""How near candidates must be to be one (see `eval.grouping.NEAR`): only what says the same is."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a model.

    Attributes:
        source: its name.
        number: 0 for the greedy answer, samples count from 1.
        logprob: log P(answer), nats, at temperature 1 over the whole vocabulary.
        tokens: of the answer.
    """

    source: str
    number: int
    logprob: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Mean log-probability of a token, nats."""
        return self.logprob / max(1, self.tokens)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text, and the answers that said it, or nearly; the first one's words are kept."""

    text: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """A pair with its candidates, in the order in which they were first given."""

    pair: Pair
    candidates: tuple[Candidate, ...]

    @property
    def answers(self) -> list[tuple[Answer, int]]:
        """Every answer with the place of its candidate."""
        return [(answer, place) for place, candidate in enumerate(self.candidates) for answer in candidate.answers]


def merge(given: Sequence[tuple[str, Answer]], encoder: Encoder | None = None, near: float = NEAR) -> list[Candidate]:
    """Candidates of one pair.

    Args:
        given: texts of answers with what is known of each, greedy ones first; blank ones are no candidates.
        encoder: puts near-duplicates together; None leaves it at case and punctuation.
        near: how near they are; see `NEAR`.
    """
    kept = [(text, answer) for text, answer in given if text.strip()]
    texts = [text for text, _ in kept]
    if encoder is None or len(texts) < 2:
        labels: list[object] = [plain_text(text) for text in texts]
    else:
        labels = near_duplicate_groups(texts, encoder, near).tolist()
    groups: dict[object, list[tuple[str, Answer]]] = {}
    for label, one in zip(labels, kept, strict=True):
        groups.setdefault(label, []).append(one)
    return [Candidate(group[0][0], tuple(answer for _, answer in group)) for group in groups.values()]


def write_candidates(path: Path, rows: Iterable[CandidateRow]) -> None:
    """Write a Parquet file, whole or not at all."""
    write_table(path, COLUMNS, _cells(rows))


def _cells(rows: Iterable[CandidateRow]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        pair = (row.pair.id, row.pair.original_text, row.pair.rewritten_text)
        for candidate in row.candidates or (Candidate("", ()),):
            answers = [[one.source, one.number, one.logprob, one.tokens] for one in candidate.answers]
            yield (*pair, candidate.text, json.dumps(answers, ensure_ascii=False))


def read_candidates(path: Path) -> list[CandidateRow]:
    """Read what `write_candidates` wrote, or any CSV or Parquet file like it; rows of a pair stand together or not.

    Raises:
        UserError: a column is missing, a cell is not what it should be, a pair's texts differ between its rows, or a
            candidate is there twice.
    """
    pairs: dict[str, Pair] = {}
    found: dict[str, list[Candidate]] = {}
    for row in read_table(path, COLUMNS):
        row_id, original, rewritten, text, answers = row.cells
        if not row_id.strip():
            raise UserError(f"{path}: null id on {row.where}")
        pair = Pair(row_id, original, rewritten)
        if pairs.setdefault(row_id, pair) != pair:
            raise UserError(f"{path}: {row.where} has other texts than the rows of id {row_id!r} before it")
        candidates = found.setdefault(row_id, [])
        if any(text == other.text for other in candidates):
            raise UserError(f"{path}: {row.where} repeats a candidate of id {row_id!r}")
        if not is_blank(text):
            candidates.append(Candidate(text, _answers(answers, f"{path}: {row.where}")))
    if not pairs:
        raise UserError(f"{path} has a header and no row")
    return [CandidateRow(pair, tuple(found[row_id])) for row_id, pair in pairs.items()]


def _answers(cell: str, where: str) -> tuple[Answer, ...]:
    try:
        answers = tuple(_answer(*entry) for entry in json.loads(cell))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{where}: answers must be a JSON list of [source, number, log-probability, tokens], not {cell[:60]!r}"
        ) from error
    if not answers:
        raise UserError(f'{where}: a candidate without an answer: name at least one, such as [["mine", 1, 0, 1]]')
    return answers


def _answer(source: object, number: object, logprob: object, tokens: object) -> Answer:
    """Raises ValueError: something is of another kind, below zero or infinite. A log-probability may be NaN."""
    if not (isinstance(source, str) and isinstance(logprob, int | float) and not math.isinf(logprob)):
        raise ValueError
    if not (isinstance(number, int) and isinstance(tokens, int) and 0 <= number < 2**63 > tokens >= 0):
        raise ValueError
    return Answer(source, number, float(logprob), tokens)
