"""Where the run of a kernel is: asked once, or until it ends.

python -m submission status someone/prompt-recovery
"""

from __future__ import annotations

import json
import logging
import re
import time
from contextlib import suppress
from dataclasses import dataclass

from submission.publish.client import CALL_SECONDS, KaggleError, failure, run_client, shell_line

LOG = logging.getLogger(__name__)

WAIT_SECONDS = 14 * 3600.0
"""Time for a run to end: the limit of a session is 9 hours for this competition, and it may stand in a queue first."""

_FAILED = ("error", "cancel_requested", "cancel_acknowledged")
_SAY_SECONDS = 60.0
_LOST_POLLS = 5
_LOG_LINES = 20


@dataclass(frozen=True, slots=True)
class Status:
    """Where the latest run of a kernel is; `message` says why it failed.

    `state` is one of new_script, queued, running, complete, error, cancel_requested, cancel_acknowledged.
    """

    state: str
    message: str

    @property
    def failed(self) -> bool:
        """Whether the run ended, or is about to, without being complete."""
        return self.state in _FAILED

    def __str__(self) -> str:
        reason = " ".join(self.message.split())
        return f"{self.state}: {reason}" if reason else self.state


def status(kernel: str, *, timeout: float = CALL_SECONDS, show: bool = False) -> Status | None:
    """Where the latest run of `owner/slug` is; None with `show`.

    Raises:
        KaggleError: there is no such kernel, or Kaggle cannot be asked.
    """
    if show:
        print(shell_line(_status_command(kernel)))
        return None
    return _status(kernel, timeout)


def wait_for(
    kernel: str,
    poll_seconds: float = 30.0,
    timeout: float = WAIT_SECONDS,
    *,
    show: bool = False,
) -> Status | None:
    """Ask for the status until the run is complete, with a line when it changes and once a minute.

    A few polls in a row may fail on the network: each is told, and the waiting goes on.

    Raises:
        KaggleError: the run failed or was cancelled (the end of its log is told first), or did not end in time.
    """
    if show:
        print(shell_line(_status_command(kernel)))
        return None
    begin = time.monotonic()
    told, told_at, lost = "", begin, 0
    while True:
        try:
            now, lost = _status(kernel, CALL_SECONDS), 0
        except KaggleError as error:
            lost += 1
            if not error.transient or lost >= _LOST_POLLS:
                raise
            LOG.info(f"no status this time ({lost} of {_LOST_POLLS}): {str(error).splitlines()[0]}")
            now = Status(told, "")
        passed = time.monotonic() - begin
        if now.state != told or time.monotonic() - told_at >= _SAY_SECONDS:
            told, told_at = now.state, time.monotonic()
            LOG.info(f"{kernel}: {now.state}, {_clock(passed)}")
        if now.state == "complete":
            return now
        if now.failed:
            raise _failed_run(kernel, now)
        if passed >= timeout:
            raise KaggleError(
                f"{kernel} is still {now.state or 'unknown'} after {_clock(passed)}\n"
                f"It goes on at Kaggle; ask later with: {shell_line(_status_command(kernel))}"
            )
        time.sleep(poll_seconds)


def _status_command(kernel: str) -> list[str]:
    return ["kernels", "status", kernel]


def _status(kernel: str, timeout: float) -> Status:
    reply = run_client(_status_command(kernel), timeout)
    found = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', reply.text)
    if reply.exit_code != 0 or found is None:
        raise failure(f"status of {kernel}", reply)
    message = re.search(r'^Failure message: "(.*?)"$', reply.text, re.MULTILINE | re.DOTALL)
    return Status(found[1].lower(), message[1] if message else "")


def _failed_run(kernel: str, now: Status) -> KaggleError:
    for line in _log_tail(kernel):
        LOG.info(f"  {line}")
    what = "failed" if now.state == "error" else "was cancelled"
    reason = " ".join(now.message.split())
    return KaggleError(
        f"the run of {kernel} {what}{f': {reason}' if reason else ''}\n"
        f"The whole log comes with: {shell_line(['kernels', 'output', kernel, '-p', 'output'])}"
    )


def _log_tail(kernel: str) -> list[str]:
    try:
        reply = run_client(["kernels", "logs", kernel])
    except KaggleError as error:
        return [f"(no log: {str(error).splitlines()[0]})"]
    if reply.exit_code != 0:
        return [f"(no log: {str(failure('asking', reply)).splitlines()[0]})"]
    return log_lines(str(reply.said("log") or reply.text))[-_LOG_LINES:]


def log_lines(log: str) -> list[str]:
    """The lines of a kernel's log, which is JSON: `[{"stream_name": "stdout", "time": 1.5, "data": "..."}]`."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):  # a log of another form is told as it is
        log = "".join(str(event["data"]) for event in json.loads(log))
    return [line for line in log.splitlines() if line.strip()]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
