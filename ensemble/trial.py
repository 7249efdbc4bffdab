"""The whole thing in a few minutes: candidates of the packaged models for the examples, all selectors, the report.

python -m ensemble trial -o trial
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ensemble.experiment import ALL, Experiment, ExperimentConfig
from ensemble.models import read_models
from ensemble.report import experiment_with_page
from ensemble.sample import sample
from ensemble.sources import CandidateSource
from eval.encoders import Encoder
from submission.backends.models import EMBEDDED
from submission.data.tables import read_pairs
from submission.errors import UserError

_SOURCES = (
    CandidateSource(name="tuned", n=4, temperature=0.8, max_new_tokens=32),
    CandidateSource(
        name="untuned", model=EMBEDDED, template="detailed", n=3, greedy=False, temperature=0.8, max_new_tokens=32
    ),
)


def examples() -> tuple[Path, Path]:
    """Pairs and truth that come with a checkout.

    Raises:
        UserError: this is no checkout.
    """
    folder = Path(str(resources.files("ensemble"))).parent / "examples"
    pairs, truth = folder / "test.csv", folder / "truth.csv"
    if not (pairs.is_file() and truth.is_file()):
        raise UserError(f"{folder} has no test.csv and truth.csv: run the trial from a checkout")
    return pairs, truth


def trial(output: Path, encoder: Encoder, near: float, *, fresh: bool = False) -> Experiment:
    """Sample, score and compare; the same command again goes on, or does nothing but compare."""
    pairs, truth = examples()
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    output.mkdir(parents=True, exist_ok=True)
    candidates = output / "candidates.parquet"
    sample(read_pairs(pairs), _SOURCES, candidates, encoder, near, fresh=fresh)
    config = ExperimentConfig(
        candidates, truth, output, list(ALL), read_models(None, {}), rotations=4,
        fresh=fresh,
    )  # fmt: skip
    return experiment_with_page(config, encoder)
