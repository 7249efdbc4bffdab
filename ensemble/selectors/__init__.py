"""Selectors: functions from a pair and its candidates to scores, the higher the better.

    def longest(pair: Pair, candidates: Sequence[Candidate]) -> list[float]

All of them are listed in `SELECTORS`. Those that ask a model or an encoder are made with `Tools`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ensemble.candidates import Candidate
from ensemble.selectors import consensus, judges, likelihood, posterior, predicted, simple
from ensemble.selectors.asking import Asking, Selector
from ensemble.selectors.combine import combined, parts_of
from eval.encoders import Encoder
from eval.head import read_head
from submission.calls.likelihoods import Likelihoods
from submission.errors import UserError

__all__ = ["SELECTORS", "Asking", "Candidate", "Selector", "Tools", "entry_of", "make_selectors"]


@dataclass(frozen=True)
class Tools:
    """What selectors may need.

    Attributes:
        encoder: of the metric, for `consensus` and `posterior`.
        target: the model that made the rewrites, for `likelihood`.
        judge: any model, for the judges.
        gate: a judge that was trained to say Yes or No; `judge` if there is none.
        rotations: of the letters that `judge_pick` sees; 0 for as many as candidates.
        weights: of sums of selectors, by name.
    """

    encoder: Encoder | None = None
    target: Likelihoods | None = None
    judge: Likelihoods | None = None
    gate: Likelihoods | None = None
    rotations: int = 0
    weights: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectorEntry:
    """A selector as it is listed.

    Attributes:
        about: in a line.
        make: with the tools.
        needs: "", "target" or "judge", the model it asks.
        embeds: it asks the encoder of the metric.
        file: it needs one that is named behind a colon.
    """

    about: str
    make: Callable[[Tools], Selector]
    needs: str = ""
    embeds: bool = False
    file: bool = False


def entry_of(name: str) -> SelectorEntry | None:
    """The entry of a selector; None if there is none. `posterior:1/0.5/0` is `posterior` with these powers,
    `predicted:FILE` is `predicted` with this head.

    Raises:
        UserError: powers that are none, or `predicted` without a file.
    """
    base, colon, powers = name.partition(":")
    if base == predicted.NAME:
        predicted.head_file(name)
        return replace(SELECTORS[base], make=_by_head(name))
    if not colon or base != "posterior":
        return SELECTORS.get(name)
    evidence = posterior.Evidence.parse(powers)
    return replace(SELECTORS[base], make=lambda tools: posterior.Posterior(_encoder(tools), _target(tools), evidence))


def _by_head(name: str) -> Callable[[Tools], Selector]:
    """Makes `predicted:FILE`."""
    return lambda tools: predicted.Predicted(_encoder(tools), read_head(predicted.head_file(name)))


def _encoder(tools: Tools) -> Encoder:
    if tools.encoder is None:
        raise UserError("this selector needs the encoder of the metric")
    return tools.encoder


def _target(tools: Tools) -> Likelihoods:
    if tools.target is None:
        raise UserError("a selector by likelihood needs the model that made the rewrites: --target")
    return tools.target


def _judge(tools: Tools) -> Likelihoods:
    if tools.judge is None:
        raise UserError("a judge needs a model: --judge")
    return tools.judge


SELECTORS: dict[str, SelectorEntry] = {
    "first": SelectorEntry("the first answer of the first source, greedy where it has one", lambda _: simple.first),
    "random": SelectorEntry("any, by a hash of the id", lambda _: simple.random_choice),
    "longest": SelectorEntry("most words", lambda _: simple.longest),
    "most_frequent": SelectorEntry("most answers", lambda _: simple.most_frequent),
    "logprob": SelectorEntry("the generator's own log-probability of a token", lambda _: simple.logprob),
    "logprob_total": SelectorEntry("the generator's own log-probability of the answer", lambda _: simple.logprob_total),
    "consensus": SelectorEntry(
        "the medoid of the answers: least expected loss by the metric",
        lambda tools: consensus.Consensus(_encoder(tools)),
        embeds=True,
    ),
    "likelihood": SelectorEntry(
        "log P(rewrite | candidate, original) of a token, under the target model",
        lambda tools: likelihood.Likelihood(_target(tools)),
        "target",
    ),
    "likelihood_gain": SelectorEntry(
        "the same, less that under a generic prompt", lambda tools: likelihood.Gain(_target(tools)), "target"
    ),
    "posterior": SelectorEntry(
        "expected score by the metric, candidates weighted by recoverer and target model",
        lambda tools: posterior.Posterior(_encoder(tools), _target(tools)),
        "target",
        embeds=True,
    ),
    "noisy_channel": SelectorEntry(
        "probability by recoverer and target model; needs no encoder",
        lambda tools: posterior.NoisyChannel(_target(tools)),
        "target",
    ),
    predicted.NAME: SelectorEntry(
        "the generator's log-probability, and nearness to the prompt's predicted embedding: predicted:head.safetensors",
        _by_head(predicted.NAME),
        embeds=True,
        file=True,
    ),
    "judge_pick": SelectorEntry(
        "a judge's probability of the candidate's letter, mean over rotations",
        lambda tools: judges.Pick(_judge(tools), tools.rotations),
        "judge",
    ),
    "judge_rate": SelectorEntry(
        "the mean of a judge's rating from 1 to 5", lambda tools: judges.Rate(_judge(tools)), "judge"
    ),
    "judge_yes_no": SelectorEntry(
        "a judge's log-odds of Yes; the trained one if there is one",
        lambda tools: judges.YesNo(tools.gate or _judge(tools)),
        "judge",
    ),
}  # fmt: skip


def make_selectors(names: list[str], tools: Tools) -> dict[str, Selector]:
    """Selectors by name; `a+b` is the sum of ranks, and what `tools.weights` names a weighted sum.

    Raises:
        UserError: a name is unknown, or the model that a selector needs is not there.
    """

    def one(name: str) -> Selector:
        entry = entry_of(name)
        if entry is None:
            known = ", ".join([*SELECTORS, *tools.weights])
            raise UserError(f"unknown selector {name!r}; there are: {known}, and sums of ranks such as first+consensus")
        return entry.make(tools)

    made: dict[str, Selector] = {}
    for name in names:
        if name in tools.weights:
            weights = tools.weights[name]
            made[name] = combined([one(part) for part in weights], list(weights.values()), ranks=False)
        elif "+" in name:
            parts = parts_of(name)
            made[name] = combined([one(part) for part in parts], [1.0] * len(parts), ranks=True)
        else:
            made[name] = one(name)
    return made
