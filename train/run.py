"""All stages of a recipe, one after the other.

    python -m train run train/recipes/small.toml --set output=data/small

A recipe is one TOML file: `output`, and a section for each stage; those of `prepare` are as in `train.recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.encoders import Encoder, find_encoder
from submission.config import from_mapping, read_toml
from submission.errors import UserError
from train.prepare import prepare
from train.recipe import Recipe, parse_recipe, with_settings
from train.stages import Prompts, Rewrites, Texts, make_prompts, make_rewrites, make_texts

_STAGES: dict[str, type[Any]] = {"prompts": Prompts, "texts": Texts, "rewrites": Rewrites}


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe of all stages.

    Attributes:
        output: folder of everything that is made.
        prompts, texts, rewrites: their stages.
        recipe: of `prepare`; the triplets of the stage before are a source of it.
    """

    output: Path
    prompts: Prompts
    texts: Texts
    rewrites: Rewrites
    recipe: Recipe


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
    stages = {name: from_mapping(kind, _section(content, name), f"[{name}]") for name, kind in _STAGES.items()}
    return Run(folder, **stages, recipe=parse_recipe(content, [str(folder / "triplets.csv")], str(path)))


def run_stages(run: Run, encoder: Encoder, say: Callable[[str], None], *, fresh: bool = False) -> None:
    """Run what is not finished.

    Raises:
        UserError: something is missing or wrong.
    """
    run.output.mkdir(parents=True, exist_ok=True)
    spec = run.recipe.model.spec()
    prompts, texts, triplets = (run.output / name for name in ("prompts.csv", "texts.csv", "triplets.csv"))
    say("prompts")
    make_prompts(
        run.prompts, prompts, lambda: find_encoder(str(encoder.folder), cached=False), say, fresh=fresh
    )  # fmt: skip
    say("texts")
    make_texts(run.texts, texts, spec, encoder, say, fresh=fresh)
    say("rewrites")
    make_rewrites(run.rewrites, prompts, texts, triplets, spec, say, fresh=fresh)
    say("prepare")
    prepare(run.recipe, run.output / "sets", encoder, say, fresh=fresh)


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.pop(name, {})
    if not isinstance(section, dict):
        raise UserError(f"[{name}] must be a table")
    return section
