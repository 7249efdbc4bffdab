"""Samples tokens for many answers at once, in several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from submission.backends.common import NOT_FINITE, log_probabilities
from submission.backends.llama.schedule import QueuedPrompt
from submission.backends.llama.tokenizer import GgufTokenizer
from submission.backends.sampling import PendingAnswer
from submission.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class LlamaSampler:
    """See `submission.backends.llama.schedule.AnswerSampler`."""

    def __init__(self, tokenizer: GgufTokenizer, threads: int) -> None:
        self._tokenizer = tokenizer
        # numpy lets go of the interpreter's lock in the long loops over the vocabulary.
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sample")

    def begin(self, prompt: QueuedPrompt, number: int) -> PendingAnswer:
        """See `submission.backends.llama.schedule.AnswerSampler`."""
        return PendingAnswer(prompt.payload, number, self._tokenizer)

    def extend(self, states: Sequence[PendingAnswer], logits: NDArray[np.float32]) -> list[int | None]:
        """See `submission.backends.llama.schedule.AnswerSampler`."""
        sampled = self._in_parts(lambda part: _sample(states[part], logits[part]), len(states))
        tokens: list[int | None] = []
        for answer, (token, logprob) in zip(states, (pair for part in sampled for pair in part), strict=True):
            tokens.append(None if answer.add(token, logprob) else token)
        return tokens

    def log_probabilities(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """See `submission.backends.llama.schedule.Scorer`."""
        import numpy as np

        parts = self._in_parts(lambda part: log_probabilities(logits[part], tokens[part]), len(tokens))
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            raise BackendError(NOT_FINITE)
        return found

    def _in_parts(self, work: Callable[[slice], T], count: int) -> list[T]:
        size = -(-count // self._threads)
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return [work(parts[0])] if len(parts) == 1 else list(self._pool.map(work, parts))


def _sample(answers: Sequence[PendingAnswer], logits: NDArray[np.float32]) -> list[tuple[int, float]]:
    import numpy as np

    if not np.isfinite(logits.max(axis=1)).all():
        raise BackendError(NOT_FINITE)
    tokens = np.array(
        [answer.sample(row) if answer.samples else row.argmax() for answer, row in zip(answers, logits, strict=True)],
        np.int32,
    )
    return list(zip(tokens.tolist(), log_probabilities(logits, tokens).tolist(), strict=True))
