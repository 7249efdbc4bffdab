"""The few types that pass between rooms; all are frozen, none imports anything heavy.

One row of the competition's data, and what is made of it on the way:

    Pair("9559194", "The shoe may be refused ...", "Several perspectives need ...")
      -> Template.render -> Chat -> Backend.generate -> Completion -> Template.parse
      -> Prediction("9559194", "Rewrite the text as a debate.", "ok")
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from submission.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _Travels:
    """What goes to workers and comes back: as its fields, which takes a third of the time of a dataclass's own way."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        names: tuple[str, ...] = self.__slots__
        return type(self), tuple([getattr(self, name) for name in names])


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
class Part(_Travels):
    """A stretch of a message.

    Trusted text is the template's own: special tokens in it are parsed. Untrusted text is data: it is
    tokenised with special-token parsing off and may be cut in its middle when a prompt is too long.
    """

    text: str
    trusted: bool = True


@dataclass(frozen=True, slots=True)
class Message(_Travels):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Chat(_Travels):
    """A conversation that a model is to continue with an assistant's answer.

    `prefix` is a forced beginning of that answer: it is fed to the model after the answer header and is
    not part of the completion.
    """

    messages: tuple[Message, ...]
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Sampling(_Travels):
    """How answers are sampled. `temperature` 0 means greedy; lengths are in tokens of the model."""

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 40
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError: a value that means nothing, wherever it comes from."""
        for name, good, allowed in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not good:
                raise UserError(f"{name}={getattr(self, name)!r} must be {allowed}")


@dataclass(frozen=True, slots=True)
class Request(_Travels):
    """One chat to be answered; `key` comes back with the answers and seeds their random streams."""

    key: str
    chat: Chat
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Completion(_Travels):
    """One answer of a model.

    `logprob` is the sum of the natural-log probabilities of the answer's tokens at temperature 1 over the
    whole vocabulary (end-of-turn token included when there is one); `tokens` is their number.
    `prompt_tokens` is the number of ids fed; `truncated` says that texts were cut to make them fit. `seconds` is what
    the call took beside others, known once it is in a log.
    """

    text: str
    logprob: float
    tokens: int
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int = 0
    truncated: bool = False
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class LogLikelihood(_Travels):
    """log P(continuation | chat): natural log, summed over the continuation's `tokens` only.

    `prompt_tokens` is the number of the chat's tokens, whether or not they were shared with other items; `seconds` is
    as in `Completion`.
    """

    sum: float
    tokens: int
    prompt_tokens: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def per_token(self) -> float:
        """Mean over the continuation's tokens, nats; 0 for a text of none."""
        return self.sum / self.tokens if self.tokens else self.sum


@dataclass(frozen=True, slots=True)
class Failure(_Travels):
    """What an item has instead of a result; `reason` says why, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class Encoded(_Travels):
    """A prompt as a model sees it: the number of its tokens, whether texts were cut to fit, and its text.

    `context` is the number of tokens that a prompt and its answer may have together.
    """

    tokens: int
    truncated: bool
    text: str
    context: int


class Backend(Protocol):
    """A language model behind two methods. Both stream, so memory does not grow with the input.

    Answers may come in any order. When a method raises, requests that were taken and not answered count as failed
    together; the caller asks them again in smaller groups. A thin layer over an engine: it takes no part in resuming,
    deadlines or distribution.
    """

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]:
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
    """The time that is left to a strategy. `end` is in seconds of `clock`; None means no limit."""

    end: float | None = None
    clock: Callable[[], float] = field(default=time.monotonic)

    def remaining(self) -> float:
        """Seconds left, infinite without a limit, never negative."""
        return float("inf") if self.end is None else max(0.0, self.end - self.clock())


class Model(Protocol):
    """A model as a strategy sees it: every call is looked up in the run's log, and computed by workers if it is new."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]:
        """As of `Backend`; a request that cannot be answered has a `Failure`."""
        ...

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """As of `Backend`."""
        ...

    def embed(self, texts: Sequence[str], *, keep: bool = True) -> NDArray[np.float32]:
        """Embeddings of texts, shape (texts, dim), by an encoder; `keep` writes new ones to the log.

        Raises:
            BackendError: a text has none.
        """
        ...


class Recover(Protocol):
    """A strategy: a whole way of predicting. It takes pairs and yields their predictions in any order.

    It is plain Python and loads no model: it asks those of `models`, by the roles that it declares. It may yield a row
    again when it knows better; when the time is over, the last answer counts. It never writes files. It may be called
    again with pairs that an exception left without an answer.
    """

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]: ...
