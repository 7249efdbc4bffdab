"""Best of several answers, as a strategy: sample, select, answer.

    python -m submission predict test.csv -o submission.csv --recover ensemble.best_of:best_of --recover-config b.toml

with b.toml:

    selector = "consensus"

    [[source]]
    n = 8

Under `--deadline` it draws fewer samples when time gets short, then the greedy answer alone, and says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ensemble.candidates import NEAR, CandidateRow, Draw, merge
from ensemble.choose import answer_of, best, score_rows
from ensemble.models import RoleModel, likelihoods, parse_models, roles_needed, tools, with_gate
from ensemble.sample import read, requests
from ensemble.selectors import Selector, make_selectors
from ensemble.sources import CandidateSource, parse_sources
from eval.encoders import Encoder, find_encoder
from submission.backends.hardware import visible_gpus
from submission.calls.likelihoods import Likelihoods
from submission.calls.models import Spec
from submission.config import from_mapping
from submission.predict.strategies import Setup
from submission.progress import print_line
from submission.types import Budget, Failure, Model, Pair, Prediction

_WHAT = "recover ensemble.best_of:best_of"
_TOGETHER = 16  # rows between two looks at the clock
_TOGETHER_ON_GPU = 512  # where each look costs loading every model
_FIRST = 4  # rows that tell how long a row takes, where there is a deadline
_RESERVE = 0.9  # of the time that is left is planned with


@dataclass(frozen=True, slots=True)
class BestOfOptions:
    """Settings beside [[source]], [target], [judge] and [gate].

    selector: as `python -m ensemble select` takes it.
    encoder: of the metric; see `eval.encoders.find_encoder`.
    near: candidates that are so near are one; see `ensemble.candidates.NEAR`.
    rotations: of the letters that `judge_pick` sees; 0 for as many as candidates.
    """

    selector: str = "consensus"
    encoder: str = ""
    near: float = NEAR
    rotations: int = 0


class best_of:
    """See the module; made by `predict`. Its roles are its sources by name, target, judge and encoder."""

    def __init__(self, setup: Setup) -> None:
        self._options, self._sources, self._models = _parse(setup.config)
        plain = _without_a_model(self._sources, setup.config)
        self._layouts = {
            source.name: (setup.template, [])
            if source.name in plain and not (source.template or source.shots)
            else source.layout()
            for source in self._sources
        }
        self._encoder = find_encoder(self._options.encoder)
        self._judges = _roles(self._options, self._models)
        self.roles: dict[str, Spec | None] = {  # None: the model of `predict`
            **{f"source {one.name}": None if one.name in plain else one.spec() for one in self._sources},
            **{role: self._models[role].spec() for role in self._judges},
            "encoder": self._encoder.spec,
        }

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        todo = list(pairs)  # their number is needed to share out the time
        kit = _Kit(self._options, self._encoder.asked_through(models["encoder"]), likelihoods(models, self._judges))
        pace = _SampleBudget(budget, max(source.n for source in self._sources))
        start = 0
        while start < len(todo):
            share = pace.share(len(todo) - start)
            # The first row under a deadline loads the models: it tells nothing of the pace.
            count = pace.together(len(todo)) if pace.known else _FIRST if start else 1
            some = todo[start : start + count]
            began = time.monotonic()
            rows = self._draw(some, share, models, kit)
            yield from self._select(rows, share, kit)
            if start:
                pace.took(time.monotonic() - began, len(some), share)
            start += len(some)

    def _draw(self, pairs: list[Pair], share: float, models: Mapping[str, Model], kit: _Kit) -> list[CandidateRow]:
        """Candidates of some pairs; `share` of the samples are drawn, and none at 0."""
        drawn: dict[str, list[tuple[str, Draw]]] = {pair.id: [] for pair in pairs}
        for number, full in enumerate(self._sources):
            if share == 0 and number > 0:
                break  # one greedy answer is all there is time for
            source, (template, shots) = _reduced(full, share), self._layouts[full.name]
            asked = requests(pairs, source, template, shots)
            for key, found in models[f"source {source.name}"].generate(asked):
                if not isinstance(found, Failure):
                    row_id, answers = read(key, found, source, template)
                    drawn[row_id] += answers
        names = [source.name for source in self._sources]
        for answers in drawn.values():  # requests are finished in any order
            answers.sort(key=lambda one: (names.index(one[1].source), one[1].number))
        return [CandidateRow(pair, tuple(merge(drawn[pair.id], kit.encoder, self._options.near))) for pair in pairs]

    def _select(self, rows: list[CandidateRow], share: float, kit: _Kit) -> Iterator[Prediction]:
        chosen = {"it": kit.selector} if share > 0 else {}
        scores = score_rows(rows, chosen, quiet=True) if chosen else {}
        for number, row in enumerate(rows):
            if not row.candidates:
                yield Prediction(row.pair.id, "", "failed", "no candidate")
                continue
            said = scores["it"].values[number] if scores else [0.0] * len(row.candidates)
            text = answer_of(row, said)
            draws = sum(len(candidate.draws) for candidate in row.candidates)
            raw = f"{len(row.candidates)} candidates of {draws} draws; chosen: {best(said) + 1}"
            yield Prediction(row.pair.id, text, reason=_short(share), raw=raw)


class _Kit:
    """What rows are selected with, once the models are there."""

    def __init__(self, options: BestOfOptions, encoder: Encoder, opened: Mapping[str, Likelihoods]) -> None:
        self.encoder = encoder
        made = make_selectors([options.selector], tools(encoder, opened, rotations=options.rotations))
        self.selector: Selector = made[options.selector]


class _SampleBudget:
    """How many samples a row may have, so that all rows are answered in time."""

    def __init__(self, budget: Budget, most: int) -> None:
        self._budget = budget
        self._most = max(1, most)
        self._seconds: float | None = None  # that a row takes with all its samples
        self._last = 1.0

    @property
    def known(self) -> bool:
        """Whether the pace is known, or of no matter."""
        return self._seconds is not None or self._budget.remaining() == float("inf")

    def together(self, rows: int) -> int:
        """Rows between two looks at the clock: all where there is no deadline, so that each model comes once."""
        if self._budget.remaining() == float("inf"):
            return rows
        return _TOGETHER_ON_GPU if visible_gpus() else _TOGETHER

    def share(self, rows: int) -> float:
        """The share of the samples that the next rows may draw, 0 for greedy answers alone."""
        left = self._budget.remaining()
        if left == float("inf") or self._seconds is None:
            return 1.0
        afford = left * _RESERVE / (rows * self._seconds)
        share = 1.0 if afford >= 1 else afford if afford * self._most >= 1 else 0.0
        if (share < 1) != (self._last < 1) or (share == 0) != (self._last == 0):
            what = (
                "all samples" if share == 1 else "greedy answers only" if share == 0 else f"{share:.0%} of the samples"
            )
            print_line(f"time: {left:.0f} s for {rows} rows: {what} from here on", sys.stderr)
        self._last = share
        return share

    def took(self, seconds: float, rows: int, share: float) -> None:
        """Learn from the rows that were answered; a row's cost is taken to grow with its samples."""
        if share > 0:
            self._seconds = seconds / rows / max(share, 1 / self._most)


def _reduced(source: CandidateSource, share: float) -> CandidateSource:
    """The source with this share of its samples, at least one of them; with a greedy answer alone at 0."""
    if share == 0:
        return replace(source, greedy=True, n=0)
    return replace(source, n=max(1, round(source.n * share))) if source.n else source


def _short(share: float) -> str:
    if share == 1:
        return ""
    return "time was short: greedy answer only" if share == 0 else f"time was short: {share:.0%} of the samples"


def _roles(options: BestOfOptions, models: Mapping[str, RoleModel]) -> list[str]:
    return sorted(with_gate(roles_needed([options.selector])) & set(models))


def _without_a_model(sources: Sequence[CandidateSource], config: Mapping[str, Any]) -> set[str]:
    """Names of the sources that leave the model to `predict`."""
    return {source.name for source, entry in zip(sources, config.get("source", [{}]), strict=True)
            if not {"backend", "model", "adapter", "settings", "workers"} & set(entry)}  # fmt: skip


def _parse(config: Mapping[str, Any]) -> tuple[BestOfOptions, list[CandidateSource], dict[str, RoleModel]]:
    rest = {key: value for key, value in config.items() if key not in ("source", "target", "judge", "gate")}
    options = from_mapping(BestOfOptions, rest, _WHAT)
    sources = parse_sources(config.get("source", [{}]), _WHAT)
    models = parse_models({role: config[role] for role in ("target", "judge", "gate") if role in config})
    return options, sources, models
