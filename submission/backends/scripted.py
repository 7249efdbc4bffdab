"""A backend without a model, for rehearsals and tests: answers from a file, a list or a function.

    python -m submission predict test.csv -o submission.csv --backend scripted --set seconds_per_row=0.2

It can be told to be slow, to stall, to hang and to fail, so that a run's behaviour under each can be seen.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from submission.data.files import read_json
from submission.errors import BackendError, UserError
from submission.prompts.encoding import ChatEncoder, SpecialToken
from submission.types import Chat, Completion, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    from submission.backends import ModelSpec

KEYED = True
Answers = Mapping[str, str] | Sequence[str] | Callable[[Request], str]


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend; ids are lists with commas.

    answers: a JSON file, an object from id to answer or a list that rows take from by a hash of their id;
        without it every row gets an answer that names its id.
    batch: rows that are answered together.
    seconds_per_row: time that each row takes.
    stall_every, stall_seconds: every so many rows, a batch takes so much longer.
    fail_ids: a batch with one of these rows fails, every time.
    fail_every: every so many batches one fails, though its rows are good.
    empty_ids: rows with an empty answer.
    hang_ids: at one of these rows a native call never returns.
    hang_holds_gil: and keeps all other Python threads from running.
    context: tokens (words, here) that a prompt may have.
    """

    answers: str = ""
    batch: int = 1
    seconds_per_row: float = 0.0
    stall_every: int = 0
    stall_seconds: float = 0.0
    fail_ids: str = ""
    fail_every: int = 0
    empty_ids: str = ""
    hang_ids: str = ""
    hang_holds_gil: bool = False
    context: int = 2048


def check(spec: ModelSpec) -> None:
    """Refuse answers that cannot be read, and an adapter."""
    _read_answers(spec.options.answers)
    if spec.adapter is not None:
        raise UserError("backend scripted takes no adapter")
    if spec.options.batch < 1:
        raise UserError("option batch for backend scripted must be at least 1")


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """What decides the answers; speed and failures do not."""
    answers = spec.options.answers
    return {"model": hashlib.sha256(Path(answers).read_bytes()).hexdigest() if answers else "scripted"}


def load(spec: ModelSpec) -> Scripted:
    """Make the double."""
    return Scripted(_read_answers(spec.options.answers), spec.options)


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """An encoder whose tokens are words."""
    return ChatEncoder(WordTokenizer(), spec.options.context)


class WordTokenizer:
    """Splits at blanks; keeps the words it has seen, so that ids can be read back."""

    specials: Mapping[str, SpecialToken] = {}
    bos: int | None = None

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\n\nassistant: "

    def tokenize(self, text: str, *, at_start: bool) -> list[int]:
        del at_start
        ids = []
        for word in text.split(" "):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(self._words[number] for number in ids)


class Scripted:
    """A `Backend` that answers as it is told.

    Args:
        answers: a mapping from request key to answer, a list (a request takes the one that a hash of its
            key points to), a function of the request, or None for answers that name the key.
    """

    def __init__(self, answers: Answers | None = None, options: Options | None = None) -> None:
        self._answers = answers
        self._options = options or Options()
        self._fail_ids = _ids(self._options.fail_ids)
        self._empty_ids = _ids(self._options.empty_ids)
        self._hang_ids = _ids(self._options.hang_ids)
        self._rows = 0
        self._batches = 0
        self.requests: list[Request] = []
        """The last 1,000 requests seen, for tests to look at."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """See `submission.types.Backend`."""
        stream = iter(requests)
        while batch := list(islice(stream, self._options.batch)):
            self._work([request.key for request in batch])
            self.requests = [*self.requests, *batch][-1000:]
            encoder = ChatEncoder(WordTokenizer(), self._options.context)  # anew: it keeps all words it sees
            for request in batch:
                encoded = encoder.encode_for(request.chat, request.sampling.max_new_tokens)
                text = self._answer(request)
                tokens = len(text.split())
                completion = Completion(text, -float(tokens), tokens, "stop", len(encoded.ids), encoded.truncated)
                yield request.key, [completion] * request.sampling.n

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`; every word has the log-probability -1."""
        for key, _, continuation in items:
            self._work([key])
            tokens = len(continuation.split())
            yield key, LogLikelihood(-float(tokens), tokens)

    def _work(self, keys: Sequence[str]) -> None:
        options = self._options
        self._batches += 1
        if not self._hang_ids.isdisjoint(keys):
            _hang(holding_gil=options.hang_holds_gil)
        seconds = options.seconds_per_row * len(keys)
        before, self._rows = self._rows, self._rows + len(keys)
        if options.stall_every and before // options.stall_every != self._rows // options.stall_every:
            seconds += options.stall_seconds
        time.sleep(seconds)
        if not self._fail_ids.isdisjoint(keys):
            raise BackendError("scripted failure")
        if options.fail_every and self._batches % options.fail_every == 0:
            raise BackendError("scripted passing failure")

    def _answer(self, request: Request) -> str:
        if request.key in self._empty_ids:
            return ""
        if self._answers is None:
            return f"Rewrite the text as row {request.key} asks."
        if callable(self._answers):
            return self._answers(request)
        if isinstance(self._answers, Mapping):
            if request.key not in self._answers:
                raise BackendError("no scripted answer for this id")
            return self._answers[request.key]
        place = hashlib.sha256(request.key.encode("utf-8", "surrogatepass")).digest()
        return self._answers[int.from_bytes(place[:8], "little") % len(self._answers)]


def _hang(*, holding_gil: bool) -> None:
    library = ctypes.PyDLL(None) if holding_gil else ctypes.CDLL(None)
    while True:
        library.sleep(3600)


def _ids(text: str) -> frozenset[str]:
    return frozenset(part for part in text.split(",") if part)


def _read_answers(path: str) -> Answers | None:
    if not path:
        return None
    answers = read_json(Path(path), "answers file")
    values = list(answers.values()) if isinstance(answers, dict) else answers
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"answers file {path} must hold a list of texts or an object from id to text")
    return answers  # type: ignore[no-any-return]
