"""Progress of a long run on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TextIO

_LINE_SECONDS = 10.0


def print_line(line: str, stream: TextIO | None) -> None:
    """Print a line. A reader that has gone, or a stream that was never there, ends no run.

    What data holds for terminals (colours, cursor moves, titles) is spelled out.
    """
    if stream is not None:
        with suppress(OSError, ValueError):
            print(spelled_out(line), file=stream, flush=True)


def spelled_out(text: str) -> str:
    """A text in which nothing but line breaks and tabs moves a terminal: control characters as escapes."""
    return text if text.isprintable() else "".join(map(_spelled, text))


def _spelled(character: str) -> str:
    if character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def this_python() -> str:
    """The Python that runs this, as a command line calls it."""
    if not sys.executable or sys.executable == shutil.which("python"):
        return "python"
    try:
        path = str(Path(sys.executable).relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere; the working directory is gone
        return shlex.quote(sys.executable)
    return shlex.quote(path if "/" in path else f"./{path}")


class Progress(Protocol):
    """What a command tells while it works."""

    def advance(self, *, fell_back: bool = False, computed: bool = True) -> None:
        """One more row is done; if it was not computed now, it says nothing of the pace."""
        ...


@contextmanager
def show_progress(
    total: int, done: int, *, doing: str = "predicting", unit: str = "rows", nested: bool = False
) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        total: rows of the run.
        done: rows that are finished already.
        doing: what the bar is called.
        unit: what is counted.
        nested: within a run whose bar or lines are there already: plain lines, none if it is over in a moment.
    """
    pace = _Pace(total, done, unit)
    if nested:
        yield _Lines(pace, f"{doing}: ", last=False)
    elif sys.stderr is not None and sys.stderr.isatty():
        with _Bar(pace, doing) as bar:
            yield bar
    else:
        yield _Lines(pace)


class _Pace:
    """Rows per second and time left, from the rows computed now."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        self.total, self.done, self.unit, self.fell_back = total, done, unit, 0
        self._resumed = done
        self._start = time.monotonic()

    def advance(self, *, fell_back: bool = False, computed: bool = True) -> None:
        self.done += 1
        self.fell_back += fell_back
        self._resumed += not computed

    def text(self) -> str:
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._resumed) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        told = []
        if rate > 0:  # else all that is finished was so before
            pace = f"{rate:.2f} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:.0f} s a {self.unit.removesuffix('s')}"
            told = [pace, f"{clock} left"]
        return ", ".join([*told, f"{self.fell_back} fell back"] if self.unit == "rows" else told)


class _Lines:
    def __init__(self, pace: _Pace, doing: str = "", *, last: bool = True) -> None:
        self._pace, self._doing, self._last = pace, doing, last
        self._printed_at = time.monotonic()

    def advance(self, *, fell_back: bool = False, computed: bool = True) -> None:
        self._pace.advance(fell_back=fell_back, computed=computed)
        now = time.monotonic()
        if now - self._printed_at >= _LINE_SECONDS or (self._last and self._pace.done == self._pace.total):
            self._printed_at = now
            done = f"{self._doing}{self._pace.done}/{self._pace.total} {self._pace.unit}"
            print_line(", ".join(filter(None, [done, self._pace.text()])), sys.stderr)


class _Bar:
    def __init__(self, pace: _Pace, doing: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._pace = pace
        self._bar = RichProgress(
            TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task(pace.unit, total=pace.total, completed=pace.done, pace="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal has gone
            self._bar.stop()

    def advance(self, *, fell_back: bool = False, computed: bool = True) -> None:
        self._pace.advance(fell_back=fell_back, computed=computed)
        with suppress(OSError):
            self._bar.update(self._task, completed=self._pace.done, pace=self._pace.text())
