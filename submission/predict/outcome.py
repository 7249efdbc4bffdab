"""The end of a run: fill what is missing with the fallback, write the file whole, read it back, sum up."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from submission.calls.log import log_path
from submission.data.files import display_path
from submission.data.tables import write_predictions
from submission.data.validation import validate
from submission.errors import PromptRecoveryError
from submission.progress import print_line, this_python
from submission.types import Prediction

BLANK_INPUT = "blank rewritten_text"
DEADLINE = "deadline"
NO_ANSWER = "no answer"

EXIT_TOO_MANY_FAILED = 3


@dataclass(frozen=True, slots=True)
class Summary:
    """What came out of a run.

    Attributes:
        rows: of the output.
        fallbacks: rows that took the fallback, for whatever reason.
        reasons: how many for which reason, most frequent first.
        short: rows with an answer that the strategy had less for than was asked, by what was missing.
        truncated: rows whose texts were cut to fit the model.
        computed: rows answered by this process; the answers of the others were in the log.
        calls: of models, made by this process.
        seconds: since the process started.
        degraded: how models were loaded after trouble, in words; usually nothing.
        rows_per_second: computed rows per second, the loading of models included; 0 if none was computed.
        too_many_failed: more rows failed than was allowed.
    """

    rows: int
    fallbacks: int
    reasons: Mapping[str, int]
    short: Mapping[str, int]
    truncated: int
    computed: int
    calls: int
    seconds: float
    rows_per_second: float
    output: Path
    degraded: tuple[str, ...]
    too_many_failed: bool

    @property
    def exit_code(self) -> int:
        """0, or 3 when too many rows failed."""
        return EXIT_TOO_MANY_FAILED if self.too_many_failed else 0

    def as_json(self) -> str:
        """One line for programs."""
        return json.dumps(
            {
                "rows": self.rows,
                "fallbacks": self.fallbacks,
                "reasons": dict(self.reasons),
                "short": dict(self.short),
                "truncated": self.truncated,
                "computed": self.computed,
                "calls": self.calls,
                "seconds": round(self.seconds, 3),
                "rows_per_second": round(self.rows_per_second, 4),
                "degraded": list(self.degraded),
                "output": display_path(self.output),
                "log": str(log_path(self.output)),
                "exit_code": self.exit_code,
            }
        )

    def as_text(self) -> str:
        """The lines that end a run on the terminal."""
        further = f", {self.calls} further calls made" if self.calls and not self.computed else ""
        lines = [f"rows       {self.rows} ({self.computed} computed now{further})"]
        lines.append(f"fallbacks  {self.fallbacks}")
        lines += [f"           {count} x {reason}" for reason, count in self.reasons.items()]
        lines += [f"short      {count} x {missing}" for missing, count in self.short.items()]
        lines += [f"models     loaded {words} after trouble" for words in self.degraded]
        lines.append(f"truncated  {self.truncated}")
        pace = f", {self.rows_per_second:.2f} rows/s" if self.computed else ""
        lines.append(f"time       {self.seconds:.1f} s{pace}")
        lines.append(f"output     {display_path(self.output)} (valid)")
        if self.too_many_failed:
            lines.append("Too many rows failed: the same command tries them again.")
        look = f"{this_python()} -m submission inspect ID --run {shlex.quote(display_path(self.output))}"
        lines.append(f"next       {look}    (one row: prompt and answer)")
        return "\n".join(lines)


def finish(
    output: Path,
    ids: Iterable[str],
    finished: Mapping[str, Prediction],
    *,
    fallback: str,
    max_failures: float,
    computed: int,
    calls: int,
    seconds: float,
    computing_seconds: float,
    late: bool,
    lost: str = "",
    degraded: Sequence[str] = (),
) -> Summary:
    """Write the output for all `ids` and validate it by reading it back.

    Args:
        ids: in order; they are gone through more than once.
        finished: the rows that were tried; the others count as stopped by the deadline, if it came.
        fallback: takes the place of failed and missing answers.
        max_failures: the share of tried rows, 0 to 1, above which too many failed.
        late: whether the deadline came before all rows were tried.
        lost: why rows without an answer have none, where no model is left.
        degraded: how models were loaded after trouble, in words.

    Raises:
        PromptRecoveryError: what was read back is not valid (a fault of the disk or of this program).
        OSError: the file could not be written.
    """
    count = _Count(finished, fallback, late=late, lost=lost)
    write_predictions(output, count.rows(ids))
    problems = validate(output, ids)
    if problems:
        raise PromptRecoveryError(f"{display_path(output)} was written but is not valid: {problems[0]}")
    return Summary(
        rows=count.written,
        fallbacks=sum(count.reasons.values()),
        reasons=dict(count.reasons.most_common()),
        short=dict(count.short.most_common()),
        truncated=count.truncated,
        computed=computed,
        calls=calls,
        seconds=seconds,
        rows_per_second=computed / computing_seconds if computed and computing_seconds > 0 else 0.0,
        output=output,
        degraded=tuple(degraded),
        too_many_failed=count.failed > max_failures * count.asked,
    )


class _Count:
    """Goes through the rows once, so that what is written and what is told agree while more answers come."""

    def __init__(self, finished: Mapping[str, Prediction], fallback: str, *, late: bool, lost: str) -> None:
        self._finished, self._fallback, self._late, self._lost = finished, fallback, late, lost
        self.reasons: Counter[str] = Counter()
        self.short: Counter[str] = Counter()
        self.written = self.truncated = self.asked = self.failed = 0

    def rows(self, ids: Iterable[str]) -> Iterator[tuple[str, str]]:
        """What is to be written."""
        for row_id in ids:
            self.written += 1
            prediction = self._finished.get(row_id)
            if prediction is None:
                self.reasons[DEADLINE if self._late else self._lost or NO_ANSWER] += 1
                self.asked += not self._late
                self.failed += not self._late
                yield row_id, self._fallback
                continue
            failed = prediction.status != "ok"
            self.truncated += prediction.truncated
            if prediction.reason != BLANK_INPUT:
                self.asked += 1
                self.failed += failed
            if failed:
                self.reasons[prediction.reason] += 1
            elif prediction.reason:
                self.short[prediction.reason] += 1
            yield row_id, self._fallback if failed else prediction.text


def print_summary(summary: Summary, *, as_json: bool) -> None:
    """Print the summary; with `as_json` as one line on standard output, and the text on standard error."""
    print_line(summary.as_text(), sys.stderr if as_json else sys.stdout)
    if as_json:
        print_line(summary.as_json(), sys.stdout)
