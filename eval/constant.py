"""The best constant prompt: one answer for every row, the floor that any other way must beat.

    python -m eval constant train.csv -o constant.toml
    python -m submission predict test.csv -o constant.csv --recover constant --recover-config constant.toml

Among sentences that somebody wrote (the training prompts) the best one is simply looked for. A beam search over words
then goes on from the best of them; what it finds need not be a sentence any more, it pleases the encoder. Such prompts
are marked `exploit`, and no table mixes their scores with those of recovered prompts.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.encoders import Encoder
from eval.metric import sharpened_cosines
from submission.predict.strategies import DEFAULT_PROMPT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOG = logging.getLogger(__name__)

_VOCABULARY = 400  # words of the training prompts that are tried
_MOST_WORDS = 30
_BLOCK = 2048  # prompts that are scored together


@dataclass(frozen=True, slots=True)
class Search:
    """How long to search.

    Attributes:
        rounds: of the beam search over words; 0 for sentences only.
        beam: prompts that are kept after a round.
        tries: changed prompts that are scored in a round.
        seed: of the changes.
    """

    rounds: int = 8
    beam: int = 6
    tries: int = 600
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FittedConstant:
    """A prompt with its mean score on the prompts that it was chosen by (so that is too high for others).

    `exploit` says that it was put together to please the encoder, and that nobody wrote it.
    """

    prompt: str
    train_mean: float
    exploit: bool

    def figures(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {"prompt": self.prompt, "train_mean": self.train_mean, "exploit": self.exploit}


def fit_constant(prompts: Sequence[str], encoder: Encoder, search: Search = Search()) -> list[FittedConstant]:
    """Search the constants that score best on `prompts`.

    Args:
        prompts: true prompts of the training rows; one that is there twice counts twice.
        encoder: of the metric.
        search: how long.

    Returns:
        the best sentence and, if the search over words found a better one, that as an exploit.
    """
    counts = Counter(prompts)
    target = _Target(list(counts), list(counts.values()), encoder)
    sentences = list(dict.fromkeys([DEFAULT_PROMPT, *counts]))
    means = target.means(sentences, keep=True)
    order = means.argsort(kind="stable")[::-1].tolist()
    found = [FittedConstant(sentences[order[0]], float(means[order[0]]), exploit=False)]
    beam = {sentences[index]: float(means[index]) for index in order[: search.beam]}
    for number, better in enumerate(_beam_search(target, beam, list(counts), search), start=1):
        prompt, mean = max(better.items(), key=lambda item: item[1])
        LOG.info(f"round {number} of {search.rounds}: {mean:.4f}  {prompt}")
        if mean > found[0].train_mean:
            found[1:] = [FittedConstant(prompt, mean, exploit=True)]
    return found


class _Target:
    """The weighted prompts that a constant is to be near to."""

    def __init__(self, prompts: Sequence[str], counts: Sequence[int], encoder: Encoder) -> None:
        import numpy as np

        self._encoder = encoder
        self._vectors = encoder.embed(prompts)
        self._weights = np.array(counts) / sum(counts)

    def means(self, candidates: Sequence[str], *, keep: bool) -> NDArray[np.float64]:
        """Mean score of each candidate, shape (candidates,); `keep` has the cache remember them."""
        import numpy as np

        found = []
        for start in range(0, len(candidates), _BLOCK):
            vectors = self._encoder.embed(candidates[start : start + _BLOCK], keep=keep)
            found.append(sharpened_cosines(vectors, self._vectors) @ self._weights)
        return np.concatenate(found)


def _beam_search(
    target: _Target, beam: dict[str, float], prompts: Sequence[str], search: Search
) -> Iterator[dict[str, float]]:
    """Yield the beam after each round, until no change makes it better."""
    import numpy as np

    random = np.random.default_rng(search.seed)
    counts = Counter(word for prompt in prompts for word in _words(prompt))
    vocabulary = [word for word, _ in counts.most_common(_VOCABULARY)]
    seen = set(beam)
    for _ in range(search.rounds if vocabulary else 0):
        starts = list(beam)
        changed: dict[str, None] = {}
        for _ in range(20 * search.tries):  # short prompts have few neighbours
            if len(changed) >= search.tries:
                break
            prompt = _change(starts[int(random.integers(len(starts)))], vocabulary, random)
            if prompt and prompt not in seen:
                changed[prompt] = None
        if not changed:
            return
        seen |= changed.keys()
        means = target.means(list(changed), keep=False)
        together = beam | dict(zip(changed, means.tolist(), strict=True))
        best = sorted(together, key=lambda prompt: -together[prompt])[: search.beam]
        if best == starts:
            return
        beam = {prompt: together[prompt] for prompt in best}
        yield beam


def _change(prompt: str, vocabulary: Sequence[str], random: np.random.Generator) -> str:
    """The prompt with a word added, left out or replaced."""
    words = prompt.split()
    place = int(random.integers(len(words) + 1))
    word = vocabulary[int(random.integers(len(vocabulary)))]
    kind = int(random.integers(3))
    if kind == 0 and len(words) < _MOST_WORDS:
        words.insert(place, word)
    elif kind == 1:
        words[place : place + 1] = [word]
    else:
        del words[place : place + 1]
    return " ".join(words)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text.lower())
