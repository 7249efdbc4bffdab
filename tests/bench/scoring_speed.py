"""How long scoring takes, beside one `encode` per text per row.

    python -m tests.bench.scoring_speed TRIPLETS.csv

1,400 rows are drawn from the table: 200 distinct true prompts, predictions that are copies of known prompts or all
differ. The slow way is timed on some of the rows and multiplied up; both ways must give the same numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.encoders import Encoder, SentenceTransformers, find_encoder
from eval.intervals import bootstrap
from eval.metric import sharpened_cosine
from eval.scoring import score_texts
from submission.data.tables import read_triplets

ROWS, DISTINCT, SLOW_ROWS = 1400, 200, 200


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triplets", type=Path)
    parser.add_argument("--encoder", default="")
    arguments = parser.parse_args()
    encoder = find_encoder(arguments.encoder, cached=False)
    prompts = [triplet.rewrite_prompt for triplet in read_triplets(arguments.triplets)]
    random = np.random.default_rng(0)
    true = [prompts[number % min(DISTINCT, len(prompts))] for number in range(ROWS)]
    drawn = [prompts[int(random.integers(len(prompts)))] for _ in range(ROWS)]
    encoder.embed(["the model is loaded now"])
    print(f"{ROWS} rows, {len(set(true))} distinct true prompts, {encoder.name}")
    for what, predicted in (
        ("copies of known prompts", drawn),
        ("all different", [f"{prompt} {number}" for number, prompt in enumerate(drawn)]),
    ):
        slow, slow_scores = timed(partial(one_by_one, encoder, predicted[:SLOW_ROWS], true[:SLOW_ROWS]))
        slow *= ROWS / SLOW_ROWS
        fresh = find_encoder(arguments.encoder, cached=False)
        fresh.embed(["loaded"])
        score = partial(score_texts, predicted, true, fresh)
        fast, scores = timed(score)
        again, _ = timed(score)
        print(f"predictions: {what}, {len(set(predicted))} distinct")
        print(f"  one encode per text per row   {slow:8.2f} s")
        print(f"  this program                  {fast:8.2f} s   {slow / fast:.1f} x")
        print(f"  again, embeddings kept        {again:8.2f} s   {slow / again:.0f} x")
        print(f"  largest difference            {np.abs(scores[:SLOW_ROWS] - slow_scores).max():8.1e}")

    for dim in (384, 768):
        vectors = random.normal(size=(2, 100_000, dim)).astype(np.float32)
        times = [timed(partial(sharpened_cosine, *vectors))[0] for _ in range(5)]
        print(f"arithmetic of 100,000 rows, {dim} dimensions   {1000 * sorted(times)[2]:.0f} ms")
    values = random.beta(1, 6, size=(ROWS, 10))
    for what, clusters in (("rows", None), ("400 clusters", random.integers(400, size=ROWS))):
        spent, _ = timed(partial(bootstrap, values, clusters))
        print(f"bootstrap, 10,000 resamples of {ROWS} rows x 10 systems, by {what}   {spent:.2f} s")


def one_by_one(encoder: Encoder, predicted: list[str], true: list[str]) -> Any:
    """What a notebook does."""
    model = SentenceTransformers(encoder.folder)._model
    pairs = [(model.encode(p, show_progress_bar=False), model.encode(t, show_progress_bar=False))
             for p, t in zip(predicted, true, strict=True)]  # fmt: skip
    return np.array([float(sharpened_cosine(p, t)[0]) for p, t in pairs])


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
