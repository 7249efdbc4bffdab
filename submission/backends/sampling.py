"""Answers on their way: tokens are sampled in numpy, each answer from a random stream of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from submission.backends.common import PendingRequest, stop_at, stream_seed
from submission.types import Completion, Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_BLOCK = 256
COLDEST = 1e-6  # below it nothing but the likeliest token is left, and 32 bits divide by zero


class Pieces(Protocol):
    """Tokens one by one, as a tokenizer knows them."""

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """The bytes of one token; those of a special token are empty unless `special`."""
        ...

    def ends_answer(self, token: int) -> bool:
        """True for end-of-turn, end-of-text and the like."""
        ...


class PendingAnswer:
    """One answer on its way.

    Args:
        asked: what it answers.
        number: which of the answers to it this is.
        tokenizer: of the model.
    """

    def __init__(self, asked: PendingRequest, number: int, tokenizer: Pieces) -> None:
        import numpy as np

        self.asked = asked
        self.number = number
        sampling = asked.request.sampling
        self.samples = sampling.temperature > 0
        """Whether tokens are sampled; the likeliest ones are taken else."""
        self._stream = np.random.Generator(np.random.Philox(stream_seed(sampling.seed, asked.request.key, number)))
        self._tokenizer = tokenizer
        self._content = b""
        self._text: str | None = None  # the final one, if a stop string ended it
        self._tokens = 0
        self._logprob = 0.0
        self._ended = False

    def sample(self, logits: NDArray[np.float32]) -> int:
        """A token from logits of shape (vocabulary,)."""
        return sample_token(logits, self.asked.request.sampling, self._stream.random())

    def add(self, token: int, logprob: float) -> bool:
        """Add a token; True if the answer is complete with it."""
        sampling = self.asked.request.sampling
        self._tokens += 1
        self._logprob += logprob
        if self._tokenizer.ends_answer(token):
            self._ended = True
            return True
        piece = self._tokenizer.piece(token, special=False)
        self._content += piece
        if sampling.stop:
            # Only the end can hold a new one.
            tail = len(piece) + max(len(stop.encode()) for stop in sampling.stop) + 4
            if stop_at(self._content[-tail:].decode("utf-8", "replace"), sampling.stop) is not None:
                self._text = stop_at(self._content.decode("utf-8", "replace"), sampling.stop)
        return self._text is not None or self._tokens == sampling.max_new_tokens

    def completion(self) -> Completion:
        """What became of it."""
        encoded = self.asked.encoded
        return Completion(
            self._content.decode("utf-8", "replace") if self._text is None else self._text,
            self._logprob,
            self._tokens,
            "stop" if self._ended or self._text is not None else "length",
            len(encoded.ids),
            encoded.truncated,
        )


def sample_token(logits: NDArray[np.float32], sampling: Sampling, point: float) -> int:
    """The token at `point`, in [0, 1), of the distribution that temperature, top-p and min-p leave, in this order.

    Top-p keeps the likeliest tokens up to the first with which they have that much together (Holtzman et al., 2020);
    min-p those of at least that share of the likeliest one's probability.
    """
    import numpy as np

    weights = np.exp((logits - logits.max()) / np.float32(max(sampling.temperature, COLDEST)))
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        if sampling.min_p > 0:
            kept = kept[weights[kept] >= sampling.min_p]
        return int(kept[_at(weights[kept], point)])
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0
    return _at(weights, point)


def _nucleus(weights: NDArray[np.float32], share: float) -> NDArray[np.int64]:
    """The likeliest tokens, in that order, up to the first with which they have `share` of all weight."""
    import numpy as np

    wanted = share * float(weights.sum(dtype=np.float64))
    for least in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 0.0):  # of the likeliest one's weight: few are left to be sorted
        likely = (weights >= least).nonzero()[0]
        if least == 0 or float(weights[likely].sum(dtype=np.float64)) >= wanted:
            break
    order = likely[np.argsort(-weights[likely], kind="stable")]
    summed = np.cumsum(weights[order], dtype=np.float64)
    return order[: int(np.searchsorted(summed, wanted)) + 1]


def _at(weights: NDArray[np.float32], point: float) -> int:
    """The token at `point` of all weight. Blocks are summed first: weights one by one would take five times as long."""
    import numpy as np

    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).astype(np.float64)
    ends = np.cumsum(blocks)
    wanted = point * ends[-1]
    block = min(int(np.searchsorted(ends, wanted, side="right")), int(blocks.nonzero()[0][-1]))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    place = int(
        np.searchsorted(np.cumsum(inside, dtype=np.float64), wanted - ends[block] + blocks[block], side="right")
    )
    return block * _BLOCK + min(place, int(inside.nonzero()[0][-1]))
