"""Workers that hold a model, and what happens when one is lost.

Items are dealt to the worker that has the least to do, and answers come back as they are finished. A worker that dies,
hangs or is stopped is replaced. What it had is asked again apart from everything else, and divided each time that
happens again, until the item that does it stands alone: its result is a `Failure`. The same is done when a batch fails
with an exception, without a new worker.

What carries the messages is for a `Carrier` to say: processes of this machine, or actors of a Ray cluster.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from submission.calls.requests import MethodKind
from submission.errors import PromptRecoveryError, UserError
from submission.types import Failure

LOG = logging.getLogger(__name__)

_PARTS = 4  # that a suspected group is divided in
_DEATHS_ALONE, _ERRORS_ALONE = 3, 2  # after which an item on its own is given up
# Items in a row that did it alone, without one answer in between, after which the model is given up.
_DEADLY_IN_A_ROW, _FAILING_IN_A_ROW = 4, 64  # of a model that never answered
_DEADLY_AFTER_ANSWERS = 16  # of one that did; that items fail is then no matter of the model
_LOADS = 3  # workers in a row that may die while they load the model
_TICK = 0.5  # seconds between two looks at workers that say nothing
STALL_SECONDS = 900.0  # without an answer, beyond which a busy worker counts as hanging
_LEAST_STALL, _SLOWER, _KNOWN = 120.0, 20.0, 50  # once so many answers are known: so many times the slowest, at least
_LOADING_SECONDS = 3600.0
_SHARE = 0.25  # of the time to a deadline that one hang may cost
_ATTENTIVE = 5.0  # seconds; answers that lay there longer tell nothing of the pace of a worker
_OTHERS_SECONDS = 30.0  # that the first worker waits for the others

Message = tuple[Any, ...]
"""To a worker: ("ask", (call, try), method, items), ("stop", (call, try)).

From it: ("ready", where), ("refused", words) of a model that cannot be loaded, ("answers", (call, try), [(key, answer),
...]), ("trouble", (call, try), words), ("lost", words) of one that is about to end, since its GPU is lost to it.
"""


class DeadlineReached(BaseException):
    """The time of the run is over. Not an Exception: no strategy swallows it by accident."""


class HopelessError(PromptRecoveryError):
    """A model's workers were lost again and again without one answer in between."""


class LostError(PromptRecoveryError):
    """No worker is left, and none can be started."""


@dataclass(slots=True, eq=False)
class Worker:
    """A worker as the supervisor sees it; a carrier keeps what it needs in `handle`.

    Attributes:
        number: its own.
        handle: of the carrier.
        ready: its model is loaded.
        since: when it was last heard of or given something to do, in seconds of `time.monotonic()`.
        asked: items that it has not answered, by call and key.
        load: the work that they are, in characters.
        alone: what it has was suspected, so it gets nothing else.
        loads: workers before it that died in its place while they loaded the model.
        tries: by call, how often it failed: what it still has of an earlier try is none of ours.
    """

    number: int
    handle: Any = None
    ready: bool = False
    since: float = field(default_factory=time.monotonic)
    asked: dict[tuple[int, str], Item] = field(default_factory=dict)
    load: int = 0
    alone: bool = False
    loads: int = 0
    tries: dict[int, int] = field(default_factory=dict)

    def take(self, items: Iterable[Item]) -> None:
        """It is asked these."""
        for item in items:
            self.asked[item.call, item.key] = item
            self.load += item.size

    def drop(self, call: int, key: str) -> Item | None:
        """It has this no longer; None if it had not."""
        item = self.asked.pop((call, key), None)
        if item is not None:
            self.load -= item.size
        self.alone = self.alone and bool(self.asked)
        return item

    def leave(self, call: int | None = None) -> list[Item]:
        """Drop all that it has, or all of one call."""
        gone = [item for item in self.asked.values() if call in (None, item.call)]
        for item in gone:
            self.drop(item.call, item.key)
        return gone

    def asks(self, call: int) -> tuple[int, int]:
        """How a call is named to the worker: its number and the try."""
        return call, self.tries.get(call, 0)


@dataclass(slots=True, eq=False)
class Item:
    """Something that is asked, and how often it was alone with a worker that was lost or failed."""

    call: int
    key: str
    content: Any
    size: int
    deaths: int = 0
    errors: int = 0


class Carrier(ABC):
    """Starts workers, carries messages, and knows when a worker is gone."""

    count: int
    """Number of workers that are wanted."""

    @abstractmethod
    def start(self, worker: Worker) -> None:
        """Start what `worker` stands for; it tells ("ready", ...) or ("refused", ...) when its model is loaded."""

    @abstractmethod
    def send(self, worker: Worker, message: Message) -> None:
        """Send; a worker that is gone is found out by `receive`."""

    @abstractmethod
    def receive(self, workers: Sequence[Worker], seconds: float) -> Iterator[tuple[Worker, Message | None]]:
        """What workers have told, after waiting so long for it at most; None for a worker that is gone."""

    @abstractmethod
    def end(self, worker: Worker) -> str:
        """End a worker, however it is; returns what became of it, for messages."""

    def kill(self, worker: Worker) -> None:
        """Let a worker end soon, without waiting for it."""
        del worker

    def peak_memory(self, worker: Worker) -> float:
        """Bytes that a worker took at its peak; 0 where that is not known."""
        del worker
        return 0.0

    def halted(self, worker: Worker) -> bool:
        """Whether somebody stopped the worker without ending it."""
        del worker
        return False


class Pool:
    """The workers of one model.

    Args:
        carrier: of messages.
        end: when all workers are to be ended, in seconds of `time.monotonic()`; None for never.
        stall: seconds without an answer after which a busy worker is replaced.

    Raises:
        UserError: the model cannot be loaded.
        DeadlineReached: while it was.
    """

    def __init__(self, carrier: Carrier, end: float | None = None, stall: float = STALL_SECONDS) -> None:
        self._carrier = carrier
        self._end, self._stall = end, stall
        self._calls: dict[int, Call] = {}
        self._numbers = 0
        self._deadly = self._failing = 0  # items that stood alone since the last answer
        self._slowest = 0.0  # seconds that a worker took between two answers
        self._answers = 0
        self._looked = self._took_in = time.monotonic()
        self.closed = False
        self.workers = [Worker(number) for number in range(carrier.count)]
        try:
            for worker in self.workers:
                carrier.start(worker)
            # The first one to be ready would take all that there is, if there is little.
            first = float("inf")
            while not all(worker.ready for worker in self.workers) and time.monotonic() < first + _OTHERS_SECONDS:
                self._receive()
                if any(worker.ready for worker in self.workers):
                    first = min(first, time.monotonic())
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether a call is being answered."""
        return bool(self._calls)

    def peak_memory(self) -> float:
        """Bytes that the workers took at their peaks, together; 0 where that is not known."""
        return sum(map(self._carrier.peak_memory, self.workers))

    def open(self, kind: MethodKind) -> Call:
        """Begin a call; several may be open at once."""
        self._numbers += 1
        call = Call(self, self._numbers, kind)
        self._calls[call.number] = call
        return call

    def give_up(self, call: Call) -> None:
        """Forget a call; workers stop what they do for it."""
        if self._calls.pop(call.number, None) is None:
            return
        for worker in self.workers:
            if worker.leave(call.number):
                self._carrier.send(worker, ("stop", worker.asks(call.number)))

    def close(self) -> None:
        """End all workers; nothing of them is left."""
        workers, self.workers = self.workers, []
        self.closed = True
        for worker in workers:
            self._carrier.kill(worker)
        for worker in workers:
            self._carrier.end(worker)

    # -- dealing ----------------------------------------------------------------------------------------------

    def deal(self, call: Call) -> None:
        """Send what waits in a call to workers: suspected groups to idle ones, the rest to those with the least.

        A block that is not full waits for more, until a worker has little left or the call says that there is no more.
        """
        for worker in self.workers:
            if call.suspects and worker.ready and not worker.asked:
                worker.alone = True
                self._give(worker, call, call.suspects.pop())
        while call.waiting and not call.suspects:
            ahead = call.kind.ahead
            free = [one for one in self.workers if one.ready and not one.alone and len(one.asked) < ahead]
            if not free:
                return
            full = call.no_more or len(call.waiting) >= call.kind.block
            if not full and all(len(one.asked) > ahead // 2 for one in free):
                return
            block = [call.waiting.popleft() for _ in range(min(call.kind.block, len(call.waiting)))]
            self._give(min(free, key=lambda one: one.load), call, block)

    def _give(self, worker: Worker, call: Call, items: list[Item]) -> None:
        if not worker.asked:
            worker.since = time.monotonic()
        worker.take(items)
        self._carrier.send(
            worker, ("ask", worker.asks(call.number), call.kind.method, [item.content for item in items])
        )

    # -- listening --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Wait for something to happen, and deal with it.

        Raises:
            DeadlineReached: the time is over; all workers were ended.
            LostError: no worker is left.
        """
        self._receive()
        for call in self._calls.values():
            self.deal(call)

    def _receive(self) -> None:
        left = _TICK if self._end is None else min(_TICK, self._end - time.monotonic())
        if left <= 0:
            self.close()
            raise DeadlineReached
        if not self.workers:
            raise LostError("the model's workers were ended in the middle of a call")
        before = time.monotonic()
        self.take_in(left)
        now = time.monotonic()
        if now - before > _TICK + 5:  # this very process was halted: what the others have told is still to be read
            for worker in self.workers:
                worker.since = now
            return
        if now - self._looked > _TICK:
            self._looked = now
            for worker in list(self.workers):
                self._look_after(worker, now)

    def take_in(self, seconds: float = 0.0) -> None:
        """Deal with what workers have told, after waiting so long for it at most; errors as of `listen`."""
        attentive = time.monotonic() - self._took_in < _ATTENTIVE
        for worker, message in self._carrier.receive(list(self.workers), seconds):
            if worker not in self.workers:
                continue
            if message is None:
                self._lose(worker, self._carrier.end(worker))
            else:
                self._take(worker, message, attentive=attentive)
        self._took_in = time.monotonic()

    def _look_after(self, worker: Worker, now: float) -> None:
        limit = self._patience(worker) if worker.ready else _LOADING_SECONDS
        why = ""
        if self._carrier.halted(worker):
            why = "was stopped"
        elif (worker.asked or not worker.ready) and now - worker.since > limit:
            why = f"gave no answer for {now - worker.since:.0f} s"
        if why:
            self._carrier.end(worker)
            self._lose(worker, f"worker {worker.number} {why}")

    def _patience(self, worker: Worker) -> float:
        """Seconds without an answer after which a busy worker hangs: shorter once it is known how long answers take,
        and where a deadline is near.
        """
        left = float("inf") if self._end is None else _SHARE * (self._end - worker.since)
        if self._answers < _KNOWN:
            return max(min(self._stall, max(_LEAST_STALL, left)), _SLOWER * self._slowest)
        return min(self._stall, max(min(_LEAST_STALL, left), _SLOWER * self._slowest))

    def _take(self, worker: Worker, message: Message, *, attentive: bool) -> None:
        kind, *told = message
        now = time.monotonic()
        if kind == "ready":
            worker.ready, worker.since = True, now
        elif kind == "refused":
            self._carrier.end(worker)
            self._leave_out(worker, str(told[0]))
        elif kind == "lost":
            self._carrier.end(worker)
            self._lose(worker, f"worker {worker.number} lost its GPU: {told[0]}")
        elif kind == "answers":
            (number, _), answers = told
            gap = (now - worker.since) / max(1, len(answers))
            if attentive:
                self._slowest = max(self._slowest, now - worker.since)
            self._answers += len(answers)
            worker.since = now
            self._deadly = self._failing = 0
            call = self._calls.get(number)
            for key, answer in answers:
                item = worker.drop(number, key)
                if item is not None and call is not None:
                    call.finish(item, answer, gap)
        else:
            (number, attempt), words = told
            if attempt != worker.tries.get(number, 0):
                return
            worker.since = now
            self._carrier.send(worker, ("stop", (number, attempt)))  # what is on its way to it is asked anew
            worker.tries[number] = attempt + 1
            self._suspect(worker.leave(number), words, died=False)

    # -- losses -----------------------------------------------------------------------------------------------

    def _lose(self, worker: Worker, words: str) -> None:
        """A worker is gone: another takes its place, and what it had is asked again."""
        items = worker.leave()
        loads = 0 if worker.ready else worker.loads + 1
        if loads == _LOADS:
            self._leave_out(
                worker, f"{words} while it loaded the model\nThere may be too little memory: use fewer --workers"
            )
        else:
            if worker.ready:
                LOG.warning("%s: another takes its place, what it had is asked again", words)
            place = self.workers.index(worker)
            self.workers[place] = Worker(worker.number, loads=loads)
            try:
                self._carrier.start(self.workers[place])
            except UserError as error:
                self._leave_out(self.workers[place], str(error))
        self._suspect(items, words, died=True)

    def _leave_out(self, worker: Worker, words: str) -> None:
        """A worker cannot be started: the others go on."""
        self.workers.remove(worker)
        if not self.workers:
            if not self._calls:
                raise UserError(words)
            raise LostError(f"{words}\nNo worker is left; what was computed is safe.")
        LOG.warning("%s: %d workers are left", words.splitlines()[0], len(self.workers))

    def _suspect(self, items: list[Item], words: str, *, died: bool) -> None:
        """Ask items again that a worker had when it was lost or failed, in smaller groups."""
        by_call: dict[int, list[Item]] = {}
        for item in items:
            by_call.setdefault(item.call, []).append(item)
        for number, group in by_call.items():
            call = self._calls.get(number)
            if call is not None and call.suspect(group, words, died=died):
                self._deadly += died
                self._failing += not died
        never = self._answers == 0
        if self._deadly >= (_DEADLY_IN_A_ROW if never else _DEADLY_AFTER_ANSWERS) or (
            never and self._failing >= _FAILING_IN_A_ROW
        ):
            raise HopelessError(words)


class Call:
    """Items of one call of a method, and their results as they come.

    Attributes:
        number: of the call.
        kind: of the method.
        waiting: items that no worker has.
        no_more: no item will be added.
        suspects: groups that are to be asked apart from everything else; the last one first, so that a culprit is found
            before the next group is tried.
    """

    def __init__(self, pool: Pool, number: int, kind: MethodKind) -> None:
        self.number, self.kind = number, kind
        self.waiting: deque[Item] = deque()
        self.suspects: list[list[Item]] = []
        self.no_more = False
        self._pool = pool
        self._open: dict[str, Item] = {}
        self._results: deque[tuple[Any, Any, float]] = deque()

    @property
    def pending(self) -> list[Any]:
        """What has no result yet."""
        return [item.content for item in self._open.values()]

    @property
    def unfinished(self) -> bool:
        """Whether something has no result yet, or results wait to be taken."""
        return bool(self._open or self._results)

    @property
    def pool(self) -> Pool:
        """The workers that it is asked of; it is `closed` when another call gave the model up."""
        return self._pool

    @property
    def has_room(self) -> bool:
        """Whether workers could take more."""
        return len(self._open) < self.kind.ahead * len(self._pool.workers)

    def add(self, content: Any) -> None:
        """Ask something; its key must be another than those of what has no result yet."""
        key = self.kind.key(content)
        if key in self._open:
            raise ValueError(f"two items of one call have the key {key!r}")
        self._open[key] = item = Item(self.number, key, content, self.kind.size(content))
        self.waiting.append(item)
        if len(self.waiting) >= self.kind.block:
            self._pool.deal(self)

    def results(self) -> Iterator[tuple[Any, Any, float]]:
        """Results that are there: item, answer or `Failure`, seconds that it took beside others."""
        while self._results:
            yield self._results.popleft()

    def wait(self, *, flush: bool = True) -> None:
        """Deal what waits, and come back when there is a result.

        Args:
            flush: there will be no more items: blocks need not be full.

        Raises:
            DeadlineReached, HopelessError, LostError: see each.
        """
        self.no_more = flush
        self._pool.deal(self)
        while self._open and not self._results:
            self._pool.listen()

    def finish(self, item: Item, answer: Any, seconds: float) -> None:
        """An item has a result."""
        if self._open.pop(item.key, None) is not None:
            self._results.append((item.content, answer, seconds))

    def suspect(self, group: list[Item], words: str, *, died: bool) -> bool:
        """One of these items did harm; whether it is known by now which one."""
        if len(group) > 1:
            size = -(-len(group) // _PARTS)
            self.suspects.extend(reversed([group[at : at + size] for at in range(0, len(group), size)]))
            return False
        (item,) = group
        item.deaths += died
        item.errors += not died
        if item.deaths >= _DEATHS_ALONE or item.errors >= _ERRORS_ALONE:
            self.finish(item, Failure(words), 0.0)
            return True
        self.suspects.append(group)
        return False

    def close(self) -> None:
        """Give up what has no result."""
        self._pool.give_up(self)
