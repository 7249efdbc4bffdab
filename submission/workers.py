"""A model held by several processes behind the two methods of a `Backend`: one for each GPU, or the cores divided.

    python -m submission predict test.csv -o submission.csv --workers 2

Requests are dealt to the process that has the fewest, answers come back as they are finished. A process that is killed
is replaced, and what it had is asked again: whoever keeps the journal sees one backend.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from submission.backends.common import memory_budget, thread_count
from submission.errors import BackendError, UserError, first_line
from submission.hardware import visible_gpus
from submission.types import Chat, Completion, LogLikelihood, Request

if TYPE_CHECKING:
    from submission.backends import ModelSpec

_BLOCK = 16  # requests that are dealt together: neighbours often share a beginning
_AHEAD = 512  # requests that a process may have: twice what a backend looks at together, so that none runs dry
_DEATHS = 3  # of processes in one call, beyond which the rows are suspected and divided

Method = Literal["generate", "loglikelihood"]


@dataclass(slots=True, eq=False)
class _Worker:
    """A process, the line to it, and the requests that it has not answered."""

    number: int
    process: BaseProcess
    line: Connection
    asked: dict[str, Any] = field(default_factory=dict)


class Workers:
    """A `Backend` that spreads its requests over processes with a copy of the model each.

    Args:
        spec: the model.
        count: of processes.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, spec: ModelSpec, count: int) -> None:
        self._shares = shares(spec, count)
        self._call = 0
        self._workers = [self._start(number) for number in range(count)]
        for worker in self._workers:
            _await_ready(worker)

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """See `submission.types.Backend`."""
        return self._spread("generate", ((request.key, request) for request in requests))

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood]]:
        """See `submission.types.Backend`."""
        return self._spread("loglikelihood", ((item[0], item) for item in items))

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.line.close()
            worker.process.kill()
            worker.process.join()

    def _spread(self, method: Method, items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Deal items out, yield what comes back.

        Raises:
            BackendError: a backend failed, or processes died again and again, on requests that are not answered yet.
        """
        self._call += 1
        source = iter(items)
        trouble: Exception | None = None
        more, deaths = True, 0
        try:
            while True:
                while more and (worker := min(self._workers, key=lambda one: len(one.asked))):
                    if len(worker.asked) >= _AHEAD:
                        break
                    block: list[tuple[str, Any]] = []
                    try:
                        block.extend(islice(source, _BLOCK))
                    except Exception as error:  # of whoever makes the requests: passed on when the others are answered
                        trouble, more = error, False
                    more = more and len(block) == _BLOCK
                    worker.asked |= block
                    self._send(worker, method, [item for _, item in block])
                busy = {worker.line: worker for worker in self._workers if worker.asked}
                if not busy:
                    break
                for line in wait(list(busy)):
                    worker = busy[line]  # type: ignore[index]  # lines are all that was waited for
                    try:
                        kind, call, *answer = worker.line.recv()
                    except (EOFError, OSError):
                        deaths += 1
                        words = self._replace(worker)
                        if deaths > _DEATHS:
                            raise BackendError(words) from None
                        self._send(worker, method, list(worker.asked.values()))
                        continue
                    if call != self._call:
                        continue  # of a call that was given up
                    if kind == "answer":
                        worker.asked.pop(answer[0])
                        yield answer[0], answer[1]
                    elif kind == "refused":
                        raise UserError(answer[0])
                    else:
                        raise BackendError(answer[0])
        finally:
            for worker in self._workers:
                if worker.asked:
                    worker.asked.clear()
                    with suppress(OSError):
                        worker.line.send(("stop", self._call))
        if trouble is not None:
            raise trouble

    def _send(self, worker: _Worker, method: Method, items: Sequence[Any]) -> None:
        if items:
            with suppress(OSError):  # a dead process is found out when its line is read
                worker.line.send(("ask", self._call, method, items))

    def _start(self, number: int) -> _Worker:
        spec, environment = self._shares[number]
        here, there = get_context("spawn").Pipe()
        # A daemon: it is ended with this process, and may not have children of its own.
        process = get_context("spawn").Process(
            target=_serve, args=(spec, environment, there), name=f"worker-{number}", daemon=True
        )
        process.start()
        there.close()
        return _Worker(number, process, here)

    def _replace(self, dead: _Worker) -> str:
        """Put a new process in a dead one's place, with the same requests; returns what became of the old one."""
        dead.line.close()
        words = _last_words(dead)
        new = self._start(dead.number)
        dead.process, dead.line = new.process, new.line
        _await_ready(dead)
        return words


def shares(spec: ModelSpec, count: int) -> list[tuple[ModelSpec, dict[str, str]]]:
    """What each process loads, and its environment: a share of the cores, and a GPU where there are some."""
    gpus = visible_gpus()
    names = {item.name for item in fields(spec.options)}
    divided: dict[str, int] = {}
    if "threads" in names and not spec.options.threads:
        divided["threads"] = max(1, thread_count(0) // count)
    if "memory" in names and not spec.options.memory:
        divided["memory"] = max(64, memory_budget() // count // 1_000_000)
    share = replace(spec, workers=1, options=replace(spec.options, **divided))
    return [(share, {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}) for number in range(count)]


def _await_ready(worker: _Worker) -> None:
    try:
        kind, _, *words = worker.line.recv()
    except (EOFError, OSError):
        raise UserError(
            f"{_last_words(worker)} while it loaded the model\nThere may be too little memory: use fewer --workers"
        ) from None
    if kind != "ready":
        raise UserError(words[0])


def _last_words(worker: _Worker) -> str:
    worker.process.join(5)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    return f"worker {worker.number} (process {worker.process.pid}) {how}"


def _serve(spec: ModelSpec, environment: dict[str, str], line: Connection) -> None:
    """What a process does: load the model, answer until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    os.environ.update(environment)
    _end_with_parent()
    try:
        backend = spec.load()
    except Exception as error:
        line.send(("refused", 0, str(error) if isinstance(error, UserError) else first_line(error)))
        return
    inbox = _Inbox(line)
    line.send(("ready", 0))
    with suppress(EOFError, OSError):  # the driver has gone
        while True:
            call, method, items = inbox.next()
            try:
                for key, answer in getattr(backend, method)(inbox.stream(call, items)):
                    if inbox.stopped >= call:
                        break
                    line.send(("answer", call, key, answer))
            except UserError as error:
                line.send(("refused", call, str(error)))
            except (EOFError, OSError):
                raise
            except Exception as error:
                line.send(("trouble", call, first_line(error)))


class _Inbox:
    """Takes what the driver sends as it comes, so that the driver never waits for a busy process."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._blocks: SimpleQueue[tuple[int, Method, list[Any]] | None] = SimpleQueue()
        self._returned: tuple[int, Method, list[Any]] | None = None
        self.stopped = 0
        """The last call that the driver gave up."""
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> tuple[int, Method, list[Any]]:
        """The next block of a call that is wanted.

        Raises:
            EOFError: the driver has gone.
        """
        while True:
            block, self._returned = self._returned or self._blocks.get(), None
            if block is None:
                raise EOFError
            if block[0] > self.stopped:
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

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                kind, call, *rest = self._line.recv()
                if kind == "stop":
                    self.stopped = call
                else:
                    self._blocks.put((call, rest[0], rest[1]))
        self._blocks.put(None)


def _end_with_parent() -> None:
    with suppress(AttributeError, OSError):  # Linux does it also when a native call holds the interpreter
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
