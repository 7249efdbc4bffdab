"""Answers of a model to many chats, with the journal of `predict`: a run that is stopped goes on where it was.

`python -m train texts --write`, `python -m train rewrites` and `python -m ensemble sample` run on it.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from submission.backends import ModelSpec
from submission.predict.deadline import SIGNALS
from submission.data.files import remove_leftovers
from submission.calls.journal import Journal, journal_path
from submission.progress import show_progress
from submission.calls.retry import answer_all
from submission.types import Backend, Budget, Chat, Completion, Pair, Prediction, Request, Sampling


@dataclass(frozen=True, slots=True)
class Job:
    """A chat to be answered; `sampling.n` answers are wanted."""

    id: str
    chat: Chat
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of the jobs.

    Attributes:
        completions: by id, of the jobs that were answered.
        failed: reason by id, of the others.
        computed: answered by this process; the others were in the journal.
    """

    completions: dict[str, list[Completion]]
    failed: dict[str, str]
    computed: int

    @property
    def texts(self) -> dict[str, str]:
        """The first answer to each job, without blanks around it, where it is more than that."""
        return {key: text for key, (first, *_) in self.completions.items() if (text := first.text.strip())}

    @property
    def cut(self) -> set[str]:
        """Jobs whose first answer was stopped at its length limit."""
        return {key for key, (first, *_) in self.completions.items() if first.finish_reason == "length"}


def answer(
    output: Path,
    jobs: Sequence[Job],
    spec: ModelSpec,
    say: Callable[[str], None],
    *,
    fresh: bool = False,
) -> Answers:
    """Answer all jobs whose answer is not in the journal beside `output`; the model is loaded if there are any.

    Args:
        output: the file that will be written from the answers; the journal lies beside it.
        jobs: with distinct ids.
        spec: the model.
        say: takes lines for people.
        fresh: forget earlier answers.

    Raises:
        UserError: the journal belongs to another run.
        KeyboardInterrupt: a signal stopped the run; what was finished is safe.
    """
    journal = Journal(journal_path(output), {"jobs": _digest(jobs), **spec.fingerprint()}, fresh=fresh)
    by_id = {job.id: job for job in jobs}
    computed = 0
    try:
        todo = [job for job in jobs if job.id not in journal.finished]
        if todo:
            with _signals_as_interrupts():
                backend = spec.load()
                remove_leftovers(output)
                journal.begin()
                if journal.finished:
                    say(f"resuming: {len(jobs) - len(todo)} of {len(jobs)} are in {journal.path}")
                with show_progress(len(jobs), len(jobs) - len(todo)) as progress:
                    pairs = [Pair(job.id, "", "") for job in todo]
                    for prediction in answer_all(_Ask(backend, by_id), pairs, Budget()):
                        journal.append(prediction)
                        computed += 1
                        progress.advance(fell_back=prediction.status != "ok")
        done = {job.id: journal.finished[job.id] for job in jobs}
    except KeyboardInterrupt:
        say(f"stopped: {len(journal.finished)} of {len(jobs)} are safe in {journal.path}; the same command goes on")
        raise
    finally:
        journal.close()
    return Answers(
        {key: completions_of(one) for key, one in done.items() if one.status == "ok"},
        {key: one.reason for key, one in done.items() if one.status != "ok"},
        computed,
    )


def _digest(jobs: Iterable[Job]) -> str:
    digest = hashlib.sha256()
    for job in jobs:
        digest.update(repr(job).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def completions_of(prediction: Prediction) -> list[Completion]:
    """What a line of the journal holds."""
    return [Completion(**fields) for fields in json.loads(prediction.text)]


class _Ask:
    """A `Recover` whose predictions are lists of completions, as JSON."""

    def __init__(self, backend: Backend, jobs: Mapping[str, Job]) -> None:
        self._backend, self._jobs = backend, jobs

    def __call__(self, pairs: Iterable[Pair], budget: Budget) -> Iterator[Prediction]:
        del budget
        for key, completions in self._backend.generate(self._request(pair.id) for pair in pairs):
            yield Prediction(key, json.dumps([asdict(completion) for completion in completions], ensure_ascii=False))

    def _request(self, key: str) -> Request:
        job = self._jobs[key]
        return Request(key, job.chat, job.sampling)


class _signals_as_interrupts:
    """SIGTERM, and SIGHUP unless it is ignored, end the block like Ctrl-C does."""

    def __enter__(self) -> None:
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
