"""The competition's metric: sharpened cosine similarity of two texts' embeddings.

    SCS(s, k) = sign(c) |c|^3   with   c = s.k / ((|s| + 1e-6) |k|)

s is the embedding of the predicted prompt, k that of the true one. Source: the evaluation page of Kaggle's "LLM Prompt
Recovery", whose encoder is sentence-t5-base; under another encoder the numbers are another metric's.

>>> import numpy as np
>>> sharpened_cosine(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])).round(4)
array([0.3536])
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from submission.backends.common import thread_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXPONENT = 3
EPSILON = 1e-6
_BLOCK = 1 << 18  # numbers that are looked at together: they stay in the cache of a core


def sharpened_cosine(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> NDArray[np.float64]:
    """Score predictions against truths, row by row.

    Args:
        predicted: embeddings, shape (rows, dim); they need not have length 1.
        true: embeddings, shape (rows, dim), or (dim,) or (1, dim) for one truth of all rows.

    Returns:
        scores, shape (rows,), in [-1, 1]. A zero vector, the embedding of nothing, scores 0.

    Raises:
        ValueError: the shapes do not go together, or a number is not finite; names the first such row.
    """
    import numpy as np

    predicted, true = np.atleast_2d(predicted), np.atleast_2d(true)
    if predicted.shape[1:] != true.shape[1:] or predicted.ndim != 2 or len(true) not in (1, len(predicted)):
        raise ValueError(f"embeddings of shapes {predicted.shape} and {true.shape} cannot be scored row by row")
    dots, lengths, true_lengths = np.empty((3, len(predicted)))
    step = max(1, _BLOCK // max(1, predicted.shape[1]))

    def compute(start: int) -> None:
        rows = slice(start, start + step)
        s, k = predicted[rows], true[rows] if len(true) == len(predicted) else true
        dots[rows] = np.einsum("...d,...d->...", s, k)
        lengths[rows] = np.einsum("rd,rd->r", s, s)
        true_lengths[rows] = np.einsum("rd,rd->r", k, k)

    with ThreadPoolExecutor(thread_count(0)) as pool, np.errstate(all="ignore"):
        list(pool.map(compute, range(0, len(predicted), step)))
        product = (np.sqrt(lengths) + EPSILON) * np.sqrt(true_lengths)
    bad = ~np.isfinite(product + dots)
    if bad.any():
        raise ValueError(f"row {int(bad.argmax())}: the embedding is not finite ({int(bad.sum())} such rows in all)")
    return _sharpened(np.divide(dots, product, out=np.zeros(len(dots)), where=product > 0))


def sharpened_cosines(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> NDArray[np.float64]:
    """Score every prediction against every truth: shapes (p, dim) and (t, dim) give (p, t)."""
    import numpy as np

    def scaled(vectors: NDArray[np.floating], epsilon: float) -> NDArray[np.float64]:
        vectors = vectors.astype(np.float64)
        length = np.linalg.norm(vectors, axis=1, keepdims=True) + epsilon
        unit: NDArray[np.float64] = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
        return unit

    return _sharpened(scaled(predicted, EPSILON) @ scaled(true, 0.0).T)


def _sharpened(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    scores: NDArray[np.float64] = np.sign(cosine) * np.minimum(np.abs(cosine), 1.0) ** EXPONENT
    return scores
