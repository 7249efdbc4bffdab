"""The models that selectors ask: the target, a judge, a trained gate; each loaded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from submission.calls.likelihoods import Likelihoods
from submission.calls.session import session
from submission.config import from_mapping, read_toml
from submission.errors import UserError
from submission.types import Model

ROLES = ("target", "judge", "gate")


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
        path: TOML with [target], [judge] and [gate]; None for none.
        given: paths by role, which go before the file; blank ones do not count.

    Raises:
        UserError: an unknown role, key or value.
    """
    return parse_models(read_toml(path, "--models") if path else {}, given)


def parse_models(content: Mapping[str, Any], given: Mapping[str, str] | None = None) -> dict[str, RoleModel]:
    """Models from tables; target and judge are the embedded model unless they say otherwise."""
    unknown = [role for role in content if role not in ROLES]
    if unknown:
        raise UserError(f"unknown model [{unknown[0]}]; there are: {', '.join(ROLES)}")
    models = {"target": RoleModel(), "judge": RoleModel()}
    for role, table in content.items():
        if not isinstance(table, Mapping):
            raise UserError(f"[{role}] must be a table")
        models[role] = from_mapping(RoleModel, table, f"[{role}]")
    return models | {role: RoleModel(model=name) for role, name in (given or {}).items() if name}


def roles_needed(selectors: list[str]) -> set[str]:
    """The roles that these selectors, or the parts of sums, ask."""
    return {entry.needs for entry in _entries(selectors) if entry} - {""}


def embeds(selectors: list[str]) -> bool:
    """Whether these selectors, or the parts of sums, ask the encoder; one that is not known may."""
    return any(entry is None or entry.embeds for entry in _entries(selectors))


def _entries(selectors: list[str]) -> list[SelectorEntry | None]:
    return [entry_of(part) for name in selectors for part in parts_of(name)]


def with_gate(roles: set[str]) -> set[str]:
    """A gate takes the place of the judge that is asked for Yes or No: it goes with it."""
    return roles | ({"gate"} if "judge" in roles else set())


@contextmanager
def open_models(
    models: Mapping[str, RoleModel], roles: set[str], output: Path, *, placement: Placement = ALONE, fresh: bool = False
) -> Iterator[dict[str, Likelihoods]]:
    """Likelihoods by role, with one log beside `output`; roles that name one model share it.

    Raises:
        UserError: a model is missing or wrong; said before any is loaded.
    """
    specs = {role: model.spec().held_by(placement) for role, model in models.items() if role in with_gate(roles)}
    with session(output, specs, fresh=fresh) as opened:
        yield likelihoods(opened, specs)


def likelihoods(models: Mapping[str, Model], roles: Iterable[str]) -> dict[str, Likelihoods]:
    """Likelihoods by role; roles that share a model share them too."""
    by_model: dict[int, Likelihoods] = {}
    return {role: by_model.setdefault(id(models[role]), Likelihoods(models[role])) for role in roles}


def tools(encoder: Encoder | None, opened: Mapping[str, Likelihoods], **more: Any) -> Tools:
    """What selectors are made with."""
    return Tools(encoder, opened.get("target"), opened.get("judge"), opened.get("gate"), **more)
