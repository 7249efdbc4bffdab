"""Draws tokens: the likeliest ones in numpy, random ones in llama.cpp's sampler chain."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from submission.backends.common import PendingAnswer, PendingRequest, log_probabilities, row_buffer, stream_seed
from submission.backends.llama.library import library
from submission.backends.llama.schedule import QueuedPrompt
from submission.backends.llama.tokenizer import GgufTokenizer
from submission.types import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

_HEAD = 10.0  # tokens whose probability is at least e^-10 of the highest are drawn from one by one


class ChainedAnswer(PendingAnswer):
    """An answer on its way, and the chain that samples its tokens; None for the likeliest ones."""

    def __init__(self, asked: PendingRequest, number: int, tokenizer: GgufTokenizer, chain: Chain | None) -> None:
        super().__init__(asked, number, tokenizer)
        self.chain = chain


class Chain:
    """llama.cpp's sampler chain of one answer: temperature, top-p, min-p, then a draw.

    Args:
        sampling: with a temperature above 0.
        seed: of the answer's random stream.
    """

    def __init__(self, sampling: Sampling, seed: int) -> None:
        lib = library()
        self.sampling = sampling
        self._free = lib.llama_sampler_free
        self._pointer = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        samplers = [lib.llama_sampler_init_temp(sampling.temperature)]
        if sampling.top_p < 1:
            samplers.append(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            samplers.append(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        for sampler in [*samplers, lib.llama_sampler_init_dist(seed)]:
            lib.llama_sampler_chain_add(self._pointer, sampler)
        self._apply = lib.llama_sampler_apply
        self._array = lib.llama_token_data_array
        self._pointer_type = lib.llama_token_data_p

    def draw(self, candidates: NDArray[Any]) -> int:
        """The id that was drawn from candidates (id, logit, p); they are sorted and cut in place."""
        data = candidates.ctypes.data_as(self._pointer_type)
        array = self._array(data=data, size=len(candidates), selected=-1, sorted=False)
        self._apply(self._pointer, ctypes.byref(array))
        return int(candidates["id"][array.selected])

    def __del__(self) -> None:
        self._free(self._pointer)


class LlamaSampler:
    """Draws for many answers at once; see `submission.backends.llama.schedule.AnswerSampler`."""

    def __init__(self, tokenizer: GgufTokenizer, threads: int) -> None:
        self._tokenizer = tokenizer
        # numpy and llama.cpp let go of the interpreter's lock in the long loops over the vocabulary.
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="draw")

    def begin(self, prompt: QueuedPrompt, number: int) -> ChainedAnswer:
        """See `submission.backends.llama.schedule.AnswerSampler`."""
        asked: PendingRequest = prompt.payload
        sampling = asked.request.sampling
        if sampling.temperature <= 0:
            return ChainedAnswer(asked, number, self._tokenizer, None)
        chain = Chain(sampling, stream_seed(sampling.seed, asked.request.key, number))
        return ChainedAnswer(asked, number, self._tokenizer, chain)

    def extend(self, states: Sequence[ChainedAnswer], logits: NDArray[np.float32]) -> list[int | None]:
        """See `submission.backends.llama.schedule.AnswerSampler`."""
        drawn = self._in_parts(lambda part: _draw(states[part], logits[part]), len(states))
        tokens: list[int | None] = []
        for answer, (token, logprob) in zip(states, (pair for part in drawn for pair in part), strict=True):
            tokens.append(None if answer.add(token, logprob) else token)
        return tokens

    def log_probabilities(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """See `submission.backends.llama.schedule.Scorer`."""
        import numpy as np

        parts = self._in_parts(lambda part: log_probabilities(logits[part], tokens[part]), len(tokens))
        return np.concatenate(parts)

    def _in_parts(self, work: Callable[[slice], T], count: int) -> list[T]:
        size = -(-count // self._threads)
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return [work(parts[0])] if len(parts) == 1 else list(self._pool.map(work, parts))


def _draw(answers: Sequence[ChainedAnswer], logits: NDArray[np.float32]) -> list[tuple[int, float]]:
    import numpy as np

    tokens = np.array(
        [
            row.argmax() if answer.chain is None else sample_token(answer.chain, row)
            for answer, row in zip(answers, logits, strict=True)
        ],
        np.int32,
    )
    return list(zip(tokens.tolist(), log_probabilities(logits, tokens).tolist(), strict=True))


def sample_token(chain: Chain, logits: NDArray[np.float32]) -> int:
    """Draw a token; what a chain over the whole vocabulary would draw from, at a tenth of its cost.

    The chain goes over the likely tokens only. The others stand in it as nameless candidates, each less likely than
    any named one, with the probability that they have together. Top-p and min-p cut them off as they would have
    cut the others off; if one is drawn, the chain draws again, from those it stood for.
    """
    import numpy as np

    sampling = chain.sampling
    peak = float(logits.max())
    scaled = np.subtract(logits, peak, out=row_buffer(len(logits)))
    scaled /= sampling.temperature
    likely = scaled > -_HEAD
    head = likely.nonzero()[0]
    total = float(np.exp(scaled, out=scaled).sum(dtype=np.float64))
    tail = max(0.0, total - float(scaled[head].sum(dtype=np.float64)))
    nameless = math.ceil(tail * math.exp(_HEAD))
    named_enough = sampling.top_p >= 1 or tail < (1 - sampling.top_p) * total * 0.999
    if len(head) + nameless > len(logits) // 2 or not named_enough or 0 < sampling.min_p < math.exp(-_HEAD):
        return chain.draw(_candidates(np.arange(len(logits)), logits))
    ids = np.concatenate([head, np.full(nameless, -1)])
    value = peak + sampling.temperature * (math.log(tail / nameless) if nameless else 0.0)
    token = chain.draw(_candidates(ids, np.concatenate([logits[head], np.full(nameless, value, np.float32)])))
    if token >= 0:
        return token
    others = (~likely).nonzero()[0]
    return chain.draw(_candidates(others, logits[others]))


def _candidates(ids: NDArray[Any], logits: NDArray[np.float32]) -> NDArray[Any]:
    import numpy as np

    candidates = np.zeros(len(ids), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    candidates["id"] = ids
    candidates["logit"] = logits
    return candidates
