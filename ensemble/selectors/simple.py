"""Selectors that look at nothing but the candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ensemble.candidates import Candidate
from submission.types import Pair


def first(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """The first answer of the first source: the greedy answer where there is one."""
    return [-float(place) for place in range(len(candidates))]


def random_choice(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """Any answer, the same one every time: a candidate is as likely as it is frequent."""
    answers = [place for place, candidate in enumerate(candidates) for _ in candidate.answers]
    digest = hashlib.sha256(pair.id.encode("utf-8", "surrogatepass")).digest()
    chosen = answers[int.from_bytes(digest[:8], "big") % len(answers)]
    return [float(place == chosen) for place in range(len(candidates))]


def longest(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """Number of words."""
    return [float(len(candidate.text.split())) for candidate in candidates]


def most_frequent(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """Number of answers."""
    return [float(len(candidate.answers)) for candidate in candidates]


def logprob(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """The generator's log-probability of a token, of the answer that found the candidate most likely; nats."""
    return [max(answer.per_token for answer in candidate.answers) for candidate in candidates]


def logprob_total(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """The generator's log-probability of the whole answer, likewise; nats."""
    return [max(answer.logprob for answer in candidate.answers) for candidate in candidates]
