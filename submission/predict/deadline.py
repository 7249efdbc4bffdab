"""Deadlines that are kept: when to stop, signals, and a watchdog that does not wait.

Handles stop a strategy when the time is over (`submission.calls.supervisor.DeadlineReached`). A strategy that sits in
code of its own meanwhile is overtaken by a thread, which writes the file and ends the process.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from submission.calls.session import SIGNALS

_TICK = 0.25
_STOP_SECONDS = 5.0  # how long a signalled process may take to come back from a native call


class Interrupted(BaseException):
    """A signal asks the run to stop. Not an Exception: no retry swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = SIGNALS[signal.Signals(signum)]


@dataclass(frozen=True, slots=True)
class Timetable:
    """When to stop for a deadline; times in seconds of `time.monotonic()`.

    Attributes:
        stop: compute no further; what is left takes the fallback.
        takeover: the watchdog writes the file, if nobody does.
        last_call: the same, of a run that does not know its rows yet.
    """

    stop: float
    takeover: float
    last_call: float

    @classmethod
    def until(cls, seconds: float, start: float, rows: int) -> Timetable:
        """A timetable for a deadline `seconds` after `start`.

        A tenth of it, from 2 s to 30 s but no more than half, and 45 s per million rows are kept back for
        writing and checking the file.
        """
        reserve = min(min(max(2.0, 0.1 * seconds), 30.0, seconds / 2) + 45e-6 * rows, 0.9 * seconds)
        end = start + seconds
        return cls(end - reserve, end - 0.8 * reserve, end - min(0.1 * reserve, 1.0))


class Watchdog:
    """Turns signals into `Interrupted` in the main thread, and acts itself when that thread does not.

    Args:
        takeover_at: when to call `take_over`, in seconds of `time.monotonic()`; None for never.
        take_over: finishes the run and ends the process; called in the watchdog's thread.
        stop_now: ends the process for an exit code without finishing the run; called in the watchdog's
            thread when the main thread has not come back seconds after a signal.
    """

    def __init__(
        self,
        *,
        takeover_at: float | None,
        take_over: Callable[[], None],
        stop_now: Callable[[int], None],
    ) -> None:
        self.takeover_at = takeover_at
        self._take_over = take_over
        self._stop_now = stop_now
        self._signalled: tuple[float, int] | None = None
        self._done = threading.Event()
        self._handlers: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            # The wake-up byte is written by C code at once, also while a native call keeps Python busy.
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            # One that is ignored stays so: `nohup` and background jobs of a shell set that.
            heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._interrupt) for number in heeded}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stand_down()
        if self._in_main:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._thread.join(1)
        os.close(self._writing)
        if not self._thread.is_alive():
            os.close(self._reading)

    def stand_down(self) -> None:
        """The main thread is finishing by itself."""
        self._done.set()
        os.write(self._writing, b"\0")  # no signal: it wakes the thread

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self._signalled and time.monotonic() - self._signalled[0] > 0.5:  # asked a second time
            self._stop_now(SIGNALS[signal.Signals(signum)])
        raise Interrupted(signum)

    def _watch(self) -> None:
        while not self._done.is_set():
            if sys.platform == "win32":
                time.sleep(_TICK)
            elif select.select([self._reading], [], [], _TICK)[0]:
                for signum in os.read(self._reading, 64):
                    if signum in self._handlers and self._signalled is None:
                        self._signalled = (time.monotonic(), signum)
            if self._done.is_set():
                return
            if self._signalled and time.monotonic() > self._signalled[0] + _STOP_SECONDS:
                self._stop_now(SIGNALS[signal.Signals(self._signalled[1])])
            if self.takeover_at is not None and time.monotonic() >= self.takeover_at:
                self._take_over()
                return
