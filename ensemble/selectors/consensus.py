"""Consensus: the candidate that scores best if any of the answers may be the truth."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble.candidates import Candidate
from eval.encoders import Encoder
from eval.metric import sharpened_cosines
from submission.types import Pair


class Consensus:
    """Minimum Bayes risk under the metric (Kumar and Byrne, 2004), each answer as likely as any other.

    Args:
        encoder: of the metric.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __call__(self, pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
        """Mean score of each candidate against all answers but one of its own, from -1 to 1."""
        import numpy as np

        vectors = self._encoder.embed([candidate.text for candidate in candidates])
        scores = sharpened_cosines(vectors, vectors)
        counts = np.array([len(candidate.answers) for candidate in candidates], float)
        if counts.sum() < 2:
            return [0.0] * len(candidates)
        expected: list[float] = ((scores @ counts - scores.diagonal()) / (counts.sum() - 1)).tolist()
        return expected
