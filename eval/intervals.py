"""Means with intervals from a bootstrap over clusters of rows, and what they allow to say.

Rows with the same prompt, or nearly the same, rise and fall together: drawing rows one by one would give intervals that
are too narrow. So whole clusters are drawn, the same ones for all systems, which makes differences paired. Percentiles
of such a bootstrap are too narrow when clusters are few; they are widened as Hesterberg (2015), "What Teachers Should
Know about the Bootstrap", section 5.3.3, says: by sqrt(g / (g - 1)) t(g - 1) in place of the normal quantile. g is the
number of clusters or, when they differ in size, the number of equal ones that would do as much (Kish).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 1 << 21  # counts that are held at a time
_POWER = 0.8  # with which a difference is to be seen


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over rows with its bootstrap interval.

    Attributes:
        mean: over rows.
        low, high: ends of the 95 % interval; NaN where there is a single cluster, which tells nothing of others.
        error: standard error of the mean; NaN likewise.
    """

    mean: float
    low: float
    high: float
    error: float

    @property
    def holds_zero(self) -> bool:
        """Whether zero cannot be ruled out."""
        return not (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return format(self)

    def __format__(self, form: str) -> str:
        """In words: `form` is that of its numbers, such as +.4f."""
        form = form or ".4f"
        return self.shown(form) if self.low == self.low else f"{self.mean:{form}} [one prompt: no interval]"

    def shown(self, form: str = ".4f") -> str:
        """For a table: the mean, and the interval where there is one."""
        mean = f"{self.mean:{form}}"
        return f"{mean} [{self.low:{form}}, {self.high:{form}}]" if self.low == self.low else mean


def bootstrap(
    values: NDArray[np.floating],
    clusters: NDArray[np.integer] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Means and 95 % intervals of columns that are measured on the same rows.

    Args:
        values: shape (rows, columns), a column for each system or difference of two.
        clusters: label of each row's cluster, shape (rows,); None means that each row is its own.
        resamples: how many times clusters are drawn.
        seed: of the draws; the same values give the same intervals.

    Returns:
        one interval for each column.

    Raises:
        ValueError: there is no row, or a value is not finite.
    """
    import numpy as np

    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values of shape {values.shape}: (rows, columns) with at least one row is wanted")
    if not np.isfinite(values).all():
        raise ValueError(f"row {int((~np.isfinite(values)).any(axis=1).argmax())}: a value is not finite")
    ones = np.ones((len(values), 1))
    return bootstrap_of(
        lambda sums: sums[:, :-1] / sums[:, -1:], np.hstack([values, ones]), clusters, resamples=resamples, seed=seed
    )


def bootstrap_of(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    values: NDArray[np.floating],
    clusters: NDArray[np.integer] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """95 % intervals of statistics that are functions of sums over rows, such as ratios, variances and correlations.

    Args:
        statistic: from sums over rows, shape (draws, columns), to statistics, shape (draws, statistics).
        values: what is summed, shape (rows, columns); finite.
        clusters, resamples, seed: as in `bootstrap`.

    Returns:
        one interval for each statistic; its `mean` is the statistic of all rows.
    """
    import numpy as np

    labels = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sizes = np.bincount(labels)
    found = statistic(values.sum(axis=0, keepdims=True))[0]
    if len(sizes) == 1:
        return [Interval(float(value), np.nan, np.nan, np.nan) for value in found]
    totals = np.stack([np.bincount(labels, weights=column) for column in values.T], axis=1)
    resampled = statistic(np.concatenate([counts @ totals for counts in _draws(len(sizes), resamples, seed)]))
    effective = max(2.0, float(sizes.sum() ** 2 / (sizes**2).sum()))
    tail = _tail(effective)
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    errors = resampled.std(axis=0) * np.sqrt(effective / (effective - 1))
    return [Interval(*map(float, column)) for column in zip(found, low, high, errors, strict=True)]


def rows_needed(difference: Interval, rows: int) -> int | None:
    """Rows that show a difference of this size with 80 % power; None if there is none to show.

    Args:
        difference: of two systems, as measured.
        rows: it was measured on.
    """
    from scipy.stats import norm

    if not difference.mean or not difference.error > 0:
        return None
    ratio = (norm.ppf((1 + LEVEL) / 2) + norm.ppf(_POWER)) * difference.error / abs(difference.mean)
    return max(2, round(float(rows * ratio**2)))


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each cluster is drawn, shape (some resamples, clusters)."""
    import numpy as np

    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // clusters)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        drawn = random.integers(clusters, size=(count, clusters)) + clusters * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * clusters).reshape(count, clusters).astype(np.float64)


def _tail(effective: float) -> float:
    """The probability of either tail of the widened percentile interval."""
    from scipy.stats import norm, t

    wide = (effective / (effective - 1)) ** 0.5 * t.ppf((1 + LEVEL) / 2, effective - 1)
    return float(norm.cdf(-wide))
