"""Which texts say nearly the same: groups for splits, intervals and leak checks.

"Rewrite this as a poem" and "rewrite this as a poem." are one prompt to anybody but a computer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.encoders import Encoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR = 0.7
"""How near two prompts must be to be near-duplicates: 0 is as near as prompts of unlike meaning are, 1 is the same."""
NEAR_TEXTS = 0.9
"""Likewise for texts, which are longer and share much more when they share something."""

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

    plain = [plain_text(text) for text in texts]
    first: dict[str, int] = {}
    place = [first.setdefault(text, len(first)) for text in plain]
    a, b = near_pairs(list(first), list(first), encoder, near)
    links = coo_array((np.ones(len(a), np.bool_), (a, b)), shape=(len(first), len(first)))
    _, labels = connected_components(links, directed=False)
    return np.asarray(labels, np.int64)[place]


def near_pairs(
    a: Sequence[str], b: Sequence[str], encoder: Encoder, near: float = NEAR
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (into a, into b) of all pairs that are at least so near; see `NEAR`."""
    import numpy as np

    if not a or not b:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    left, right = unit_vectors(encoder.embed(a)), unit_vectors(encoder.embed(b))
    unlike = _unlike(encoder)
    least = np.cbrt(unlike + near * (1 - unlike))  # of the cosine
    step = max(1, _BLOCK // len(right))
    found = []
    for start in range(0, len(left), step):
        rows, columns = (left[start : start + step] @ right.T >= least).nonzero()
        found.append((rows + start, columns))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))  # type: ignore[return-value]


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
