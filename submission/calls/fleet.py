"""Several copies of a model behind the two methods of a `Backend`: who gets which request, and what a worker does.

Requests are dealt to the worker that has the least to do, answers come back as they are finished, and what a lost
worker had is asked again: whoever keeps the journal sees one backend. Workers are processes of this machine
(`submission.calls.processes`) or actors of a Ray cluster (`submission.calls.ray`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from submission.backends.common import memory_budget, thread_count
from submission.errors import BackendError, UserError, first_line
from submission.backends.hardware import ALONE, visible_gpus
from submission.types import Backend, Chat, Completion, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    from submission.backends import ModelSpec

_BLOCK = 8  # requests that are dealt together: neighbours often share a beginning
_AHEAD = 512  # requests that a worker may have: twice what a backend looks at together, so that none runs dry
_ANSWER = 250  # characters of a prompt that take as long as an answer, about
_DEATHS = 3  # of workers in one call, beyond which the rows are suspected and divided

Method = Literal["generate", "loglikelihood"]
Event = tuple[Any, ...]
"""What a worker tells: ("ready", 0), ("answer", call, key, answer), ("trouble" or "refused", call, words)."""


@dataclass(slots=True, eq=False)
class Member:
    """A worker, as the driver sees it.

    Attributes:
        number: its own.
        asked: requests that it has not answered, by key.
        load: the work that they are, in characters.
    """

    number: int
    asked: dict[str, Any] = field(default_factory=dict)
    load: int = 0

    def take(self, block: Iterable[tuple[str, Any]]) -> None:
        """It has been asked these."""
        for key, item in block:
            self.asked[key] = item
            self.load += _load(item)

    def done(self, key: str) -> bool:
        """Whether this answers what it has been asked: one that was taken for lost had answered already."""
        item = self.asked.pop(key, None)
        if item is None:
            return False
        self.load -= _load(item)
        return True

    def leave(self) -> dict[str, Any]:
        """What it has not answered, which is to be asked of others."""
        left, self.asked, self.load = self.asked, {}, 0
        return left


def _load(item: Any) -> int:
    """What a request or a (key, chat, continuation) takes, so that nobody is done long before the others."""
    chat, more = (item.chat, _ANSWER * item.sampling.n) if isinstance(item, Request) else (item[1], len(item[2]))
    return more + sum(len(part.text) for message in chat.messages for part in message.parts)


M = TypeVar("M", bound=Member)


class Spread(ABC, Generic[M]):
    """A `Backend` that deals its requests to workers. What carries the messages is for a subclass to say."""

    def __init__(self) -> None:
        self._call = 0
        self.members: list[M] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """See `submission.types.Backend`."""
        return self._spread("generate", ((request.key, request) for request in requests))

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`."""
        return self._spread("loglikelihood", ((item[0], item) for item in items))

    @abstractmethod
    def close(self) -> None:
        """End the workers."""

    def __del__(self) -> None:  # a backend has no end but this one: its memory is wanted for the next
        with suppress(Exception):
            self.close()

    @abstractmethod
    def _ask(self, member: M, call: int, method: Method, items: Sequence[Any]) -> None:
        """Send requests; a lost worker is found out by `_listen`."""

    @abstractmethod
    def _stop(self, member: M, call: int) -> None:
        """Tell a worker that a call is given up."""

    @abstractmethod
    def _listen(self, members: Sequence[M]) -> Iterator[tuple[M, Event | None]]:
        """What some of these have told, after waiting for it; None for a worker that is lost."""

    @abstractmethod
    def _replace(self, member: M) -> str:
        """Put a new worker in a lost one's place, or leave it out; returns what became of the old one.

        Raises:
            UserError: there is none left.
        """

    def _spread(self, method: Method, items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Deal items out, yield what comes back.

        Raises:
            BackendError: a backend failed, or workers died again and again, on requests that are not answered yet.
        """
        if any(member.asked for member in self.members):
            raise RuntimeError("a call to these workers is still running: end it first")
        self._call += 1
        source = iter(items)
        trouble: Exception | None = None
        more, deaths = True, 0
        homeless: dict[str, Any] = {}  # of a worker that could not be replaced
        try:
            while True:
                while homeless or more:
                    free = [member for member in self.members if len(member.asked) < _AHEAD]
                    if not free:
                        break
                    member = min(free, key=lambda one: one.load)
                    block: list[tuple[str, Any]] = []
                    if homeless:
                        block = list(islice(homeless.items(), _BLOCK))
                        for key, _ in block:
                            del homeless[key]
                    else:
                        try:
                            block.extend(islice(source, _BLOCK))
                        except Exception as error:  # of whoever makes the requests: passed on when all is answered
                            trouble, more = error, False
                        more = more and len(block) == _BLOCK
                    member.take(block)
                    if block:
                        self._ask(member, self._call, method, [item for _, item in block])
                busy = [member for member in self.members if member.asked]
                if not busy:
                    break
                for member, event in self._listen(busy):
                    if event is None:
                        deaths += 1
                        words = self._replace(member)
                        if deaths > _DEATHS:
                            raise BackendError(words)
                        if member in self.members:
                            self._ask(member, self._call, method, list(member.asked.values()))
                        else:
                            homeless |= member.leave()
                    elif event[1] != self._call:
                        continue  # of a call that was given up
                    elif event[0] == "answer":
                        if member.done(event[2]):
                            yield event[2], event[3]
                    elif event[0] == "refused":
                        raise UserError(event[2])
                    else:
                        raise BackendError(event[2])
        finally:
            for member in self.members:
                if member.leave():
                    self._stop(member, self._call)
        if trouble is not None:
            raise trouble


def shares(spec: ModelSpec, count: int) -> list[tuple[ModelSpec, Mapping[str, str]]]:
    """What each process of a machine loads, and its environment: a share of the cores, a GPU where there are some."""
    gpus = visible_gpus()
    share = divided(spec, count, thread_count(0))
    return [(share, {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}) for number in range(count)]


def divided(spec: ModelSpec, count: int, cores: int) -> ModelSpec:
    """The model as one of `count` workers loads it, beside the others, on a machine with so many cores."""
    names = {item.name for item in fields(spec.options)}
    part: dict[str, int] = {}
    if "threads" in names and not spec.options.threads:
        part["threads"] = max(1, cores // count)
    if "memory" in names and not spec.options.memory:
        part["memory"] = max(64, memory_budget() // count // 1_000_000)
    return replace(spec, fleet=ALONE, options=replace(spec.options, **part))


class Inbox:
    """What a worker has been asked. It takes messages at any time, so that the driver never waits for a busy worker."""

    def __init__(self) -> None:
        self._blocks: SimpleQueue[tuple[int, Method, list[Any]] | None] = SimpleQueue()
        self._returned: tuple[int, Method, list[Any]] | None = None
        self.stopped = 0
        """The last call that the driver gave up."""

    def put(self, call: int, method: Method, items: list[Any]) -> None:
        """Take a block."""
        self._blocks.put((call, method, items))

    def close(self) -> None:
        """There will be no more."""
        self._blocks.put(None)

    def next(self) -> tuple[int, Method, list[Any]] | None:
        """The next block of a call that is wanted, after waiting for it; None when there will be no more."""
        while True:
            block, self._returned = self._returned or self._blocks.get(), None
            if block is None or block[0] > self.stopped:
                return block

    def stream(self, call: int, items: list[Any]) -> Iterator[Any]:
        """Items of a call, as long as there are any: a backend that waited for more would answer none of these."""
        yield from items
        while True:
            try:
                block = self._blocks.get_nowait()
            except Empty:
                return
            if block is None:
                self._blocks.put(None)  # for `next` to see
                return
            if block[0] != call:
                self._returned = block
                return
            yield from block[2]


def work(backend: Backend, inbox: Inbox) -> Iterator[Event]:
    """A worker's life: what it has to tell."""
    while (block := inbox.next()) is not None:
        call, method, items = block
        try:
            for key, answer in getattr(backend, method)(inbox.stream(call, items)):
                if inbox.stopped >= call:
                    break
                yield ("answer", call, key, answer)
        except UserError as error:
            yield ("refused", call, str(error))
        except Exception as error:
            yield ("trouble", call, first_line(error))


def load_words(error: Exception) -> str:
    """What a worker says when its model cannot be loaded."""
    return str(error) if isinstance(error, UserError) else first_line(error)


def gathered(events: Iterable[Event], most: int = 64, seconds: float = 0.1) -> Iterator[list[Event]]:
    """Events in groups, none of which waits longer than `seconds` for the next: a message costs a millisecond on a
    cluster, whatever is in it.
    """
    told: SimpleQueue[Event | None] = SimpleQueue()

    def tell() -> None:
        for event in events:
            told.put(event)
        told.put(None)

    threading.Thread(target=tell, daemon=True).start()
    while True:
        group: list[Event] = []
        event = told.get()
        with suppress(Empty):
            while event is not None:
                group.append(event)
                if len(group) == most:
                    break
                event = told.get(timeout=seconds)
        if group:
            yield group
        if event is None:
            return
