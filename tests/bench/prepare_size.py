"""Seconds and memory of `python -m train prepare` by the number of triplets. A study, not a test.

    python -m tests.bench.prepare_size --rows 1000,10000,100000 --anew 0 --plot docs/prepare-size.png

Two sources: texts of sentences of the study's originals, with rewrites that keep a quarter of them, and prompts of the
grammar; the styles of one source are told, those of the other are not. A share of the rewrites (`--anew`) keeps only
every third word of these: such texts have to be embedded. Memory is that of the command and its children.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from submission.data.tables import read_table, write_table
from submission.prompts.grammar import GRAMMAR, MadePrompt, read_grammar
from tests.bench.merge_memory import Step, step
from train.prompts import take

_SETS = Path("docs/study/sets")
_COLUMNS = ("original_text", "rewritten_text", "rewrite_prompt", "style")


def triplets(
    prompts: Iterator[MadePrompt], *, with_style: bool, seed: int, anew: float = 0.0
) -> Iterator[tuple[str, ...]]:
    """A row for each prompt."""
    pools = [
        [sentence for name in ("train", "test") for row in read_table(_SETS / f"{name}.parquet", [column])
         for sentence in re.split(r"(?<=[.!?])\s+", row.cells[0]) if 4 <= len(sentence.split()) <= 40]
        for column in ("original_text", "rewritten_text")
    ]  # fmt: skip
    rng = random.Random(seed)
    for prompt in prompts:
        original = rng.sample(pools[0], rng.randint(4, 9))
        kept = -(-len(original) // 4)
        rewritten = [*original[:kept], *rng.sample(pools[1], len(original) - kept)]
        if rng.random() < anew:
            rewritten[:kept] = [" ".join(sentence.split()[::3]) for sentence in rewritten[:kept]]
        yield " ".join(original), " ".join(rewritten), prompt.text, prompt.style if with_style else ""


def measure(rows: int, anew: float, folder: Path) -> Step:
    """What one run takes."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # with no embeddings
    prompts = take(read_grammar(GRAMMAR, ()), rows)
    sources = [folder / "one.parquet", folder / "two.csv"]
    for number, (source, part) in enumerate(zip(sources, (rows // 2, rows - rows // 2), strict=True)):
        write_table(source, _COLUMNS, triplets(islice(prompts, part), with_style=not number, seed=number, anew=anew))
    return step(f"{rows} rows", "prepare", *sources, "-o", folder / "sets")


def plot(path: Path, rows: Sequence[int], taken: Sequence[Step]) -> None:
    """Seconds and memory beside the number of rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    minutes, memory = figure.subplots(1, 2)
    minutes.plot(rows, [one.seconds / 60 for one in taken], marker="o")
    minutes.set_ylabel("minutes")
    memory.plot(rows, [one.own / 1e9 for one in taken], marker="o")
    memory.set_ylabel("memory at the peak, GB")
    for axes in (minutes, memory):
        axes.set_xlabel("triplets")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,10000,100000")
    parser.add_argument(
        "--anew", type=float, default=0.3, help="a quarter of the rows is embedded then, as of 400 real ones"
    )
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    sizes = [int(rows) for rows in asked.rows.split(",")]
    taken = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            taken.append(measure(rows, asked.anew, Path(folder)))
    if asked.plot:
        plot(asked.plot, sizes, taken)


if __name__ == "__main__":
    main()
