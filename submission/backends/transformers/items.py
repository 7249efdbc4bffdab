"""What is asked of a model, as batches are made of it: prompts to be answered, texts to be scored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from submission.backends.common import PendingRequest
from submission.types import Completion, Failure, Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(slots=True, eq=False)
class Prompt:
    """Answers of these numbers to a request are wanted."""

    ids: NDArray[np.int32]
    asked: PendingRequest
    numbers: range
    again: bool = False
    answers: list[Completion | Failure] = field(default_factory=list)
    outputs = 1

    @property
    def sampling(self) -> Sampling:
        return self.asked.request.sampling

    @property
    def need(self) -> int:
        return len(self.ids) + self.sampling.max_new_tokens

    @property
    def rows(self) -> int:
        return len(self.numbers)

    @property
    def most_shared(self) -> int:
        return len(self.ids) - 1

    @property
    def plain(self) -> bool:
        """Greedy, once, without stop strings."""
        return self.sampling.temperature <= 0 and self.sampling.n == 1 and not self.sampling.stop

    def fits(self, other: Prompt) -> bool:
        """Whether both may be decoded together: greedy answers and samples may, so a prompt is computed once."""
        ours, theirs = self.sampling, other.sampling
        return (ours.max_new_tokens, ours.stop) == (theirs.max_new_tokens, theirs.stop)

    def parts(self) -> list[Prompt]:
        """Two of half the answers; of one answer the same once more."""
        half = (len(self.numbers) + 1) // 2
        cut = [numbers for numbers in (self.numbers[:half], self.numbers[half:]) if numbers]
        return [replace(self, numbers=numbers, again=self.again or len(cut) == 1, answers=[]) for numbers in cut]

    def fail(self, failure: Failure) -> None:
        """It has no answer."""
        self.answers = [failure] * self.rows


@dataclass(slots=True, eq=False)
class Text:
    """Tokens whose probabilities are wanted from index `scored_from` (at least 1) on."""

    ids: NDArray[np.int32]
    scored_from: int
    key: str
    again: bool = False
    total: float = 0.0
    failure: Failure | None = None
    rows = 1
    plain = False

    @property
    def outputs(self) -> int:
        return len(self.ids) - self.scored_from

    @property
    def need(self) -> int:
        return len(self.ids)

    @property
    def most_shared(self) -> int:
        return self.scored_from - 1

    def fits(self, other: Text) -> bool:
        return True

    def parts(self) -> list[Text]:
        """The same once more."""
        return [replace(self, again=True)]

    def fail(self, failure: Failure) -> None:
        """It has no likelihood."""
        self.failure = failure
