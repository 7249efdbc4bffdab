"""One file of predictions against the truth.

python -m eval score submission.csv truth.csv
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.encoders import Encoder
from eval.grouping import near_duplicate_groups
from eval.intervals import Interval, bootstrap
from eval.metric import sharpened_cosine
from submission.data.tables import PREDICTION_COLUMNS, Row, check_ids, has_text, read_table, some
from submission.errors import UserError
from submission.prompts.answers import is_blank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHOWN = 5
_GOOD = 0.5
# What an encoder reads as something else than text. Such answers play with the metric (see docs/EVAL.md).
_SPECIAL = re.compile(r"</?s>|<pad>|<unk>|<extra_id_\d+>|\[(?:CLS|SEP|PAD|UNK|MASK)\]")


@dataclass(frozen=True, slots=True)
class Truth:
    """What is to be predicted.

    Attributes:
        path: where it was read from.
        ids, prompts: of the rows, in file order.
        clusters: near-duplicate prompts have the same label, shape (rows,).
        kinds: value of the column that scores are to be shown by; None without one.
    """

    path: Path
    ids: list[str]
    prompts: list[str]
    clusters: NDArray[np.int64]
    kinds: list[str] | None = None

    @property
    def number_of_clusters(self) -> int:
        """Prompts that are not near-duplicates of each other."""
        return len(set(self.clusters.tolist()))


@dataclass(frozen=True, slots=True)
class Scored:
    """Predictions with their scores, in the truth's order, shape (rows,)."""

    truth: Truth
    predictions: list[str]
    scores: NDArray[np.float64]
    encoder: str
    special: int
    """Predictions that hold a special token of an encoder."""

    def interval(self) -> Interval:
        """The mean; clusters of near-duplicate prompts are drawn as a whole."""
        return bootstrap(self.scores[:, None], self.truth.clusters)[0]

    def by_kind(self) -> dict[str, tuple[int, Interval]]:
        """Number of rows and mean by kind, the most frequent kind first."""
        import numpy as np

        kinds = np.array(self.truth.kinds or [])
        names, counts = np.unique(kinds, return_counts=True)
        found = {}
        for name, count in sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda item: -item[1]):
            rows = kinds == name
            found[name] = (count, bootstrap(self.scores[rows][:, None], self.truth.clusters[rows])[0])
        return found

    def figures(self) -> dict[str, Any]:
        """The figures, for JSON."""
        interval = self.interval()
        figures: dict[str, Any] = {
            **interval_figures(interval),
            "n": len(self.scores),
            "encoder": self.encoder,
            "median": float(statistics.median(self.scores)),
            "above_half": float((self.scores > _GOOD).mean()),
            "clusters": self.truth.number_of_clusters,
            "special_tokens": self.special,
        }
        if self.truth.kinds is not None:
            figures["by"] = {
                kind: {"n": count, **interval_figures(part)} for kind, (count, part) in self.by_kind().items()
            }
        return figures


def read_truth(path: Path, encoder: Encoder, by: str = "") -> Truth:
    """Read a table with the columns id and rewrite_prompt.

    Args:
        path: CSV or Parquet.
        encoder: finds near-duplicate prompts.
        by: a further column to show scores by; "" for none.

    Raises:
        UserError: the file, a column or a prompt is missing, or an id is there twice.
    """
    rows = read_table(path, (*PREDICTION_COLUMNS, *([by] if by else [])))
    _check_rows(path, rows)
    blank = [row.where for row in rows if not has_text(row.cells[1])]
    if blank:
        raise UserError(f"{path}: blank rewrite_prompt on {some(blank)}\nA row without a truth cannot be scored.")
    prompts = [row.cells[1] for row in rows]
    kinds = [row.cells[2] or "(blank)" for row in rows] if by else None
    return Truth(path, [row.cells[0] for row in rows], prompts, near_duplicate_groups(prompts, encoder), kinds)


def read_predictions(path: Path, truth: Truth) -> list[str]:
    """The predicted prompts of a file, in the truth's order.

    Raises:
        UserError: an id is missing, unknown or there twice, or a prompt is null, as the competition refuses it too;
            names them.
    """
    rows = read_table(path, PREDICTION_COLUMNS)
    _check_rows(path, rows)
    null = [f"{row.where} (id {row.cells[0]!r})" for row in rows if is_blank(row.cells[1])]
    if null:
        raise UserError(
            f"{path}: rewrite_prompt is blank or reads as null on {some(null)}\n"
            "The competition refuses such a file; `python -m submission predict` never writes one."
        )
    given = {row.cells[0]: row.cells[1] for row in rows}
    check_same_ids(path, given, truth)
    return [given[row_id] for row_id in truth.ids]


def check_same_ids(path: Path, given: Collection[str], truth: Truth) -> None:
    """Refuse a file whose ids are not the truth's, in whatever order.

    Raises:
        UserError: names the missing or unknown ones.
    """
    wanted = set(truth.ids)
    for what, ids in (
        ("lacks", [row_id for row_id in truth.ids if row_id not in given]),
        ("has, and the truth lacks,", [row_id for row_id in given if row_id not in wanted]),
    ):
        if ids:
            raise UserError(
                f"{path} {what} {len(ids)} of the ids: {some([repr(row_id) for row_id in ids])}\n"
                f"Both must have the same ids; the truth is {truth.path}."
            )


def score_texts(predicted: Sequence[str], true: Sequence[str], encoder: Encoder) -> NDArray[np.float64]:
    """Score predicted prompts against true ones, row by row; a blank text on either side scores 0.

    Returns:
        scores, shape (rows,).

    Raises:
        ValueError: their numbers differ.
    """
    import numpy as np

    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} truths")
    if not true:
        return np.zeros(0)
    vectors = encoder.embed([*predicted, *true])
    scores = sharpened_cosine(vectors[: len(predicted)], vectors[len(predicted) :])
    said = [has_text(a) and has_text(b) for a, b in zip(predicted, true, strict=True)]
    return np.where(said, scores, 0.0)


def score_file(path: Path, truth: Truth, encoder: Encoder) -> Scored:
    """Score a file of predictions; see `read_predictions` for what is refused."""
    predictions = read_predictions(path, truth)
    scores = score_texts(predictions, truth.prompts, encoder)
    return Scored(truth, predictions, scores, encoder.name, sum(map(has_special_token, predictions)))


def has_special_token(text: str) -> bool:
    """Whether an encoder would read a part of a text as something else than text."""
    return bool(_SPECIAL.search(text))


def lines(scored: Scored, metric: str) -> Iterator[str]:
    """Lines to print.

    Args:
        scored: what to show.
        metric: its name; see `Encoder.metric`.
    """
    interval = scored.interval()
    yield f"metric     {metric}"
    yield f"rows       {len(scored.scores)}, {scored.truth.number_of_clusters} prompts (near-duplicates are one)"
    yield f"mean       {interval}   95 % interval, prompts drawn as a whole"
    yield f"median     {statistics.median(scored.scores):.4f}"
    yield f"above {_GOOD}  {(scored.scores > _GOOD).mean():.1%}"
    if scored.special:
        yield f"exploit    {scored.special} predictions hold special tokens of an encoder: no recovered prompts"
    if scored.truth.kinds is not None:
        yield ""
        for kind, (count, part) in scored.by_kind().items():
            yield f"{one_line(kind, 40):<40} {count:>6} rows   {part}"
    order = scored.scores.argsort(kind="stable").tolist()
    for title, rows in (("best", order[::-1][:_SHOWN]), ("worst", order[:_SHOWN])):
        yield ""
        yield title
        for row in rows:
            yield f"  {scored.scores[row]:7.4f}  id {one_line(scored.truth.ids[row], 40)}"
            yield f"           predicted: {one_line(scored.predictions[row])}"
            yield f"           true:      {one_line(scored.truth.prompts[row])}"


def interval_figures(interval: Interval) -> dict[str, float | None]:
    """The figures, for JSON; null stands for what is unknown, JSON has no NaN."""
    known = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {name: value if value == value else None for name, value in known.items()}


def one_line(text: str, most: int = 90) -> str:
    """A text without line breaks or control characters, shortened between words where there are any."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    flat = " ".join(flat.split())
    if len(flat) <= most:
        return flat
    room = most - 3
    end = flat.rfind(" ", room // 2, room + 1)
    return flat[: room if end < 0 else end] + "..."


def _check_rows(path: Path, rows: Sequence[Row]) -> None:
    if not rows:
        raise UserError(f"{path} has a header and no row")
    check_ids(path, rows)
