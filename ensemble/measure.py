"""How good choices were: each selector beside the first answer, the constant and the oracle, on the same rows.

Knows numbers only: the true score of every candidate, and what each selector said of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensemble.choose import SelectorScores, best
from eval.intervals import Interval, bootstrap, bootstrap_of
from eval.scoring import interval_figures

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ORACLE, WORST, FIRST, CONSTANT = "oracle", "worst", "first", "constant"
_EQUAL = 1e-9  # scores that are no further apart are one


@dataclass(frozen=True, slots=True)
class SelectorResult:
    """A way of choosing, over all rows.

    Attributes:
        name: of the selector.
        mean: score.
        over_first, over_constant: paired differences of the mean.
        headroom: share of what the oracle gains over the first answer that this one gains.
        regret: what the oracle has more.
        top: share of rows in which a best candidate was chosen; None where there is no choice.
        undecided: rows of which the selector said nothing.
        tokens, seconds: a row.
    """

    name: str
    mean: Interval
    over_first: Interval
    over_constant: Interval
    headroom: Interval
    regret: Interval
    top: Interval | None
    undecided: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """The figures, for JSON."""
        intervals = ("mean", "over_first", "over_constant", "headroom", "regret")
        return {
            **{name: interval_figures(getattr(self, name)) for name in intervals},
            "top": interval_figures(self.top) if self.top else None,
            "undecided": self.undecided, "tokens_per_row": self.tokens, "seconds_per_row": self.seconds,
        }  # fmt: skip


def chance(truths: Sequence[Sequence[float]]) -> float:
    """Share of rows in which a candidate that is taken blindly is a best one."""
    return sum(len(best_places(row)) / len(row) for row in truths) / len(truths)


def best_places(row: Sequence[float]) -> list[int]:
    """Places of the highest true score."""
    return [place for place, value in enumerate(row) if value >= max(row) - _EQUAL]


def chosen(truths: Sequence[Sequence[float]], scores: Mapping[str, SelectorScores]) -> dict[str, NDArray[np.float64]]:
    """True scores of what each selector chose, of the oracle and of its contrary; shape (rows,) each."""
    import numpy as np

    found = {
        name: np.array([row[best(said)] for row, said in zip(truths, score.values, strict=True)])
        for name, score in scores.items()
    }
    found.setdefault(FIRST, np.array([row[0] for row in truths]))
    return found | {ORACLE: np.array([max(row) for row in truths]), WORST: np.array([min(row) for row in truths])}


def measure(
    truths: Sequence[Sequence[float]],
    scores: Mapping[str, SelectorScores],
    constant: NDArray[np.float64],
    clusters: NDArray[np.integer] | None = None,
    more: Mapping[str, NDArray[np.float64]] | None = None,
) -> list[SelectorResult]:
    """A line for each selector, for the oracle, its contrary and the constant, the best mean first.

    Args:
        truths: true score of each candidate of each row.
        scores: of the selectors.
        constant: score of the constant prompt, shape (rows,).
        clusters: label of each row; rows with near-duplicate prompts are drawn together.
        more: scores of other answers to the same rows, such as joined candidates.
    """
    import numpy as np

    picked = chosen(truths, scores) | {CONSTANT: constant}
    first, oracle = picked[FIRST], picked[ORACLE]
    every = picked | dict(more or {})
    selectors = {FIRST, *scores}
    lines = []
    for name, values in every.items():
        columns = np.stack([values, values - first, values - constant, oracle - values], axis=1)
        mean, over_first, over_constant, regret = bootstrap(columns, clusters)
        share = bootstrap_of(_ratio, np.stack([values - first, oracle - first], axis=1), clusters)[0]
        top = bootstrap((values >= oracle - _EQUAL).astype(float)[:, None], clusters)[0] if name in selectors else None
        said = scores.get(name)
        lines.append(SelectorResult(
            name, mean, over_first, over_constant, share, regret, top, said.undecided if said else 0,
            said.tokens if said else 0.0, said.seconds if said else 0.0,
        ))  # fmt: skip
    return sorted(lines, key=lambda line: -line.mean.mean)


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    gained, there = sums[:, :1], sums[:, 1:]
    return np.divide(gained, there, out=np.full_like(gained, math.nan), where=there > _EQUAL)
