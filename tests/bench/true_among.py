"""Is the true prompt told from others by what it explains? A study, not a test.

    python -m tests.bench.true_among TRIPLETS.csv --rows 48 --selectors likelihood,judge_yes_no

Each row's own prompt stands among prompts of other rows that are unlike it, in an order drawn by chance. Printed is
how often each selector puts it first, for all rows and for those whose rewrite depends on the prompt by so many nats,
as the screen `matters` of `train prepare` counts them. The target is the model that made the rewrites.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ensemble.candidates import Answer, Candidate, CandidateRow
from ensemble.choose import best, score_rows
from ensemble.models import open_models, read_models, roles_needed, tools
from ensemble.selectors import make_selectors
from eval.encoders import Encoder, find_encoder
from eval.grouping import near_duplicate_groups
from eval.intervals import bootstrap
from submission.data.tables import read_triplets
from submission.types import Triplet

_GAINS = (-np.inf, 1.0, 8.0)  # nats


def rows_of(
    triplets: Sequence[Triplet], count: int, encoder: Encoder, seed: int
) -> tuple[list[CandidateRow], list[int]]:
    """Rows of `count` candidates, and the place of the true one."""
    draw = random.Random(seed)
    groups = near_duplicate_groups([triplet.rewrite_prompt for triplet in triplets], encoder).tolist()
    rows, places = [], []
    for number, triplet in enumerate(triplets):
        others = [place for place, group in enumerate(groups) if group != groups[number]]
        chosen = [number, *draw.sample(others, count - 1)]
        draw.shuffle(chosen)
        places.append(chosen.index(number))
        rows.append(CandidateRow(triplet.pair, tuple(
            Candidate(triplets[place].rewrite_prompt, (Answer("given", n, 0.0, 1),)) for n, place in enumerate(chosen)
        )))  # fmt: skip
    return rows, places


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triplets", type=Path)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--selectors", default="likelihood")
    parser.add_argument("--target", default="")
    parser.add_argument("--judge", default="")
    parser.add_argument("--gate", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("true_among"), help="beside it lie the logs")
    asked = parser.parse_args()
    encoder = find_encoder()
    triplets = read_triplets(asked.triplets)
    random.Random(asked.seed).shuffle(triplets)
    rows, places = rows_of(triplets[: asked.rows], asked.candidates, encoder, asked.seed)
    names = asked.selectors.split(",")
    models = read_models(None, {"target": asked.target, "judge": asked.judge, "gate": asked.gate})
    with open_models(models, roles_needed([*names, "likelihood_gain"]), asked.output) as opened:
        made = make_selectors([*names, "likelihood_gain"], tools(encoder, opened))
        scores = score_rows(rows, made)
        tokens = [known.tokens for known in opened["target"].of(
            [next(q for _, q in made["likelihood_gain"].questions(row.pair, row.candidates)) for row in rows]  # type: ignore[attr-defined]
        )]  # fmt: skip
    gains = np.array([said[place] * count for said, place, count
                      in zip(scores["likelihood_gain"].values, places, tokens, strict=True)])  # fmt: skip
    print(f"{len(rows)} rows, {asked.candidates} candidates: chance is {1 / asked.candidates:.0%}")
    for least in _GAINS:
        kept = gains >= least
        label = "all rows" if least == -np.inf else f"gain >= {least:g} nats"
        for name in names:
            right = np.array([best(said) == place for said, place in zip(scores[name].values, places, strict=True)])
            if kept.any():
                print(f"{label:<18} {int(kept.sum()):>4} rows  {name:<16} {bootstrap(right[kept][:, None] * 1.0)[0]}")


if __name__ == "__main__":
    main()
