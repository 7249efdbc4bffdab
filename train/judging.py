"""What a yes/no judge is trained on: was this rewrite made by this candidate prompt?

Every triplet gives two questions: its own prompt (yes), and one prompt that made other rewrites (no). Some of those are
drawn at random, some are hard: near the true one by embedding, yet no near-duplicate of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from submission.backends.transformers.tokenizer import HfTokenizer
from submission.errors import BackendError, UserError
from submission.prompts.encoding import ChatEncoder
from submission.prompts.templates import NO, YES, render_yes_no
from submission.types import Pair, Triplet
from train.encoding import TrainingExample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eval.encoders import Encoder

_NEAREST = 8  # prompts from which a hard one is drawn


@dataclass(frozen=True, slots=True)
class Question:
    """One question to the judge, and its answer."""

    pair: Pair
    candidate: str
    yes: bool


def questions(triplets: Sequence[Triplet], encoder: Encoder, hard: float, seed: int) -> list[Question]:
    """Two questions for each triplet, one of each answer.

    Args:
        triplets: rewrites and their prompts.
        encoder: says which prompts are near.
        hard: share of the wrong candidates that are near the true prompt.
        seed: of what is drawn.

    Raises:
        UserError: a prompt has no other that is different enough.
    """
    prompts = list(dict.fromkeys(triplet.rewrite_prompt for triplet in triplets))
    place = {prompt: number for number, prompt in enumerate(prompts)}
    rng = random.Random(seed)
    wrong = _Wrong(prompts, encoder)
    found = []
    for triplet in triplets:
        true = place[triplet.rewrite_prompt]
        other = wrong.near(true, rng) if rng.random() < hard else wrong.any(true, rng)
        found.append(Question(triplet.pair, triplet.rewrite_prompt, True))
        found.append(Question(triplet.pair, prompts[other], False))
    return found


class QuestionEncoder:
    """Encodes questions; the answer is one token, and the only one that the loss counts.

    Raises:
        UserError: the tokenizer has no single token for an answer.
    """

    def __init__(self, tokenizer: HfTokenizer, max_tokens: int) -> None:
        self._encoder = ChatEncoder(tokenizer, max_tokens)
        self.yes, self.no = (self._single(word) for word in (YES, NO))

    def encode(self, question: Question) -> TrainingExample | None:
        """Encode a question; None if it does not fit."""
        try:
            prompt = self._encoder.encode_for(render_yes_no(question.pair, question.candidate), 1).ids
        except BackendError:
            return None
        return TrainingExample((*prompt, self.yes if question.yes else self.no), len(prompt))

    def _single(self, word: str) -> int:
        ids = self._encoder.encode_continuation(word)
        if len(ids) != 1:
            raise UserError(f"the tokenizer needs {len(ids)} tokens for {word!r}: a judge answers with one")
        return ids[0]


class _Wrong:
    """Other prompts than a given one."""

    def __init__(self, prompts: Sequence[str], encoder: Encoder) -> None:
        from eval.grouping import least_cosine, unit_vectors

        self._prompts = prompts
        self._same = least_cosine(encoder)  # from here on, a prompt is a near-duplicate
        self._vectors: NDArray[np.float32] = unit_vectors(encoder.embed(prompts))

    def any(self, true: int, rng: random.Random) -> int:
        """One at random."""
        for _ in range(100):
            other = rng.randrange(len(self._prompts))
            if other != true and self._vectors[true] @ self._vectors[other] < self._same:
                return other
        return self.near(true, rng)  # where nearly all are alike, all are looked at

    def near(self, true: int, rng: random.Random) -> int:
        """One of the nearest."""
        import numpy as np

        likeness = self._vectors @ self._vectors[true]
        nearest = np.argsort(-likeness, kind="stable")
        others = [int(number) for number in nearest if number != true and likeness[number] < self._same]
        if not others:
            raise UserError(f"a judge needs wrong candidates, and no prompt is unlike {self._prompts[true]!r}")
        return rng.choice(others[:_NEAREST])
