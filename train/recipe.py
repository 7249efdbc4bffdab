"""What `prepare` is asked to do: a TOML file, or defaults; see train/recipes/ for complete ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from submission.backends import AUTO, ModelSpec, model_spec
from submission.backends.models import EMBEDDED
from submission.config import from_mapping, read_toml
from submission.errors import UserError
from train.cleaning import Cleaning
from train.screens import Screens
from train.splits import Splitting

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where triplets come from.

    Attributes:
        path: a CSV, Parquet or JSONL file, a folder of them, or kaggle:owner/dataset.
        name: as shown; "" takes the file's.
        share: of the mixed rows; 0 for all sources takes all rows of all.
        limit: most rows that are read; 0 for all.
        ood: rows go to ood.parquet, and share nothing with the others.
        licence: as given by who made it.
        columns: of the project's columns (rewrite_prompt ...) those that are called otherwise here.
    """

    path: str = ""
    name: str = ""
    share: float = 0.0
    limit: int = 0
    ood: bool = False
    licence: str = "not given"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mix:
    """How many rows, of all sources together.

    Attributes:
        size: rows in all splits together; 0 for as many as there are.
        subsets: sizes of training sets, each inside the next, that are written beside train.parquet.
        seed: of the order of rows.
    """

    size: int = 0
    subsets: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TargetModel:
    """The target model, for screens by likelihood."""

    backend: str = AUTO
    model: str = EMBEDDED
    adapter: str = ""
    settings: tuple[str, ...] = ()

    def spec(self) -> ModelSpec:
        """Check it; see `submission.backends.model_spec`."""
        return model_spec(self.backend, self.model, Path(self.adapter) if self.adapter else None, list(self.settings))


@dataclass(frozen=True, slots=True)
class Recipe:
    """All of it."""

    sources: tuple[DataSource, ...]
    cleaning: Cleaning = field(default_factory=Cleaning)
    screens: Screens = field(default_factory=Screens)
    split: Splitting = field(default_factory=Splitting)
    mix: Mix = Mix()
    model: TargetModel = TargetModel()


_SECTIONS: dict[str, type[Any]] = {
    "cleaning": Cleaning, "screens": Screens, "split": Splitting, "mix": Mix, "model": TargetModel,
}  # fmt: skip


def read_recipe(paths: Sequence[str], file: Path | None, settings: Sequence[str] = ()) -> Recipe:
    """Put a recipe of `prepare` together.

    Args:
        paths: sources beside those of the file.
        file: TOML; None for the defaults.
        settings: `section.key=value`, which go before the file.

    Raises:
        UserError: an unknown section or key, a bad value, or no source.
    """
    content = with_settings(read_toml(file, "--recipe") if file else {}, settings)
    return parse_recipe(content, paths, str(file or "--set"))


def with_settings(content: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A recipe's content with some values replaced.

    Raises:
        UserError: a setting is not `key=value` or `section.key=value`.
    """
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in content.items()}
    for setting in settings:
        name, equals, value = setting.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not section or (dot and not key):
            raise UserError(f"--set {setting!r}: write it as SECTION.KEY=VALUE")
        if dot:
            changed[section] = {**_table(changed.get(section, {}), section), key: value.strip()}
        else:
            changed[section] = value.strip()
    return changed


def section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Take a table out of a recipe's content.

    Raises:
        UserError: it is something else.
    """
    return _table(content.pop(name, {}), name)


def parse_recipe(content: Mapping[str, Any], paths: Sequence[str], where: str) -> Recipe:
    """A recipe from a file's content and further sources; see `read_recipe`."""
    entries = content.get("source", [])
    unknown = [name for name in content if name not in _SECTIONS and name != "source"]
    if unknown:
        raise UserError(f"{where}: unknown section {unknown[0]!r}; allowed: source, {', '.join(_SECTIONS)}")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where}: sources are written as [[source]]")
    sources = [_source(entry, f"{where}: source {number}") for number, entry in enumerate(entries, start=1)]
    sources += [DataSource(path=path) for path in paths]
    if all(source.ood for source in sources):
        raise UserError("there is no source to train on: name files, or [[source]] in the recipe")
    shares = [source.share > 0 for source in sources if not source.ood]
    if any(shares) and not all(shares):
        raise UserError("either every source has a share or none has")
    parts = {
        name: from_mapping(kind, _table(content.get(name, {}), name), f"[{name}]") for name, kind in _SECTIONS.items()
    }
    return Recipe(tuple(sources), **parts)


def _source(entry: Mapping[str, Any], where: str) -> DataSource:
    columns = entry.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise UserError(f"{where}: columns must be a table of names, as {{ rewrite_prompt = 'prompt' }}")
    plain = from_mapping(DataSource, {key: value for key, value in entry.items() if key != "columns"}, where)
    if not plain.path:
        raise UserError(f"{where} has no path")
    return dataclasses.replace(plain, columns=columns)


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"[{name}] must be a table")
    return value
