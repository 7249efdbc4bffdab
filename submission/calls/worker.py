"""What a worker does, whoever carries its messages: load a model, answer what it is asked until there is no more.

`python -m submission.calls.worker FD` is a worker of this machine; see `submission.calls.processes`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from submission.backends.common import end_with
from submission.errors import DeviceLostError, UserError, first_line

Call = tuple[int, int]
"""A call and the try at it."""

_Block = tuple[Call, str, list[Any]]
_TOGETHER = 256  # answers of a message at most


class Loadable(Protocol):
    """What a worker loads: a model, an encoder. It travels to the worker as it is."""

    def load(self) -> Any:
        """The object whose methods are called, each with an iterator of items; they yield (key, answer)."""
        ...


class Inbox:
    """What a worker has been asked. It takes messages at any time, so that nobody waits for a busy worker."""

    def __init__(self) -> None:
        self._blocks: SimpleQueue[_Block] = SimpleQueue()
        self._returned: _Block | None = None
        self._stopped: set[Call] = set()

    def take(self, message: tuple[Any, ...]) -> None:
        """Take a message; see `submission.calls.supervisor.Message`."""
        if message[0] == "stop":
            self._stopped.add(message[1])
        else:
            self._blocks.put((message[1], message[2], message[3]))

    def next(self) -> _Block:
        """The next block of a call that is wanted, after waiting for it."""
        while True:
            block, self._returned = self._returned or self._blocks.get(), None
            if block[0] not in self._stopped:
                return block

    def stopped(self, call: Call) -> bool:
        """Whether a call was given up."""
        return call in self._stopped

    def stream(self, call: Call, method: str, items: list[Any]) -> Iterator[Any]:
        """Items of a call, as long as there are any: a backend that waited for more would answer none of these."""
        yield from items
        while True:
            try:
                block = self._blocks.get_nowait()
            except Empty:
                return
            if block[:2] != (call, method):
                self._returned = block
                return
            yield from block[2]


class Outbox:
    """Tells in a thread of its own: whatever answers are there together make one message."""

    def __init__(self, send: Callable[[tuple[Any, ...]], None]) -> None:
        self._send = send
        self._events: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._thread.start()

    def put(self, event: tuple[Any, ...]) -> None:
        """Take an event: ("answer", call, key, answer), or a message."""
        self._events.put(event)

    def close(self) -> None:
        """Tell what is left."""
        self._events.put(None)
        self._thread.join()

    def _send_answers(self, call: Call, answers: list[tuple[Any, ...]]) -> None:
        try:
            self._send(("answers", call, answers))
        except OSError:
            raise
        except Exception as error:  # of what cannot be sent
            self._send(("trouble", call, first_line(error)))

    def _tell(self) -> None:
        with suppress(OSError):  # nobody listens any more
            event = self._events.get()
            while event is not None:
                if event[0] != "answer":
                    self._send(event)
                    event = self._events.get()
                    continue
                call, answers = event[1], [event[2:]]
                event = None
                with suppress(Empty):
                    while len(answers) < _TOGETHER:
                        event = self._events.get_nowait()
                        if event is None or event[:2] != ("answer", call):
                            break
                        answers.append(event[2:])
                        event = None
                self._send_answers(call, answers)
                if event is None:
                    event = self._events.get()


def load(what: Loadable) -> tuple[Any, str]:
    """A model, or why it cannot be loaded."""
    try:
        return what.load(), ""
    except UserError as error:
        return None, str(error)
    except Exception as error:
        return None, first_line(error)


def work(backend: Any, inbox: Inbox, tell: Callable[[tuple[Any, ...]], None]) -> None:
    """Answer for as long as the process can.

    Raises:
        DeviceLostError: it cannot any more, and is to end.
    """
    while True:
        call, method, items = inbox.next()
        try:
            for key, answer in getattr(backend, method)(inbox.stream(call, method, items)):
                if inbox.stopped(call):
                    break
                tell(("answer", call, key, answer))
        except DeviceLostError as error:
            tell(("lost", str(error)))
            raise
        except Exception as error:
            tell(("trouble", call, str(error) if isinstance(error, UserError) else first_line(error)))


def main() -> None:
    """Serve the process at the other end of a socket, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    line = Connection(int(sys.argv[1]))
    end_with(int(sys.argv[2]))
    with suppress(EOFError, OSError):
        _, sys.path[:] = line.recv()
        backend, wrong = _received(line)
        inbox = Inbox()
        threading.Thread(target=_read, args=(line, inbox), daemon=True).start()
        outbox = Outbox(line.send)
        outbox.put(("refused", wrong) if wrong else ("ready", os.getpid()))
        if not wrong:
            with suppress(DeviceLostError):
                work(backend, inbox, outbox.put)
        outbox.close()
    os._exit(0)  # freeing a large model takes seconds, and some libraries hang when they are unloaded


def _received(line: Connection) -> tuple[Any, str]:
    """The model that the parent names, or why it cannot be loaded."""
    try:
        _, what = line.recv()
    except (EOFError, OSError):
        raise
    except Exception as error:  # its module cannot be imported here
        return None, f"a worker cannot make what it is to load: {first_line(error)}"
    return load(what)


def _read(line: Connection, inbox: Inbox) -> None:
    with suppress(EOFError, OSError):
        while True:
            inbox.take(line.recv())
    os._exit(1)  # the parent is gone, whatever is being computed


if __name__ == "__main__":
    main()
