"""A search for the prompt, as a strategy: sample answers, score them, say the likeliest in other words, score these.

    python -m submission predict test.csv -o submission.csv --recover search --recover-config s.toml

with s.toml, where every line may be left out:

    proposals = 32
    rounds = 1
    [[source]]
    n = 8
    [target]
    model = "embedded"

What the recoverer answers is of few words: it has learned what to ask for, not how it was worded. So each answer is
read as an intent (kind and style, see `submission.prompts.grammar`); the likeliest are rendered in the phrasings of the
grammar, which the target model scores as it scored the answers. The one with the highest expected score by the metric
under the noisy channel is taken (see `ensemble.selectors.posterior`).

It is for rewrites whose model is at hand; on those of another one it is worse than a choice among the answers
(docs/STUDY.md, question 8).
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ensemble.best_of import BestOfOptions, Kit, ScoredRow, best_of
from ensemble.candidates import Answer, Candidate, CandidateRow
from ensemble.choose import answer_of, ask_together, score_rows
from ensemble.selectors.asking import softmax
from ensemble.selectors.likelihood import Likelihood
from ensemble.selectors.posterior import Evidence, Posterior, logprobs, weights
from eval.encoders import Encoder
from eval.metric import sharpened_cosines
from submission.calls.likelihoods import Likelihoods, Question
from submission.data.scratch import key_of
from submission.errors import UserError
from submission.predict.strategies import Setup
from submission.prompts.grammar import GRAMMAR, Grammar, PromptKind, read_grammar, renderings

LOG = logging.getLogger(__name__)

Intent = tuple[PromptKind, str]

SOURCE = "rendering"
UNSEARCHED = "chosen among the answers: other words were not scored"
_MOST_ROUNDS = 6
_LEAST_READ = 0.5  # of the posterior of a row's answers that the grammar must read
_FIRST_SHARE = 0.65  # of the renderings that the likeliest intent has, the next one the same share of the rest


@dataclass(frozen=True, slots=True)
class SearchOptions(BestOfOptions):
    """Settings beside [[source]] and [target], and those of `best_of` that are not about choosing.

    proposals: answers and renderings of a row, which the target model scores; all answers are, and renderings take
        what they leave.
    rounds: each has twice the proposals of the one before. Under a deadline they end with it.
    intents: of a row that are rendered, at most.
    likelihood: power of P(rewrite | prompt) among renderings; see `ensemble.selectors.posterior.Evidence`.
    grammar: TOML; "" for the project's own.
    """

    selector: str = "posterior"
    untuned: bool = False
    proposals: int = 32
    rounds: int = 1
    intents: int = 2
    likelihood: float = 0.25
    grammar: str = ""

    def __post_init__(self) -> None:
        BestOfOptions.__post_init__(self)
        if self.selector != "posterior" or self.weights or self.concat != 1:
            raise UserError("selector, weights and concat are not for a search: it chooses one by the posterior")
        if self.proposals < 1 or self.intents < 1 or not 0 <= self.likelihood <= 100:
            raise UserError("proposals and intents are whole numbers from 1, likelihood a number from 0 to 100")
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            raise UserError(f"rounds is a whole number from 1 to {_MOST_ROUNDS}: each has twice the proposals")


class search(best_of):
    """See the module; made by `predict`. Its roles are its sources by name, target and encoder."""

    what = "recover ensemble.search:search"
    options_type = SearchOptions
    unrefined = UNSEARCHED

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert isinstance(self._options, SearchOptions)
        self.rounds = self._options.rounds
        path = self._options.grammar
        self._grammar = read_grammar(Path(path).expanduser() if path else GRAMMAR)

    def refine(self, scored: list[ScoredRow], kit: Kit, number: int) -> list[ScoredRow]:
        """The rows with renderings, and the expected scores of all; each round has twice the proposals."""
        assert isinstance(self._options, SearchOptions)
        assert kit.target is not None
        assert kit.encoder is not None
        options = replace(self._options, proposals=self._options.proposals * 2**number)
        return said_otherwise(scored, kit.target, kit.encoder, options, self._grammar)


def said_otherwise(
    scored: Sequence[ScoredRow],
    model: Likelihoods,
    encoder: Encoder,
    options: SearchOptions,
    grammar: Grammar,
) -> list[ScoredRow]:
    """The rows with renderings of their likeliest intents, and the expected scores of all candidates.

    Args:
        scored: rows with the scores of the answers, which stay where nothing can be said in other words.
        model: the target.
        encoder: of the metric.
        options: of the search.
        grammar: that answers are read by, and renderings made from.
    """
    rows = [row for row, _ in scored]
    target = Likelihood(model)
    plans = [_plan(row, options, grammar, target) for row in rows]
    asked: list[Question] = []
    for row, plan in zip(rows, plans, strict=True):
        asked += target.ask(row.pair, plan.candidates)
    ask_together(model, asked, "in other words", "likelihoods", nested=True)
    if texts := [text for row, plan in zip(rows, plans, strict=True) if plan.candidates for text in _texts(row, plan)]:
        encoder.embed(texts)
    found: list[ScoredRow] = []
    for (row, scores), plan in zip(scored, plans, strict=True):
        more = _expected(row, plan, options, target, encoder)
        found.append((CandidateRow(row.pair, (*row.candidates, *plan.candidates)), more) if more else (row, scores))
    return found


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search answered.

    Attributes:
        answers: of the rows.
        rows: with the candidates that they were chosen from.
        tokens, seconds: of the target model, a row, answers included; shared beginnings count each time.
    """

    answers: list[str]
    rows: list[CandidateRow]
    tokens: float
    seconds: float


def search_rows(rows: Sequence[CandidateRow], model: Likelihoods, encoder: Encoder, proposals: int) -> Searched | None:
    """Search on from answers; None if no row has a rendering.

    Args:
        rows: with their answers.
        model: the target.
        encoder: of the metric.
        proposals: that the target scores for a row at most, answers included.
    """
    channel = Posterior(encoder, model)
    scored = list(zip(rows, score_rows(rows, {"it": channel})["it"].values, strict=True))
    found = said_otherwise(scored, model, encoder, SearchOptions(proposals=proposals), read_grammar(GRAMMAR))
    if all(len(row.candidates) == len(before.candidates) for (row, _), before in zip(found, rows, strict=True)):
        LOG.warning(
            "the search is left out: answers take all %d proposals, the grammar reads none, or all likelihoods of "
            "renderings failed", proposals,
        )  # fmt: skip
        return None
    known = [one for row, _ in found for one in channel.answers(row.pair, row.candidates)]
    return Searched(
        [answer_of(row, scores) for row, scores in found],
        [row for row, _ in found],
        sum(one.prompt_tokens + one.tokens for one in known) / len(rows),
        sum(one.seconds for one in known) / len(rows),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Renderings of a row, each with the log-probability of its intent, shared among the renderings of it."""

    candidates: tuple[Candidate, ...] = ()
    priors: tuple[float, ...] = ()


def _plan(row: CandidateRow, options: SearchOptions, grammar: Grammar, target: Likelihood) -> _Plan:
    left = options.proposals - len(row.candidates)
    intents = _intents(row, grammar, target)
    candidates: list[Candidate] = []
    priors: list[float] = []
    for place, ((kind, style), prior) in enumerate(intents[: options.intents]):
        last = place + 1 == min(options.intents, len(intents))
        wanted = left if last else round(left * _FIRST_SHARE)
        rng = random.Random(key_of(f"{row.pair.id} {kind.name} {style}"))  # another run has the same ones
        said = {candidate.text for candidate in (*row.candidates, *candidates)}
        texts = dict.fromkeys(one.text for one in islice(renderings(kind, style, rng), max(0, wanted)))
        made = [text for text in texts if text not in said]
        if not made:
            continue
        candidates += [Candidate(text, (Answer(SOURCE, place, 0.0, 1),)) for text in made]
        priors += [prior - math.log(len(made))] * len(made)
        left -= len(made)
    return _Plan(tuple(candidates), tuple(priors))


def _intents(row: CandidateRow, grammar: Grammar, target: Likelihood) -> list[tuple[Intent, float]]:
    """What the answers ask for, the likeliest by the posterior first, with its log-probability by the recoverer."""
    import numpy as np

    if not row.candidates:
        return []
    sums = [known.sum for known in target.answers(row.pair, row.candidates)]
    posterior = weights(row.candidates, sums, Evidence())
    mass: dict[Intent, float] = {}
    prior: dict[Intent, float] = {}
    for candidate, weight, logprob in zip(row.candidates, posterior, logprobs(row.candidates), strict=True):
        intent = grammar.intent_of(candidate.text)
        if intent is not None:
            mass[intent] = mass.get(intent, 0.0) + float(weight)
            prior[intent] = float(np.logaddexp(prior.get(intent, -math.inf), logprob))
    if sum(mass.values()) < _LEAST_READ:
        return []  # what is likely has no intent: the answers are what there is
    return [(intent, prior[intent]) for intent in sorted(mass, key=lambda one: -mass[one])]


def _texts(row: CandidateRow, plan: _Plan) -> list[str]:
    return [candidate.text for candidate in (*row.candidates, *plan.candidates)]


def _expected(
    row: CandidateRow, plan: _Plan, options: SearchOptions, target: Likelihood, encoder: Encoder
) -> list[float]:
    """Expected scores of answers and renderings under the renderings' posterior; none if that is not known."""
    import numpy as np

    sums = np.array([known.sum for known in target.answers(row.pair, plan.candidates)])
    if not np.isfinite(sums).any():
        return []
    logs = np.where(np.isfinite(sums), options.likelihood * sums + np.array(plan.priors), -np.inf)
    vectors = encoder.embed(_texts(row, plan))
    expected = sharpened_cosines(vectors, vectors[len(row.candidates) :]) @ softmax(logs.tolist())
    return [float(score) for score in expected]
