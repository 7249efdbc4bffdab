"""The posterior: which candidate scores best if each is the truth as probably as recoverer and target model say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble.candidates import Candidate
from ensemble.selectors.asking import softmax
from ensemble.selectors.likelihood import Likelihood
from eval.encoders import Encoder
from eval.metric import sharpened_cosines
from submission.calls.likelihoods import Likelihoods, Question
from submission.errors import UserError
from submission.types import Pair

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_MOST = 100


@dataclass(frozen=True, slots=True)
class Evidence:
    """How much each kind of evidence counts, as powers.

    Attributes:
        likelihood: of P(rewrite | candidate, original) by the target model.
        logprob: of P(candidate | pair) by the recoverer that gave it.
        answers: of the number of answers that say it. Samples follow P(candidate | pair) already: give one of the two.
    """

    likelihood: float = 1.0
    logprob: float = 1.0
    answers: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Evidence:
        """Powers as `1/0.5/0`: of likelihood, log-probability and answers.

        Raises:
            UserError: they are not three numbers from 0.
        """
        try:
            powers = [float(part) for part in text.split("/")]
        except ValueError:
            powers = []
        if len(powers) != 3 or not all(0 <= power <= _MOST for power in powers):
            raise UserError(
                f"selector posterior:{text}: write three powers from 0 to {_MOST}, such as posterior:1/0.5/0"
            )
        return cls(*powers)

    def __str__(self) -> str:
        return f"{self.likelihood:g}/{self.logprob:g}/{self.answers:g}"


NOISY_CHANNEL = Evidence(likelihood=0.5)
"""Powers from 0.3 to 1 are not told apart (docs/STUDY.md, question 8)."""
_WITHIN = 2.0  # nats; asking about all scores -0.002 at home and +0.002 abroad, for three times the likelihoods


class Posterior(Likelihood):
    """Minimum Bayes risk by the metric, each candidate weighted by the noisy channel.

    P(candidate | pair) is the recoverer's, P(rewrite | candidate, original) the target model's: their product is the
    noisy channel (Yee et al., arXiv 1908.05731), and weights by a model instead of by counts are those of MBMBR (arXiv
    2311.05263). Where a likelihood failed, the recoverer alone decides.

    Args:
        encoder: of the metric.
        target: the model that made the rewrites.
        evidence: how much each kind counts.
    """

    def __init__(self, encoder: Encoder, target: Likelihoods, evidence: Evidence = Evidence()) -> None:
        super().__init__(target)
        self._encoder, self._evidence = encoder, evidence

    def __call__(self, pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
        """Expected score of each candidate, from -1 to 1."""
        return self.under([self._evidence], pair, candidates)[0]

    def under(self, evidences: Sequence[Evidence], pair: Pair, candidates: Sequence[Candidate]) -> list[list[float]]:
        """Expected scores of the candidates under each of several kinds of evidence."""
        sums = [known.sum for known in self.answers(pair, candidates)]
        vectors = self._encoder.embed([candidate.text for candidate in candidates])
        scores = sharpened_cosines(vectors, vectors)
        return [(scores @ weights(candidates, sums, evidence)).tolist() for evidence in evidences]


class NoisyChannel(Likelihood):
    """The probability of each candidate under the noisy channel, which needs no encoder.

    Only candidates that their recoverer finds nearly as likely as its best are asked about: the others cannot win, or
    nearly so, and a likelihood is what takes the time. Where one failed, the recoverer alone decides.
    """

    def ask(self, pair: Pair, candidates: Sequence[Candidate]) -> list[Question]:
        """The rewrite behind each candidate that may win; nothing where there is one."""
        rivals = _rivals(candidates)
        return super().ask(pair, [candidates[place] for place in rivals]) if len(rivals) > 1 else []

    def __call__(self, pair: Pair, candidates: Sequence[Candidate], /) -> list[float]:
        """Probability of each candidate that may win; of the others a number below 0, in the recoverer's order."""
        import numpy as np

        prior, rivals = logprobs(candidates), _rivals(candidates)
        sums = [known.sum for known in self.answers(pair, candidates)]
        logs = prior[rivals]
        if sums and all(math.isfinite(value) for value in sums):
            logs = logs + NOISY_CHANNEL.likelihood * np.array(sums)
        found: list[float] = (prior - prior.max() - 1).tolist()
        for place, probability in zip(rivals, softmax(logs.tolist()), strict=True):
            found[place] = probability
        return found


def _rivals(candidates: Sequence[Candidate]) -> list[int]:
    """Places of candidates that have an answer nearly as likely as the best of its source, or of unknown likelihood."""
    return [place for place, below in enumerate(_below_best(candidates)) if not all(nats < -_WITHIN for nats in below)]


def _below_best(candidates: Sequence[Candidate]) -> list[list[float]]:
    """By candidate, log P of each answer less that of the likeliest of its source, nats; NaN where it is not known."""
    best: dict[str, float] = {}
    for answer in (answer for candidate in candidates for answer in candidate.answers):
        found = answer.logprob if answer.logprob < 0 else -math.inf
        best[answer.source] = max(best.get(answer.source, -math.inf), found)
    return [
        [answer.logprob - best[answer.source] if answer.logprob < 0 else math.nan for answer in one.answers]
        for one in candidates
    ]


def weights(candidates: Sequence[Candidate], sums: Sequence[float], evidence: Evidence) -> NDArray[np.float64]:
    """The probability of each candidate among them, shape (candidates,).

    Args:
        candidates: with their answers.
        sums: log P(rewrite | candidate, original) in nats; NaN where it is not known.
        evidence: how much each kind counts.
    """
    import numpy as np

    logs = evidence.answers * np.log([len(candidate.answers) for candidate in candidates])
    if all(math.isfinite(value) for value in sums):
        logs = logs + evidence.likelihood * np.array(sums)
    logs = logs + evidence.logprob * logprobs(candidates)
    parts = np.exp(logs - logs.max())
    probabilities: NDArray[np.float64] = parts / parts.sum()
    return probabilities


def logprobs(candidates: Sequence[Candidate]) -> NDArray[np.float64]:
    """log P of each candidate by the source that gave it, nats, less that of the source's best.

    So the best answers of several models count alike, whatever words each of them likes. A candidate of other origin,
    noted as 0, is as the least of the others.
    """
    import numpy as np

    found = np.array([max(filter(math.isfinite, below), default=math.nan) for below in _below_best(candidates)])
    known = found[~np.isnan(found)]
    return np.where(np.isnan(found), known.min() if len(known) else 0.0, found)
