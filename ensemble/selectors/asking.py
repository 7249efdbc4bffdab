"""What selectors that ask a model have in common: all questions are known before any is answered.

So the questions of many rows go to the model together, and a selector is still a function of one pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from ensemble.candidates import Candidate
from submission.calls.likelihoods import Known, Likelihoods, Question
from submission.types import Pair


class Selector(Protocol):
    """Scores candidates; the highest is chosen, NaN never is."""

    def __call__(self, pair: Pair, candidates: Sequence[Candidate], /) -> list[float]: ...


@runtime_checkable
class Asking(Protocol):
    """A selector whose questions can be asked ahead."""

    def questions(self, pair: Pair, candidates: Sequence[Candidate], /) -> Iterator[tuple[Likelihoods, Question]]:
        """What it will ask, of which model."""
        ...


class Asker:
    """Base of selectors that ask one model. Of a pair of which a question failed it says nothing.

    Args:
        model: that answers.
    """

    def __init__(self, model: Likelihoods) -> None:
        self._model = model

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """The questions about one pair."""
        raise NotImplementedError

    def combine(self, candidates: Sequence[Candidate], answers: list[Known]) -> list[float]:
        """Scores from the answers to `ask`, in its order."""
        raise NotImplementedError

    def questions(self, pair: Pair, candidates: Sequence[Candidate], /) -> Iterator[tuple[Likelihoods, Question]]:
        """See `Asking`."""
        for question in self.ask(pair, candidates):
            yield self._model, question

    def answers(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Known]:
        """What the model answers to `ask`."""
        return self._model.of(self.ask(pair, candidates))

    def __call__(self, pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
        """See `Selector`."""
        answers = self.answers(pair, candidates)
        if any(known.failure for known in answers):
            return [math.nan] * len(candidates)
        return self.combine(candidates, answers)


def ask_ahead(
    selectors: Iterable[Selector], rows: Iterable[tuple[Pair, Sequence[Candidate]]]
) -> dict[int, tuple[Likelihoods, list[Question]]]:
    """All questions of these selectors about these rows, by model, each once."""
    found: dict[int, tuple[Likelihoods, dict[Question, None]]] = {}
    asking = [selector for selector in selectors if isinstance(selector, Asking)]
    for pair, candidates in rows:
        for selector in asking:
            for model, question in selector.questions(pair, candidates):
                found.setdefault(id(model), (model, {}))[1][question] = None
    return {key: (model, list(questions)) for key, (model, questions) in found.items()}


def softmax(logs: Sequence[float]) -> list[float]:
    """Probabilities from log-probabilities of alternatives; even where none is possible."""
    top = max(logs)
    if top == -math.inf or top != top:
        return [1 / len(logs)] * len(logs)
    parts = [math.exp(value - top) for value in logs]
    return [part / sum(parts) for part in parts]
