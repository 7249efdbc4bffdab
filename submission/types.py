"""The few types that pass between rooms; all are frozen, none imports anything heavy.

One row of the competition's data, and what is made of it on the way:

    Pair("9559194", "The shoe may be refused ...", "Several perspectives need ...")
      -> Template.render -> Chat -> Backend.generate -> Completion -> Template.parse
      -> Prediction("9559194", "Rewrite the text as a debate.", "ok")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Pair:
    """What is given: a text and what a language model made of it under an unknown prompt."""

    id: str
    original_text: str
    rewritten_text: str


@dataclass(frozen=True, slots=True)
class Triplet:
    """A pair whose rewrite prompt is known."""

    pair: Pair
    rewrite_prompt: str


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a message.

    Trusted text is the template's own: special tokens in it are parsed. Untrusted text is data: it is
    tokenised with special-token parsing off and may be cut in its middle when a prompt is too long.
    """

    text: str
    trusted: bool = True


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that a model is to continue with an assistant's answer.

    `prefix` is a forced beginning of that answer: it is fed to the model after the answer header and is
    not part of the completion.
    """

    messages: tuple[Message, ...]
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn. `temperature` 0 means greedy; lengths are in tokens of the model."""

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 40
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One chat to be answered; `key` comes back with the answers and seeds their random streams."""

    key: str
    chat: Chat
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of a model.

    `logprob` is the sum of the natural-log probabilities of the answer's tokens at temperature 1 over the
    whole vocabulary (end-of-turn token included when there is one); `tokens` is their number.
    `prompt_tokens` is the number of ids fed; `truncated` says that texts were cut to make them fit.
    """

    text: str
    logprob: float
    tokens: int
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """log P(continuation | chat): natural log, summed over the continuation's `tokens` only.

    `prompt_tokens` is the number of the chat's tokens, whether or not they were shared with other items.
    """

    sum: float
    tokens: int
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """What an item has instead of a result; `reason` is for people, in one line."""

    reason: str


class Backend(Protocol):
    """A language model behind two methods. Both stream, so memory does not grow with the input.

    Answers may come in any order. When a method raises, requests that were taken and not answered count
    as failed together; the caller retries them in smaller batches.
    """

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """Yield `(key, completions)` per request, `sampling.n` completions each."""
        ...

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """Yield `(key, log P(continuation | chat))` per `(key, chat, continuation)`; a text that is longer than the
        model's context is a failure of its own.
        """
        ...


Status = Literal["ok", "failed", "unfinished"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one pair.

    `status` is `ok`, `failed` (the row was tried, its answer is of no use; `reason` says why; the fallback
    takes its place) or `unfinished` (never tried: the deadline came first). `raw` is the model's own text
    before parsing; `prompt_tokens` and `truncated` are as in `Completion`.
    """

    id: str
    text: str
    status: Status = "ok"
    reason: str = ""
    raw: str = ""
    prompt_tokens: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """The time that is left to a way of predicting. `end` is in seconds of `clock`; None means no limit."""

    end: float | None = None
    clock: Callable[[], float] = field(default=time.monotonic)

    def remaining(self) -> float:
        """Seconds left, infinite without a limit, never negative."""
        return float("inf") if self.end is None else max(0.0, self.end - self.clock())


class Recover(Protocol):
    """A whole way of predicting: takes pairs, yields their predictions in any order.

    It never writes files; the driver owns journal, deadline and fallback. It may be called again with
    pairs that an exception left without an answer.
    """

    def __call__(self, pairs: Iterable[Pair], budget: Budget) -> Iterator[Prediction]: ...
