"""The metric, its intervals and groups: numbers worked out by hand, and coverage by simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.encoders import Encoder
from eval.grouping import near_duplicate_groups
from eval.intervals import Interval, bootstrap, rows_needed
from eval.metric import EPSILON, sharpened_cosine, sharpened_cosines
from eval.scoring import score_texts

Floats = NDArray[np.float64]


def by_the_formula(s: Floats, k: Floats) -> float:
    """The competition's formula, as it is written."""
    similarity = np.dot(s, k) / ((np.linalg.norm(s) + EPSILON) * np.linalg.norm(k))
    return float(np.sign(similarity) * np.abs(similarity) ** 3)


def test_a_known_angle_has_the_known_score() -> None:
    predicted = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    true = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    expected = [2**-1.5, 1.0, 0.0, -1.0]
    assert sharpened_cosine(predicted, true) == pytest.approx(expected, abs=5e-6)


def test_scores_are_those_of_the_formula_for_any_vectors() -> None:
    random = np.random.default_rng(0)
    predicted, true = random.normal(size=(2, 500, 24)) * random.lognormal(size=(2, 500, 1))
    expected = [by_the_formula(s, k) for s, k in zip(predicted, true, strict=True)]
    assert sharpened_cosine(predicted, true) == pytest.approx(expected, abs=1e-12)
    assert sharpened_cosines(predicted, true).diagonal() == pytest.approx(expected, abs=1e-12)
    single = sharpened_cosine(predicted.astype(np.float32), true.astype(np.float32))
    assert single == pytest.approx(expected, abs=1e-5)


def test_one_truth_may_serve_all_rows() -> None:
    random = np.random.default_rng(1)
    predicted, true = random.normal(size=(7, 5)), random.normal(size=5)
    expected = sharpened_cosine(predicted, np.tile(true, (7, 1)))
    assert sharpened_cosine(predicted, true) == pytest.approx(expected)


def test_nothing_scores_nothing_and_a_number_that_is_none_is_refused() -> None:
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert sharpened_cosine(zero, one).tolist() == [0.0]
    assert sharpened_cosine(one, zero).tolist() == [0.0]
    assert sharpened_cosine(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0,)
    broken = np.ones((4, 3))
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2"):
        sharpened_cosine(broken, np.ones((4, 3)))
    with pytest.raises(ValueError, match="row 2"):
        sharpened_cosine(np.ones((4, 3)), np.where(np.isnan(broken), np.inf, broken))
    with pytest.raises(ValueError, match="shapes"):
        sharpened_cosine(np.ones((4, 3)), np.ones((5, 3)))


def test_scores_never_leave_their_range() -> None:
    same = np.full((1, 384), 0.1, np.float32)
    assert np.abs(sharpened_cosine(same * 1e4, same * 1e4)).max() <= 1.0


def test_blank_texts_score_nothing_and_equal_ones_score_one(encoder: Encoder) -> None:
    scores = score_texts(["", "  \n", "Make it rhyme.", "Make it rhyme."], ["Make it rhyme."] * 3 + ["\0 "], encoder)
    assert scores == pytest.approx([0, 0, 1, 0], abs=1e-5)
    assert score_texts([], [], encoder).shape == (0,)
    with pytest.raises(ValueError, match="2 predictions for 1"):
        score_texts(["a", "b"], ["a"], encoder)


def test_scores_are_those_of_one_text_at_a_time(encoder: Encoder) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder.folder), local_files_only=True)
    predicted = ["Rewrite this as a poem", "Make it formal, please.", "x", "Rewrite this as a poem", "lies " * 400]
    true = ["Turn it into a ballad", "Make it formal.", "Summarise", "Rewrite this as a poem", "Translate"]
    seeds = [by_the_formula(*(model.encode(text) for text in texts)) for texts in zip(predicted, true, strict=True)]
    assert score_texts(predicted, true, encoder) == pytest.approx(seeds, abs=1e-5)


def test_near_duplicates_are_one_group(encoder: Encoder) -> None:
    texts = [
        "Please rewrite the essay as a poem.",
        "please rewrite the essay, as a POEM!",
        "Rewrite the essay as a poem",
        "Make it a lawyer's",
        "¿¡",
        "Make it a lawyer's.",
        "¿¡",
    ]
    labels = near_duplicate_groups(texts, encoder).tolist()
    assert labels[0] == labels[1] == labels[2]
    assert labels[3] == labels[5]
    assert labels[4] == labels[6]
    assert len({labels[0], labels[3], labels[4]}) == 3
    assert near_duplicate_groups(texts, encoder, near=1.01).max() > 2  # only what is equal to the letter


# -- intervals ----------------------------------------------------------------------------------------------


def test_the_standard_error_of_independent_rows_is_the_known_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 2))
    first, _ = bootstrap(values)
    assert first.mean == pytest.approx(values[:, 0].mean())
    assert first.error == pytest.approx(values[:, 0].std(ddof=1) / 20, rel=0.03)
    assert first.high - first.low == pytest.approx(2 * 1.966 * first.error, rel=0.03)


def test_copies_of_a_row_tell_nothing_new() -> None:
    values = np.random.default_rng(0).normal(size=(60, 1))
    once = bootstrap(values)[0]
    copied = bootstrap(np.repeat(values, 10, axis=0), np.repeat(np.arange(60), 10))[0]
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-9)


def test_constant_values_have_an_interval_without_width() -> None:
    interval = bootstrap(np.full((50, 1), 0.25))[0]
    assert (interval.mean, interval.low, interval.high, interval.error) == pytest.approx((0.25, 0.25, 0.25, 0))
    assert rows_needed(interval, 50) is None


def test_a_single_cluster_has_no_interval() -> None:
    interval = bootstrap(np.arange(5.0)[:, None], np.zeros(5, np.int64))[0]
    assert interval.mean == 2.0
    assert np.isnan([interval.low, interval.high]).all()
    assert interval.holds_zero
    assert "no interval" in str(interval)


@pytest.mark.parametrize("bad", [np.zeros((0, 1)), np.zeros(3), np.array([[1.0], [np.nan]])])
def test_values_that_cannot_be_averaged_are_refused(bad: Floats) -> None:
    with pytest.raises(ValueError, match=r"shape|finite"):
        bootstrap(bad)


def test_rows_needed_follow_the_textbook() -> None:
    # Standard deviation 1 over 100 rows, a difference of 0.2: (1.96 + 0.84)^2 / 0.2^2 = 196 rows.
    assert rows_needed(Interval(0.2, 0.0, 0.4, 0.1), 100) == 196
    assert rows_needed(Interval(0.0, -0.2, 0.2, 0.1), 100) is None


def skewed(random: np.random.Generator, clusters: int) -> tuple[Floats, NDArray[np.int64], float]:
    """Scores as they are met: a level for each prompt, most of them low, few high; equally many rows of each."""
    labels = np.repeat(np.arange(clusters), 4)
    levels = random.beta(0.8, 6.0, size=clusters)
    return levels[labels] + random.normal(0, 0.05, size=len(labels)), labels, 0.8 / 6.8


def unequal(random: np.random.Generator, clusters: int) -> tuple[Floats, NDArray[np.int64], float]:
    """Some prompts have many more rows than others."""
    labels = np.repeat(np.arange(clusters), 1 + random.geometric(0.3, size=clusters))
    levels = random.normal(0.1, 0.1, size=clusters)
    return levels[labels] + random.normal(0, 0.1, size=len(labels)), labels, 0.1


@pytest.mark.parametrize(("draw", "clusters"), [(skewed, 60), (skewed, 200), (unequal, 30), (unequal, 100)])
def test_intervals_hold_the_truth_as_often_as_they_say(
    draw: Callable[[np.random.Generator, int], tuple[Floats, NDArray[np.int64], float]], clusters: int
) -> None:
    random = np.random.default_rng(clusters)
    held = 0
    for seed in range(1000):
        values, labels, mean = draw(random, clusters)
        interval = bootstrap(values[:, None], labels, resamples=1000, seed=seed)[0]
        held += interval.low <= mean <= interval.high
    assert 930 <= held <= 970
