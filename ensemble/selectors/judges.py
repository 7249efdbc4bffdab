"""Judges: a model is shown the pair and candidates, and its opinion is read from the probabilities of single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
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
_ROUNDS = 200  # of the fit of strengths
_PRIOR = 0.1  # half wins that everybody has, so that one who won or lost all has a finite strength


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

    @staticmethod
    def attention(answers: Sequence[Known], count: int) -> float:
        """How probable it is that the judge answers with a letter at all, mean over orders, from 0 to 1."""
        return sum(math.exp(known.sum) for known in answers) / (len(answers) / count)

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


class Pairs(Asker):
    """A judge compares two at a time, in both orders; strengths by Bradley and Terry (1952)."""

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """Both letters' probabilities for every ordered pair of candidates."""
        shown = [candidates[place].text for place in shown_together(candidates)]
        return [
            (render_pick(pair, [shown[a], shown[b]]), letter)
            for a, b in permutations(range(len(shown)), 2)
            for letter in LETTERS[:2]
        ]

    def combine(self, candidates: Sequence[Candidate], answers: list[Known]) -> list[float]:
        """Log-strengths; NaN for those that were not shown."""
        import numpy as np

        shown = shown_together(candidates)
        if len(shown) == 1:
            return [0.0]
        wins = np.zeros((len(shown), len(shown)))
        logs = [known.sum for known in answers]
        for number, (a, b) in enumerate(permutations(range(len(shown)), 2)):
            first, second = softmax(logs[2 * number : 2 * number + 2])
            wins[a, b] += first
            wins[b, a] += second
        return _at_their_places(bradley_terry(wins).tolist(), shown, len(candidates))


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
    order = sorted(range(len(candidates)), key=lambda place: (-len(candidates[place].draws), place))
    return sorted(order[:MOST])


def bradley_terry(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-strengths of players with mean 0, by Hunter's (2004) iteration.

    Args:
        wins: how often, or how probably, row beat column, shape (players, players).
    """
    import numpy as np

    wins = wins + _PRIOR / 2
    np.fill_diagonal(wins, 0)
    games = wins + wins.T
    strengths = np.ones(len(wins))
    for _ in range(_ROUNDS):
        strengths = wins.sum(axis=1) / (games / (strengths[:, None] + strengths)).sum(axis=1)
        strengths /= np.exp(np.log(strengths).mean())
    logs: NDArray[np.float64] = np.log(strengths)
    return logs


def _at_their_places(values: Sequence[float], places: Sequence[int], count: int) -> list[float]:
    """Values at these places of a list of `count`; NaN elsewhere."""
    scores = [math.nan] * count
    for place, value in zip(places, values, strict=True):
        scores[place] = value
    return scores
