"""Why a choice among candidates helps or doesn't: how alike their errors are, how much there is to win, who knows it.

Knows numbers only, like `ensemble.measure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ensemble.choose import SelectorScores
from eval.intervals import Interval, bootstrap, bootstrap_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FEWEST = 3  # candidates of a row whose order tells something
_MOST_ANSWERS = 64


@dataclass(frozen=True, slots=True)
class Variance:
    """Variance components of the answers' true scores.

    Attributes:
        between: variance of rows' means: some rows are hard for every answer.
        within: variance of the answers of a row: what a choice can use.
        correlation: of two answers of one row; between / (between + within).
    """

    between: Interval
    within: Interval
    correlation: Interval


def variance(answers: Sequence[Sequence[float]], clusters: NDArray[np.integer] | None = None) -> Variance:
    """Split the variance of answers' scores by the one-way analysis of variance (Fisher, 1925).

    Args:
        answers: true score of each answer of each row; rows may have different numbers.
        clusters: label of each row.
    """
    import numpy as np

    rows = [np.array(row, float) for row in answers if len(row)]
    kept = None if clusters is None else np.array([c for c, row in zip(clusters, answers, strict=True) if len(row)])
    sums = np.array([[1, len(r), len(r) ** 2, r.sum(), len(r) * r.mean() ** 2, ((r - r.mean()) ** 2).sum()]
                     for r in rows])  # fmt: skip

    def split(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        count, n, n_squared, total, squares, inside = totals.T
        with np.errstate(all="ignore"):
            within = np.where(n > count, inside / (n - count), np.nan)
            typical = (n - n_squared / n) / (count - 1)
            between = ((squares - total**2 / n) / (count - 1) - within) / typical
            return np.stack([between, within, between / (between + within)], axis=1)

    return Variance(*bootstrap_of(split, sums, kept))


def correlations(
    by_source: Mapping[str, Sequence[Sequence[float]]], clusters: NDArray[np.integer] | None = None
) -> dict[tuple[str, str], Interval]:
    """Correlation over rows of the true scores of two single answers, for every two sources.

    Args:
        by_source: true score of each answer of each row, by source. Rows in which a source has no answer are left out.
        clusters: label of each row.

    Returns:
        by pair of sources; a source beside itself stands for two different answers, and is NaN if no row has two.
    """
    import numpy as np

    names = list(by_source)
    rows = [row for row in range(len(by_source[names[0]])) if all(len(by_source[name][row]) for name in names)]
    if not rows:
        return {}
    kept = None if clusters is None else np.asarray(clusters)[rows]
    found = {}
    for number, a in enumerate(names):
        for b in names[number:]:
            sums = np.array([_products(by_source[a][row], by_source[b][row], same=a == b) for row in rows])
            found[a, b] = bootstrap_of(_pearson, sums, kept)[0]
    return found


def _products(a: Sequence[float], b: Sequence[float], *, same: bool) -> list[float]:
    """Weight, and means over pairs of answers of x, y, xx, yy, xy."""
    if not same:
        x, y = sum(a) / len(a), sum(b) / len(b)
        return [1.0, x, y, sum(v * v for v in a) / len(a), sum(v * v for v in b) / len(b), x * y]
    if len(a) < 2:
        return [0.0] * 6
    mean, square = sum(a) / len(a), sum(v * v for v in a) / len(a)
    product = (sum(a) ** 2 - sum(v * v for v in a)) / (len(a) * (len(a) - 1))
    return [1.0, mean, mean, square, square, product]


def _pearson(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    n, x, y, xx, yy, xy = sums.T
    with np.errstate(all="ignore"):
        spread = np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2))
        return np.where(spread > 0, (xy / n - x * y / n**2) / spread, np.nan)[:, None]


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean score of the choice among k answers, for each k from 1.

    Attributes:
        chosen: by selector; "oracle" among them.
        independent: of the oracle, were answers of a row no more alike than those of any two rows.
    """

    chosen: dict[str, list[float]]
    independent: list[float]


def curve(answers: Sequence[Sequence[float]], said: Mapping[str, Sequence[Sequence[float]]]) -> Curve:
    """Expected scores over all subsets of k answers, computed exactly.

    Args:
        answers: true score of each answer of each row.
        said: what each selector says of each answer; for those that compare, of all of them together.
    """
    import numpy as np

    longest = min(_MOST_ANSWERS, max(len(row) for row in answers))
    counts = range(1, longest + 1)
    chosen = {name: _means_of_best(answers, scores, counts) for name, scores in {"oracle": answers, **said}.items()}
    pool = np.sort(np.concatenate([np.array(row, float) for row in answers if len(row)]))
    shares = np.arange(len(pool) + 1) / len(pool)
    return Curve(chosen, [float(pool @ np.diff(shares**k)) for k in counts])


def _means_of_best(
    answers: Sequence[Sequence[float]], said: Sequence[Sequence[float]], counts: Sequence[int]
) -> list[float]:
    """Mean over rows of the expected true score of the answer of k with the highest score, for each k."""
    import numpy as np

    rows = []
    for truth, scores in zip(answers, said, strict=True):
        if not truth:
            continue
        known = np.nan_to_num(np.array(scores, float), nan=-np.inf)
        order = np.argsort(known, kind="stable")
        values, keys = np.array(truth, float)[order], known[order]
        for key in np.unique(keys):  # equal scores: any of them
            values[keys == key] = values[keys == key].mean()
        rows.append([float(values @ _ways(len(truth), min(k, len(truth)))) for k in counts])
    means: list[float] = np.mean(rows, axis=0).tolist()
    return means


@cache
def _ways(answers: int, size: int) -> NDArray[np.float64]:
    """How probably the i-th lowest of some answers is the best of a subset: the others come from those below it."""
    import numpy as np

    return np.array([math.comb(i, size - 1) for i in range(answers)], float) / math.comb(answers, size)


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Whether a selector knows which candidate is better, within rows.

    Attributes:
        rank_correlation: mean over rows of Spearman's coefficient of its scores and the true ones.
        rows: in which it can be told.
    """

    rank_correlation: Interval
    rows: int


def knowledge(
    truths: Sequence[Sequence[float]], said: SelectorScores, clusters: NDArray[np.integer] | None = None
) -> Knowledge | None:
    """None if there is no row with three candidates of different scores on both sides."""
    import numpy as np
    from scipy.stats import rankdata

    found, rows = [], []
    for number, (truth, scores) in enumerate(zip(truths, said.values, strict=True)):
        known = [place for place, score in enumerate(scores) if score == score]
        if len(known) < _FEWEST:
            continue
        a, b = (rankdata([values[place] for place in known]) for values in (truth, scores))
        if a.std() == 0 or b.std() == 0:
            continue
        found.append(float(np.corrcoef(a, b)[0, 1]))
        rows.append(number)
    if not found:
        return None
    kept = None if clusters is None else np.asarray(clusters)[rows]
    return Knowledge(bootstrap(np.array(found)[:, None], kept)[0], len(found))
