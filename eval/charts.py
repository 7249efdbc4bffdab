"""The figures of a report, as PNGs that can be read at the width of a phone."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eval.compare import Comparison
from eval.intervals import Interval, bootstrap
from eval.scoring import one_line

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Okabe and Ito's colours: told apart by the colour-blind too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8B6F00")
_STYLES = ("-", "--", ":", "-.")
_WIDTH, _DPI = 5.2, 150  # inches: small enough for its letters to be read on a phone
_BINS = 5
_MOST_LETTERS = 34


def score_distribution(comparison: Comparison) -> bytes:
    """For each system the share of rows that score at least so much."""
    import numpy as np

    with canvas(4.2) as (axes, png):
        for number, line in enumerate(comparison.lines):
            scores = np.sort(line.system.scored.scores)
            share = 1 - np.arange(len(scores)) / len(scores)
            axes.step(scores, share, where="pre", label=one_line(line.system.name, _MOST_LETTERS), **style(number))
        axes.set_xlabel("score")
        axes.set_ylabel("share of rows that score at least so much")
        axes.set_ylim(0, 1.02)
        legend(axes)
    return png.getvalue()


def differences(comparison: Comparison) -> bytes:
    """Paired differences to the reference with their intervals."""
    lines = {line.system.name: line.difference for line in comparison.lines if line.difference is not None}
    return intervals(lines, f"mean score minus that of {one_line(comparison.reference, 30)}, 95 % interval")


def intervals(found: Mapping[str, Interval], label: str, *, beside: float = 0.0, from_zero: bool = False) -> bytes:
    """A dot with its interval for each name, and a line at what they are to be told from."""
    with canvas(1.2 + 0.42 * len(found)) as (axes, png):
        _dots(axes, [one_line(name, _MOST_LETTERS) for name in found], list(found.values()), 0.0, 0)
        axes.axvline(beside, color="#444444", linewidth=1)
        if from_zero:
            axes.set_xlim(left=0)
        axes.set_xlabel(label)
    return png.getvalue()


def by_kind(comparison: Comparison, kinds: Sequence[str], names: Sequence[str]) -> bytes:
    """Mean scores by kind of prompt.

    Args:
        comparison: of the systems.
        kinds: of each row.
        names: kinds to show, from top to bottom.
    """
    import numpy as np

    labels = np.array(kinds)
    lines = comparison.lines
    with canvas(1.4 + (0.28 + 0.12 * len(lines)) * len(names)) as (axes, png):
        for number, line in enumerate(lines):
            means = []
            for name in names:
                rows = labels == name
                means.append(bootstrap(line.system.scored.scores[rows][:, None], comparison.truth.clusters[rows])[0])
            offset = (number - (len(lines) - 1) / 2) * 0.8 / len(lines)
            shown = [f"{_in_two_lines(name)} ({kinds.count(name)})" for name in names]
            _dots(axes, shown, means, offset, number, line.system.name)
        axes.set_xlabel("mean score, 95 % interval")
        legend(axes)
    return png.getvalue()


def _in_two_lines(text: str) -> str:
    return "\n".join(textwrap.wrap(one_line(text, 2 * _MOST_LETTERS), _MOST_LETTERS, max_lines=2, placeholder="..."))


def by_length(comparison: Comparison, lengths: NDArray[np.int64]) -> bytes:
    """Mean scores by the length of the rewritten text, in fifths of the rows.

    Args:
        comparison: of the systems.
        lengths: words of each row's rewritten text.
    """
    import numpy as np

    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _BINS + 1)))
    bins = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    with canvas(4.2) as (axes, png):
        used = [number for number in range(max(1, len(edges) - 1)) if (bins == number).any()]
        places = [float(np.median(lengths[bins == number])) for number in used]
        for index, line in enumerate(comparison.lines):
            means = [float(line.system.scored.scores[bins == number].mean()) for number in used]
            axes.plot(places, means, marker="o", markersize=4, label=one_line(line.system.name, _MOST_LETTERS),
                      **style(index))  # fmt: skip
        axes.set_xlabel("words of the rewritten text (median of each fifth of the rows)")
        axes.set_ylabel("mean score")
        legend(axes)
    return png.getvalue()


def speed(rows_per_second: Mapping[str, float]) -> bytes:
    """Rows per second of each run."""
    with canvas(1.2 + 0.42 * len(rows_per_second)) as (axes, png):
        places = range(len(rows_per_second))
        axes.barh(list(places), list(rows_per_second.values()), color=_COLOURS[0], height=0.6)
        axes.set_yticks(list(places), [one_line(name, _MOST_LETTERS) for name in rows_per_second])
        axes.invert_yaxis()
        for place, value in zip(places, rows_per_second.values(), strict=True):
            axes.text(value, place, f" {value:.2f}", va="center", fontsize=9)
        axes.set_xlim(0, 1.15 * max(rows_per_second.values()))
        axes.set_xlabel("rows per second")
    return png.getvalue()


def _dots(
    axes: Axes, names: Sequence[str], means: Sequence[Interval], offset: float, number: int, label: str = ""
) -> None:
    """A dot with a line for each mean, the first on top."""
    import numpy as np

    places = np.arange(len(names)) + offset
    centre = np.array([mean.mean for mean in means])
    reach = np.nan_to_num(np.array([[m.mean - m.low, m.high - m.mean] for m in means]).T)
    axes.errorbar(
        centre, places, xerr=np.maximum(reach, 0).reshape(2, -1), fmt="o", markersize=4, capsize=2,
        color=_COLOURS[number % len(_COLOURS)], label=one_line(label, _MOST_LETTERS) if label else None,
    )  # fmt: skip
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)


def style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STYLES[number // len(_COLOURS) % len(_STYLES)]}


@contextmanager
def canvas(height: float) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes to draw on; the PNG is there when the block has ended."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=9)
    png = io.BytesIO()
    yield axes, png
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a dollar sign in a name is no formula
    figure.savefig(png, format="png", dpi=_DPI)
