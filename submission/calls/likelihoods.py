"""log P(text | chat) of many questions to one model, in their order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from submission.types import Chat, Failure, LogLikelihood

Question = tuple[Chat, str]
"""A chat, and the text whose probability is wanted as its continuation."""


class LikelihoodModel(Protocol):
    """What can be asked: a handle, or a backend."""

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`."""
        ...


@dataclass(frozen=True, slots=True)
class Known:
    """A likelihood and what it took.

    Attributes:
        sum: log P(text | chat), nats.
        tokens: of the text.
        prompt_tokens: of the chat.
        seconds: that it took beside others.
        failure: why there is none; "" if there is one.
    """

    sum: float
    tokens: int
    prompt_tokens: int
    seconds: float
    failure: str = ""

    @property
    def per_token(self) -> float:
        """Mean over the text's tokens, nats; 0 for a text of none, NaN for a failure."""
        return self.sum / self.tokens if self.tokens else self.sum


class Likelihoods:
    """Likelihoods of one model; what was asked once is kept.

    Args:
        model: that is asked.

    Attributes:
        calls: that a question takes.
    """

    calls = 1

    def __init__(self, model: LikelihoodModel) -> None:
        self._model = model
        self._known: dict[Question, Known] = {}

    def of(self, asked: Sequence[Question], done: Callable[[], None] = lambda: None) -> list[Known]:
        """The likelihood of each text behind its chat.

        Args:
            asked: in any order; what is there twice is computed once.
            done: is called for each one, known or computed.
        """
        missing = [question for question in dict.fromkeys(asked) if question not in self._known]
        for _ in range(len(asked) - len(missing)):
            done()
        items = ((str(number), chat, text) for number, (chat, text) in enumerate(missing))
        for key, found in self._model.loglikelihood(items):
            if isinstance(found, Failure):
                known = Known(math.nan, 0, 0, 0.0, found.reason)
            else:
                known = Known(found.sum, found.tokens, found.prompt_tokens, found.seconds)
            self._known[missing[int(key)]] = known
            done()
        return [self._known[question] for question in asked]
