"""log P(text | chat) under a model, each computed once and kept in a journal: judging a set may take hours."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from submission.backends import ModelSpec
from submission.calls.journal import Journal, journal_path
from submission.types import Backend, Chat, Failure, Prediction

Question = tuple[Chat, str]
"""A chat, and the text whose probability is wanted as its continuation."""


@dataclass(frozen=True, slots=True)
class Known:
    """A likelihood and what it took.

    Attributes:
        sum: log P(text | chat), nats.
        tokens: of the text.
        prompt_tokens: of the chat.
        seconds: since the one before was known.
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
    """Likelihoods of one model.

    Args:
        load: loads it, when something is asked that is not known.
        journal: of this model, begun; None: they are known to this object alone.
    """

    def __init__(self, load: Callable[[], Backend], journal: Journal | None = None) -> None:
        self._load = load
        self._journal = journal
        self._backend: Backend | None = None
        finished = journal.finished if journal is not None else {}
        self._known = {key: _parse(answer.text) for key, answer in finished.items()}

    def of(self, asked: Sequence[Question], done: Callable[[], None] = lambda: None) -> list[Known]:
        """The likelihood of each text behind its chat.

        Args:
            asked: in any order; what is there twice is computed once.
            done: is called for each one, known or computed.
        """
        keys = [_digest(chat, text) for chat, text in asked]
        missing = {key: item for key, item in zip(keys, asked, strict=True) if key not in self._known}
        for _ in range(len(asked) - len(missing)):
            done()
        if missing:
            self._backend = self._backend or self._load()
            items = ((key, chat, text) for key, (chat, text) in missing.items())
            before = time.perf_counter()
            for key, found in self._backend.loglikelihood(items):
                now = time.perf_counter()
                if isinstance(found, Failure):  # in no journal: a rerun tries again
                    known = Known(math.nan, 0, 0, now - before, found.reason)
                else:
                    known = Known(found.sum, found.tokens, found.prompt_tokens, now - before)
                    if self._journal is not None:
                        self._journal.append(Prediction(key, _line(known)))
                before = now
                self._known[key] = known
                done()
        return [self._known[key] for key in keys]


@contextmanager
def journalled(spec: ModelSpec, output: Path, *, fresh: bool = False) -> Iterator[Likelihoods]:
    """Likelihoods of a model with a journal beside `output`, open while the block runs.

    Raises:
        UserError: the journal is of another model, or another process writes it.
    """
    journal = Journal(journal_path(output), spec.fingerprint(), fresh=fresh)
    try:
        journal.begin()
        yield Likelihoods(spec.load, journal)
    finally:
        journal.close()


def _digest(chat: Chat, text: str) -> str:
    return hashlib.sha256(f"{chat!r}\0{text!r}".encode("utf-8", "surrogatepass")).hexdigest()


def _line(known: Known) -> str:
    return f"{known.sum!r} {known.tokens} {known.prompt_tokens} {known.seconds:.6f}"


def _parse(line: str) -> Known:
    total, tokens, prompt_tokens, seconds = line.split()
    return Known(float(total), int(tokens), int(prompt_tokens), float(seconds))
