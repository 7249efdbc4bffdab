"""How far two models' next-token probabilities are apart, on four short texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROBES = (
    "The night train stopped between two stations and the lights went out. For a while nobody spoke.",
    "Dear neighbours, on Saturday we will celebrate that the scaffolding is finally gone.",
    "Original text:\nIt rained for nine days.\n\nRewritten text:\nNine days of rain, o weary town!\n\nInstruction:",
    "Bees find their way by the sun, and on cloudy days by the light that the clouds let through.",
)
LONGEST = 256  # tokens of a probe
# Mean KL divergence a token, in nats, that weights in 16 bits cost at most. A wrong conversion or merge is off by a
# thousand times as much, whatever the size of the model; limits on logits would depend on it.
MOST_DIVERGENCE = 2e-3


@dataclass(frozen=True, slots=True)
class Apart:
    """A model beside another one.

    Attributes:
        divergence: mean KL(theirs || ours) of the next token, nats.
        same_first: share of tokens after which both hold the same token for the most probable, 0 to 1.
        tokens: how many were compared.
    """

    divergence: float
    same_first: float
    tokens: int


def compare(theirs: Sequence[NDArray[np.float32]], ours: Sequence[NDArray[np.float32]]) -> Apart:
    """Compare logits, an array of (tokens, vocabulary) for each probe; ours may have unused columns at their end."""
    import numpy as np

    by_token: list[float] = []
    same: list[bool] = []
    for expected, found in zip(theirs, ours, strict=True):
        found = found[:, : expected.shape[1]]
        logs, other = log_softmax(expected), log_softmax(found)
        by_token += (np.exp(logs) * (logs - other)).sum(axis=1).tolist()
        same += (expected.argmax(axis=1) == found.argmax(axis=1)).tolist()
    return Apart(float(np.mean(by_token)), float(np.mean(same)), len(by_token))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities that logits of shape (tokens, vocabulary) stand for."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
