"""What is asked of vLLM's engine, and what its outputs add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from submission.backends.common import PendingRequest, stream_seed
from submission.backends.sampling import PendingAnswer
from submission.types import LogLikelihood

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NO_NUMBER = "the model's probabilities are not numbers (NaN): its dtype may be too narrow for it"


class SampleJob(PendingAnswer):
    """One answer to a request.

    Attributes:
        failure: why there is none; "" if there is.
    """

    def __init__(self, asked: PendingRequest, number: int, tokenizer: Any) -> None:
        super().__init__(asked, number, tokenizer)
        self.failure = ""
        self._ends: Sequence[int] = sorted(tokenizer.ends)

    @property
    def ids(self) -> list[int]:
        """The tokens to feed."""
        return list(self.asked.encoded.ids)

    def params(self) -> dict[str, Any]:
        """Arguments of `vllm.SamplingParams`. Stop strings are looked for here: vLLM has no tokenizer."""
        sampling, key = self.asked.request.sampling, self.asked.request.key
        params: dict[str, Any] = {"temperature": 0.0}
        if sampling.temperature > 0:
            params = {
                "temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p,
                "seed": stream_seed(sampling.seed, key, self.number),
            }  # fmt: skip
        return {**params, "max_tokens": sampling.max_new_tokens, "stop_token_ids": self._ends, "logprobs": 0}

    @property
    def stepwise(self) -> bool:
        """Whether tokens must be seen as they come."""
        return bool(self.asked.request.sampling.stop)

    def take(self, output: Any) -> bool:
        """Take tokens that are new; True if the answer is complete with them."""
        (part,) = output.outputs
        for token, logprobs in zip(part.token_ids, part.logprobs or (), strict=True):
            logprob = logprobs[token].logprob
            if not math.isfinite(logprob):
                self.failure = NO_NUMBER
                return True
            if self.add(token, logprob):
                return True
        return False


class TextJob:
    """A text whose probability is wanted.

    Its last token is the answer, and the only one allowed: so a text may fill the model's context, and that of one
    token needs no probabilities of its prompt, for which vLLM would pass over its prefix cache.

    Args:
        key: of the item.
        tokens: of chat and continuation, shape (tokens,).
        scored_from: index of the continuation's first token.
    """

    stepwise = False

    def __init__(self, key: str, tokens: NDArray[np.int32], scored_from: int) -> None:
        self.key, self.failure = key, ""
        self._tokens, self._from = tokens.tolist(), scored_from
        self._total = 0.0

    @property
    def ids(self) -> list[int]:
        """The tokens to feed."""
        return list(self._tokens[:-1])

    def params(self) -> dict[str, Any]:
        """Arguments of `vllm.SamplingParams`."""
        params = {"temperature": 0.0, "max_tokens": 1, "allowed_token_ids": self._tokens[-1:], "logprobs": 0}
        return params | ({"prompt_logprobs": 0} if self._from < len(self._tokens) - 1 else {})

    def take(self, output: Any) -> bool:
        """Take the engine's one output."""
        rows: Sequence[Mapping[int, Any]] = (output.prompt_logprobs or [])[self._from :]
        rows = [*rows, *output.outputs[0].logprobs]
        self._total = math.fsum(row[token].logprob for row, token in zip(rows, self._tokens[self._from :], strict=True))
        if not math.isfinite(self._total):
            self.failure = NO_NUMBER
        return True

    def likelihood(self) -> LogLikelihood:
        """What was found."""
        return LogLikelihood(self._total, len(self._tokens) - self._from, self._from)
