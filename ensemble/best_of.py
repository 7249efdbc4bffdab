"""Best of several answers, as a way of predicting: sample, select, answer.

    python -m submission predict test.csv -o submission.csv --recover ensemble.best_of:best_of --recover-config b.toml

with b.toml:

    selector = "consensus"

    [[source]]
    n = 8

Under `--deadline` it draws fewer samples when time gets short, then the greedy answer alone, and says so.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ensemble.candidates import NEAR, Draw, Row, merge
from ensemble.choose import answer_of, best, score_rows
from ensemble.models import Model, parse_models, roles_needed, tools, with_gate
from ensemble.sample import jobs, read
from ensemble.selectors import Selector, make_selectors
from ensemble.sources import Source, parse_sources
from eval.encoders import Encoder, find_encoder
from submission.backends import ModelSpec
from submission.config import from_mapping
from submission.calls.likelihoods import Likelihoods
from submission.progress import tell
from submission.predict.strategies import Setup
from submission.prompts.templates import Template
from submission.types import Backend, Budget, Pair, Prediction, Request, Triplet

_TOGETHER = 16  # rows between two looks at the clock
_FIRST = 4  # rows that tell how long a row takes, where there is a deadline
_RESERVE = 0.9  # of the time that is left is planned with


@dataclass(frozen=True, slots=True)
class Options:
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


@dataclass(slots=True)
class _Asked:
    source: Source
    template: Template
    shots: list[Triplet]
    backend: Backend


class best_of:
    """See the module; made by the driver of `predict`."""

    uses_model = False  # the models are those of its own configuration

    def __init__(self, setup: Setup) -> None:
        self._options, self._sources, self._models = _parse(setup.config)
        self._specs = [(source, source.spec(), source.layout()) for source in self._sources]
        self._asked_specs = {role: self._models[role].spec() for role in _roles(self._options, self._models)}
        self._asked: list[_Asked] | None = None
        self._selector: Selector | None = None
        self._encoder: Encoder | None = None

    @classmethod
    def fingerprint(cls, config: Mapping[str, Any]) -> dict[str, str]:
        """What decides the answers beside the configuration: the content of the models."""
        options, sources, models = _parse(config)
        marks = [source.spec().fingerprint() for source in sources]
        marks += [models[role].spec().fingerprint() for role in _roles(options, models)]
        templates = [source.layout()[0].fingerprint() for source in sources]
        digest = hashlib.sha256(repr((marks, templates)).encode()).hexdigest()
        return {"ensemble": digest, "encoder": find_encoder(options.encoder).fingerprint}

    def __call__(self, pairs: Iterable[Pair], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        todo = list(pairs)  # their number is needed to share out the time
        self._load()
        pace = _Pace(budget, max(source.n for source in self._sources))
        start = 0
        while start < len(todo):
            share = pace.share(len(todo) - start)
            some = todo[start : start + (_TOGETHER if pace.known else _FIRST)]
            began = time.monotonic()
            rows = self._draw(some, share)
            yield from self._select(rows, share)
            pace.took(time.monotonic() - began, len(some), share)
            start += len(some)

    def _load(self) -> None:
        if self._asked is not None:
            return
        load = cache(ModelSpec.load)  # sources and roles may share a model
        self._asked = [_Asked(source, *layout, load(spec)) for source, spec, layout in self._specs]
        self._encoder = find_encoder(self._options.encoder)
        opened = {role: Likelihoods(lambda spec=spec: load(spec)) for role, spec in self._asked_specs.items()}  # type: ignore[misc]
        kit = tools(self._encoder, opened, rotations=self._options.rotations)
        self._selector = make_selectors([self._options.selector], kit)[self._options.selector]

    def _draw(self, pairs: list[Pair], share: float) -> list[Row]:
        """Candidates of some pairs; `share` of the samples are drawn, and none at 0."""
        assert self._asked is not None
        drawn: dict[str, list[tuple[str, Draw]]] = {pair.id: [] for pair in pairs}
        for number, asked in enumerate(self._asked):
            if share == 0 and number > 0:
                break  # one greedy answer is all there is time for
            source = _reduced(asked.source, share)
            requests = (Request(job.id, job.chat, job.sampling)
                        for job in jobs(pairs, source, asked.template, asked.shots))  # fmt: skip
            for key, completions in asked.backend.generate(requests):
                row_id, answers = read(key, completions, source, asked.template)
                drawn[row_id] += answers
        names = [source.name for source in self._sources]
        for answers in drawn.values():  # requests are finished in any order
            answers.sort(key=lambda one: (names.index(one[1].source), one[1].number))
        return [Row(pair, tuple(merge(drawn[pair.id], self._encoder, self._options.near))) for pair in pairs]

    def _select(self, rows: list[Row], share: float) -> Iterator[Prediction]:
        assert self._selector is not None
        chosen = {"it": self._selector} if share > 0 else {}
        scores = score_rows(rows, chosen) if chosen else {}
        for number, row in enumerate(rows):
            if not row.candidates:
                yield Prediction(row.pair.id, "", "failed", "no candidate")
                continue
            said = scores["it"].values[number] if scores else [0.0] * len(row.candidates)
            text = answer_of(row, said)
            draws = sum(len(candidate.draws) for candidate in row.candidates)
            raw = f"{len(row.candidates)} candidates of {draws} draws; chosen: {best(said) + 1}"
            yield Prediction(row.pair.id, text, reason=_short(share), raw=raw)


class _Pace:
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
            tell(f"time: {left:.0f} s for {rows} rows: {what} from here on", sys.stderr)
        self._last = share
        return share

    def took(self, seconds: float, rows: int, share: float) -> None:
        """Learn from the rows that were answered; a row's cost is taken to grow with its samples."""
        if share > 0:
            self._seconds = seconds / rows / max(share, 1 / self._most)


def _reduced(source: Source, share: float) -> Source:
    """The source with this share of its samples, at least one of them; with a greedy answer alone at 0."""
    if share == 0:
        return replace(source, greedy=True, n=0)
    return replace(source, n=max(1, round(source.n * share))) if source.n else source


def _short(share: float) -> str:
    if share == 1:
        return ""
    return "time was short: greedy answer only" if share == 0 else f"time was short: {share:.0%} of the samples"


def _roles(options: Options, models: Mapping[str, Model]) -> list[str]:
    return sorted(with_gate(roles_needed([options.selector])) & set(models))


def _parse(config: Mapping[str, Any]) -> tuple[Options, list[Source], dict[str, Model]]:
    what = "recover ensemble.best_of:best_of"
    rest = {key: value for key, value in config.items() if key not in ("source", "target", "judge", "gate")}
    options = from_mapping(Options, rest, what)
    sources = parse_sources(config.get("source", [{}]), what)
    models = parse_models({role: config[role] for role in ("target", "judge", "gate") if role in config})
    return options, sources, models
