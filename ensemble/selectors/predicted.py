"""A choice by the predicted embedding of the prompt: for rewrites whose model is not known or not at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ensemble.candidates import Candidate
from ensemble.selectors.combine import parts_of
from ensemble.selectors.posterior import logprobs
from eval.encoders import Encoder
from eval.grouping import unit_vectors
from eval.head import Head
from submission.errors import UserError, first_line
from submission.types import Pair

NAME = "predicted"
_POWER = 10.0  # nats that a cosine of 1 is worth: from 5 to 20 nothing is told apart (docs/STUDY.md, question 8)


class Predicted:
    """The recoverer's log-probability of a candidate, plus how near it lies to where a head expects the prompt.

    Args:
        encoder: that the head was learned with.
        head: see `eval.head`.
    """

    def __init__(self, encoder: Encoder, head: Head) -> None:
        head.check(encoder)
        self._encoder, self._head = encoder, head

    def __call__(self, pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
        """See `ensemble.selectors.asking.Selector`; in nats."""
        vectors = unit_vectors(self._encoder.embed([candidate.text for candidate in candidates]))
        cosines = vectors @ self._head.predict([pair], self._encoder)[0]
        found: list[float] = (logprobs(candidates) + _POWER * cosines).tolist()
        return found


def head_file(name: str) -> Path:
    """The file of `predicted:FILE`.

    Raises:
        UserError: it names none.
    """
    path = name.partition(":")[2]
    if not path:
        raise UserError(f"{NAME} needs a head: {NAME}:head.safetensors, which `python -m train head` writes")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {first_line(error)}") from error


def head_files(selectors: Iterable[str]) -> list[Path]:
    """The files of heads that these selectors, or the parts of sums, name."""
    parts = [part for name in selectors for part in parts_of(name)]
    return list(dict.fromkeys(head_file(part) for part in parts if part.partition(":")[0] == NAME))
