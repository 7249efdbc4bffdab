"""The figures of an experiment, as PNGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ensemble.diagnosis import Curve
from eval.charts import canvas, legend, style
from eval.intervals import Interval
from eval.scoring import one_line

_LETTERS = 22


def correlations(found: Mapping[tuple[str, str], Interval]) -> bytes:
    """A matrix of sources; each cell is the correlation of two answers' scores."""
    import numpy as np

    names = list(dict.fromkeys(name for pair in found for name in pair))
    matrix = np.full((len(names), len(names)), np.nan)
    for (a, b), value in found.items():
        i, j = names.index(a), names.index(b)
        matrix[i, j] = matrix[j, i] = value.mean
    with canvas(1.6 + 0.55 * len(names)) as (axes, png):
        axes.grid(visible=False)
        image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr")
        shown = [one_line(name, _LETTERS) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), shown)
        for i, j in np.ndindex(matrix.shape):
            text = f"{matrix[i, j]:.2f}" if matrix[i, j] == matrix[i, j] else "one answer"
            dark = abs(matrix[i, j]) > 0.6
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axes.figure.colorbar(image, ax=axes, label="correlation over rows")
    return png.getvalue()


def headroom(curve: Curve, names: Sequence[str]) -> bytes:
    """Mean score of the choice against the number of answers."""
    with canvas(4.2) as (axes, png):
        counts = range(1, len(curve.independent) + 1)
        for number, name in enumerate(["oracle", *names]):
            axes.plot(counts, curve.chosen[name], marker=".", label=one_line(name, _LETTERS), **style(number))
        axes.plot(counts, curve.independent, color="#444444", linestyle=":", label="oracle, independent answers")
        axes.set_xlabel("answers a row")
        axes.set_ylabel("mean score of the choice")
        legend(axes)
    return png.getvalue()
