"""Strategies from solved examples that are like the pair at hand.

    python -m submission predict test.csv -o nearest.csv --recover eval.retrieval:Nearest --recover-config r.toml
    python -m submission predict test.csv -o shots.csv --recover eval.retrieval:NearestShots --recover-config r.toml

with r.toml:

    train = "train.csv"

`Nearest` answers with the prompt of the most similar training pair and needs no model; with the line
`head = "head.safetensors"` it is the prompt that is nearest to where the head expects it (see `eval.head`).
`NearestShots` shows the model similar pairs, no two of them with like prompts, as solved examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.encoders import Encoder, find_encoder
from eval.grouping import unit_vectors
from eval.head import Head, read_head
from submission.calls.models import Spec
from submission.config import from_mapping
from submission.data.tables import read_triplets
from submission.errors import UserError
from submission.predict.strategies import GENERATOR, Ask, Setup
from submission.prompts.templates import get_template
from submission.types import Budget, Model, Pair, Prediction, Triplet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENCODER = "encoder"
_TOGETHER = 64  # pairs that are embedded together
# The original text tells what a pair is about, not how it was changed. Mean MiniLM score of the nearest other's prompt
# on 400 real triplets, +-0.003: by original 0.033, rewritten 0.048, difference 0.048, the last two 0.048, all 0.043.
_WEIGHTS = {"rewritten": 1.0, "difference": 1.0}


@dataclass(frozen=True, slots=True)
class RetrievalOptions:
    """Settings of both ways.

    train: CSV or Parquet of triplets.
    encoder: see `eval.encoders.find_encoder`.
    head: file of `python -m train head`, for `Nearest`; "" compares pairs.
    shots: examples for `NearestShots`.
    diversity: 0 takes the most similar pairs as shots, 1 those whose prompts are least like each other.
    """

    train: str = ""
    encoder: str = ""
    head: str = ""
    shots: int = 3
    diversity: float = 0.3


class PairIndex:
    """Training triplets by what was done to their texts.

    Args:
        triplets: to search in.
        encoder: embeds the texts.
    """

    def __init__(self, triplets: Sequence[Triplet], encoder: Encoder) -> None:
        self.triplets = triplets
        self._encoder = encoder
        self._vectors = self._embed([triplet.pair for triplet in triplets])
        self._prompts = unit_vectors(encoder.embed([triplet.rewrite_prompt for triplet in triplets]))

    def similarities(self, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        """Similarities of each pair to each triplet, in [-1, 1], shape (pairs, triplets)."""
        return self._embed(pairs) @ self._vectors.T

    def expected(self, pairs: Sequence[Pair], head: Head) -> NDArray[np.float32]:
        """Cosine of each triplet's prompt to where the head expects that of each pair, shape (pairs, triplets)."""
        return head.predict(pairs, self._encoder) @ self._prompts.T

    def diverse(self, similarities: NDArray[np.float32], count: int, diversity: float) -> list[Triplet]:
        """Choose triplets by maximal marginal relevance (Carbonell and Goldstein, 1998), the most similar last.

        Args:
            similarities: of one pair to each triplet, shape (triplets,).
            count: how many.
            diversity: weight of the likeness to prompts that are chosen already, 0 to 1.
        """
        import numpy as np

        chosen: list[int] = []
        likeness = np.zeros(len(self.triplets), np.float32)
        for _ in range(min(count, len(self.triplets))):
            gain = (1 - diversity) * similarities - diversity * likeness
            gain[chosen] = -np.inf
            best = int(gain.argmax())
            chosen.append(best)
            likeness = np.maximum(likeness, self._prompts @ self._prompts[best])
        return [self.triplets[index] for index in reversed(chosen)]

    def _embed(self, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        import numpy as np

        original = unit_vectors(self._encoder.embed([pair.original_text for pair in pairs]))
        rewritten = unit_vectors(self._encoder.embed([pair.rewritten_text for pair in pairs]))
        parts = {"rewritten": rewritten, "difference": unit_vectors(rewritten - original)}
        return unit_vectors(np.concatenate([weight * parts[name] for name, weight in _WEIGHTS.items()], axis=1))


class _FromExamples:
    """What both ways share: reading the examples, and finding those that are like a pair."""

    what = ""

    def __init__(self, setup: Setup) -> None:
        self.options = _options(setup.config, self.what)
        self._triplets = read_triplets(Path(self.options.train).expanduser())
        self._encoder = find_encoder(self.options.encoder)
        self._head = read_head(Path(self.options.head).expanduser()) if self.options.head else None
        if self._head:
            self._head.check(self._encoder)
        self._index: PairIndex | None = None
        self.roles: dict[str, Spec | None] = {ENCODER: self._encoder.spec}

    def with_similarities(
        self, pairs: Iterable[Pair], models: Mapping[str, Model]
    ) -> Iterator[tuple[Pair, NDArray[np.float32], PairIndex]]:
        """Each pair with its similarity to every triplet, or with what the head expects of its prompt."""
        self._index = self._index or PairIndex(self._triplets, self._encoder.asked_through(models[ENCODER]))
        source = iter(pairs)
        while some := list(islice(source, _TOGETHER)):
            found = self._index.expected(some, self._head) if self._head else self._index.similarities(some)
            for pair, row in zip(some, found, strict=True):
                yield pair, row, self._index


class Nearest(_FromExamples):
    """Answers with the prompt of the most similar training pair."""

    what = "recover eval.retrieval:Nearest"

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        del budget
        for pair, similarities, index in self.with_similarities(pairs, models):
            yield Prediction(pair.id, index.triplets[int(similarities.argmax())].rewrite_prompt)


class NearestShots(_FromExamples):
    """Asks the model behind examples that are like the pair."""

    what = "recover eval.retrieval:NearestShots"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if self.options.head:
            raise UserError(f"option head for {self.what}: it is for eval.retrieval:Nearest")
        self._ask = Ask(Setup(setup.model, get_template("few_shot"), sampling=setup.sampling))
        self.roles[GENERATOR] = None  # the model of `predict`

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        options = self.options
        shown = (
            (pair, index.diverse(similarities, options.shots, options.diversity))
            for pair, similarities, index in self.with_similarities(pairs, models)
        )
        yield from self._ask.behind(shown, models, budget)


def _options(config: Mapping[str, Any], what: str) -> RetrievalOptions:
    options = from_mapping(RetrievalOptions, config, what)
    if not options.train:
        raise UserError(f'{what} needs examples: --recover-config FILE with the line train = "train.csv"')
    if not 0 <= options.diversity <= 1:
        raise UserError(f"option diversity={options.diversity!r} for {what} must be from 0 to 1")
    if options.shots < 1:
        raise UserError(f"option shots={options.shots!r} for {what} must be at least 1")
    return options
