"""The whole thing in three minutes: nine answers of the default to pairs that it has not seen, selectors, a search.

python -m ensemble trial -o trial

The pairs are the first of the study's test set: the embedded model made their rewrites, so `likelihood` and `posterior`
know the target. The rows were screened for rewrites that their prompt makes more likely, which favours these two.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ensemble.experiment import Experiment, ExperimentConfig
from ensemble.models import read_models
from ensemble.report import experiment_with_page
from ensemble.sample import sample
from ensemble.sources import CandidateSource
from eval.encoders import Encoder
from submission.data.outputs import check_no_file, made_files
from submission.data.tables import read_triplets, write_predictions
from submission.errors import UserError

ROWS = 18
_SELECTORS = ("first", "consensus", "logprob", "likelihood", "noisy_channel", "posterior", "judge_pick")
_SOURCE = CandidateSource(name="default", n=8, temperature=0.8, max_new_tokens=32)
_ROTATIONS = 2
_PROPOSALS = 16


def examples() -> Path:
    """Triplets that come with a checkout, of which nothing was learned.

    Raises:
        UserError: this is no checkout.
    """
    path = Path(str(resources.files("ensemble"))).parent / "docs" / "study" / "sets" / "test.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing: run the trial from a checkout")
    return path


def trial(output: Path, encoder: Encoder, near: float, *, rows: int = ROWS, fresh: bool = False) -> Experiment:
    """Sample, score and compare; the same command again goes on, or does nothing but compare."""
    triplets = read_triplets(examples())[:rows]
    check_no_file(output)
    output.mkdir(parents=True, exist_ok=True)
    candidates = output / "candidates.parquet"
    truth = output / "truth.csv"
    with made_files(truth, [truth], {"rows": len(triplets)}):
        write_predictions(truth, ((triplet.pair.id, triplet.rewrite_prompt) for triplet in triplets))
    sample([triplet.pair for triplet in triplets], [_SOURCE], candidates, encoder, near, fresh=fresh)
    config = ExperimentConfig(
        candidates, truth, output, _SELECTORS, read_models(None, {}), rotations=_ROTATIONS, proposals=_PROPOSALS,
        fresh=fresh,
    )  # fmt: skip
    return experiment_with_page(config, encoder)
