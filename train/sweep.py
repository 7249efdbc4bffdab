"""Several runs of `sft` that differ in a few values, one table and one plot.

    python -m train sweep train/recipes/embedded.toml -o runs/sweep --grid learning_rate=2e-4,5e-4 --grid epochs=1,2

Every combination is a run in a folder of its own, skipped when it is finished and resumed when it is not.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from submission.config import from_mapping, split_list
from submission.data.files import atomic_path, write_json
from submission.data.outputs import check_apart, check_free, check_no_file, claim, read_manifest
from submission.data.tables import write_table
from submission.errors import UserError
from train.sft import sft
from train.sft_config import Sft, read_sft

LOG = logging.getLogger(__name__)

COLUMNS = ("run", "steps", "training_loss", "best_validation_loss", "at_step", "score", "seconds")
_LAST = 10  # steps whose training loss is averaged


def combinations(grid: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of `key=value,value` entries.

    Raises:
        UserError: an entry is written otherwise, or names a key of no recipe.
    """
    axes: dict[str, list[str]] = {}
    for entry in grid:
        key, equals, values = entry.partition("=")
        found = list(dict.fromkeys(split_list(values)))
        key = key.strip().removeprefix("sft.")
        if not equals or not key or not found:
            raise UserError(f"--grid {entry!r}: write it as KEY=VALUE,VALUE")
        if key in axes:
            raise UserError(f"--grid names {key} twice")
        from_mapping(Sft, {key: found[0]}, "[sft]")
        axes[key] = found
    if not axes:
        raise UserError("--grid is missing: say what is to differ, as in --grid learning_rate=2e-4,5e-4")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(recipe: Path, output: Path, grid: Sequence[str], settings: Sequence[str]) -> list[tuple[Any, ...]]:
    """Run them all, and write sweep.csv, sweep.json and sweep.png.

    Returns:
        rows of `COLUMNS`, best validation loss first.

    Raises:
        UserError: see `combinations` and `train.sft.sft`.
    """
    runs = {
        ",".join(f"{key}={value}" for key, value in chosen.items()): read_sft(
            recipe, [*settings, *(f"{key}={value}" for key, value in chosen.items())]
        )
        for chosen in combinations(grid)
    }
    check_no_file(output)
    files = [output / name for name in ("sweep.csv", "sweep.json", "sweep.png")]
    check_apart(output / "sweep", files, [("recipe", recipe)])
    check_free(output / "sweep", files)
    output.mkdir(parents=True, exist_ok=True)
    told = {}
    for number, (name, config) in enumerate(runs.items(), start=1):
        LOG.info(f"run {number} of {len(runs)}: {name}")
        adapter = sft(config, output / name.replace("/", "_"))
        told[name] = read_manifest(adapter)
    rows = sorted((_row(name, manifest) for name, manifest in told.items()), key=lambda row: (row[3] is None, row[3]))
    claim(output / "sweep", files)
    write_table(output / "sweep.csv", COLUMNS, ([_shown(cell) for cell in row] for row in rows))
    write_json(output / "sweep.json", [dict(zip(COLUMNS, row, strict=True)) for row in rows])
    _plot(output / "sweep.png", told)
    return rows


def lines(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """The table, as lines to print."""
    cells = [[column.replace("_", " ") for column in COLUMNS], *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(COLUMNS))]
    return [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]  # fmt: skip


def _row(name: str, manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    history = manifest["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry][-_LAST:]
    evaluated = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry]
    best, step = min(evaluated, default=(None, None))
    scores = {entry["step"]: entry[key] for entry in history for key in ("eval_score", "eval_auc") if key in entry}
    mean = sum(losses) / len(losses) if losses else None
    return (name, manifest["steps"], mean, best, step, scores.get(step), manifest["seconds"])


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def _plot(path: Path, told: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, manifest in told.items():
        points = [(entry["step"], entry["eval_loss"]) for entry in manifest["history"] if "eval_loss" in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
