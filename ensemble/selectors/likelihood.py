"""Forward likelihood: how well a candidate explains the rewrite, under the model that made it."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble.candidates import Candidate
from ensemble.selectors.asking import Asker
from submission.calls.likelihoods import Known, Question
from submission.predict.strategies import DEFAULT_PROMPT
from submission.prompts.templates import render_rewrite
from submission.types import Pair


class Likelihood(Asker):
    """log P(rewrite | candidate, original), mean over the rewrite's tokens, nats."""

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """The rewrite behind each candidate."""
        return [_question(pair, candidate.text) for candidate in candidates]

    def combine(self, candidates: Sequence[Candidate], answers: list[Known]) -> list[float]:
        """Per token."""
        return [known.per_token for known in answers]


class Gain(Likelihood):
    """The same, less that under a generic prompt: the order within a row is the same, rows can be compared."""

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """The rewrite behind each candidate and behind the generic prompt."""
        return [*super().ask(pair, candidates), _question(pair, DEFAULT_PROMPT)]

    def combine(self, candidates: Sequence[Candidate], answers: list[Known]) -> list[float]:
        """Per token."""
        *ours, generic = (known.per_token for known in answers)
        return [value - generic for value in ours]


def _question(pair: Pair, prompt: str) -> Question:
    return render_rewrite(prompt, pair.original_text), pair.rewritten_text
