"""Answers of a model to many chats, with the journal of `predict`: a run that is stopped goes on where it was.

Both `python -m train texts --write` and `python -m train rewrites` run on it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from submission.backends import ModelSpec
from submission.journal import Journal, journal_path
from submission.progress import show_progress
from submission.retry import answer_all
from submission.tables import remove_leftovers
from submission.types import Backend, Budget, Chat, Pair, Prediction, Request, Sampling

CUT = "cut at the length limit"


@dataclass(frozen=True, slots=True)
class Job:
    """A chat to be answered with at most `new_tokens` tokens."""

    id: str
    chat: Chat
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of the jobs.

    Attributes:
        texts: by id, of the jobs that were answered.
        cut: ids whose answer was stopped at its length limit.
        failed: reason by id.
        computed: answers of this process; the others were in the journal.
    """

    texts: dict[str, str]
    cut: set[str]
    failed: dict[str, str]
    computed: int


def answer(
    output: Path,
    jobs: Sequence[Job],
    spec: ModelSpec,
    sampling: Sampling,
    fingerprint: Mapping[str, str],
    say: Callable[[str], None],
    *,
    fresh: bool = False,
) -> Answers:
    """Answer all jobs whose answer is not in the journal beside `output`; the model is loaded if there are any.

    Args:
        output: the file that will be written from the answers; the journal lies beside it.
        jobs: with distinct ids.
        spec: the model.
        sampling: how answers are drawn; the length comes from the jobs.
        fingerprint: what decides the answers, beside model and sampling.
        say: takes lines for people.
        fresh: forget earlier answers.

    Raises:
        UserError: the journal belongs to another run.
        KeyboardInterrupt: a signal stopped the run; what was finished is safe.
    """
    marks = {**fingerprint, **spec.fingerprint(), "sampling": repr(replace(sampling, max_new_tokens=0))}
    journal = Journal(journal_path(output), marks, fresh=fresh)
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
                    for prediction in answer_all(_Ask(backend, by_id, sampling), pairs, Budget()):
                        journal.append(prediction)
                        computed += 1
                        progress.advance(fell_back=prediction.status != "ok")
    except KeyboardInterrupt:
        say(f"stopped: {len(journal.finished)} of {len(jobs)} are safe in {journal.path}; the same command goes on")
        raise
    finally:
        journal.close()
    done = {job.id: journal.finished[job.id] for job in jobs}
    return Answers(
        {key: one.text for key, one in done.items() if one.status == "ok"},
        {key for key, one in done.items() if one.status == "ok" and one.reason == CUT},
        {key: one.reason for key, one in done.items() if one.status != "ok"},
        computed,
    )


class _Ask:
    """A `Recover` whose answers are kept as they are, but for blanks around them."""

    def __init__(self, backend: Backend, jobs: Mapping[str, Job], sampling: Sampling) -> None:
        self._backend, self._jobs, self._sampling = backend, jobs, sampling

    def __call__(self, pairs: Iterable[Pair], budget: Budget) -> Iterator[Prediction]:
        del budget
        for key, (completion, *_) in self._backend.generate(self._request(pair.id) for pair in pairs):
            yield Prediction(
                key,
                completion.text.strip(),
                reason=CUT if completion.finish_reason == "length" else "",
                prompt_tokens=completion.prompt_tokens,
                truncated=completion.truncated,
            )

    def _request(self, key: str) -> Request:
        job = self._jobs[key]
        return Request(key, job.chat, replace(self._sampling, max_new_tokens=job.new_tokens))


class _signals_as_interrupts:
    """SIGTERM ends the block like Ctrl-C does."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
