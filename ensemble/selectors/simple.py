"""Selectors that look at nothing but the candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ensemble.candidates import Candidate
from submission.types import Pair


def first(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """The first draw of the first source: the greedy answer where there is one."""
    return [-float(place) for place in range(len(candidates))]


def random_choice(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """Any draw, the same one every time: a candidate is as likely as it is frequent."""
    draws = [place for place, candidate in enumerate(candidates) for _ in candidate.draws]
    digest = hashlib.sha256(pair.id.encode("utf-8", "surrogatepass")).digest()
    chosen = draws[int.from_bytes(digest[:8], "big") % len(draws)]
    return [float(place == chosen) for place in range(len(candidates))]


def longest(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """Number of words."""
    return [float(len(candidate.text.split())) for candidate in candidates]


def most_frequent(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """Number of draws."""
    return [float(len(candidate.draws)) for candidate in candidates]


def logprob(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """The generator's log-probability of a token, of the draw that found the candidate most likely; nats."""
    return [max(draw.per_token for draw in candidate.draws) for candidate in candidates]


def logprob_total(pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
    """The generator's log-probability of the whole answer, likewise; nats."""
    return [max(draw.logprob for draw in candidate.draws) for candidate in candidates]
