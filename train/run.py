"""All stages of a recipe, one after the other.

    python -m train run train/recipes/embedded.toml --set output=runs/embedded

A recipe is one TOML file: `output`, and a section for each stage; those of `prepare` are as in `train.recipe`. The
stages from `sft` on are run if the recipe has them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.baselines import BaselinesConfig, check_names, run_baselines
from eval.encoders import Encoder, find_encoder
from submission.backends import AUTO, model_spec
from submission.backends.models import resolve_folder
from submission.config import from_mapping, read_toml
from submission.data.files import write_json
from submission.data.outputs import check_free, claim, up_to_date
from submission.errors import UserError
from train.gguf import Gguf, export
from train.merge import made_from, merge
from train.prepare import prepare
from train.recipe import Recipe, parse_recipe, section, with_settings
from train.sft import check_installed, sft
from train.sft_config import Sft, with_sets
from train.stages import Prompts, Rewrites, Texts, make_prompts, make_rewrites, make_texts

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    """What the tuned model is compared with on the test set.

    Attributes:
        baselines: as `python -m eval baselines` names them.
        base: model of zero-shot and few-shot; "" for the one that was tuned.
        quantization: of the GGUF file that predicts; "" for the first one made.
        backend: transformers predicts with the merged folder, any other with the GGUF file; auto follows the model.
        max_new_tokens: of an answer.
        limit: first rows of the test set only; 0 for all.
    """

    baselines: tuple[str, ...] = ("constant", "constant_fitted", "zero_shot")
    base: str = ""
    quantization: str = ""
    backend: str = AUTO
    max_new_tokens: int = 40
    limit: int = 0


_SCORE = "score.json"
_STAGES: dict[str, type[Any]] = {"prompts": Prompts, "texts": Texts, "rewrites": Rewrites}
_LATER: dict[str, type[Any]] = {"sft": Sft, "gguf": Gguf, "score": Score}


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe of all stages.

    Attributes:
        output: folder of everything that is made.
        prompts, texts, rewrites: their stages.
        recipe: of `prepare`; the triplets of the stage before are a source of it.
        sft, gguf, score: None if the recipe has none.
    """

    output: Path
    prompts: Prompts
    texts: Texts
    rewrites: Rewrites
    recipe: Recipe
    sft: Sft | None
    gguf: Gguf | None
    score: Score | None

    @property
    def sets(self) -> Path:
        """The folder of training, validation and test sets."""
        return self.output / "sets"


def read_run(path: Path, settings: Sequence[str] = ()) -> Run:
    """Read a recipe.

    Args:
        path: TOML.
        settings: `key=value` and `section.key=value`, which go before the file.

    Raises:
        UserError: an unknown section or key, or a bad value.
    """
    content = with_settings(read_toml(path, "RECIPE"), settings)
    output = content.pop("output", "")
    if not isinstance(output, str) or not output:
        raise UserError(f"{path} has no output: add output = 'FOLDER', or --set output=FOLDER")
    folder = Path(output).expanduser()
    stages = {name: from_mapping(kind, section(content, name), f"[{name}]") for name, kind in _STAGES.items()}
    later: dict[str, Any] = {name: from_mapping(kind, section(content, name), f"[{name}]") if name in content else None
             for name, kind in _LATER.items()}  # fmt: skip
    for name in ("gguf", "score"):
        if later[name] and not later["sft"]:
            raise UserError(f"{path} has [{name}] and no [sft]: there would be nothing to do it with")
    if later["score"] and later["score"].backend != "transformers" and not later["gguf"]:
        raise UserError(f"{path} has no [gguf] for [score] to predict with: add it, or backend = 'transformers'")
    if later["score"] and later["gguf"] and later["score"].quantization not in ("", *later["gguf"].quantizations):
        raise UserError(f"[score] names {later['score'].quantization!r}, which [gguf] does not make")
    run = Run(folder, **stages, **later, recipe=parse_recipe(content, [str(folder / "triplets.csv")], str(path)))
    return replace(run, sft=with_sets(run.sft, output)) if run.sft else run


def run_stages(run: Run, encoder: Encoder, *, fresh: bool = False) -> None:
    """Run what is not finished.

    Raises:
        UserError: something is missing or wrong.
    """
    run.output.mkdir(parents=True, exist_ok=True)
    spec = run.recipe.model.spec()
    _check(run)
    prompts, texts, triplets = (run.output / name for name in ("prompts.csv", "texts.csv", "triplets.csv"))
    LOG.info("prompts")
    make_prompts(
        run.prompts, prompts, lambda: find_encoder(str(encoder.folder), cached=False), fresh=fresh
    )  # fmt: skip
    LOG.info("texts")
    make_texts(run.texts, texts, spec, encoder, fresh=fresh)
    LOG.info("rewrites")
    make_rewrites(run.rewrites, prompts, texts, triplets, spec, fresh=fresh)
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
        _score(run, run.score, merged, encoder, fresh=fresh)


def _check(run: Run) -> None:
    """Refuse before hours of work what would be refused after them."""
    if run.sft:
        check_installed(run.sft)
        resolve_folder(run.sft.base)
    if run.gguf:
        run.gguf.check()
        run.gguf.converter()
    if run.score and run.sft:
        check_free(run.output / _SCORE, [run.output / _SCORE])
        model_spec(run.score.backend, run.score.base or run.sft.base)
        check_names(run.score.baselines)


def _merge(adapter: Path, merged: Path, *, fresh: bool) -> None:
    if up_to_date(merged, made_from(adapter)) and not fresh:
        LOG.info(f"{merged} is merged from the same adapter: nothing to do (--fresh makes it anew)")
        return
    merge(adapter, merged)


def _score(run: Run, score: Score, merged: Path, encoder: Encoder, *, fresh: bool) -> None:
    assert run.sft is not None
    model = str(merged)
    if score.backend != "transformers":
        assert run.gguf is not None
        model = str(run.output / run.gguf.file(score.quantization or run.gguf.quantizations[0]))
    result = run_baselines(
        BaselinesConfig(
            train=run.sets / "train.parquet", test=run.sets / "test.parquet", output=run.output / "score",
            only=(*score.baselines, "tuned"), reference="tuned", backend=score.backend,
            model=score.base or run.sft.base, tuned_model=model, max_new_tokens=score.max_new_tokens,
            limit=score.limit, fresh=fresh,
        ),
        encoder,
    )  # fmt: skip
    for line in result.lines():
        LOG.info(line)
    claim(run.output / _SCORE, [run.output / _SCORE])
    write_json(run.output / _SCORE, result.figures())
