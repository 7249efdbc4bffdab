"""A failing batch costs no row but the bad ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.errors import UserError
from submission.predict.asking import answer_all
from submission.types import Budget, Model, Pair, Prediction

PAIRS = [Pair(str(number), "a", "b") for number in range(20)]


class Batches:
    """Answers in batches; a batch with a bad row raises, and every so many calls one raises for no reason."""

    def __init__(self, size: int, bad: set[str] = frozenset(), fail_every: int = 0) -> None:  # type: ignore[assignment]
        self.size, self.bad, self.fail_every = size, bad, fail_every
        self.batches = 0
        self.answered: list[str] = []

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        stream = iter(pairs)
        while batch := list(islice(stream, self.size)):
            self.batches += 1
            if self.bad & {pair.id for pair in batch}:
                raise ValueError("a bad row\nand more")
            if self.fail_every and self.batches % self.fail_every == 0:
                raise MemoryError
            for pair in batch:
                self.answered.append(pair.id)
                yield Prediction(pair.id, f"answer {pair.id}")


@given(st.integers(1, 25), st.sets(st.sampled_from([pair.id for pair in PAIRS])))
def test_every_row_comes_out_once_and_only_bad_ones_fail(size: int, bad: set[str]) -> None:
    recover = Batches(size, bad)
    predictions = list(answer_all(recover, PAIRS, {}, Budget()))
    assert sorted(p.id for p in predictions) == sorted(pair.id for pair in PAIRS)
    assert {p.id for p in predictions if p.status == "failed"} == bad
    assert {p.reason for p in predictions if p.status == "failed"} <= {"ValueError: a bad row"}
    assert len(recover.answered) == len(set(recover.answered)), "a row was computed twice"


@given(st.integers(1, 25), st.integers(3, 9))
def test_passing_failures_cost_no_row(size: int, fail_every: int) -> None:
    predictions = list(answer_all(Batches(size, fail_every=fail_every), PAIRS, {}, Budget()))
    assert [p for p in predictions if p.status != "ok"] == []


def test_a_single_row_is_tried_twice() -> None:
    assert next(answer_all(Batches(1, fail_every=1), PAIRS[:1], {}, Budget())).reason == "MemoryError"
    calls = []

    def second_time(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        calls.append(1)
        for pair in pairs:
            if len(calls) == 1:
                raise OSError("busy")
            yield Prediction(pair.id, "answer")

    assert [p.status for p in answer_all(second_time, PAIRS[:1], {}, Budget())] == ["ok"]


def test_a_way_that_fails_before_it_takes_a_row_ends_with_all_rows_failed() -> None:
    def broken(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        raise RuntimeError("no device")

    predictions = list(answer_all(broken, PAIRS, {}, Budget()))
    assert len(predictions) == 20
    assert {p.reason for p in predictions} == {"RuntimeError: no device"}


def test_rows_without_an_answer_and_blank_answers_fail() -> None:
    def forgetful(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        for pair in pairs:
            if pair.id != "3":
                yield Prediction(pair.id, "" if pair.id == "4" else "answer")

    failed = {p.id: p.reason for p in answer_all(forgetful, PAIRS, {}, Budget()) if p.status == "failed"}
    assert failed == {"3": "no answer", "4": "empty answer"}


def test_an_answer_that_nobody_asked_for_is_an_error_not_a_row() -> None:
    def confused(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        for pair in pairs:
            yield Prediction("other" if pair.id == "5" else pair.id, "answer")

    failed = {p.id: p.reason for p in answer_all(confused, PAIRS, {}, Budget()) if p.status == "failed"}
    assert failed == {"5": "RuntimeError: an answer for id 'other', which was not asked for"}


def test_an_error_of_the_user_is_not_retried() -> None:
    def wrong(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        raise UserError("wrong option")

    with pytest.raises(UserError, match="wrong option"):
        list(answer_all(wrong, PAIRS, {}, Budget()))


def test_what_a_csv_cannot_hold_is_taken_out_of_an_answer() -> None:
    def odd(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        for pair in pairs:
            yield Prediction(pair.id, "a\0b\ud800" if pair.id == "1" else "\0")

    predictions = {p.id: (p.text, p.status) for p in answer_all(odd, PAIRS[:3], {}, Budget())}
    assert predictions == {"0": ("", "failed"), "1": ("ab", "ok"), "2": ("", "failed")}


def test_a_failed_batch_is_not_kept_alive() -> None:
    """The frames of an error may hold a GPU's memory, which the next and smaller try needs."""
    import gc
    import weakref

    class Tensor:
        pass

    alive: list[weakref.ref[Tensor]] = []

    def hungry(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        batch = list(pairs)
        gc.collect()
        assert all(reference() is None for reference in alive)
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        if len(batch) > 5:
            raise MemoryError
        for pair in batch:
            yield Prediction(pair.id, "answer")

    assert [p.status for p in answer_all(hungry, PAIRS, {}, Budget())] == ["ok"] * 20


def test_a_better_answer_may_come_later() -> None:
    known: dict[str, str] = {}

    def anytime(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        some = list(pairs)
        for text in ("first", "better"):
            for pair in some:
                yield Prediction(pair.id, text)

    for prediction in answer_all(anytime, PAIRS, {}, Budget(), known.__contains__):
        known[prediction.id] = prediction.text
    assert known == {pair.id: "better" for pair in PAIRS}
