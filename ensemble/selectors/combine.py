"""Sums of selectors, by rank or weighted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ensemble.candidates import Candidate
from ensemble.selectors.asking import Asking, Selector
from submission.calls.likelihoods import Likelihoods, Question
from submission.types import Pair


def parts_of(name: str) -> list[str]:
    """The selectors of a sum of ranks, `a+b`; the name itself where it is none."""
    return [part.strip() for part in name.split("+")]


class combined:
    """The weighted sum of what several selectors say, each brought to a scale of its own within a row.

    Args:
        parts: selectors.
        weights: of each.
        ranks: sum ranks (0 for the worst to 1); else scores that are centred and divided by their deviation.
    """

    def __init__(self, parts: Sequence[Selector], weights: Sequence[float], *, ranks: bool) -> None:
        self._parts, self._weights, self._ranks = parts, weights, ranks

    def questions(self, pair: Pair, candidates: Sequence[Candidate], /) -> Iterator[tuple[Likelihoods, Question]]:
        """See `Asking`."""
        for part in self._parts:
            if isinstance(part, Asking):
                yield from part.questions(pair, candidates)

    def __call__(self, pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
        """See `Selector`."""
        scale = ranked if self._ranks else standardised
        scored = [scale(part(pair, candidates)) for part in self._parts]
        return [
            sum(weight * values[place] for weight, values in zip(self._weights, scored, strict=True))
            for place in range(len(candidates))
        ]


def ranked(scores: Sequence[float]) -> list[float]:
    """0 for the lowest to 1 for the highest; equal ones share the middle of their places, NaN is lowest."""
    from scipy.stats import rankdata

    if len(scores) < 2:
        return [0.0] * len(scores)
    places = rankdata([-math.inf if score != score else score for score in scores])
    return [float(place - 1) / (len(scores) - 1) for place in places]


def standardised(scores: Sequence[float]) -> list[float]:
    """Centred and divided by the standard deviation within the row; NaN becomes the lowest of the others."""
    known = [score for score in scores if math.isfinite(score)]
    if not known:
        return [0.0] * len(scores)
    filled = [score if math.isfinite(score) else min(known) for score in scores]
    mean = sum(filled) / len(filled)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in filled) / len(filled))
    return [(value - mean) / deviation if deviation > 0 else 0.0 for value in filled]
