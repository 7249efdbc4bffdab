"""The posterior over candidates: recoverer, target model and metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ensemble.candidates import Answer, Candidate, CandidateRow
from ensemble.fitting import fit_evidence
from ensemble.selectors import Asking, Tools, entry_of, make_selectors
from ensemble.selectors.posterior import Evidence, Posterior, weights
from submission.calls.likelihoods import Likelihoods
from submission.errors import UserError
from submission.types import Chat, Failure, LogLikelihood, Pair

PAIR = Pair("1", "An original text.", "A rewritten text.")


class _Target:
    """Answers with the log-probability that a prompt stands for; None fails."""

    def __init__(self, sums: dict[str, float | None]) -> None:
        self._sums = sums

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        for key, chat, _ in items:
            said = "".join(part.text for message in chat.messages for part in message.parts)
            value = next(value for prompt, value in self._sums.items() if prompt in said)
            yield key, Failure("lost") if value is None else LogLikelihood(value, 10, 20, 0.1)


class _Encoder:
    """Puts texts at angles in a plane: the number in a text, in degrees."""

    def embed(self, texts: Sequence[str]) -> Any:
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _candidates(*told: tuple[str, float, int]) -> list[Candidate]:
    return [Candidate(text, tuple(Answer("s", number, logprob, 5) for number in range(draws)))
            for text, logprob, draws in told]  # fmt: skip


def _choice(candidates: list[Candidate], sums: dict[str, float | None]) -> str:
    encoder: Any = _Encoder()
    scores = Posterior(encoder, Likelihoods(_Target(sums)))(PAIR, candidates)
    assert all(-1 <= score <= 1 for score in scores)
    return candidates[int(np.argmax(scores))].text


THREE = _candidates(("style 0", -2.0, 5), ("style 60", -4.0, 1), ("style 65", -4.0, 1))


def test_both_models_are_believed() -> None:
    assert _choice(THREE, {"style 0": -50.0, "style 60": -50.0, "style 65": -50.0}) == "style 0"  # the likelier answer
    assert _choice(THREE, {"style 0": -50.0, "style 60": -40.0, "style 65": -52.0}) == "style 60"  # what explains more
    # The metric: two that are near each other share what either wins.
    assert _choice(THREE, {"style 0": -50.0, "style 60": -48.4, "style 65": -48.4}) in ("style 60", "style 65")
    assert weights(THREE, [-50.0, -48.4, -48.4], Evidence()).argmax() == 0


def test_corners_are_the_selectors_that_it_joins() -> None:
    sums = [-50.0, -45.0, -60.0]
    assert weights(THREE, sums, Evidence(1, 0, 0)).argmax() == 1  # likelihood
    assert weights(THREE, sums, Evidence(0, 1, 0)).argmax() == 0  # logprob_total
    assert weights(THREE, sums, Evidence(0, 0, 1)) == pytest.approx([5 / 7, 1 / 7, 1 / 7])  # consensus
    assert weights(THREE, sums, Evidence(0, 0, 0)) == pytest.approx([1 / 3] * 3)


def test_the_noisy_channel_takes_the_likeliest_and_needs_no_encoder() -> None:
    def chosen(sums: dict[str, float | None]) -> int:
        tools = Tools(None, target=Likelihoods(_Target(sums)))
        scores = make_selectors(["noisy_channel"], tools)["noisy_channel"](PAIR, THREE)
        assert sum(scores) == pytest.approx(1)
        return int(np.argmax(scores))

    assert chosen({"style 0": -50.0, "style 60": -47.0, "style 65": -52.0}) == 0  # 3 nats there, 2 here: half counts
    assert chosen({"style 0": -50.0, "style 60": -45.0, "style 65": -52.0}) == 1
    assert chosen({"style 0": -50.0, "style 60": None, "style 65": -10.0}) == 0  # the recoverer alone
    with pytest.raises(UserError, match="encoder"):
        make_selectors(["posterior"], Tools(None, target=Likelihoods(_Target({}))))


def test_powers_are_fitted_and_named() -> None:
    encoder: Any = _Encoder()
    rows = [CandidateRow(replace(PAIR, id=str(number)), tuple(THREE)) for number in range(4)]
    told = Posterior(encoder, Likelihoods(_Target({"style 0": -50.0, "style 60": -40.0, "style 65": -52.0})))
    knows, mean = fit_evidence(rows, [[0.1, 0.9, 0.5]] * 4, told)
    assert mean == 0.9
    assert knows.likelihood > 0
    fooled, mean = fit_evidence(rows, [[0.9, 0.1, 0.5]] * 4, told)
    assert mean == 0.9
    assert fooled.likelihood < knows.likelihood
    assert Evidence.parse(str(knows)) == knows
    assert entry_of(f"posterior:{knows}") is not None
    assert entry_of("consensus:1/1/0") is None
    for wrong in ("1/1", "a/b/c", "-1/0/0", "inf/0/0", "1e308/1/0", ""):
        with pytest.raises(UserError, match="three powers"):
            entry_of(f"posterior:{wrong}")


def test_what_is_not_known_decides_nothing() -> None:
    assert _choice(THREE, {"style 0": -90.0, "style 60": None, "style 65": -10.0}) == "style 0"
    odd = _candidates(("style 0", 0.0, 1), ("style 60", -3.0, 1), ("style 65", math.nan, 1))
    assert weights(odd, [-1.0, -1.0, -1.0], Evidence()) == pytest.approx([1 / 3] * 3)
    both = [
        Candidate("style 0", (Answer("mine", 1, 0.0, 1), Answer("s", 1, -4.0, 5))),
        *_candidates(("style 60", -1.0, 1)),
    ]
    assert weights(both, [-1.0, -1.0], Evidence())[0] == pytest.approx(1 / (1 + math.exp(3)))  # its known answer counts
    assert weights(THREE, [-1e6, -2e6, -3e6], Evidence()) == pytest.approx([1, 0, 0])
    one = _candidates(("style 7", -3.0, 1))
    assert _choice(one, {"style 7": -5.0}) == "style 7"


def test_the_noisy_channel_asks_only_about_what_may_win() -> None:
    def asked(candidates: list[Candidate]) -> int:
        channel = make_selectors(["noisy_channel"], Tools(None, target=Likelihoods(_Target({"style": -1.0}))))
        questions = channel["noisy_channel"]
        assert isinstance(questions, Asking)
        scores = questions(PAIR, candidates)
        assert sum(score for score in scores if score > 0) == pytest.approx(1)
        return len(list(questions.questions(PAIR, candidates)))

    near, far, unknown = (_candidates((f"style {n}", value, 1)) for n, value in ((1, -2.5), (2, -9.0), (3, math.nan)))
    best = _candidates(("style 0", -2.0, 1))
    assert asked(best) == asked(best + far) == 0  # there is nothing to choose
    assert asked(best + near + far) == 2
    assert asked(best + far + unknown) == 2  # of what is not known nothing is said against it
    other = [Candidate("style 4", (Answer("another model", 1, -30.0, 5),))]
    assert asked(best + far + other) == 2  # log-probabilities of two models are not compared
    assert asked(far + unknown) == 2
    assert asked(unknown) == 0


def test_the_best_answers_of_two_models_count_alike() -> None:
    brief = _candidates(("style 0", -2.0, 1), ("style 20", -3.0, 1))
    wordy = [
        Candidate("style 60", (Answer("wordy", 0, -30.0, 20),)),
        Candidate("style 80", (Answer("wordy", 1, -34.0, 20),)),
    ]
    both = [*brief, *wordy]
    assert weights(both, [-1.0] * 4, Evidence()) == pytest.approx(np.exp([0, -1, 0, -4]) / np.exp([0, -1, 0, -4]).sum())
    assert weights(both, [-1.0, -1.0, -0.5, -0.9], Evidence()).argmax() == 2

    def chosen(sums: dict[str, float | None]) -> int:
        channel = make_selectors(["noisy_channel"], Tools(None, target=Likelihoods(_Target(sums))))["noisy_channel"]
        return int(np.argmax(channel(PAIR, both)))

    assert chosen({"style 0": -50.0, "style 20": -51.0, "style 60": -48.0}) == 2
    assert chosen({"style 0": -50.0, "style 20": -51.0, "style 60": -52.0}) == 0
    assert chosen({"style 0": -50.0, "style 20": -51.0, "style 60": None}) == 0  # nothing is known: the first source


def test_what_cannot_win_keeps_its_order() -> None:
    channel = make_selectors(["noisy_channel"], Tools(None, target=Likelihoods(_Target({"style": -1.0}))))
    told = [("style 0", -2.0, 1), ("style 1", -9.0, 1), ("style 2", -2.5, 1), ("style 3", -6.0, 1), ("style 4", 0.0, 1)]
    scores = channel["noisy_channel"](PAIR, _candidates(*told))
    assert np.argsort(scores).tolist()[::-1][:4] == [0, 2, 4, 3]
    assert scores[3] > scores[1]
    assert scores[1] < 0 < scores[4] < 0.01  # of unknown origin: as unlikely as the least of all
