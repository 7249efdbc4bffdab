"""The data card: what is in a folder of sets, what was left out and why."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.scoring import one_line
from submission.data.files import atomic_path, atomic_writer
from train.cleaning import DataRow
from train.rows import Rows, RowStore

NAME, PLOT = "README.md", "lengths.png"
_EXAMPLES = 3
_KINDS = 12
_TEXTS = ("rewrite_prompt", "original_text", "rewritten_text")


@dataclass(slots=True)
class PreparedData:
    """What came out of `prepare`.

    Attributes:
        rows: all that were read.
        splits: rows by split, in the order of their file.
        read: rows by source.
        dropped: (number of the row, stage, reason) of every row that is in no split.
        files: hash by file of the sources.
    """

    rows: RowStore = field(default_factory=RowStore)
    splits: dict[str, Rows] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def write(
    folder: Path,
    made: PreparedData,
    hashes: Mapping[str, str],
    licences: Mapping[str, str],
    *,
    groups: int,
    encoder: str,
) -> None:
    """Write README.md and lengths.png into the folder."""
    plot_lengths(folder / PLOT, made.splits)
    with atomic_writer(folder / NAME) as file:
        file.write("\n".join(_lines(made, hashes, licences, groups, encoder)) + "\n")


def plot_lengths(path: Path, splits: Mapping[str, Sequence[DataRow]]) -> None:
    """Distributions of the lengths in words, by split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column in zip(figure.subplots(1, len(_TEXTS)), _TEXTS, strict=True):
        for name, rows in splits.items():
            lengths = [len(getattr(row, column).split()) for row in rows]
            if lengths:
                axes.hist(lengths, bins=25, density=True, histtype="step", label=name)
        axes.set_xlabel(f"words of {column}")
        axes.set_yticks([])
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _lines(
    made: PreparedData, hashes: Mapping[str, str], licences: Mapping[str, str], groups: int, encoder: str
) -> Iterator[str]:
    rows = Rows(made.rows, [number for part in made.splits.values() for number in part.numbers])
    yield "# Data card"
    yield ""
    yield f"{len(rows)} triplets for prompt recovery, made by `python -m train prepare`. The splits share no prompt,"
    yield "style or text: rows with one in common, to the letter or nearly, form a group, and groups are not divided"
    yield f"(with `by = row` they are). There are {groups} groups. Near-duplicate prompts were found by {encoder},"
    yield "near-duplicate texts by the words that they share."
    yield ""
    yield from _table(("split", "rows", "distinct prompts", "styles", "distinct texts", "hash"), (
        (name, len(part), len({r.rewrite_prompt for r in part}), len({r.style for r in part if r.style}),
         len({hash(r.original_text) for r in part}), f"`{hashes.get(f'{name}.parquet', '')[:16]}`")
        for name, part in made.splits.items()
    ))  # fmt: skip
    yield "## Where rows went"
    yield ""
    yield "Every row that was read is in a split or in one line of this table; `dropped.csv` has them one by one."
    yield ""
    stages = Counter((stage, reason) for _, stage, reason in made.dropped)
    yield from _table(("stage", "what became of it", "rows"), [
        ("read", "from all sources", sum(made.read.values())),
        *((stage, reason, count) for (stage, reason), count in stages.items()),
        *(("kept", f"in {name}", len(part)) for name, part in made.splits.items()),
    ])  # fmt: skip
    yield "## Sources"
    yield ""
    kept = Counter(made.rows.sources[number] for number in rows.numbers)
    yield from _table(("source", "rows read", "rows kept"), ((n, c, kept[n]) for n, c in made.read.items()))
    given = (
        (Path(path).name, licences.get(path, "see the recipe"), digest[:16]) for path, digest in made.files.items()
    )
    yield from _table(("file", "licence as given", "hash"), given)
    yield "## Lengths in words"
    yield ""
    yield f"![Distributions of lengths]({PLOT})"
    yield ""
    yield from _table(("column", "shortest", "median", "mean", "longest"), _length_rows(rows))
    kinds = Counter(row.kind for row in rows if row.kind)
    if kinds:
        yield "## Kinds of prompt"
        yield ""
        yield from _table(("kind", "rows"), kinds.most_common(_KINDS))
    yield "## Examples"
    yield ""
    for row in rows[:_EXAMPLES]:
        yield f"- **{_plain(row.rewrite_prompt)}** ({_plain(row.source)})"
        yield f"  - original: {_plain(row.original_text, 200)}"
        yield f"  - rewritten: {_plain(row.rewritten_text, 200)}"


def _length_rows(rows: Sequence[DataRow]) -> Iterator[tuple[object, ...]]:
    for column in _TEXTS:
        lengths = [len(getattr(row, column).split()) for row in rows]
        yield (
            column,
            min(lengths),
            round(statistics.median(lengths)),
            round(statistics.mean(lengths), 1),
            max(lengths),
        )


def _table(head: Sequence[str], rows: object) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    assert hasattr(rows, "__iter__")
    for row in rows:
        yield f"| {' | '.join(_plain(str(cell)) for cell in row)} |"
    yield ""


def _plain(text: str, most: int = 120) -> str:
    """Text of data that no Markdown reader takes for markup."""
    line = one_line(text, most)
    return "".join(f"\\{c}" if c in "\\*_[]<>#|" or (c == "`" and not text.startswith("`")) else c for c in line)
