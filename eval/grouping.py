"""Which prompts say nearly the same, by their embeddings: groups for splits, intervals and leak checks.

"Rewrite this as a poem" and "rewrite this as a poem." are one prompt to anybody but a computer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from eval.encoders import Encoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR = 0.7
"""How near two prompts must be to be near-duplicates: 0 is as near as prompts of unlike meaning are, 1 is the same."""

# Encoders differ in what they give to prompts that have nothing in common (MiniLM about 0.05, sentence-T5 about 0.6).
_UNLIKE = (
    "Rewrite this as a sea shanty.",
    "Make the tone more formal.",
    "Summarise the text in one sentence.",
    "Translate everything into pirate slang.",
    "Explain it to a five-year-old.",
    "Turn it into a news report with a headline.",
    "Retell the story from the dog's point of view.",
    "List the main points as bullets.",
    "Add more humour and a surprising ending.",
    "Write it as a dialogue between two scientists.",
)
_BLOCK = 1 << 24  # similarities that are held at a time


def near_duplicate_groups(texts: Sequence[str], encoder: Encoder, near: float = NEAR) -> NDArray[np.int64]:
    """A label for each text, shape (texts,): connected components of near-duplicates.

    Args:
        texts: to group.
        encoder: embeds them.
        near: how near near-duplicates are; see `NEAR`.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[str, int] = {}
    place = [first.setdefault(plain_text(text), len(first)) for text in texts]
    distinct = list(first)
    labels = np.arange(len(distinct))
    # Block by block, so that memory does not grow with the number of pairs.
    for a, b in _near_blocks(distinct, distinct, encoder, near):
        links = coo_array((np.ones(len(a), np.bool_), (labels[a], labels[b])), shape=(len(distinct), len(distinct)))
        labels = connected_components(links, directed=False)[1][labels]
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.int64)[place]


def connected(marks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Components of rows that share a mark in any column.

    Args:
        marks: shape (rows, columns); a negative mark is shared with nobody.

    Returns:
        labels, shape (rows,).
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = marks.shape
    ends, offset = [], rows
    for column in range(columns):
        known = marks[:, column] >= 0
        values, inverse = np.unique(marks[known, column], return_inverse=True)
        ends.append((np.arange(rows)[known], inverse + offset))
        offset += len(values)
    left, right = (np.concatenate(part) for part in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(offset, offset))
    return np.asarray(connected_components(graph, directed=False)[1][:rows], np.int64)


def first_of_each(groups: NDArray[np.int64]) -> list[int]:
    """Places of the first text of each group, in order.

    Args:
        groups: a label for each text, shape (texts,).
    """
    import numpy as np

    places: list[int] = np.sort(np.unique(groups, return_index=True)[1]).tolist()
    return places


def near_pairs(
    a: Sequence[str], b: Sequence[str], encoder: Encoder, near: float = NEAR
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (into a, into b) of all pairs that are at least so near; see `NEAR`."""
    import numpy as np

    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64)), *_near_blocks(a, b, encoder, near)]
    left, right = (np.concatenate(part) for part in zip(*found, strict=True))
    return left, right


def _near_blocks(
    a: Sequence[str], b: Sequence[str], encoder: Encoder, near: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The pairs of `near_pairs`, some of `a` at a time."""

    if not a or not b:
        return
    left = unit_vectors(encoder.embed(a))
    right = left if a is b else unit_vectors(encoder.embed(b))
    least = least_cosine(encoder, near)
    step = max(1, _BLOCK // len(right))
    for start in range(0, len(left), step):
        rows, columns = (left[start : start + step] @ right.T >= least).nonzero()
        yield rows + start, columns


def least_cosine(encoder: Encoder, near: float = NEAR) -> float:
    """The cosine from which texts are so near; see `NEAR`."""
    unlike = _unlike(encoder)
    return float((unlike + near * (1 - unlike)) ** (1 / 3))


def unit_vectors(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of length 1; zero vectors stay."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return unit


def _unlike(encoder: Encoder) -> float:
    """The score of prompts that have nothing in common."""
    vectors = unit_vectors(encoder.embed(_UNLIKE))
    scores = (vectors @ vectors.T) ** 3
    return float((scores.sum() - len(scores)) / (len(scores) * (len(scores) - 1)))


def plain_text(text: str) -> str:
    """Lower case letters and digits with single blanks: what is left is compared to the letter."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text
