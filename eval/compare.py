"""Several systems on the same rows: means, paired differences, and whether they can be told apart.

    python -m eval compare runs/zero_shot runs/tuned --truth truth.csv --reference zero_shot

A constant prompt is in every table: what does not beat it has recovered nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eval.encoders import Encoder
from eval.intervals import Interval, bootstrap, rows_needed
from eval.scoring import Scored, Truth, interval_figures, one_line, score_file, score_texts
from submission.data.outputs import manifest_path, read_manifest
from submission.errors import UserError
from submission.predict.strategies import DEFAULT_PROMPT

N = TypeVar("N", int, float)

CONSTANT = "constant"
_TIE = 1e-6
_SPECIAL_SHARE = 0.01  # of answers with special tokens, above which a system is no honest one


@dataclass(frozen=True, slots=True)
class System:
    """One strategy, scored.

    Attributes:
        name: as shown.
        scored: its predictions.
        exploit: its answers play with the encoder, so its mean is shown in a column of its own.
        rows_per_second, fallbacks: of its run; None if there is no manifest.
    """

    name: str
    scored: Scored
    exploit: bool = False
    rows_per_second: float | None = None
    fallbacks: int | None = None

    @property
    def constant(self) -> bool:
        """Whether it answers the same to everything."""
        return len(set(self.scored.predictions)) == 1


@dataclass(frozen=True, slots=True)
class ComparedSystem:
    """A system beside the reference.

    Attributes:
        system: which.
        mean: over rows.
        difference: mean of (system - reference) over rows, paired; None for the reference itself.
        won, tied, lost: rows against the reference.
        needed: rows that show a difference of this size with 80 % power; None if there is none.
    """

    system: System
    mean: Interval
    difference: Interval | None
    won: int
    tied: int
    lost: int
    needed: int | None

    @property
    def verdict(self) -> str:
        """What may be said."""
        if self.difference is None:
            return "reference"
        if self.difference.low != self.difference.low:
            return "unknown: one prompt only"
        if self.difference.holds_zero:
            return "no difference seen"
        return "better" if self.difference.mean > 0 else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Systems on one set of rows."""

    truth: Truth
    lines: list[ComparedSystem]
    encoder: Encoder

    @property
    def reference(self) -> str:
        """The system that the others are compared with."""
        return next(line.system.name for line in self.lines if line.difference is None)


def read_system(argument: str, truth: Truth, encoder: Encoder, exploits: Sequence[str] = ()) -> System:
    """Score a run that is named on the command line.

    Args:
        argument: a file of predictions or a folder that holds submission.csv; `NAME=` before it names the system.
        truth: of its rows.
        encoder: of the metric.
        exploits: names of the systems that play with the encoder.

    Raises:
        UserError: there is no such file, or its ids are not the truth's.
    """
    name, path = _name_and_path(argument)
    scored = score_file(path, truth, encoder)
    speed: float | None = None
    fallbacks: int | None = None
    if manifest_path(path).is_file():
        result = read_manifest(path).get("result")
        result = result if isinstance(result, dict) else {}
        # A run that was resumed knows the speed of its last part only, one that was complete knows none.
        speed, fallbacks = _number(result.get("rows_per_second"), float) or None, _number(result.get("fallbacks"), int)
    exploit = name in exploits or scored.special > _SPECIAL_SHARE * len(scored.scores)
    return System(name, scored, exploit, speed, fallbacks)


def _number(value: Any, kind: type[N]) -> N | None:
    """A finite number from 0 of a manifest; None for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    return kind(value) if good else None


def constant_system(truth: Truth, encoder: Encoder, prompt: str = DEFAULT_PROMPT, name: str = CONSTANT) -> System:
    """The same prompt for every row."""
    predictions = [prompt] * len(truth.ids)
    return System(name, Scored(truth, predictions, score_texts(predictions, truth.prompts, encoder), encoder.name, 0))


def compare(systems: Sequence[System], truth: Truth, encoder: Encoder, reference: str = "") -> Comparison:
    """Put systems beside a reference; a constant prompt is added if none of them is one.

    Args:
        systems: scored on `truth`.
        truth: the rows.
        encoder: of the metric.
        reference: name of a system; "" takes a constant.

    Raises:
        UserError: two systems have the same name, or none is called `reference`.
    """
    import numpy as np

    systems = list(systems)
    names = [system.name for system in systems]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two runs are called {twice[0]!r}: name them, as in {twice[0]}2=PATH")
    plain = [system for system in systems if system.constant and not system.exploit]
    if not plain:
        free = CONSTANT if CONSTANT not in names else "constant prompt"
        plain = [constant_system(truth, encoder, name=free)]
        systems = [*plain, *systems]
    wanted = reference or plain[0].name
    base = next((system for system in systems if system.name == wanted), None)
    if base is None:
        raise UserError(f"no run is called {wanted!r}; there are: {', '.join(s.name for s in systems)}")
    scores = np.stack([system.scored.scores for system in systems], axis=1)
    differences = scores - base.scored.scores[:, None]
    intervals = bootstrap(np.concatenate([scores, differences], axis=1), truth.clusters)
    lines = []
    for column, system in enumerate(systems):
        difference = None if system is base else intervals[len(systems) + column]
        gap = differences[:, column]
        lines.append(
            ComparedSystem(
                system, intervals[column], difference,
                int((gap > _TIE).sum()), int((np.abs(gap) <= _TIE).sum()), int((gap < -_TIE).sum()),
                rows_needed(difference, len(gap)) if difference else None,
            )
        )  # fmt: skip
    return Comparison(truth, lines, encoder)


def table(comparison: Comparison) -> Iterator[str]:
    """Lines to print."""
    truth = comparison.truth
    yield f"metric     {comparison.encoder.metric}"
    yield f"rows       {len(truth.ids)} of {truth.path}, {truth.number_of_clusters} prompts (near-duplicates are one)"
    yield ""
    widths = (22, 24, 24, 25, 14, 7, 9)
    yield _row(headings(comparison), widths)
    for line in comparison.lines:
        yield _row(cells(line), widths)
    yield ""
    for line in comparison.lines:
        if line.difference is not None:
            yield f"{one_line(line.system.name, 22):<22}  {sentence(line, comparison)}"


def headings(comparison: Comparison) -> tuple[str, ...]:
    """The heads of a table's columns."""
    reference = one_line(comparison.reference, 18)
    return ("system", "mean [95 %]", "as an exploit", f"minus {reference}", "won/tied/lost", "rows/s", "fallbacks")


def sentence(line: ComparedSystem, comparison: Comparison) -> str:
    """What may be said of a system beside the reference, and what it would take to say more."""
    said = f"{line.verdict}" + (f" than {comparison.reference}" if line.verdict in ("better", "worse") else "")
    if line.needed is not None and line.difference is not None:
        more = len(comparison.truth.ids)
        if line.difference.holds_zero:
            said += f"; {line.difference.mean:+.3f} needs about {line.needed} rows for 80 % power, you have {more}"
        elif line.needed > more:
            said += f"; for 80 % power it needs about {line.needed} rows, you have {more}"
    return said


def cells(line: ComparedSystem) -> tuple[str, ...]:
    """The cells of a table's row."""
    system = line.system
    mean = line.mean.shown(".3f")
    return (
        one_line(system.name, 22),
        "" if system.exploit else mean,
        mean if system.exploit else "",
        "" if line.difference is None else line.difference.shown("+.3f"),
        "" if line.difference is None else f"{line.won}/{line.tied}/{line.lost}",
        "" if system.rows_per_second is None or system.constant else f"{system.rows_per_second:.2f}",
        "" if system.fallbacks is None else str(system.fallbacks),
    )


def figures(comparison: Comparison) -> dict[str, Any]:
    """The figures, for JSON."""
    return {
        "encoder": comparison.encoder.name,
        "n": len(comparison.truth.ids),
        "clusters": comparison.truth.number_of_clusters,
        "reference": comparison.reference,
        "systems": {
            line.system.name: {
                **interval_figures(line.mean),
                "exploit": line.system.exploit,
                "difference": interval_figures(line.difference) if line.difference else None,
                "verdict": line.verdict,
                "won": line.won, "tied": line.tied, "lost": line.lost,
                "rows_needed": line.needed,
                "rows_per_second": line.system.rows_per_second,
                "fallbacks": line.system.fallbacks,
            }
            for line in comparison.lines
        },
    }  # fmt: skip


def _name_and_path(argument: str) -> tuple[str, Path]:
    name, equals, rest = argument.partition("=")
    if not equals or Path(argument).exists():
        name, rest = "", argument
    path = Path(rest).expanduser()
    folder = path.is_dir()
    if folder:
        path = path / "submission.csv"
        if not path.is_file():
            raise UserError(f"{path.parent} is a folder without a submission.csv: name the file of predictions")
    shown = path.parent.resolve().name if folder or path.name == "submission.csv" else path.stem
    return name or shown, path


def _row(parts: Sequence[str], widths: Sequence[int]) -> str:
    padded = [part.ljust(width) if column < 4 else part.rjust(width) for column, (part, width) in
              enumerate(zip(parts, widths, strict=True))]  # fmt: skip
    return "  ".join(padded).rstrip()
