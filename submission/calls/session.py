"""Models for a command that writes one output: their log lies beside it, and signals end the command cleanly.

with session(output, {"writer": spec}) as models:
    answers = answer(models["writer"], requests)
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from submission.calls.log import Log, is_log, log_path
from submission.calls.models import Models, Spec, open_models
from submission.data.outputs import check_free, claim
from submission.progress import show_progress
from submission.types import Completion, Failure, Model, Request

LOG = logging.getLogger(__name__)

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGHUP"):  # the terminal has gone
    SIGNALS[signal.SIGHUP] = 129
"""The signals that stop a command cleanly, and the exit codes that follow."""


@contextmanager
def session(output: Path, roles: Mapping[str, Spec], *, fresh: bool = False) -> Iterator[Models]:
    """Models whose calls are logged beside `output`; the same command again computes nothing twice.

    Args:
        output: that will be written.
        roles: what each model is called, and what it is.
        fresh: forget earlier calls.

    Raises:
        UserError: the log is somebody else's file, or another process writes it.
        KeyboardInterrupt: a signal stopped the command; what was computed is safe.
    """
    path = log_path(output)
    if not is_log(path):
        check_free(output, [path])
    log = Log(path, fresh=fresh, before_writing=lambda: claim(output, [path]))
    damaged = log.tell_damaged()
    with _signals_as_interrupts(), open_models(roles, log) as models:
        try:
            yield models
            log.tell_damaged(damaged)
        except KeyboardInterrupt:
            LOG.info("stopped: what was computed is safe in %s; the same command goes on", path)
            raise


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of requests.

    Attributes:
        completions: by key, of the requests that were answered.
        failed: reason by key, of the others.
    """

    completions: dict[str, list[Completion]]
    failed: dict[str, str]

    @property
    def texts(self) -> dict[str, str]:
        """The first answer to each request, without blanks around it, where it is more than that."""
        return {key: text for key, (first, *_) in self.completions.items() if (text := first.text.strip())}

    @property
    def cut(self) -> set[str]:
        """Requests whose first answer was stopped at its length limit."""
        return {key for key, (first, *_) in self.completions.items() if first.finish_reason == "length"}


def answer(model: Model, requests: Sequence[Request]) -> Answers:
    """Answer all requests, in their order, and show progress."""
    found: dict[str, list[Completion] | Failure] = {}
    with show_progress(len(requests), 0) as progress:
        for key, one in model.generate(requests):
            found[key] = one
            progress.advance(fell_back=isinstance(one, Failure))
    completions, failed = {}, {}
    for request in requests:
        one = found[request.key]
        if isinstance(one, Failure):
            failed[request.key] = one.reason
        else:
            completions[request.key] = one
    return Answers(completions, failed)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored, end the block like Ctrl-C does."""
    numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
