"""Cross-validation of a recipe: every row is answered by a model that learned from the other parts.

    python -m train run --triplets mine.csv -o runs/mine --folds 5

Each fold is a run of its own in OUTPUT/folds/N, with an adapter and its answers; their test sets together are the score
of the run. The model that is exported learns from all rows.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from eval.encoders import Encoder
from submission.backends.models import resolve_folder
from submission.errors import UserError
from train.gguf import Gguf, export_adapter
from train.prepare import prepare
from train.run import Run, check, run_stages
from train.score import score_folds, score_run
from train.sft import sft
from train.sft_config import with_sets

LOG = logging.getLogger(__name__)


def check_folds(run: Run, folds: int) -> None:
    """Refuse what cannot be cross-validated.

    Raises:
        UserError: the recipe has no triplets of its own, or no [sft] and [score]; or one fold.
    """
    if folds < 2:
        raise UserError(f"--folds {folds}: two are the least")
    if run.making or not (run.recipe and run.sft and run.score):
        raise UserError(
            "--folds needs a recipe with [[source]], [sft] and [score]: the triplets that are divided must be there"
        )
    check(run)


def run_folds(run: Run, folds: int, encoder: Encoder, *, fresh: bool = False) -> None:
    """Train and score each fold, then train on all rows and export.

    Raises:
        UserError: as `check_folds` and `run_stages`.
    """
    check_folds(run, folds)
    assert run.recipe is not None
    assert run.score is not None
    parts = []
    for number in range(folds):
        LOG.info(f"fold {number + 1} of {folds}")
        parts.append(_run_fold(run, number, folds, encoder, fresh=fresh))
    score_folds(parts, run.output, encoder, run.score.limit)
    LOG.info("all rows")
    whole = replace(run.recipe, split=replace(run.recipe.split, test=0.0))
    run_stages(replace(run, recipe=whole, score=None), encoder, fresh=fresh)


def _run_fold(run: Run, number: int, folds: int, encoder: Encoder, *, fresh: bool) -> Path:
    """Train and predict one fold; returns its folder."""
    assert run.recipe is not None
    assert run.sft is not None
    assert run.score is not None
    output = run.output / "folds" / str(number + 1)
    output.mkdir(parents=True, exist_ok=True)
    recipe = replace(run.recipe, split=replace(run.recipe.split, folds=folds, fold=number))
    prepare(recipe, output / "sets", encoder, fresh=fresh)
    own = with_sets(replace(run.sft, train="", validation=""), str(output))
    adapter = sft(own, output / "sft", fresh=fresh)
    if resolve_folder(run.sft.base).is_file():  # the engines for GGUF files take adapters of that kind only
        adapter = export_adapter(adapter, output, (run.gguf or Gguf()).converter(), fresh=fresh)
    score_run(run.score, output, run.sft.base, encoder, adapter=adapter, fresh=fresh)
    return output
