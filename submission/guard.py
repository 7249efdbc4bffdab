"""The last line of defence for a deadline: a process that writes the file when the run's own threads cannot.

Started by `predict --deadline`; waits for the end of its standard input, which comes when the run ends. If
the time comes first, it stops the run for good, fills the output from the journal and prints the summary.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from submission.journal import journal_path, read_finished
from submission.manifest import mark_finished
from submission.outcome import finish, print_summary
from submission.tables import read_pairs


@dataclass(frozen=True, slots=True)
class Orders:
    """What the guard needs to finish a run; times are in seconds of `time.monotonic()`."""

    pid: int
    started: float
    act_at: float
    input: str
    encoding: str
    limit: int
    output: str
    fallback: str
    max_failures: float
    as_json: bool
    resumed: int  # rows that were finished before this run
    fingerprint: dict[str, str]


@contextlib.contextmanager
def guarded(orders: Orders | None) -> Iterator[None]:
    """Keep a guard process while the block runs; none without orders."""
    if orders is None:
        yield
        return
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    process = subprocess.Popen(
        [sys.executable, "-m", "submission.guard"],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # a Ctrl-C at the terminal is for the run
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(asdict(orders)).encode() + b"\n")
        process.stdin.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def main() -> int:
    """Wait for the run's end or the time to act."""
    orders = Orders(**json.loads(sys.stdin.buffer.readline()))
    pairs = read_pairs(Path(orders.input), orders.encoding)[: orders.limit or None]
    ended, _, _ = select.select([sys.stdin], [], [], max(0.0, orders.act_at - time.monotonic()))
    if ended:
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(orders.pid, signal.SIGKILL)
    output = Path(orders.output)
    finished = read_finished(journal_path(output), orders.fingerprint)
    summary = finish(
        output,
        pairs,
        finished,
        fallback=orders.fallback,
        max_failures=orders.max_failures,
        computed=max(0, len(finished) - orders.resumed),
        seconds=time.monotonic() - orders.started,
        computing_seconds=0.0,
    )
    mark_finished(output, summary)
    print(
        "\nA native call kept the run from stopping: it was killed, and the file was filled from the journal.",
        file=sys.stderr,
    )
    print_summary(summary, as_json=orders.as_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
