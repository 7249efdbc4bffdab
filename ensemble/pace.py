"""How the time of a run is shared out: among the models that answer in turn, and among the rows of one.

A turn is one source's, or the selection's. `Pace` says before each wave how many rows it has and how many samples each
may have, and learns from what the wave took.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from submission.types import Budget

LOG = logging.getLogger(__name__)

WAVE = 64
"""Rows that are asked together at least, once it is known how long they take: fewer leave a GPU half empty."""

_FIRST, _FIRST_SHARE = (4, 32), 8  # rows that tell how long a row takes: an eighth of all, within these bounds
_WAVE_SHARE = 0.125  # of the time left that a wave takes
_RESERVE = 0.9  # of the time left is planned with
_FIXED = 0.4  # of what a row takes is for its prompt: eight samples take 2.4 times as long as one (docs/SPEED.md)


class Turns:
    """Divides the time left among turns in proportion to their weights.

    Args:
        budget: of the run.
        weights: of the turns, in their order.
    """

    def __init__(self, budget: Budget, weights: Sequence[float]) -> None:
        self._budget, self._weights = budget, list(weights)

    def next(self, name: str, most: int = 1, least: int = WAVE) -> Pace:
        """The pace of the next turn; see `Pace`."""
        left, total = self._budget.remaining(), sum(self._weights)
        return Pace(self._budget, left * self._weights.pop(0) / total, name, most, least)


class Pace:
    """How many rows are asked together, and how many samples each may have, so that a turn ends in its time.

    Args:
        budget: of the run.
        seconds: of the turn; infinite without a deadline.
        name: of the turn, for messages.
        most: answers of a row at most.
        least: rows that are asked together at least, once it is known how long they take.
    """

    def __init__(self, budget: Budget, seconds: float, name: str, most: int = 1, least: int = WAVE) -> None:
        self._budget, self._name, self._most, self._least = budget, name, max(1, most), least
        self._after = max(0.0, budget.remaining() - seconds) if math.isfinite(seconds) else 0.0
        self._limited = math.isfinite(seconds)
        self._each: float | None = None  # seconds that a row takes with all its samples
        self._waves = 0
        self._last = 1.0

    @property
    def left(self) -> float:
        """Seconds that are left of the turn; infinite without a deadline."""
        return max(0.0, self._budget.remaining() - self._after) if self._limited else math.inf

    def wave(self, rows: int) -> int:
        """How many of the next rows are asked together: all where there is no deadline."""
        if not self._limited:
            return rows
        if self._waves == 0:
            return min(rows, 1)  # it loads the model, and tells nothing of the pace
        if self._each is None:
            return min(rows, max(_FIRST[0], min(_FIRST[1], rows // _FIRST_SHARE)))
        return min(rows, max(self._least, int(_WAVE_SHARE * self.left / max(self._each, 1e-9))))

    def share(self, rows: int, least: float = 0.0) -> float:
        """The share of the samples that the next rows may have, from `least`; 0 for greedy answers alone."""
        if not self._limited or self._each is None:
            return 1.0
        afford = self.left * _RESERVE / (rows * max(self._each, 1e-9))
        share = 1.0 if afford >= 1 else (afford - _FIXED) / (1 - _FIXED)
        share = max(least, share if share * self._most >= 1 else 0.0)
        if (share < 1) != (self._last < 1) or (share == 0) != (self._last == 0):
            LOG.info(f"time: {self.left:.0f} s for {rows} rows of {self._name}: {words(share)} from here on")
        self._last = share
        return share

    def took(self, seconds: float, rows: int, share: float) -> None:
        """Learn from rows that were answered; what a row takes grows with its samples, but for its prompt."""
        self._waves += 1
        if self._waves > 1 and share > 0:
            self._each = seconds / rows / (_FIXED + (1 - _FIXED) * max(share, 1 / self._most))


def words(share: float) -> str:
    """A share of the samples, in words."""
    return "all samples" if share == 1 else "greedy answers only" if share == 0 else f"{share:.0%} of the samples"
