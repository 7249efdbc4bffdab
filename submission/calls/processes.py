"""A model held by several processes of this machine: one for each GPU, or the cores divided.

    python -m submission predict test.csv -o submission.csv --workers 2

A process that is killed is replaced, and what it had is asked again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, cast

from submission.errors import UserError, first_line
from submission.calls.fleet import Event, Inbox, Member, Method, Spread, load_words, shares, work
from submission.progress import say

if TYPE_CHECKING:
    from submission.backends import ModelSpec


@dataclass(slots=True, eq=False)
class Process(Member):
    """A process and the line to it."""

    process: BaseProcess = field(init=False)
    line: Connection = field(init=False)


class Workers(Spread[Process]):
    """A `Backend` of several processes with a copy of the model each.

    Args:
        spec: the model.
        count: of processes.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, spec: ModelSpec, count: int) -> None:
        super().__init__()
        self._shares = shares(spec, count)
        self.members = [Process(number) for number in range(count)]
        for member in self.members:
            self._start(member)
        for member in self.members:
            _await_ready(member)

    def close(self) -> None:
        """End the processes."""
        for member in self.members:
            with suppress(AttributeError):  # that was never started
                member.line.close()
                member.process.kill()
                member.process.join()

    def _ask(self, member: Process, call: int, method: Method, items: Sequence[Any]) -> None:
        with suppress(OSError):
            member.line.send((call, method, list(items)))

    def _stop(self, member: Process, call: int) -> None:
        with suppress(OSError):
            member.line.send((call, None, None))

    def _listen(self, members: Sequence[Process]) -> Iterator[tuple[Process, Event | None]]:
        lines = {member.line: member for member in members}
        for line in wait(list(lines)):
            member = lines[cast(Connection, line)]
            try:
                yield member, cast(Connection, line).recv()
            except (EOFError, OSError):
                yield member, None

    def _start(self, member: Process) -> None:
        spec, environment = self._shares[member.number]
        member.line, there = get_context("spawn").Pipe()
        # A daemon: it is ended with this process, and may not have children of its own.
        member.process = get_context("spawn").Process(
            target=_serve, args=(spec, environment, there), name=f"worker-{member.number}", daemon=True
        )
        member.process.start()
        there.close()

    def _replace(self, member: Process) -> str:
        member.line.close()
        words = _last_words(member)
        self._start(member)
        try:
            _await_ready(member)
        except UserError as error:  # memory is short: the others go on
            self.members.remove(member)
            if not self.members:
                raise
            say(f"{words}, and another cannot be started ({first_line(error)}): {len(self.members)} are left")
        return words


def _await_ready(member: Process) -> None:
    try:
        event = member.line.recv()
    except (EOFError, OSError):
        raise UserError(
            f"{_last_words(member)} while it loaded the model\nThere may be too little memory: use fewer --workers"
        ) from None
    if event[0] != "ready":
        raise UserError(event[2])


def _last_words(member: Process) -> str:
    member.process.join(5)
    code = member.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    return f"worker {member.number} (process {member.process.pid}) {how}"


def _serve(spec: ModelSpec, environment: Mapping[str, str], line: Connection) -> None:
    """What a process does: load the model, answer until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    os.environ.update(environment)
    _end_with_parent()
    try:
        backend = spec.load()
    except Exception as error:
        line.send(("refused", 0, load_words(error)))
        return
    inbox = Inbox()
    threading.Thread(target=_read, args=(line, inbox), daemon=True).start()
    with suppress(OSError):  # the driver has gone
        line.send(("ready", 0))
        for event in work(backend, inbox):
            line.send(event)


def _read(line: Connection, inbox: Inbox) -> None:
    with suppress(EOFError, OSError):
        while True:
            call, method, items = line.recv()
            if method is None:
                inbox.stopped = call
            else:
                inbox.put(call, method, items)
    inbox.close()


def _end_with_parent() -> None:
    with suppress(AttributeError, OSError):  # Linux does it also when a native call holds the interpreter
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
