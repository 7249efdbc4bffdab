"""One run of the predictor, from a table of pairs to a valid submission.csv.

    read pairs -> skip rows already in the journal -> Recover -> journal -> fill with the fallback at the end
    or at the deadline -> write whole -> read back and validate

The driver alone owns journal, deadline, fallback and files.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NoReturn

from submission.deadline import Interrupted, Timetable, Watchdog, process_start
from submission.files import remove_leftovers
from submission.guard import Guard, Orders, guarded
from submission.journal import Journal, journal_path
from submission.manifest import Manifest, manifest_path
from submission.outcome import BLANK_INPUT, Summary, finish, print_summary
from submission.plan import Plan, RunConfig, plan
from submission.progress import Progress, show_progress, tell
from submission.retry import answer_all
from submission.tables import says_something
from submission.types import Budget, Pair, Prediction, Recover


def predict(config: RunConfig, say: Callable[[str], None]) -> Summary:
    """Run to the end, the deadline or a signal.

    Args:
        config: what to do.
        say: takes lines for people.

    Raises:
        UserError: something is missing or wrong; nothing was overwritten.
        Interrupted: a signal stopped the run; the journal holds what was finished.
    """
    started = process_start()
    try:
        run_plan = plan(config)
        if config.shots and len(run_plan.shots) < config.n_shots:
            say(f"{config.shots} has {len(run_plan.shots)} examples of the {config.n_shots} asked for")
        return _Run(run_plan, started, say).run()
    except KeyboardInterrupt:  # a moment before the run's own handlers were there
        raise Interrupted(signal.SIGINT) from None


class _Run:
    """The state of one run that the main thread and the watchdog share."""

    def __init__(self, run_plan: Plan, started: float, say: Callable[[str], None]) -> None:
        self._plan = run_plan
        self._config = run_plan.config
        self._process, self._folder = os.getpid(), os.getcwd()
        self._started = started
        self._say = say
        self._times = (
            Timetable.until(self._config.deadline, started, len(run_plan.pairs)) if self._config.deadline else None
        )
        self._journal = Journal(journal_path(self._config.output), run_plan.fingerprint, fresh=self._config.fresh)
        for file in (self._config.output, manifest_path(self._config.output)):
            remove_leftovers(file)  # of a run that was killed while it wrote
        self._manifest = Manifest(run_plan)
        known = self._journal.finished
        self._resumed = sum(row_id in known for row_id in run_plan.pairs.ids) if known else 0
        self._added = 0  # to the journal, by this process
        self._computed = 0
        self._computing_since: float | None = None
        self._computing_seconds = 0.0
        self._finishing = threading.Lock()
        self._guard = Guard(None)

    def run(self) -> Summary:
        if self._journal.damaged:
            self._say(
                f"{self._journal.damaged} damaged lines of the journal are left out; their rows are computed again"
            )
        if self._resumed:
            self._say(f"resuming: {self._resumed} of {len(self._plan.pairs)} rows are in the journal")
        watchdog = Watchdog(
            takeover_at=self._times.thread if self._times else None,
            take_over=self._take_over,
            stop_now=self._stop_now,
            tick=self._journal.sync_if_due,
        )
        try:
            with guarded(self._orders(), self._plan.pairs.ids) as guard, watchdog:
                self._guard = guard
                late = self._compute()
                # Beyond this point the watchdog thread finds the lock taken; the guard still stands by.
                self._finishing.acquire()
                watchdog.stand_down()
                summary = self._finish(late=late)
                if late:
                    # Freeing a large model or joining a busy thread may take longer than is left.
                    self._end_process(summary)
        except Interrupted:
            self._manifest.write("interrupted")
            self._say(self._how_to_resume())
            raise
        finally:
            self._journal.close()
        return summary

    def _compute(self) -> bool:
        """Answer all rows that are not in the journal; True if the deadline came first."""
        first = next(self._to_ask(), None)
        # The model is loaded before the journal is touched: a run that cannot start changes nothing.
        recover: Recover | None = self._plan.recover.make(self._plan.setup()) if first else None
        self._journal.begin()
        self._manifest.write("running")
        budget = Budget(self._times.stop if self._times else None)
        with show_progress(len(self._plan.pairs), self._resumed) as progress:
            for pair in self._plan.pairs:
                if not says_something(pair.rewritten_text) and pair.id not in self._journal.finished:
                    self._add(Prediction(pair.id, "", "failed", BLANK_INPUT), progress)
            if recover is None:
                return False
            self._computing_since = time.monotonic()
            for prediction in answer_all(recover, self._to_ask(), budget):
                if prediction.status != "unfinished":
                    self._add(prediction, progress)
                    self._computed += 1
                if budget.remaining() == 0:
                    return True
            self._stop_clock()
        return False

    def _to_ask(self) -> Iterator[Pair]:
        """The pairs that are not in the journal and can be asked about."""
        for pair in self._plan.pairs:
            if says_something(pair.rewritten_text) and pair.id not in self._journal.finished:
                yield pair

    def _add(self, prediction: Prediction, progress: Progress) -> None:
        self._journal.append(prediction)
        self._added += 1
        progress.advance(fell_back=prediction.status == "failed")

    def _stop_clock(self) -> None:
        if self._computing_since is not None:
            self._computing_seconds = time.monotonic() - self._computing_since
            self._computing_since = None

    def _finish(self, *, late: bool) -> Summary:
        if os.getpid() != self._process:  # code of a way of predicting forked and let the copy run on
            os._exit(1)
        with suppress(OSError):
            os.chdir(self._folder)  # wherever it has gone
        self._stop_clock()
        self._guard.stand_by()
        summary = finish(
            self._config.output,
            self._plan.pairs.ids,
            self._journal.finished,
            fallback=self._config.fallback,
            max_failures=self._config.max_failures,
            computed=self._computed,
            seconds=time.monotonic() - self._started,
            computing_seconds=self._computing_seconds,
            late=late,
        )
        self._journal.sync()
        self._manifest.write("complete", summary)
        return summary

    def _take_over(self) -> None:
        """The watchdog's thread finishes the run: the main thread is in a call that takes too long."""
        if not self._finishing.acquire(blocking=False):
            return
        try:
            summary = self._finish(late=True)
        except BaseException as error:
            tell(f"error: {error}", sys.stderr)
            os._exit(1)
        self._end_process(summary)

    def _end_process(self, summary: Summary) -> NoReturn:
        _leave_progress()
        print_summary(summary, as_json=self._config.as_json)
        os._exit(summary.exit_code)

    def _stop_now(self, exit_code: int) -> None:
        self._journal.sync()
        _leave_progress()
        tell(self._how_to_resume(), sys.stderr)
        os._exit(exit_code)

    def _how_to_resume(self) -> str:
        return (
            f"stopped: {self._resumed + self._added} of {len(self._plan.pairs)} rows are safe in {self._journal.path}\n"
            "Run the same command again to go on from there."
        )

    def _orders(self) -> Orders | None:
        if self._times is None:
            return None
        config = self._config
        return Orders(
            pid=os.getpid(), started=self._started, act_at=self._times.guard, last_call=self._times.last_call,
            output=str(config.output), fallback=config.fallback,
            max_failures=config.max_failures, as_json=config.as_json, resumed=self._resumed,
            fingerprint=self._plan.fingerprint,
        )  # fmt: skip


def _leave_progress() -> None:
    """End the line of a progress bar that will never be stopped, and show the cursor that it hid."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None and sys.stderr.isatty():
            print("\x1b[?25h", file=sys.stderr, flush=True)
