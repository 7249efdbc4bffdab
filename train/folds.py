"""Cross-validation of a recipe: every row is answered by a model that learned from the other parts.

    python -m train run --triplets mine.csv -o runs/mine --folds 5

Each fold is a run of its own in OUTPUT/folds/N, with an adapter and its answers; their test sets together are the score
of the run. The model that is exported learns from all rows but those that it is watched with, the validation set's.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from eval.encoders import Encoder
from submission.backends import model_spec
from submission.backends.models import resolve_folder
from submission.data.outputs import check_free
from submission.errors import UserError
from train.gguf import Gguf, export_adapter
from train.prepare import prepare
from train.run import Run, begin, check, run_stages
from train.score import score_folds, score_run, truth_file
from train.sft import sft
from train.sft_config import with_sets

LOG = logging.getLogger(__name__)


def check_folds(run: Run, *, fresh: bool = False) -> None:
    """Refuse what cannot be cross-validated.

    Raises:
        UserError: the recipe has no triplets of its own, or no [sft] and [score]; or one fold; or as `check`.
    """
    if run.folds < 2:
        raise UserError(f"--folds {run.folds}: two are the least")
    if run.making or not (run.recipe and run.sft and run.score):
        raise UserError(
            "--folds needs a recipe with [[source]], [sft] and [score]: the triplets that are divided must be there"
        )
    check(run, fresh=fresh)
    check_free(truth_file(run.output), [truth_file(run.output)])
    model_spec(run.score.backend, run.sft.base)  # it answers with the adapter of a fold


def run_folds(run: Run, encoder: Encoder, *, fresh: bool = False) -> None:
    """Train and score each fold, then train with no test set and export.

    Raises:
        UserError: as `check_folds` and `run_stages`.
    """
    check_folds(run, fresh=fresh)
    assert run.recipe is not None
    assert run.score is not None
    begin(run)
    parts = [run.output / "folds" / str(number + 1) for number in range(run.folds)]
    for number, part in enumerate(parts):  # all of them first: too few groups are seen before hours of training
        part.mkdir(parents=True, exist_ok=True)
        split = replace(run.recipe.split, folds=run.folds, fold=number)
        prepare(replace(run.recipe, split=split), part / "sets", encoder, fresh=fresh)
    for number, part in enumerate(parts):
        LOG.info(f"fold {number + 1} of {run.folds}")
        _run_fold(run, part, encoder, fresh=fresh)
    score_folds(run.score, parts, run.output, encoder)
    LOG.info("all folds together, for the model that is exported")
    whole = replace(run.recipe, split=replace(run.recipe.split, test=0.0, folds=0, fold=0))
    run_stages(replace(run, recipe=whole, score=None), encoder, fresh=fresh)


def _run_fold(run: Run, output: Path, encoder: Encoder, *, fresh: bool) -> None:
    """Train and predict one fold, whose sets are there."""
    assert run.sft is not None
    assert run.score is not None
    own = with_sets(replace(run.sft, train="", validation=""), str(output))
    adapter = sft(own, output / "sft", fresh=fresh)
    if resolve_folder(run.sft.base).is_file():  # the engines for GGUF files take adapters of that kind only
        adapter = export_adapter(adapter, output, (run.gguf or Gguf()).converter(), fresh=fresh)
    score_run(run.score, output, run.sft.base, encoder, adapter=adapter, fresh=fresh)
