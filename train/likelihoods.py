"""log P(text | chat) under a model, each computed once and kept in a journal: judging a set may take hours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from submission.journal import Journal
from submission.types import Backend, Chat, Prediction


class Likelihoods:
    """Likelihoods of one model.

    Args:
        load: loads it, when something is asked that is not known.
        journal: of this model, begun; None keeps nothing.
    """

    def __init__(self, load: Callable[[], Backend], journal: Journal | None = None) -> None:
        self._load = load
        self._journal = journal
        self._backend: Backend | None = None
        finished = journal.finished if journal else {}
        self._known = {key: _parse(prediction.text) for key, prediction in finished.items()}

    def of(self, asked: Sequence[tuple[Chat, str]], done: Callable[[], None] = lambda: None) -> list[tuple[float, int]]:
        """Sum over the text's tokens in nats, and their number, for each (chat, text).

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
            for key, likelihood in self._backend.loglikelihood(items):
                self._known[key] = (likelihood.sum, likelihood.tokens)
                if self._journal is not None:
                    self._journal.append(Prediction(key, f"{likelihood.sum!r} {likelihood.tokens}"))
                done()
        return [self._known[key] for key in keys]


def _digest(chat: Chat, text: str) -> str:
    return hashlib.sha256(f"{chat!r}\0{text!r}".encode("utf-8", "surrogatepass")).hexdigest()


def _parse(text: str) -> tuple[float, int]:
    total, tokens = text.split()
    return float(total), int(tokens)
