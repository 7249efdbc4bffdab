"""From scores to choices, for many rows at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensemble.candidates import Answer, Candidate, CandidateRow
from ensemble.selectors import Selector
from ensemble.selectors.asking import ask_ahead
from submission.calls.likelihoods import Likelihoods, Question
from submission.calls.models import NOT_IN_LOG
from submission.errors import UserError
from submission.predict.strategies import DEFAULT_PROMPT
from submission.progress import show_progress

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SelectorScores:
    """What one selector says about every candidate of every row.

    Attributes:
        values: by row and candidate; NaN where it says nothing.
        tokens: that its model was given, a row; shared beginnings count each time.
        seconds: that its model took, a row.
    """

    values: list[list[float]]
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def undecided(self) -> int:
        """Rows of which it says nothing at all; the first candidate is taken."""
        return sum(bool(row) and all(value != value for value in row) for row in self.values)


def score_rows(
    rows: Sequence[CandidateRow], selectors: Mapping[str, Selector], *, nested: bool = False
) -> dict[str, SelectorScores]:
    """Let selectors score the candidates of all rows; questions to models are asked together, first.

    Args:
        rows: with their candidates.
        selectors: by name.
        nested: True in a run that shows progress already: plain lines only.

    Raises:
        UserError: a selector returned another number of scores than there are candidates.
    """
    asked = [(row.pair, row.candidates) for row in rows if row.candidates]
    for model, questions in ask_ahead(selectors.values(), asked).values():
        if nested:
            ask_together(model, questions, "choosing", "likelihoods", nested=True)
        else:
            LOG.info(f"{len(questions)} questions to a model")
            ask_together(model, questions, "asking", "questions")
    return {name: _score(name, selector, rows) for name, selector in selectors.items()}


def ask_together(
    model: Likelihoods, questions: Sequence[Question], doing: str, unit: str, *, nested: bool = False
) -> None:
    """Have a model answer questions, with progress; warns how many failed, and why the first did.

    Args:
        model: that is asked.
        questions: whose answers it knows from then on.
        doing, unit, nested: see `submission.progress.show_progress`.
    """
    with show_progress(len(questions) * model.calls, 0, doing=doing, unit=unit, nested=nested) as progress:
        found = model.of(questions, progress.advance)
    if failures := [known.failure for known in found if known.failure not in ("", NOT_IN_LOG)]:  # nothing was asked
        LOG.warning(
            "%d of %d questions to a model failed, the first with: %s; other evidence decides in those rows",
            len(failures), len(found), failures[0],
        )  # fmt: skip


def _score(name: str, selector: Selector, rows: Sequence[CandidateRow]) -> SelectorScores:
    values = []
    for row in rows:
        scores = [float(score) for score in selector(row.pair, row.candidates)] if row.candidates else []
        if len(scores) != len(row.candidates):
            raise UserError(f"selector {name} gave {len(scores)} scores to {len(row.candidates)} candidates")
        values.append(scores)
    tokens = seconds = 0.0
    asked = [(row.pair, row.candidates) for row in rows if row.candidates]
    for model, questions in ask_ahead([selector], asked).values():
        for known in model.of(questions):
            tokens += known.prompt_tokens + known.tokens
            seconds += known.seconds
    return SelectorScores(values, tokens / max(1, len(rows)), seconds / max(1, len(rows)))


def best(scores: Sequence[float]) -> int:
    """The place of the highest score; the first of equal ones, never one that is not a number if there is another."""
    return max(range(len(scores)), key=lambda place: -math.inf if scores[place] != scores[place] else scores[place])


def order(scores: Sequence[float]) -> list[int]:
    """Places from best to worst, as `best` compares them."""
    known = [-math.inf if score != score else score for score in scores]
    return sorted(range(len(scores)), key=lambda place: (-known[place], place))


def answer_of(row: CandidateRow, scores: Sequence[float], concat: int = 1, constant: str = "") -> str:
    """The answer to a row.

    Args:
        row: with its candidates; without one the answer is the constant, or the default prompt.
        scores: of the candidates.
        concat: how many of the best ones are joined.
        constant: a prompt that is put behind them; "" for none.
    """
    if not row.candidates:
        return constant or DEFAULT_PROMPT
    texts = [row.candidates[place].text for place in order(scores)[: max(1, concat)]]
    texts += [constant] if constant else []
    return texts[0] if len(texts) == 1 else " ".join(_sentence(text) for text in texts)


def or_fallback(row: CandidateRow) -> CandidateRow:
    """The row, with the default prompt as its candidate if it has none."""
    if row.candidates:
        return row
    return CandidateRow(row.pair, (Candidate(DEFAULT_PROMPT, (Answer("fallback", 0, 0.0, 1),)),))


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
