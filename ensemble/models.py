"""The models that selectors ask: the target, or several stand-ins for it, a judge, a trained gate; each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.selectors import SelectorEntry, Tools, entry_of
from ensemble.selectors.combine import parts_of
from eval.encoders import Encoder
from submission.backends import AUTO, ModelSpec, model_spec
from submission.backends.hardware import ALONE, Placement
from submission.backends.models import EMBEDDED
from submission.calls.likelihoods import Known, Likelihoods, Question
from submission.calls.session import session
from submission.config import from_mapping, read_toml
from submission.errors import UserError
from submission.types import Model

TARGET = "target"
ROLES = (TARGET, "judge", "gate")


@dataclass(frozen=True, slots=True)
class RoleModel:
    """A model by path."""

    model: str = EMBEDDED
    backend: str = AUTO
    adapter: str = ""
    settings: tuple[str, ...] = ()
    workers: int = 1

    def spec(self) -> ModelSpec:
        """Check it; see `submission.backends.model_spec`."""
        adapter = Path(self.adapter).expanduser() if self.adapter else None
        return model_spec(self.backend, self.model, adapter, list(self.settings), Placement(self.workers))


def read_models(path: Path | None, given: Mapping[str, str]) -> dict[str, RoleModel]:
    """Models by role.

    Args:
        path: TOML with [target] or several [[target]], [judge] and [gate]; None for none.
        given: paths by role, which go before the file; blank ones do not count.

    Raises:
        UserError: an unknown role, key or value.
    """
    return parse_models(read_toml(path, "--models") if path else {}, given)


def parse_models(content: Mapping[str, Any], given: Mapping[str, str] | None = None) -> dict[str, RoleModel]:
    """Models from tables; target and judge are the embedded model unless they say otherwise. Of several targets the
    second is called `target 2`.
    """
    unknown = [role for role in content if role not in ROLES]
    if unknown:
        raise UserError(f"unknown model [{unknown[0]}]; there are: {', '.join(ROLES)}")
    models = {TARGET: RoleModel(), "judge": RoleModel()}
    for role, said in content.items():
        tables = said if role == TARGET and isinstance(said, list) else [said]
        if not tables or not all(isinstance(table, Mapping) for table in tables):
            raise UserError(f"[{role}] must be a table{', or several [[target]]' if role == TARGET else ''}")
        for number, table in enumerate(tables, start=1):
            name = role if number == 1 else f"{role} {number}"
            models[name] = from_mapping(RoleModel, table, f"[{name}]")
    named = {role: RoleModel(model=name) for role, name in (given or {}).items() if name}
    return {role: model for role, model in models.items() if role in named or kind_of(role) not in named} | named


def kind_of(role: str) -> str:
    """What a model is asked as: `target` of `target 2`."""
    return role.partition(" ")[0]


def roles_needed(selectors: list[str]) -> set[str]:
    """The roles that these selectors, or the parts of sums, ask."""
    return {entry.needs for entry in _entries(selectors) if entry} - {""}


def embeds(selectors: list[str]) -> bool:
    """Whether these selectors, or the parts of sums, ask the encoder; one that is not known may."""
    return any(entry is None or entry.embeds for entry in _entries(selectors))


def _entries(selectors: list[str]) -> list[SelectorEntry | None]:
    return [entry_of(part) for name in selectors for part in parts_of(name)]


def asked_for(models: Iterable[str], kinds: set[str]) -> list[str]:
    """Those of the models that are asked: all targets; and with the judge the gate, which takes its place where Yes or
    No is asked.
    """
    every = kinds | ({"gate"} if "judge" in kinds else set())
    return [role for role in models if kind_of(role) in every]


@contextmanager
def open_models(
    models: Mapping[str, RoleModel], roles: set[str], output: Path, *, placement: Placement = ALONE, fresh: bool = False
) -> Iterator[dict[str, Likelihoods]]:
    """Likelihoods by role, with one log beside `output`; roles that name one model share it.

    Raises:
        UserError: a model is missing or wrong; said before any is loaded.
    """
    specs = {role: models[role].spec().held_by(placement) for role in asked_for(models, roles)}
    with session(output, specs, fresh=fresh) as opened:
        yield likelihoods(opened, specs)


def likelihoods(models: Mapping[str, Model], roles: Iterable[str]) -> dict[str, Likelihoods]:
    """Likelihoods by kind of role; roles that share a model share them too, and several targets are averaged."""
    by_model: dict[int, Likelihoods] = {}
    found = {role: by_model.setdefault(id(models[role]), Likelihoods(models[role])) for role in roles}
    targets = [found.pop(role) for role in list(found) if kind_of(role) == TARGET]
    if targets:
        found[TARGET] = targets[0] if len(targets) == 1 else StandIns(targets)
    return found


class StandIns(Likelihoods):
    """Several models in the place of a target that is not known: the mean of their log-likelihoods.

    Args:
        models: the likelihoods of each.
    """

    def __init__(self, models: Sequence[Likelihoods]) -> None:
        self._models, self.calls = models, len(models)

    def of(self, asked: Sequence[Question], done: Callable[[], None] = lambda: None) -> list[Known]:
        """See `Likelihoods.of`. Where one model failed there is no mean, since it is for comparing candidates."""
        found = [model.of(asked, done) for model in self._models]
        return [_mean(said) for said in zip(*found, strict=True)]


def _mean(said: Sequence[Known]) -> Known:
    """What was read, and the time it took, count for all models together."""
    if failed := next((known for known in said if known.failure), None):
        return failed
    tokens = round(sum(known.tokens for known in said) / len(said))
    read = sum(known.prompt_tokens + known.tokens for known in said)
    seconds = sum(known.seconds for known in said)
    return Known(sum(known.sum for known in said) / len(said), tokens, read - tokens, seconds)


def tools(encoder: Encoder | None, opened: Mapping[str, Likelihoods], **more: Any) -> Tools:
    """What selectors are made with."""
    return Tools(encoder, opened.get("target"), opened.get("judge"), opened.get("gate"), **more)
