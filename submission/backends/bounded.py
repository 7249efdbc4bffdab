"""Rendering a model's chat template within bounds: it is a program, and comes from whoever made the model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

from submission.errors import BackendError, UserError, first_line

_MEMORY = 256 << 20  # bytes that a template may take
_TEXT = 1 << 20  # characters that it may add to the messages
_SECONDS = 10

T = TypeVar("T")
Messages = Sequence[Mapping[str, str]]


class _TooLong(Exception):
    """The time is over."""


def bounded(function: Callable[[], T], what: str) -> T:
    """What a function returns that runs a template; one that takes too much memory or time, or fails, is an error.

    Raises:
        BackendError: says which.
    """
    try:
        with _bounds():
            return function()
    except MemoryError:
        why = f"it takes more than {_MEMORY >> 20} MB of memory"
    except _TooLong:
        why = f"it takes more than {_SECONDS} s"
    except RecursionError:
        why = "it calls itself too often"
    except Exception as error:  # whatever a template does
        why = first_line(error)[:200]
    raise BackendError(f"{what} cannot be rendered: {why}")


def checked_render(render: Callable[[Messages], str]) -> Callable[[Messages], str]:
    """A function that renders messages within bounds.

    Raises:
        UserError: a first message cannot be rendered.
    """

    def render_bounded(messages: Messages) -> str:
        text = bounded(lambda: render(messages), "the model's chat template")
        if len(text) > _TEXT + sum(len(part) for message in messages for part in message.values()):
            raise BackendError(f"the model's chat template makes {len(text)} characters of the messages")
        return text

    try:
        render_bounded([{"role": "user", "content": "A question."}])
    except BackendError as error:
        raise UserError(str(error)) from error
    return render_bounded


@contextmanager
def _bounds() -> Iterator[None]:
    """Bound the memory that is taken while the block runs; in the main thread the time too."""
    with _memory_bound():
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_bound() -> Iterator[None]:
    try:
        import resource

        taken = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # neither is there but on Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + _MEMORY
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _TooLong
