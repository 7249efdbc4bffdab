"""Workers as processes of this machine: one for each GPU, or the cores divided.

A process is asked and heard in threads of its own, so that one that is stopped in the middle of a message holds up
nobody. It dies with this process, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

from submission.backends.common import package_path
from submission.calls.supervisor import Carrier, Message, Worker
from submission.calls.worker import Loadable
from submission.errors import first_line

# Linux ends a worker with the thread that started it, and a strategy may call from a thread that does not last.
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="starter")
_END_SECONDS = 10.0  # that a killed process may take to be gone; one that waits for a broken GPU may never be


@dataclass(slots=True, eq=False)
class _Process:
    process: subprocess.Popen[bytes]
    line: Connection
    outbox: SimpleQueue[Message | None]


class Processes(Carrier):
    """Processes that each load a model.

    Args:
        shares: what each loads, and its environment.
    """

    def __init__(self, shares: Sequence[tuple[Loadable, Mapping[str, str]]]) -> None:
        self.count = len(shares)
        self._shares = shares
        self._inbox: SimpleQueue[tuple[Worker, Message | None]] = SimpleQueue()
        self._halted: set[Worker] = set()

    def start(self, worker: Worker) -> None:
        """See `Carrier`."""
        what, more = self._shares[worker.number]
        line, there = Pipe()
        process = _STARTER.submit(
            subprocess.Popen,
            # -P: nothing in the current folder takes the place of a package.
            [sys.executable, "-P", "-m", "submission.calls.worker", str(there.fileno()), str(os.getpid())],
            env={**os.environ, **package_path(), **more},
            stdin=subprocess.DEVNULL,
            stdout=_standard_error(),  # standard output may be read by a program
            pass_fds=(there.fileno(),),
        ).result()
        there.close()
        worker.handle = made = _Process(process, line, SimpleQueue())
        made.outbox.put(("path", list(sys.path)))  # first: what is loaded may be of a module that lies there
        made.outbox.put(("load", what))
        threading.Thread(target=self._write, args=(worker, made), daemon=True).start()
        threading.Thread(target=self._read, args=(worker, made), daemon=True).start()

    def send(self, worker: Worker, message: Message) -> None:
        """See `Carrier`."""
        worker.handle.outbox.put(message)

    def receive(self, workers: Sequence[Worker], seconds: float) -> Iterator[tuple[Worker, Message | None]]:
        """See `Carrier`."""
        del workers
        with suppress(Empty):
            yield self._inbox.get(timeout=max(0.0, seconds))
            while True:
                yield self._inbox.get_nowait()

    def end(self, worker: Worker) -> str:
        """See `Carrier`."""
        if (made := worker.handle) is None:  # it could not be started
            return f"worker {worker.number} could not be started"
        made.outbox.put(None)
        gone = made.process.poll()
        made.process.kill()
        with suppress(subprocess.TimeoutExpired):
            made.process.wait(_END_SECONDS)
        how = f"was killed by signal {-gone}" if gone is not None and gone < 0 else f"ended with exit code {gone}"
        return f"worker {worker.number} (process {made.process.pid}) {how if gone is not None else 'was ended'}"

    def kill(self, worker: Worker) -> None:
        """See `Carrier`."""
        if worker.handle is not None:
            worker.handle.process.kill()

    def peak_memory(self, worker: Worker) -> float:
        """See `Carrier`."""
        with suppress(OSError, ValueError):
            for line in Path(f"/proc/{worker.handle.process.pid}/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return float(line.split()[1]) * 1024
        return 0.0

    def halted(self, worker: Worker) -> bool:
        """Whether the process is stopped, and was when it was last looked at."""
        was = worker in self._halted
        self._halted.discard(worker)
        if _state(worker.handle.process.pid) not in ("T", "t"):
            return False
        self._halted.add(worker)
        return was

    def _write(self, worker: Worker, made: _Process) -> None:
        try:
            while (message := made.outbox.get()) is not None:
                made.line.send(message)
        except OSError:  # it is gone, which its reader sees
            pass
        except Exception as error:  # of what cannot be sent
            if not made.line.closed:
                words = f"what a worker is to load or to answer cannot be sent to it: {first_line(error)}"
                self._inbox.put((worker, ("refused", words)))

    def _read(self, worker: Worker, made: _Process) -> None:
        with suppress(EOFError, OSError), made.line:
            while True:
                self._inbox.put((worker, made.line.recv()))
        with suppress(subprocess.TimeoutExpired):  # its socket is closed a moment before it is gone
            made.process.wait(1)
        self._inbox.put((worker, None))


def _standard_error() -> int:
    try:
        os.fstat(2)
    except OSError:  # it is closed
        return subprocess.DEVNULL
    return 2


def _state(process: int) -> str:
    """The state of a process as proc(5) has it; "" where there is no such file."""
    try:
        content = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return ""
    return chr(content.rpartition(b")")[2].split()[0][0])
