"""What a part found: figures with their limits, kept line by line, so that nothing is lost when a part is ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "failed", "ended", "left out", "not run yet"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what was measured.
        value: the figure, a text, or None for what was left out.
        unit: of the value.
        low, high: what the value must not be below or above; None for no limit.
        note: what else there is to know, or why it was left out.
    """

    name: str
    value: float | str | None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether it is within its limits; None without limits."""
        if not isinstance(self.value, int | float) or (self.low is None and self.high is None):
            return None
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)


@dataclass(slots=True)
class PartResult:
    """How a part went.

    Attributes:
        state: done, failed (an exception, a crash), ended (it ran past its limit), left out, or not run yet.
        why: of what is not done.
        seconds: that it took.
        figures: what it told, in order.
    """

    state: State = "not run yet"
    why: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in ("done", "left out") and all(figure.ok is not False for figure in self.figures)


@dataclass(frozen=True, slots=True)
class Check:
    """What a part works with.

    Attributes:
        part: its name.
        device: cuda or cpu.
        small: models are tiny and rows are few, to run the code of a part rather than to measure.
        end: when its time is over, in seconds of `time.time()`.
        work: folder that all parts share: models are made there once.
        lines: file that its figures go to.
    """

    part: str
    device: str
    small: bool
    end: float
    work: Path
    lines: Path

    def put(
        self, name: str, value: float | str, unit: str = "", *, low: float | None = None, high: float | None = None,
        note: str = "",
    ) -> None:  # fmt: skip
        """Tell a figure, with the limits that it must be within."""
        self._write(Figure(name, value, unit, low, high, note))

    def leave_out(self, name: str, why: str) -> None:
        """Tell that something was not done."""
        self._write(Figure(name, None, note=why))

    def left(self) -> float:
        """Seconds that there are."""
        return max(0.0, self.end - time.time())

    def own_folder(self) -> Path:
        """A folder of this part alone."""
        folder = self.work / self.part
        folder.mkdir(exist_ok=True)
        return folder

    def _write(self, figure: Figure) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(figure)) + "\n")
        print(" ".join(row(figure).split()), flush=True)


def read_figures(lines: Path) -> list[Figure]:
    """The figures that a part told; one that was cut off in writing does not count."""
    text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    return [Figure(**json.loads(line)) for line in text.split("\n")[:-1]]


def as_json(machine: Mapping[str, Any], results: Mapping[str, PartResult], *, small: bool) -> str:
    """The whole report."""
    parts = {
        name: {**asdict(result), "figures": [{**asdict(figure), "ok": figure.ok} for figure in result.figures]}
        for name, result in results.items()
    }
    return json.dumps({"small": small, "machine": dict(machine), "parts": parts}, indent=1) + "\n"


def table(results: Mapping[str, PartResult]) -> Iterator[str]:
    """The report for people."""
    for name, result in results.items():
        took = f", {result.seconds:.0f} s" if result.seconds else ""
        yield f"{name}: {result.state}{took}{f' ({result.why})' if result.why else ''}"
        for figure in result.figures:
            yield f"  {row(figure)}"


def row(figure: Figure) -> str:
    """One line: mark, name, value, limits, note."""
    if figure.value is None:
        return f"     {figure.name}: left out: {figure.note}"
    mark = {None: "    ", True: "ok  ", False: "BAD "}[figure.ok]
    value = figure.value if isinstance(figure.value, str) else f"{figure.value:.4g}"
    limits = [f"{word} {limit:g}" for word, limit in (("at least", figure.low), ("at most", figure.high))
              if limit is not None]  # fmt: skip
    behind = "; ".join(part for part in (", ".join(limits), figure.note) if part)
    return f"{mark} {figure.name:<58} {value:>10} {figure.unit:<12} {behind}".rstrip()
