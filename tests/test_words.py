"""Which texts are near-duplicates by the words that they share."""

from __future__ import annotations

import random

import pytest

from eval.grouping import first_of_each
from eval.words import near_groups, near_to, stretches
from train.cleaning import DataRow
from train.rows import Rows, RowStore

WORDS = [f"{first}{second}" for first in ("ab", "be", "co", "du", "el", "fi", "go") for second in "aeioumnrst"]


def text_of(seed: int, words: int = 100) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def changed(text: str, every: int) -> str:
    """With every so-manieth word replaced."""
    return " ".join("other" if number % every == 0 else word for number, word in enumerate(text.split(), start=1))


def likeness(first: str, second: str) -> float:
    """The share of stretches that two texts have in common."""
    one, other = stretches(first), stretches(second)
    return len(one & other) / len(one | other)


def test_likeness_is_the_share_of_common_stretches() -> None:
    assert likeness("It rained for nine days.", "it rained, for nine days!") == 1
    assert likeness("It rained for nine days.", "Bees find their way by the sun.") == 0
    assert likeness("It rained for nine days.", "It rained for nine nights.") == 0.5  # two of four stretches
    assert likeness("日本語、です。", "日本語です") == 1
    assert likeness("किताब कीमत कुल", "काताब कूमत कैल") == 0  # vowel signs count
    assert likeness("Caf\u00e9 au lait noir", "Cafe\u0301 au lait noir") == 1
    assert 0.5 < likeness("今天天气很好我们去公园散步然后回家", "今天天气很好我们去公园散步然后睡觉") < 1


@pytest.mark.parametrize("text", ["", "...", "one", "one two", "\ud800", "\0", "🦉"])
def test_whatever_a_text_is_it_is_like_itself(text: str) -> None:
    assert stretches(text)
    assert likeness(text, text) == 1
    assert near_groups([text, text_of(1), text]).tolist() in ([0, 1, 0], [1, 0, 1])


def test_copies_with_other_words_here_and_there_are_one_group() -> None:
    texts = [text_of(seed) for seed in range(200)]
    copies = [changed(text, 20) for text in texts]  # a likeness of 0.74
    groups = near_groups([*texts, *copies]).tolist()
    joined = sum(one == other for one, other in zip(groups[:200], groups[200:], strict=True))
    assert joined >= 195
    assert len(set(groups)) == 400 - joined  # and no others
    assert groups == near_groups(iter([*texts, *copies])).tolist()
    assert len(set(near_groups([text_of(1), changed(text_of(1), 3)]).tolist())) == 2


def test_the_first_of_a_group_stays_and_what_is_near_to_others_is_named() -> None:
    text, other = text_of(1), text_of(2)
    assert first_of_each(near_groups([text, other, changed(text, 50), other])) == [0, 1]
    assert near_to([other, changed(text, 50), text_of(3)], [text]) == [1]
    assert near_to([], [text]) == []
    assert near_to([text], []) == []
    assert first_of_each(near_groups([])) == []


def test_rows_on_disk_are_those_that_were_added() -> None:
    store = RowStore()
    rows = [DataRow(str(n), f"\ud800 {n}", "", "p\0", "one", style="ü") for n in range(5)]
    assert [store.add(row) for row in rows] == list(range(5))
    some = Rows(store, [3, 1])
    assert list(some) == [rows[3], rows[1]]
    assert list(some[1:]) == [rows[1]]
    assert len(store) == 5
