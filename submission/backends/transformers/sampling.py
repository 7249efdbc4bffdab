"""How transformers' `generate` samples tokens here: hooks that it calls after every step.

Each answer has a random stream of its own, which depends on seed, key and number of the sample only, so the same
seed gives the same samples in whatever batch. Log-probabilities are taken step by step: keeping the logits of all
steps, as `output_logits` does, takes gigabytes for a large vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from submission.backends.common import stop_at
from submission.backends.sampling import COLDEST
from submission.types import Sampling

_TOP = 1024  # tokens that nearly always hold the nucleus of top-p


class TransformersSampler:
    """A logits processor that samples the tokens and leaves only them to be picked.

    An answer whose logits are not numbers ends at once, with a log-probability that is not finite: no index is ever
    made of such logits, which would end the process on a GPU.

    Args:
        answers: how each answer of the batch is sampled, and the seed of its random stream; all of one length.
        end: token that ends an answer.
    """

    def __init__(self, answers: Sequence[tuple[Sampling, int]], end: int) -> None:
        import numpy as np

        self._end = end
        self._groups: dict[tuple[float, float, float], list[int]] = {}
        """Rows by temperature, top-p and min-p."""
        self._uniform: Any = np.zeros((len(answers), answers[0][0].max_new_tokens))
        for row, (sampling, seed) in enumerate(answers):
            way = (0.0, 1.0, 0.0)
            if sampling.temperature > 0:
                way = (sampling.temperature, sampling.top_p, sampling.min_p)
                self._uniform[row] = np.random.Generator(np.random.Philox(seed)).random(sampling.max_new_tokens)
            self._groups.setdefault(way, []).append(row)
        self.logprobs: list[Any] = []
        """By step: log-probability of each sampled token at temperature 1 over the whole vocabulary, (answers,)."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores, shape (answers, vocabulary), in which the sampled token has the highest."""
        import torch

        if not self.logprobs:
            self._uniform = torch.as_tensor(self._uniform, device=scores.device)
        uniform = self._uniform[:, len(self.logprobs), None]
        sampled = torch.empty((len(scores), 1), dtype=torch.long, device=scores.device)
        for way, rows in self._groups.items():
            if len(rows) == len(scores):
                sampled = sample_tokens(scores, uniform, *way)
            else:
                sampled[rows] = sample_tokens(scores[rows], uniform[rows], *way)
        logprobs = scores.gather(1, sampled) - scores.logsumexp(dim=-1, keepdim=True)
        self.logprobs.append(logprobs[:, 0])
        sampled = sampled.where(logprobs.isfinite(), self._end)
        return torch.full_like(scores, -torch.inf).scatter_(1, sampled, 0.0)


def sample_tokens(scores: Any, uniform: Any, temperature: float, top_p: float, min_p: float, top: int = _TOP) -> Any:
    """Sample a token for each row by inverting the distribution function.

    Args:
        scores: logits, (rows, vocabulary).
        uniform: random numbers in [0, 1), (rows, 1), float64.
        temperature: 0 takes the most probable token.
        top_p: the most probable tokens that have this probability together are kept.
        min_p: tokens are kept that have this share of the highest probability.
        top: tokens that are sorted first; all are where these do not hold `top_p`.

    Returns:
        Tokens, (rows, 1): indices of the vocabulary even where scores are not numbers.
    """
    if temperature <= 0:
        return scores.argmax(dim=-1, keepdim=True)
    probabilities = (scores / max(temperature, COLDEST)).softmax(dim=-1)
    if top_p >= 1:
        if min_p > 0:
            probabilities = probabilities * (probabilities >= min_p * probabilities.amax(dim=-1, keepdim=True))
        return _invert(probabilities.double(), uniform)
    highest, order = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
    sampled = _of_nucleus(highest.double(), order, uniform, top_p, min_p)
    if highest.shape[-1] < probabilities.shape[-1]:
        # Where the nucleus may go on behind those that were sorted.
        short = (highest.double().sum(dim=-1) < top_p) & (highest[:, -1] >= min_p * highest[:, 0])
        if bool(short.any()):
            everything, order = probabilities[short].sort(dim=-1, descending=True)
            sampled[short] = _of_nucleus(everything.double(), order, uniform[short], top_p, min_p)
    return sampled


def _of_nucleus(highest: Any, order: Any, uniform: Any, top_p: float, min_p: float) -> Any:
    """Sample from probabilities in descending order, (rows, tokens), the tokens `order`."""
    before = highest.cumsum(dim=-1) - highest
    kept = (before < top_p) & (highest >= min_p * highest[:, :1])
    return order.gather(1, _invert(highest * kept, uniform))


def _invert(weights: Any, uniform: Any) -> Any:
    """The first index at which the sum of weights, (rows, n), exceeds its share `uniform` of the whole, (rows, 1)."""
    import torch

    summed = weights.cumsum(dim=-1)
    place = torch.searchsorted(summed, uniform * summed[:, -1:], right=True)
    last = torch.searchsorted(summed, summed[:, -1:].contiguous())  # that has any weight: rounding may reach the end
    return torch.minimum(place, last).clamp(0, weights.shape[-1] - 1)


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
