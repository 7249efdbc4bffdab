"""Where candidates come from: models, adapters, templates, shots and temperatures, as a TOML file lists them.

[[source]]
name = "tuned"
model = "merged-q8_0.gguf"
n = 8

[[source]]
name = "base"
template = "detailed"
temperature = 1.0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.backends import AUTO, ModelSpec, model_spec
from submission.backends.hardware import Placement
from submission.backends.models import TUNED
from submission.config import from_mapping, read_toml, split_settings
from submission.data.tables import read_triplets
from submission.errors import UserError
from submission.predict.plan import choose_template
from submission.prompts.templates import Template
from submission.types import Sampling, Triplet


@dataclass(frozen=True, slots=True)
class CandidateSource:
    """One way of getting candidates.

    Attributes:
        name: as shown; "" takes the model's.
        backend, model, adapter, settings: as `predict` takes them.
        template: "" for the one the model was trained on, or the default.
        shots, n_shots: solved examples before each pair; "" for none.
        n: samples of a pair.
        greedy: whether a greedy answer comes before them.
        temperature, top_p, min_p, max_new_tokens, seed: of the samples.
        workers: copies of the model; 0: one for each GPU.
    """

    name: str = ""
    backend: str = AUTO
    model: str = TUNED
    adapter: str = ""
    settings: tuple[str, ...] = ()
    template: str = ""
    shots: str = ""
    n_shots: int = 3
    n: int = 8
    greedy: bool = True
    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.0
    max_new_tokens: int = 40
    seed: int = 0
    workers: int = 1

    @property
    def _adapter(self) -> Path | None:
        return Path(self.adapter).expanduser() if self.adapter else None

    def spec(self) -> ModelSpec:
        """Check the model; see `submission.backends.model_spec`."""
        return model_spec(self.backend, self.model, self._adapter, list(self.settings), Placement(self.workers))

    def layout(self) -> tuple[Template, list[Triplet]]:
        """Template and shots.

        Raises:
            UserError: there is no such template, or no such file.
        """
        template = choose_template(self.template, self.model, self._adapter, shots=bool(self.shots))
        shots = read_triplets(Path(self.shots).expanduser())[: self.n_shots] if self.shots else []
        return template, shots

    def samplings(self) -> dict[int, Sampling]:
        """How answers are sampled, by the number of the first one: 0 is greedy, samples count from 1."""
        found = {0: Sampling(max_new_tokens=self.max_new_tokens)} if self.greedy else {}
        if self.n:
            found[1] = Sampling(
                n=self.n, temperature=self.temperature, top_p=self.top_p, min_p=self.min_p,
                max_new_tokens=self.max_new_tokens, seed=self.seed,
            )  # fmt: skip
        return found


def read_sources(path: Path | None, settings: Sequence[str] = ()) -> list[CandidateSource]:
    """Sources of a TOML file; None for the embedded model alone.

    Args:
        path: with a [[source]] for each.
        settings: `key=value`, which go before each source's own.

    Raises:
        UserError: an unknown key, a bad value, or two sources of one name.
    """
    content = read_toml(path, "--sources") if path else {"source": [{}]}
    return parse_sources(content.get("source", []), str(path or "--set"), settings)


def parse_sources(entries: Any, where: str, settings: Sequence[str] = ()) -> list[CandidateSource]:
    """Sources from tables; see `read_sources`."""
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where} names no source: write each as [[source]]")
    given = split_settings(settings)
    sources = []
    for number, entry in enumerate(entries, start=1):
        source = from_mapping(CandidateSource, {**entry, **given}, f"{where}: source {number}")
        try:
            source.samplings()
        except UserError as error:
            raise UserError(f"{where}: source {number}: {error}") from None
        if not (source.n or source.greedy):
            raise UserError(f"{where}: source {number} asks for nothing: n = 0 and no greedy answer")
        if source.n > 1 and source.temperature == 0:
            raise UserError(f"{where}: source {number}: {source.n} samples at temperature 0, which are all alike")
        sources.append(dataclasses.replace(source, name=source.name or model_name(source.model, source.adapter)))
    names = [source.name for source in sources]
    odd = next((name for name in names if "/" in name or "\\" in name), "")
    if odd:
        raise UserError(f"{where}: source {odd!r}: a name is part of a file's name, without slashes")
    twice = next((name for name in names if names.count(name) > 1), "")
    if twice:
        raise UserError(f"{where}: two sources are called {twice!r}: give each a name")
    return sources


def model_name(model: str, adapter: Path | str | None) -> str:
    """What a model is called: its file or folder, or its adapter's."""
    return Path(adapter or model).name.removesuffix(".gguf")
