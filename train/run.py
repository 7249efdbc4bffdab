"""All stages of a recipe, one after the other.

    python -m train run train/recipes/embedded.toml -o runs/embedded
    python -m train run --triplets mine.csv -o runs/mine

A recipe is one TOML file: `output`, and a section for each stage; those of `prepare` are as in `train.recipe`. Triplets
are made if the recipe has a section for it ([prompts], [texts] or [rewrites]) or names no [[source]]. The stages from
`sft` on are run if the recipe has them.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.baselines import BEST_OF
from eval.encoders import Encoder, find_encoder
from submission.backends import AUTO, model_spec
from submission.backends.models import resolve_folder
from submission.backends.transformers.loading import stay_offline_and_quiet
from submission.config import from_mapping, read_toml
from submission.data.files import read_json, write_json
from submission.data.outputs import check_folder, check_free, check_no_file, made_files, up_to_date
from submission.errors import UserError
from submission.progress import this_python
from train.gguf import Gguf, export
from train.merge import check_mergeable, made_from, merge
from train.prepare import prepare
from train.recipe import Recipe, parse_recipe, section, with_settings
from train.score import Score, best_of_file, score_run
from train.sft import check_installed, sft
from train.sft_config import Sft, with_sets
from train.stages import Prompts, Rewrites, Texts, make_prompts, make_rewrites, make_texts

LOG = logging.getLogger(__name__)


_STAGES: dict[str, type[Any]] = {"prompts": Prompts, "texts": Texts, "rewrites": Rewrites}
_MADE = "triplets.csv"
_NOTE = "run.json"
_LATER: dict[str, type[Any]] = {"sft": Sft, "gguf": Gguf, "score": Score}


@dataclass(frozen=True, slots=True)
class Making:
    """The stages that make triplets."""

    prompts: Prompts
    texts: Texts
    rewrites: Rewrites


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe of all stages.

    Attributes:
        output: folder of everything that is made.
        making: the stages that make triplets; None if the recipe brings its own.
        recipe: of `prepare`; the triplets that are made are a source of it. None if [sft] names sets of its own.
        sft, gguf, score: None if the recipe has none.
        folds: of a cross-validation; 0 for one test set.
    """

    output: Path
    making: Making | None
    recipe: Recipe | None
    sft: Sft | None
    gguf: Gguf | None
    score: Score | None
    folds: int = 0

    @property
    def sets(self) -> Path:
        """The folder of training, validation and test sets."""
        return self.output / "sets"


OWN = Path(__file__).parent / "recipes" / "own.toml"
"""The recipe of triplets that come without one."""


def read_run(path: Path, settings: Sequence[str] = (), triplets: Sequence[str] = (), folds: int = 0) -> Run:
    """Read a recipe.

    Args:
        path: TOML.
        settings: `key=value` and `section.key=value`, which go before the file.
        triplets: tables that are sources beside those of the recipe; sets that [sft] names are not taken then.
        folds: of a cross-validation; 0 for none.

    Raises:
        UserError: an unknown section or key, or a bad value.
    """
    content = with_settings(read_toml(path, "RECIPE"), settings)
    if triplets and isinstance(sources := content.get("source", []), list):
        content["source"] = [*sources, *({"path": table} for table in triplets)]
        if isinstance(tuning := content.get("sft"), dict):
            content["sft"] = {key: value for key, value in tuning.items() if key not in ("train", "validation")}
    output = content.pop("output", "")
    if not isinstance(output, str) or not output:
        raise UserError(f"{path} has no output: name a folder with -o FOLDER")
    folder = Path(output).expanduser()
    making, makes = None, any(name in content for name in _STAGES)
    has_sets = isinstance(content.get("sft"), dict) and "train" in content["sft"]
    if makes or not ("source" in content or has_sets):
        making = Making(
            **{name: from_mapping(kind, section(content, name), f"[{name}]") for name, kind in _STAGES.items()}
        )
    later: dict[str, Any] = {name: from_mapping(kind, section(content, name), f"[{name}]") if name in content else None
             for name, kind in _LATER.items()}  # fmt: skip
    for name in ("gguf", "score"):
        if later[name] and not later["sft"]:
            raise UserError(f"{path} has [{name}] and no [sft]: there would be nothing to do it with")
    if later["score"] and later["sft"].task != "recover":
        raise UserError(f"{path}: [score] is for task = 'recover', not for {later['sft'].task!r}: leave it out")
    if later["score"] and later["score"].backend != "transformers" and not later["gguf"]:
        raise UserError(f"{path} has no [gguf] for [score] to predict with: add it, or backend = 'transformers'")
    if later["score"] and later["gguf"] and later["score"].quantization not in ("", *later["gguf"].quantizations):
        raise UserError(f"[score] names {later['score'].quantization!r}, which [gguf] does not make")
    recipe = None
    if making or "source" in content:
        recipe = parse_recipe(content, [str(folder / _MADE)] if making else [], str(path))
    elif content:
        raise UserError(f"{path}: [{next(iter(content))}] is for triplets: name them as [[source]]")
    elif later["score"]:
        raise UserError(f"{path} has [score] and no test set: name triplets as [[source]] instead of [sft] train")
    run = Run(folder, making, recipe, **later, folds=folds)
    return replace(run, sft=with_sets(run.sft, output)) if run.sft else run


def run_stages(run: Run, encoder: Encoder, *, fresh: bool = False) -> None:
    """Run what is not finished.

    Raises:
        UserError: something is missing or wrong.
    """
    check(run, fresh=fresh)
    begin(run)
    if run.making and run.recipe:
        _make_triplets(run, run.making, run.recipe, encoder, fresh=fresh)
    if run.recipe:
        LOG.info("prepare")
        prepare(run.recipe, run.sets, encoder, fresh=fresh)
    if run.sft is None:
        return
    LOG.info("sft")
    adapter = sft(run.sft, run.output / "sft", fresh=fresh)
    LOG.info("merge")
    merged = run.output / "merged"
    _merge(adapter, merged, fresh=fresh)
    if run.gguf:
        LOG.info("gguf")
        export(run.gguf, merged, adapter, run.output, fresh=fresh)
    if run.score:
        LOG.info("predict and score")
        score_run(run.score, run.output, run.sft.base, encoder, model=str(predictor(run)), fresh=fresh)


def predictor(run: Run) -> Path:
    """The model that predicts, as [score] does: the merged folder, or a GGUF file."""
    if run.gguf and not (run.score and run.score.backend == "transformers"):
        named = run.score.quantization if run.score else ""
        return run.output / run.gguf.file(named or run.gguf.quantizations[0])
    return run.output / "merged"


def how_to_predict(run: Run) -> str:
    """The command that predicts as [score] did with what a run made; "" if it made no model that predicts."""
    if run.sft is None or run.sft.task != "recover":
        return ""
    words = ["--model", str(predictor(run))]
    if run.score:
        if run.score.backend != AUTO:
            words += ["--backend", run.score.backend]
        if run.score.max_new_tokens != Score().max_new_tokens:
            words += ["--max-new-tokens", str(run.score.max_new_tokens)]
        best = best_of_file(run.output, run.folds)
        if BEST_OF in run.score.baselines and best.is_file():
            words += ["--recover", "best_of", "--recover-config", str(best)]
    return f"{this_python()} -m submission predict PAIRS.csv -o FILE.csv {shlex.join(words)}"


def _make_triplets(run: Run, making: Making, recipe: Recipe, encoder: Encoder, *, fresh: bool) -> None:
    spec = recipe.model.spec()
    prompts, texts = run.output / "prompts.csv", run.output / "texts.csv"
    LOG.info("prompts")
    make_prompts(making.prompts, prompts, lambda: find_encoder(str(encoder.folder), cached=False), fresh=fresh)
    LOG.info("texts")
    make_texts(making.texts, texts, spec, fresh=fresh)
    LOG.info("rewrites")
    make_rewrites(making.rewrites, prompts, texts, run.output / _MADE, spec, fresh=fresh)


def begin(run: Run) -> None:
    """Make the folder of a run that was checked, and note there what it is."""
    run.output.mkdir(parents=True, exist_ok=True)
    note = run.output / _NOTE
    with made_files(note, [note], {}):
        write_json(note, {"folds": run.folds})


def check(run: Run, *, fresh: bool = False) -> None:
    """Refuse before hours of work what would be refused after them.

    Raises:
        UserError: what is missing, wrong or in the way.
    """
    output = run.output
    check_no_file(output)
    if not fresh and (before := _folds_of(output)) is not None and before != run.folds:
        raise UserError(
            f"{output} holds a run with {before or 'no'} folds: name another output, or begin anew with --fresh"
        )
    check_free(output / _NOTE, [output / _NOTE])
    if run.sft:
        check_installed(run.sft)
        base = resolve_folder(run.sft.base)
        if base.is_dir():
            _check_base(base)
        if output.exists():
            check_folder(output / "merged")
    if run.gguf:
        run.gguf.check()
        run.gguf.converter()
        for path in (output / run.gguf.file(name) for name in run.gguf.quantizations):
            check_free(path, [path])
    if run.score and run.sft:
        run.score.check(output)
        model_spec(run.score.backend, run.score.base or run.sft.base)


def _check_base(base: Path) -> None:
    stay_offline_and_quiet()
    try:
        check_mergeable(base)
    except UserError as error:
        raise UserError(
            f"{error}\nA run merges its adapter into the base, so it is not begun. "
            "`python -m train sft` trains without merging"
        ) from error


def _folds_of(output: Path) -> int | None:
    """The folds of the run that a folder holds; None if it holds none."""
    if (output / _NOTE).is_file():
        content = read_json(output / _NOTE)
        folds = content.get("folds") if isinstance(content, dict) else None
        return folds if isinstance(folds, int) else None
    return None


def _merge(adapter: Path, merged: Path, *, fresh: bool) -> None:
    if up_to_date(merged, made_from(adapter)) and not fresh:
        LOG.info(f"{merged} is merged from the same adapter: nothing to do (--fresh makes it anew)")
        return
    merge(adapter, merged)
