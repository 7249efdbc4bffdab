"""Best of several answers, as a strategy: sample, select, answer.

    python -m submission predict test.csv -o submission.csv --recover best_of
    python -m submission predict test.csv -o submission.csv --recover best_of --recover-config b.toml

with b.toml, where every line may be left out:

    selector = "noisy_channel"

    [[source]]
    n = 8

The sources answer in turn, each all rows before the next one begins, so that a GPU holds one model at a time and loads
each once. A row has an answer as soon as the first source gave one, and a better one after every source. Under
`--deadline` each source has its share of the time; when that gets short all rows have a greedy answer before any has
samples, then as many samples as there is time for, and it says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ensemble import fitting
from ensemble.candidates import NEAR, Answer, Candidate, CandidateRow, merge
from ensemble.choose import answer_of, best, score_rows
from ensemble.models import RoleModel, asked_for, embeds, kind_of, likelihoods, parse_models, roles_needed, tools
from ensemble.pace import Pace, Turns
from ensemble.sample import read, requests
from ensemble.selectors import SELECTORS, Selector, entry_of, make_selectors
from ensemble.selectors.combine import parts_of
from ensemble.selectors.predicted import head_files
from ensemble.sources import CandidateSource, model_name, parse_sources
from eval.encoders import Encoder, find_encoder
from eval.head import read_head
from submission.backends import ModelSpec
from submission.backends.models import EMBEDDED, TUNED
from submission.calls.likelihoods import Likelihoods
from submission.calls.models import Spec
from submission.calls.supervisor import LostError
from submission.config import from_mapping
from submission.errors import PromptRecoveryError, UserError
from submission.kernel import OWN_MODEL
from submission.predict.strategies import Setup
from submission.types import Budget, Failure, Model, Pair, Prediction

LOG = logging.getLogger(__name__)

UNCHOSEN = "first answer only: nothing was chosen"
SHORT = "fewer answers than asked for: time was short"
_REFINED = 8  # rows that are refined together at least: each has a score of questions
_REFINEMENT = 2.0  # times what the selection has, for a strategy that goes on from there
_SELECTION = 0.05  # of the time, for a selector that asks no model; one that does has the share of a source


@dataclass(frozen=True, slots=True)
class BestOfOptions:
    """Settings beside [[source]], [target] or several [[target]], [judge] and [gate].

    selector: as `python -m ensemble select` takes it; the default asks the target model, and no encoder.
    weights: files of `python -m ensemble fit`, whose names are selectors too.
    concat: how many of the best candidates are joined into the answer.
    constant: a prompt that is put behind the answer.
    encoder: of the metric; see `eval.encoders.find_encoder`.
    untuned: where no source is named, the embedded model gives a greedy answer too, since it errs elsewhere. Left out:
        it does so beside the default model alone.
    near: candidates that are so near are one. 0 means `ensemble.candidates.NEAR`, or 1 (alike but for case and
        punctuation) where no encoder is asked.
    rotations: of the letters that `judge_pick` sees; 0 for as many as candidates.
    """

    selector: str = "noisy_channel"
    weights: tuple[str, ...] = ()
    concat: int = 1
    constant: str = ""
    encoder: str = ""
    untuned: bool = True
    near: float = 0.0
    rotations: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.near <= 1:
            raise UserError(f"near={self.near:g} must be a number from 0 to 1")


ScoredRow = tuple[CandidateRow, Sequence[float]]
"""A row with the scores of its candidates."""
_Steps = Generator[Prediction, None, list[ScoredRow]]
T = TypeVar("T")


class best_of:
    """See the module; made by `predict`. Its roles are its sources by name, target, judge and encoder.

    Attributes:
        answers: by role, how many answers of how many tokens a row asks of it at most, for `predict --dry-run`.
        prompted: the role whose prompts `predict --dry-run` can count, since it is asked by the run's own template; ""
            for none.
    """

    what = "recover ensemble.best_of:best_of"
    options_type = BestOfOptions
    unrefined = ""
    """What a row lacks that was chosen for and not refined; "" where there is nothing to refine."""
    rounds = 1
    """How often choices are refined, each time with more."""

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Refuse a configuration by its shape, wherever the models and files that it names are.

        Raises:
            UserError: an unknown key or selector, a bad value, or no source.
        """
        options, _ = cls.parse(config)
        parse_sources(_named(config.get("source", [{}]), lambda: "the model of predict"), cls.what)
        unknown = [part for part in parts_of(options.selector) if entry_of(part) is None]
        if unknown and not options.weights:  # the names in their files are selectors too
            raise UserError(f"unknown selector {unknown[0]!r}; there are: {', '.join(SELECTORS)}, and sums of ranks")

    def __init__(self, setup: Setup) -> None:
        given = "source" in setup.config
        self._options, self._models = self.parse(setup.config)
        entries = setup.config["source"] if given else self._default_sources(setup)
        sources = parse_sources(_named(entries, lambda: _name_of(setup.model())), self.what)
        plain = {source.name for source, entry in zip(sources, entries, strict=True) if not _has_model(entry)}
        self._sources = _with_run_sampling(sources, entries, setup)
        self._layouts = {
            source.name: (setup.template, [])
            if source.name in plain and not (source.template or source.shots)
            else source.layout()
            for source in self._sources
        }
        self._weights = fitting.read([Path(path).expanduser() for path in self._options.weights], [])
        selectors = list(self._weights.get(self._options.selector, {self._options.selector: 1.0}))
        self._encoder = (
            find_encoder(self._options.encoder)
            if embeds(selectors) or self._options.encoder or 0 < self._options.near < 1
            else None
        )
        self._judges = sorted(asked_for(self._models, roles_needed(selectors)))
        self.roles: dict[str, Spec | None] = {  # None: the model of `predict`
            **{
                f"source {one.name}": None if one.name in plain else _held(one.spec(), setup, described=given)
                for one in self._sources
            },
            **{
                role: _held(self._models[role].spec(), setup, described=kind_of(role) in setup.config)
                for role in self._judges
            },
            **({"encoder": self._encoder.spec} if self._encoder is not None else {}),
        }
        first = self._sources[0]
        asked_by_it = self._layouts[first.name] == (setup.template, []) and not setup.shots
        told = len(entries) == 1 or not given  # of several sources one would not be the whole
        counted = asked_by_it and told and first.max_new_tokens == setup.sampling.max_new_tokens
        self.prompted = f"source {first.name}" if counted else ""
        self.answers = {f"source {one.name}": (_answers(one), one.max_new_tokens) for one in self._sources}
        for path in head_files(selectors):  # before any model is loaded
            read_head(path).check(self._encoder)

    def _default_sources(self, setup: Setup) -> list[dict[str, Any]]:
        """The tables of the sources where none is named."""
        spec = setup.model()
        itself = spec.model == EMBEDDED and not spec.adapter
        wanted = self._options.untuned and ("untuned" in setup.config or spec.model == TUNED) and not itself
        return [{}, {"name": "untuned", "model": EMBEDDED, "n": 0}] if wanted else [{}]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> tuple[BestOfOptions, dict[str, RoleModel]]:
        """Options and models of a configuration; its sources may depend on `predict`."""
        rest = {key: value for key, value in config.items() if key not in ("source", "target", "judge", "gate")}
        options = from_mapping(cls.options_type, rest, cls.what)
        if {"source", "untuned"} <= config.keys():
            raise UserError(f"{cls.what}: `untuned` is for where no [[source]] is named; write it as one of them")
        return options, parse_models({role: config[role] for role in ("target", "judge", "gate") if role in config})

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        todo = [_Row(pair) for pair in pairs]
        encoder = None if self._encoder is None else self._encoder.asked_through(models["encoder"])
        kit = Kit(self._options, encoder, likelihoods(models, self._judges), self._weights)
        weights = [float(_answers(source)) for source in self._sources]
        asks = bool(self._judges)
        selection = max(weights) if asks else _SELECTION * sum(weights)
        turns = Turns(budget, [*weights, selection, _REFINEMENT * selection if self.unrefined else 0.0])
        lost: list[PromptRecoveryError] = []
        for source in self._sources:
            pace = turns.next(source.name, max(1, source.n))
            try:
                yield from self._sample(source, todo, models[f"source {source.name}"], pace)
            except (UserError, LostError) as error:  # the others answer without it
                LOG.error("source %s is left out: %s", source.name, error)
                lost.append(error)
            # Should the time end in the next source's turn, the best of these answers count.
            if source is not self._sources[-1] and not asks and budget.remaining() < float("inf"):
                yield from self._choose_all(todo, kit, Pace(budget, float("inf"), "selection"))
        if lost and not any(row.answers for row in todo):
            raise lost[0]
        missing = UNCHOSEN
        try:
            chosen = yield from self._choose_all(todo, kit, turns.next("selection"))
            if missing := self.unrefined:
                yield from self._refine_all(todo, chosen, kit, budget)
        except (UserError, LostError) as error:  # the answers are there, or the choices
            LOG.error("%s: %s", missing, error)

    def _sample(self, full: CandidateSource, todo: list[_Row], model: Model, pace: Pace) -> Iterator[Prediction]:
        """Ask one source about all rows, those without an answer first; yields the first answer of each row.

        When time is short all that lack an answer get the greedy one before any has samples.
        """
        rows = sorted(todo, key=lambda row: bool(row.answers))
        while rows:
            share = pace.share(len(rows))
            if share < 1 and full.greedy and full.n and not rows[0].answers:
                bare, rows = [row for row in rows if not row.answers], [row for row in rows if row.answers]
                yield from self._ask(replace(full, n=0), bare, 1.0, model, pace)
                yield from self._add_samples(replace(full, greedy=False), bare, model, pace)
                continue
            if pace.left == 0:  # the time of this source is over: what has an answer does without its own
                _were_short(row for row in rows if row.answers)
                rows = [row for row in rows if not row.answers]
            count = pace.wave(len(rows))
            wave, rows = rows[:count], rows[count:]
            yield from self._timed(full, wave, share, model, pace)

    def _add_samples(
        self, samples: CandidateSource, rows: list[_Row], model: Model, pace: Pace
    ) -> Iterator[Prediction]:
        """Samples for rows that have their greedy answer, one at least, until the time is over; what it does not reach
        keeps that answer. Rows without one, whose request failed, come last and in a wave of their own.
        """
        failed, rows = [row for row in rows if not row.answers], [row for row in rows if row.answers]
        while rows and pace.left > 0:
            share = pace.share(len(rows), least=1 / samples.n)
            count = pace.wave(len(rows))
            wave, rows = rows[:count], rows[count:]
            yield from self._timed(samples, wave, share, model, pace)
        _were_short(rows)
        if failed:
            yield from self._ask(samples, failed, 1 / samples.n, model, pace)

    def _timed(
        self, source: CandidateSource, wave: list[_Row], share: float, model: Model, pace: Pace
    ) -> Iterator[Prediction]:
        """`_ask`, which the pace learns from."""
        if not wave:
            return
        began = time.monotonic()
        yield from self._ask(source, wave, share, model, pace)
        pace.took(time.monotonic() - began, len(wave), share)

    def _ask(
        self, full: CandidateSource, wave: list[_Row], share: float, model: Model, pace: Pace
    ) -> Iterator[Prediction]:
        source, (template, shots) = _reduced(full, share), self._layouts[full.name]
        optional = all(row.answers for row in wave)
        if share < 1:
            _were_short(wave)
        waiting = {f"{row.pair.id}/{first}": row for row in wave for first in source.samplings()}  # keys of `requests`
        for key, completions in model.generate(requests([row.pair for row in wave], source, template, shots)):
            row = waiting.pop(key)
            if isinstance(completions, Failure):
                row.failure = row.failure or completions.reason
            else:
                _, answers = read(key, completions, source, template)
                row.answers += answers
                if answers and len(row.answers) == len(answers):
                    (text, answer), *_ = answers
                    yield row.predict(self._options, (Candidate(text, (answer,)),), [0.0], UNCHOSEN)
            if optional and pace.left == 0:
                _were_short(waiting.values())
                return  # the call is given up; what it had computed is in the log

    def _choose_all(self, todo: list[_Row], kit: Kit, pace: Pace) -> _Steps:
        """Choose for all rows."""
        candidates = kit.rows(todo, [source.name for source in self._sources])
        return self._in_waves(todo, candidates, lambda rows: self.choose(rows, kit), self.unrefined, pace)

    def _refine_all(self, todo: list[_Row], chosen: list[ScoredRow], kit: Kit, budget: Budget) -> Iterator[Prediction]:
        """Refine the choices of all rows, in rounds that each begin from them, with more to refine them by."""
        before = chosen
        for number in range(self.rounds):
            began, pace = time.monotonic(), Pace(budget, budget.remaining(), "refinement", least=_REFINED)
            step = partial(self.refine, kit=kit, number=number)
            found = yield from self._in_waves(todo, chosen, step, "", pace)
            changed = sum(answer_of(*one) != answer_of(*other) for one, other in zip(found, before, strict=True))
            if self.rounds > 1:
                LOG.info(f"round {number + 1} of {self.rounds} took {time.monotonic() - began:.0f} s and "
                         f"changed {changed} of {len(found)} answers")  # fmt: skip
            before = found

    def _in_waves(
        self, todo: list[_Row], given: list[T], step: Callable[[list[T]], list[ScoredRow]], missing: str, pace: Pace
    ) -> _Steps:
        """Take a step for all rows, as many together as the pace allows; yields better answers, returns the choices."""
        done: list[ScoredRow] = []
        while len(done) < len(todo):
            some = slice(len(done), len(done) + pace.wave(len(todo) - len(done)))
            began = time.monotonic()
            found = step(given[some])
            for row, (known, scores) in zip(todo[some], found, strict=True):
                yield row.predict(self._options, known.candidates, scores, missing)
            done += found
            pace.took(time.monotonic() - began, len(found), 1.0)
        return done

    def choose(self, rows: list[CandidateRow], kit: Kit) -> list[ScoredRow]:
        """The rows with the scores of their candidates; the highest is the answer."""
        scores = score_rows(rows, {"it": kit.selector}, nested=True)["it"].values
        return list(zip(rows, scores, strict=True))

    def refine(self, scored: list[ScoredRow], kit: Kit, number: int) -> list[ScoredRow]:
        """The rows with a better choice, once all have one; only asked where `unrefined` says what they lack.

        Args:
            scored: as they were chosen for.
            kit: that they were chosen with.
            number: of the round, from 0.
        """
        del kit, number
        return scored


@dataclass(slots=True, eq=False)
class _Row:
    """A pair, its answers so far in the order in which they came, whether it had fewer than asked for, and why a
    request failed; "" if none did.
    """

    pair: Pair
    answers: list[tuple[str, Answer]] = field(default_factory=list)
    short: bool = False
    failure: str = ""

    def predict(
        self, options: BestOfOptions, candidates: tuple[Candidate, ...], scores: Sequence[float], missing: str = ""
    ) -> Prediction:
        """The best answer so far, from candidates and their scores; `missing` is what was not done for it."""
        if not candidates:
            return Prediction(self.pair.id, "", "failed", self.failure or "empty answer")
        text = answer_of(CandidateRow(self.pair, candidates), scores, options.concat, options.constant)
        raw = f"{len(candidates)} candidates of {len(self.answers)} answers; chosen: {best(scores) + 1}"
        reason = missing or (SHORT if self.short else "")
        return Prediction(self.pair.id, text, reason=reason, raw=raw)


class Kit:
    """What rows are selected with, once the models are there."""

    def __init__(
        self,
        options: BestOfOptions,
        encoder: Encoder | None,
        opened: Mapping[str, Likelihoods],
        weights: dict[str, dict[str, float]],
    ) -> None:
        self.encoder = encoder
        self._near = options.near or (1.0 if encoder is None else NEAR)
        self.target = opened.get("target")
        kit = tools(encoder, opened, rotations=options.rotations, weights=weights)
        self.selector: Selector = make_selectors([options.selector], kit)[options.selector]

    def rows(self, todo: Sequence[_Row], names: Sequence[str]) -> list[CandidateRow]:
        """The candidates of all rows. Their texts are embedded together: one call, and the encoder is not asked again
        while other models answer.
        """
        texts = {text: None for row in todo for text, _ in row.answers}
        encoder = self.encoder if self._near < 1 else None  # alike but for case and punctuation: no encoder tells that
        if texts and encoder is not None:
            encoder.embed(list(texts))

        def in_order(row: _Row) -> list[tuple[str, Answer]]:  # requests are finished in any order
            return sorted(row.answers, key=lambda one: (names.index(one[1].source), one[1].number))

        return [CandidateRow(row.pair, tuple(merge(in_order(row), encoder, self._near))) for row in todo]


def _were_short(rows: Iterable[_Row]) -> None:
    """Note that time was short for these rows."""
    for row in rows:
        row.short = True


def _answers(source: CandidateSource) -> int:
    return source.n + source.greedy


def _reduced(source: CandidateSource, share: float) -> CandidateSource:
    """The source with this share of its samples, at least one of them; with a greedy answer alone at 0."""
    if share == 0:
        return replace(source, greedy=True, n=0)
    return replace(source, n=max(1, round(source.n * share))) if source.n else source


def _held(spec: ModelSpec, setup: Setup, *, described: bool) -> ModelSpec:
    """The model of a source or role. One that the configuration does not describe has the options of `--set` where
    `predict` runs the default model.
    """
    if described:
        return spec
    of_predict = setup.model()
    same = of_predict.model == TUNED and of_predict.backend == spec.backend
    return replace(spec, options=of_predict.options) if same else spec


def _with_run_sampling(
    sources: Sequence[CandidateSource], entries: Sequence[Mapping[str, Any]], setup: Setup
) -> list[CandidateSource]:
    """The sources, with the length and seed of `predict` where they have none of their own."""
    given = {key: getattr(setup.sampling, key) for key in ("max_new_tokens", "seed")}
    return [
        replace(source, **{key: value for key, value in given.items() if key not in entry})
        for source, entry in zip(sources, entries, strict=True)
    ]


def _has_model(entry: Any) -> bool:
    """Whether the table of a source names a model, instead of leaving it to `predict`."""
    return isinstance(entry, dict) and bool(OWN_MODEL & set(entry))


def _name_of(spec: ModelSpec) -> str:
    return model_name(spec.model, spec.adapter)


def _named(entries: Any, name: Callable[[], str]) -> Any:
    """Tables of sources; those that leave the model to `predict` have its name, unless they have one."""
    if not isinstance(entries, list):
        return entries
    return [one if _has_model(one) or not isinstance(one, dict) else {"name": name(), **one} for one in entries]
