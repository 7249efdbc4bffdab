"""How transformers' `generate` draws tokens here: hooks that it calls after every step.

Each answer has a random stream of its own, which depends on seed, key and number of the sample only, so the same
seed gives the same samples in whatever batch. Log-probabilities are taken step by step: keeping the logits of all
steps, as `output_logits` does, takes gigabytes for a large vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from submission.backends.common import stop_at
from submission.types import Sampling


class TransformersSampler:
    """A logits processor that draws the tokens and leaves only them to be picked.

    Args:
        sampling: of all answers of the batch.
        seeds: of the answers' random streams.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        import numpy as np

        self._sampling = sampling
        self._uniform = np.array(
            [np.random.Generator(np.random.Philox(s)).random(sampling.max_new_tokens) for s in seeds]
        )
        self.logprobs: list[Any] = []
        """By step: log-probability of each drawn token at temperature 1 over the whole vocabulary, (answers,)."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores, shape (answers, vocabulary), in which the drawn token has the highest."""
        import torch

        step = len(self.logprobs)
        drawn = scores.argmax(dim=-1, keepdim=True) if self._sampling.temperature <= 0 else self._draw(scores, step)
        self.logprobs.append((scores.gather(1, drawn) - scores.logsumexp(dim=-1, keepdim=True))[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def _draw(self, scores: Any, step: int) -> Any:
        import torch

        sampling = self._sampling
        probabilities, order = (scores / sampling.temperature).softmax(dim=-1).double().sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = (before < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[:, :1])
        cumulated = (probabilities * kept).cumsum(dim=-1)
        uniform = torch.as_tensor(self._uniform[:, step, None], device=scores.device) * cumulated[:, -1:]
        place = torch.searchsorted(cumulated, uniform, right=True)
        return order.gather(1, torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1))


class Stopper:
    """A stopping criterion: an answer ends with the first stop string in it.

    Args:
        stop: the strings.
        width: tokens of the prompts, padding included.
        decode: text of token ids.
    """

    def __init__(self, stop: tuple[str, ...], width: int, decode: Callable[[list[int]], str]) -> None:
        self._stop = stop
        self._width = width
        self._decode = decode
        self._tail = max(map(len, stop)) + 8  # tokens; each adds a character at least
        self.lengths: dict[int, int] = {}
        """Tokens of the answers that a stop string ended, by row."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Which answers are done, shape (answers,)."""
        import torch

        length = input_ids.shape[1] - self._width
        begin = max(self._width, input_ids.shape[1] - self._tail)
        for row, ids in enumerate(input_ids[:, begin:].tolist()):
            if row not in self.lengths and stop_at(self._decode(ids), self._stop) is not None:
                self.lengths[row] = length
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done[list(self.lengths)] = True
        return done
