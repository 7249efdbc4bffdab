"""The last line of defence for a deadline: a process that writes the file when the run's own threads cannot.

Started by `predict --deadline`; waits for the end of its standard input, which comes when the run ends. If
the time comes first, it halts the run, fills the output from the journal, prints the summary and kills it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from submission.calls.journal import journal_path, read_finished
from submission.data.manifest import mark_finished
from submission.predict.outcome import finish, print_summary
from submission.progress import tell


@dataclass(frozen=True, slots=True)
class Orders:
    """What the guard needs to finish a run; times are in seconds of `time.monotonic()`."""

    pid: int
    started: float
    act_at: float
    last_call: float  # when to act although the run says that it is finishing by itself
    output: str
    fallback: str
    max_failures: float
    as_json: bool
    resumed: int  # rows that were finished before this run
    fingerprint: dict[str, str]
    ids: int = -1  # a file descriptor: one JSON string a line


class Guard:
    """The run's line to its guard process; None stands for no guard."""

    def __init__(self, line: IO[bytes] | None) -> None:
        self._line = line

    def stand_by(self) -> None:
        """Say that the run is finishing by itself."""
        if self._line is not None:
            with suppress(OSError, ValueError):
                self._line.write(b"f")
                self._line.flush()


@contextmanager
def guarded(orders: Orders | None, ids: Iterable[str]) -> Iterator[Guard]:
    """Keep a guard process while the block runs; none without orders."""
    if orders is None:
        yield Guard(None)
        return
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    with tempfile.TemporaryFile() as listed:
        listed.writelines(json.dumps(row_id).encode() + b"\n" for row_id in ids)
        listed.flush()
        orders = replace(orders, ids=listed.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", "submission.predict.guard"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=(orders.ids,),
            start_new_session=True,  # a Ctrl-C at the terminal is for the run
        )
    assert process.stdin is not None
    try:
        with suppress(OSError):  # a guard that cannot start leaves the two other defences
            process.stdin.write(json.dumps(asdict(orders)).encode() + b"\n")
            process.stdin.flush()
        yield Guard(process.stdin)
    finally:
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


@dataclass(frozen=True, slots=True)
class _Ids:
    """The ids of a run, from the file that it left open."""

    file: int

    def __iter__(self) -> Iterator[str]:
        os.lseek(self.file, 0, os.SEEK_SET)
        with open(self.file, encoding="ascii", closefd=False) as lines:
            for line in lines:
                yield json.loads(line)


def main() -> int:
    """Wait for the run's end or the time to act."""
    first, _, more = _read_line(0).partition(b"\n")
    if not first:
        return 0
    orders = Orders(**json.loads(first))
    if not _ends_by_itself(orders, finishing=bool(more)):
        _take_over(orders)
    return 0


def _read_line(file: int) -> bytes:
    """All up to the first line break, and what came along behind it."""
    content = bytearray()
    while chunk := os.read(file, 1 << 20):
        content += chunk
        if b"\n" in chunk:
            break
    return bytes(content)


def _ends_by_itself(orders: Orders, *, finishing: bool) -> bool:
    until = orders.last_call if finishing else orders.act_at
    while (left := until - time.monotonic()) > 0:
        if select.select([0], [], [], left)[0]:
            if not os.read(0, 1):
                return True
            until = orders.last_call
    return False


def _take_over(orders: Orders) -> None:
    # Halted, not killed: whoever waits for the run is to find the file there when it is gone.
    with suppress(ProcessLookupError):
        os.kill(orders.pid, signal.SIGSTOP)
    try:
        output = Path(orders.output)
        finished = read_finished(journal_path(output), orders.fingerprint)
        ids = _Ids(orders.ids)
        summary = finish(
            output,
            ids,
            finished,
            fallback=orders.fallback,
            max_failures=orders.max_failures,
            computed=max(0, sum(row_id in finished for row_id in ids) - orders.resumed),
            seconds=time.monotonic() - orders.started,
            computing_seconds=0.0,
            late=True,
        )
        mark_finished(output, orders.fingerprint, summary)
        tell("\nThe run could not stop by itself: it was killed, and the file was filled from the journal.", sys.stderr)
        print_summary(summary, as_json=orders.as_json)
    finally:
        with suppress(ProcessLookupError):
            os.kill(orders.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
