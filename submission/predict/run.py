"""One run of the predictor, from a table of pairs to a valid submission.csv.

    read pairs -> strategy -> best answer of each row -> fill with the fallback, at the end or at the deadline ->
    write whole -> read back and validate

This process owns the files and loads no model: workers do, and every call of a model is in the log beside the output.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NoReturn

from submission.calls.log import Log, log_path
from submission.calls.models import Limits, Models, open_models
from submission.calls.supervisor import DeadlineReached, LostError
from submission.data.files import remove_leftovers
from submission.data.outputs import check_free, manifest_path, write_manifest
from submission.data.pairs import Pairs
from submission.data.scratch import MaybeThere, key_of, scratch, text_of
from submission.data.tables import has_text
from submission.predict.asking import answer_all
from submission.predict.deadline import Interrupted, Timetable, Watchdog
from submission.predict.manifest import Manifest
from submission.predict.outcome import BLANK_INPUT, Summary, finish, print_summary
from submission.predict.plan import Plan, RunConfig, plan
from submission.progress import print_line, show_progress
from submission.types import Budget, Pair, Prediction

LOG = logging.getLogger(__name__)
_TOGETHER = 1_000  # answers that are written to the working table with one statement


def predict(config: RunConfig, started: float | None = None) -> Summary:
    """Run to the end, the deadline or a signal.

    Args:
        config: what to do.
        started: when the time began to count, in seconds of `time.monotonic()`; None for now.

    Raises:
        UserError: something is missing or wrong; nothing was overwritten.
        Interrupted: a signal stopped the run; the log holds what was computed.
    """
    try:
        return _Run(config, time.monotonic() if started is None else started).run()
    except KeyboardInterrupt:  # a moment before the run's own handlers were there
        raise Interrupted(signal.SIGINT) from None


class BestAnswers(Mapping[str, Prediction]):
    """The best answer so far of each row, by id; on disk, as far as it outgrows a cache."""

    def __init__(self) -> None:
        columns = "id BLOB PRIMARY KEY, text TEXT, status TEXT, reason TEXT, truncated INT"
        self._rows = scratch(f"CREATE TABLE answers ({columns}) WITHOUT ROWID")
        self._latest: dict[str, Prediction] = {}  # not written yet: many together, since each statement costs a lock
        self._written = MaybeThere()  # by the hash of an id
        self._lock = threading.RLock()  # the watchdog's thread reads while the main one writes

    def put(self, answer: Prediction) -> bool:
        """Take a row's answer, in place of one that it had; whether it had none."""
        with self._lock:
            known = self.get(answer.id)
            if known is None or answer.status == "ok" or known.status != "ok":  # the best known answer counts
                self._latest[answer.id] = Prediction(
                    answer.id, answer.text, answer.status, answer.reason, truncated=answer.truncated
                )
                if len(self._latest) >= _TOGETHER:
                    self._write()
            return known is None

    def __getitem__(self, row_id: str) -> Prediction:
        with self._lock:
            if row_id in self._latest:
                return self._latest[row_id]
            found = (
                hash(row_id) in self._written
                and self._rows.execute(
                    "SELECT text, status, reason, truncated FROM answers WHERE id = ?", (key_of(row_id),)
                ).fetchone()
            )
        if not found:
            raise KeyError(row_id)
        return Prediction(row_id, found[0], found[1], found[2], truncated=bool(found[3]))

    def __iter__(self) -> Iterator[str]:
        self._write()
        for (key,) in self._rows.execute("SELECT id FROM answers"):
            yield text_of(key)

    def __len__(self) -> int:
        self._write()
        (count,) = self._rows.execute("SELECT count(*) FROM answers").fetchone()
        return int(count)

    def _write(self) -> None:
        with self._lock:
            cells = [(key_of(one.id), one.text, one.status, one.reason, one.truncated) for one in self._latest.values()]
            self._rows.executemany("REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", cells)
            for row_id in self._latest:
                self._written.add(hash(row_id))
            self._latest.clear()


class _Run:
    """The state of one run that the main thread and the watchdog share."""

    def __init__(self, config: RunConfig, started: float) -> None:
        self._config = config
        self._started = started
        self._process, self._folder = os.getpid(), os.getcwd()
        self._pairs: Pairs | None = None
        self._watchdog: Watchdog | None = None
        self._plan: Plan | None = None
        self._answers = BestAnswers()
        self._manifest: Manifest | None = None
        self._models: Models | None = None
        self._computed = self._from_log = 0  # rows
        self._computing_since: float | None = None
        self._computing_seconds = 0.0
        self._finishing = threading.Lock()
        self._taken_over = False
        self._lost = ""  # why no model is left

    def run(self) -> Summary:
        deadline = self._config.deadline
        times = Timetable.until(deadline, self._started, 0) if deadline else None
        watchdog = Watchdog(
            takeover_at=times.last_call if times else None, take_over=self._take_over, stop_now=self._stop_now
        )
        self._watchdog = watchdog
        try:
            with watchdog, self._held_while_taken_over():
                made = self._plan = plan(self._config, self._keep_pairs)
                if self._config.shots and len(made.shots) < self._config.n_shots:
                    LOG.info("%s has %d examples of the %d asked for", self._config.shots, len(made.shots),
                             self._config.n_shots)  # fmt: skip
                if deadline:
                    times = Timetable.until(deadline, self._started, len(made.pairs))
                    watchdog.takeover_at = times.takeover
                late = self._compute(made, times.stop if times else None)
                # Beyond this point the watchdog finds the lock taken.
                self._finishing.acquire()
                watchdog.stand_down()
                return self._finish(made.pairs, late=late)
        except Interrupted:
            if self._manifest is not None:
                self._manifest.write("interrupted")
            print_line(self._how_to_resume(), sys.stderr)
            raise

    def _keep_pairs(self, pairs: Pairs) -> None:
        """From here on a file can be written, whatever the strategy does while it is made."""
        self._pairs = pairs
        if self._config.deadline and self._watchdog is not None:
            times = Timetable.until(self._config.deadline, self._started, len(pairs))
            self._watchdog.takeover_at = times.takeover

    @contextmanager
    def _held_while_taken_over(self) -> Iterator[None]:
        """Let nothing end the main thread while the watchdog's writes the file: it ends the process."""
        try:
            yield
        finally:
            while self._taken_over:
                time.sleep(1)

    def _compute(self, made: Plan, end: float | None) -> bool:
        """Answer all rows; True if the deadline came first."""
        config = self._config
        log = Log(log_path(config.output), fresh=config.fresh, before_writing=self._begin)
        damaged = log.tell_damaged()
        late = False
        with open_models(made.roles, log, Limits(end, config.stall, config.max_failures)) as models:
            self._models = models
            for pair in made.pairs:
                if not has_text(pair.rewritten_text):
                    self._answers.put(Prediction(pair.id, "", "failed", BLANK_INPUT))
            with show_progress(len(made.pairs), len(self._answers)) as progress:
                self._computing_since = time.monotonic()
                before = (0, 0)
                try:
                    budget = Budget(end)
                    for answer in answer_all(
                        made.strategy, self._to_ask(made), models, budget, self._answers.__contains__
                    ):
                        if not self._answers.put(answer):
                            continue
                        now = (models.computed + models.failed, models.found)
                        # It stems from the log if nothing was computed at all, or nothing since the answer before it.
                        from_log = bool(models) and (now[0] == 0 or (now[0] == before[0] and now[1] > before[1]))
                        before = now
                        self._from_log += from_log
                        self._computed += not from_log
                        progress.advance(fell_back=answer.status != "ok", computed=not from_log)
                        if budget.remaining() == 0:
                            late = len(self._answers) < len(made.pairs)
                            break
                except DeadlineReached:
                    late = True
                except LostError as error:  # what is known is written
                    if not self._answers:
                        raise
                    LOG.error("%s", error)
                    self._lost = str(error).splitlines()[0]
                self._stop_clock()
            log.tell_damaged(damaged)
        return late

    def _begin(self) -> None:
        """Something is about to be written: what it will be is ours from now on."""
        for file in (self._config.output, manifest_path(self._config.output)):
            remove_leftovers(file)  # of a run that was killed while it wrote
        if self._manifest is None and self._plan is not None:
            self._manifest = Manifest(self._plan)
            self._manifest.write("running")

    def _to_ask(self, made: Plan) -> Iterator[Pair]:
        return (pair for pair in made.pairs if has_text(pair.rewritten_text))

    def _stop_clock(self) -> None:
        if self._computing_since is not None:
            self._computing_seconds = time.monotonic() - self._computing_since
            self._computing_since = None

    def _finish(self, pairs: Pairs, *, late: bool) -> Summary:
        if os.getpid() != self._process:  # code of a strategy forked and let the copy run on
            os._exit(1)
        with suppress(OSError):
            os.chdir(self._folder)  # wherever it has gone
        self._stop_clock()
        check_free(self._config.output, [self._config.output])
        self._begin()
        summary = finish(
            self._config.output,
            pairs.ids,
            self._answers,
            fallback=self._config.fallback,
            max_failures=self._config.max_failures,
            computed=self._computed,
            calls=self._models.computed if self._models else 0,
            seconds=time.monotonic() - self._started,
            computing_seconds=self._computing_seconds,
            late=late,
            lost=self._lost,
            degraded=self._models.degraded if self._models else (),
        )
        if self._manifest is not None:
            self._manifest.write("complete", summary)
        else:  # the strategy never got ready
            told = {"state": "complete", "result": json.loads(summary.as_json())}
            write_manifest(self._config.output, told, [self._config.output])
        return summary

    # -- in the watchdog's thread -------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """The main thread is in code of a strategy that does not come back, or still reads the table."""
        if not self._finishing.acquire(blocking=False):
            return
        self._taken_over = True
        if self._pairs is None:
            self._end_process("error: the deadline was over before the input was read: no file was written", 1)
        if self._models is not None:
            self._models.close()
        try:
            summary = self._finish(self._pairs, late=True)
        except BaseException as error:
            self._end_process(f"error: {error}", 1)
        _leave_progress()
        print_summary(summary, as_json=self._config.as_json)
        os._exit(summary.exit_code)

    def _stop_now(self, exit_code: int) -> None:
        self._end_process(self._how_to_resume(), exit_code)

    def _end_process(self, words: str, exit_code: int) -> NoReturn:
        _leave_progress()
        print_line(words, sys.stderr)
        os._exit(exit_code)

    def _how_to_resume(self) -> str:
        if self._plan is None or self._manifest is None:
            return "stopped before anything was computed"
        done, rows = self._computed + self._from_log, len(self._plan.pairs)
        return (
            f"stopped: {done} of {rows} rows were answered; their calls are safe in {log_path(self._config.output)}\n"
            "Run the same command again to go on from there."
        )


def _leave_progress() -> None:
    """End the line of a progress bar that will never be stopped, and show the cursor that it hid."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None and sys.stderr.isatty():
            print("\x1b[?25h", file=sys.stderr, flush=True)
