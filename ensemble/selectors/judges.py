"""Judges: a model is shown the pair and candidates, and its opinion is read from the probabilities of single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ensemble.candidates import Candidate
from ensemble.selectors.asking import Asker, softmax
from submission.calls.likelihoods import Known, Likelihoods, Question
from submission.prompts.templates import LETTERS, NO, RATINGS, YES, render_pick, render_rate, render_yes_no
from submission.types import Pair

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST = 16
"""Candidates that are put beside each other: of more, the most frequent ones."""


class Pick(Asker):
    """A judge chooses among lettered candidates; the mean over rotations of their order cancels its taste for letters.

    Args:
        model: the judge.
        rotations: orders that it sees, evenly spread; 0 for as many as there are candidates.
    """

    def __init__(self, model: Likelihoods, rotations: int = 0) -> None:
        super().__init__(model)
        self._rotations = rotations

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """Every letter's probability, for each order."""
        shown = shown_together(candidates)
        return [
            (chat, letter)
            for order in self._orders(len(shown))
            for chat in [render_pick(pair, [candidates[shown[place]].text for place in order])]
            for letter in LETTERS[: len(shown)]
        ]

    def combine(self, candidates: Sequence[Candidate], answers: list[Known]) -> list[float]:
        """Mean probability of each candidate, from 0 to 1; NaN for those that were not shown."""
        shown = shown_together(candidates)
        letters = self.letters(answers, len(shown))
        found = [0.0] * len(shown)
        for order, row in zip(self._orders(len(shown)), letters.tolist(), strict=True):
            for place, probability in zip(order, row, strict=True):
                found[place] += probability / len(letters)
        return _at_their_places(found, shown, len(candidates))

    @staticmethod
    def letters(answers: Sequence[Known], count: int) -> NDArray[np.float64]:
        """Probability of each letter among the letters, shape (orders, letters)."""
        import numpy as np

        logs = [known.sum for known in answers]
        return np.array([softmax(logs[start : start + count]) for start in range(0, len(logs), count)])

    def _orders(self, count: int) -> list[list[int]]:
        shifts = min(self._rotations or count, count)
        starts = [shift * count // shifts for shift in range(shifts)]
        return [[(place + start) % count for place in range(count)] for start in starts]


class Rate(Asker):
    """A judge's rating, the mean over the probabilities of 1 to 5."""

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """Every rating's probability, for each candidate."""
        return [(render_rate(pair, c.text), rating) for c in candidates for rating in RATINGS]

    def combine(self, candidates: Sequence[Candidate], answers: list[Known]) -> list[float]:
        """From 1 to 5."""
        logs = [known.sum for known in answers]
        return [
            sum(int(rating) * p for rating, p in zip(RATINGS, softmax(logs[start : start + 5]), strict=True))
            for start in range(0, len(logs), 5)
        ]


class YesNo(Asker):
    """Was this rewrite made by this candidate? Zero-shot, or as `train` trains a judge on that very question."""

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """Both answers' probabilities, for each candidate."""
        return [(render_yes_no(pair, c.text), answer) for c in candidates for answer in (YES, NO)]

    def combine(self, candidates: Sequence[Candidate], answers: list[Known]) -> list[float]:
        """Log-odds of Yes."""
        return [yes.sum - no.sum for yes, no in zip(answers[::2], answers[1::2], strict=True)]


def shown_together(candidates: Sequence[Candidate]) -> list[int]:
    """Places of up to `MOST` candidates, the most frequent ones, in their order."""
    order = sorted(range(len(candidates)), key=lambda place: (-len(candidates[place].answers), place))
    return sorted(order[:MOST])


def _at_their_places(values: Sequence[float], places: Sequence[int], count: int) -> list[float]:
    """Values at these places of a list of `count`; NaN elsewhere."""
    scores = [math.nan] * count
    for place, value in zip(places, values, strict=True):
        scores[place] = value
    return scores
