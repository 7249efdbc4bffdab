"""Makes examples/test.csv, examples/truth.csv and examples/train.csv from examples/texts.toml.

    python -m examples.make
    python -m examples.make data/small/sets     # examples/triplets.csv, from the sets that `make data` makes

The embedded model rewrites each text under its recorded prompt, greedily, as the target model of the
competition did: `{prompt}:\\n{text}` in the chat template. It is small and often obeys only in part; that is
what its rewrites look like. `truth.csv` holds the prompts of `test.csv`, for scoring.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from submission.backends import model_spec
from submission.data.tables import PAIR_COLUMNS, PREDICTION_COLUMNS, TRIPLET_COLUMNS, read_table, write_table
from submission.prompts.templates import render_rewrite
from submission.types import Failure, Request, Sampling

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 160


def main() -> None:
    """Write the three files, or that of the sets in a folder."""
    if len(sys.argv) > 1:
        write_triplets(Path(sys.argv[1]))
    else:
        write_examples()


def write_triplets(sets: Path) -> None:
    """Write the rows of all splits as one table."""
    columns = (*TRIPLET_COLUMNS, "kind", "style")
    rows = [
        (*row.cells, split)
        for split in ("train", "validation", "test")
        for row in read_table(sets / f"{split}.parquet", columns)
    ]
    write_table(HERE / "triplets.csv", (*columns, "split"), rows)


def write_examples() -> None:
    """Write test.csv, truth.csv and train.csv."""
    rows = tomllib.loads((HERE / "texts.toml").read_text(encoding="utf-8"))["row"]
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)

    def requests() -> Iterator[Request]:
        for row in rows:
            yield Request(row["id"], render_rewrite(row["prompt"], row["text"]), sampling)

    rewrites = {}
    for key, found in model_spec().load().generate(requests()):
        if isinstance(found, Failure):
            raise SystemExit(f"{key}: {found.reason}")
        rewrites[key] = found[0].text.strip()
    parts = {split: [row for row in rows if row["split"] == split] for split in ("test", "train")}
    triplets = {
        split: [(row["id"], row["text"], rewrites[row["id"]], row["prompt"]) for row in part]
        for split, part in parts.items()
    }
    write_table(HERE / "test.csv", PAIR_COLUMNS, [row[:3] for row in triplets["test"]])
    write_table(HERE / "truth.csv", PREDICTION_COLUMNS, [(row[0], row[3]) for row in triplets["test"]])
    write_table(HERE / "train.csv", TRIPLET_COLUMNS, triplets["train"])
    blank = [key for key, text in rewrites.items() if not text]
    if blank:
        raise SystemExit(f"blank rewrites: {', '.join(blank)}")


if __name__ == "__main__":
    main()
