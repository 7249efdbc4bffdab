"""Weighted sums of selectors, fitted on a validation set, and the mark that keeps them away from it afterwards.

python -m ensemble fit validation.parquet --truth validation.csv --selectors consensus,likelihood -o weights.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from ensemble.candidates import CandidateRow
from ensemble.choose import SelectorScores, best
from ensemble.selectors.combine import standardised
from ensemble.selectors.posterior import Evidence, Posterior
from eval.leaks import check_unseen, marks
from eval.scoring import Truth
from submission.data.files import read_json, write_json
from submission.data.outputs import made_files
from submission.errors import UserError

_RIDGE = 1e-3
_LIKELIHOODS, _LOGPROBS, _ANSWERS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0), (0.0, 0.25, 0.5, 1.0, 2.0), (0.0, 1.0)


def fit(truths: Sequence[Sequence[float]], scores: Mapping[str, SelectorScores]) -> dict[str, float]:
    """Weights of at least 0 that predict the true scores within rows, by least squares.

    Args:
        truths: true score of each candidate of each row.
        scores: of the selectors; each is brought to one scale within a row.

    Returns:
        by selector, adding up to 1; all alike if none predicts anything.
    """
    import numpy as np
    from scipy.optimize import nnls

    features, wanted = [], []
    for number, row in enumerate(truths):
        features.append(np.array([standardised(said.values[number]) for said in scores.values()]).T)
        wanted.append(np.array(row, float) - np.mean(row))
    matrix, target = np.concatenate(features), np.concatenate(wanted)
    size = len(scores)
    padded = np.vstack([matrix, np.sqrt(_RIDGE * len(matrix)) * np.eye(size)])
    weights, _ = nnls(padded, np.concatenate([target, np.zeros(size)]))
    total = float(weights.sum())
    return {name: float(weight) / total if total else 1 / size for name, weight in zip(scores, weights, strict=True)}


def fit_evidence(
    rows: Sequence[CandidateRow], truths: Sequence[Sequence[float]], posterior: Posterior
) -> tuple[Evidence, float]:
    """The powers of the posterior whose choices score best, of a grid, and their mean score; the plainest of equals.

    Args:
        rows: with their candidates.
        truths: true score of each candidate of each row.
        posterior: over them; its own powers do not matter.
    """
    grid = [Evidence(*powers) for powers in product(_LIKELIHOODS, _LOGPROBS, _ANSWERS)]
    totals = [0.0] * len(grid)
    for row, true in zip(rows, truths, strict=True):
        for number, scores in enumerate(posterior.under(grid, row.pair, row.candidates)):
            totals[number] += true[best(scores)]
    found = max(range(len(grid)), key=lambda number: (round(totals[number], 9), -abs(grid[number].likelihood - 1)))
    return grid[found], totals[found] / max(1, len(rows))


def write(path: Path, name: str, weights: Mapping[str, float], rows: Sequence[CandidateRow], truth: Truth) -> None:
    """Write weights with the marks of the rows that they were fitted on."""
    content = {"name": name, "weights": dict(weights), "seen": marks_of(rows, truth)}
    with made_files(path, [path], {"weights": dict(weights)}):
        write_json(path, content)


def read(
    paths: Sequence[Path], rows: Sequence[CandidateRow], truth: Truth | None = None
) -> dict[str, dict[str, float]]:
    """Weights by name, for these rows.

    Raises:
        UserError: a file cannot be read, or its weights were fitted on one of the rows, or on its prompt or texts.
    """
    found: dict[str, dict[str, float]] = {}
    ours = marks_of(rows, truth)
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: python -m ensemble fit writes such a file")
        content = read_json(path)
        try:
            name, seen = str(content["name"]), content["seen"]
            weights = {str(key): float(value) for key, value in content["weights"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} holds no weights of `python -m ensemble fit`: {error!r}") from error
        check_unseen(path, seen, ours)
        if not weights or not sum(weights.values()) > 0:
            raise UserError(f"{path}: its weights add up to nothing")
        found[name] = weights
    return found


def marks_of(rows: Sequence[CandidateRow], truth: Truth | None) -> dict[str, list[str]]:
    """The marks of rows; see `eval.leaks.marks`."""
    return marks([row.pair for row in rows], truth.prompts if truth is not None else [])
