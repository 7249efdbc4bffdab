"""No row is lost to a failing batch: it is split and tried again, down to single rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

from submission.answers import is_blank, storable
from submission.errors import UserError, first_line
from submission.types import Budget, Pair, Prediction, Recover

_REASON_CHARS = 200


_BLOCK = 64  # rows that are suspected when a way of predicting fails before it took one


@dataclass(frozen=True, slots=True)
class _Attempt:
    pairs: Iterator[Pair]
    rows: int = 0  # of pairs that have failed before, in other company; 0 for untried ones


def answer_all(recover: Recover, pairs: Iterable[Pair], budget: Budget) -> Iterator[Prediction]:
    """Yield one prediction per pair, in any order; rows that fail alone, twice, come out as `failed`.

    Pairs are taken as the way of predicting takes them. When it raises, the rows that it had taken without answering
    are split into halves and tried again before it goes on with the rest.

    Raises:
        UserError: passed on, since trying again would not help.
    """
    work = [_Attempt(iter(pairs))]
    while work:
        attempt = work.pop()
        taken: dict[str, Pair] = {}

        def feed(rest: Iterator[Pair] = attempt.pairs, taken: dict[str, Pair] = taken) -> Iterator[Pair]:
            for pair in rest:
                taken[pair.id] = pair
                yield pair

        try:
            for prediction in recover(feed(), budget):
                if taken.pop(prediction.id, None) is None:
                    raise RuntimeError(f"an answer for id {prediction.id!r}, which was not asked for")
                yield _checked(prediction)
            trouble = None
        except UserError:
            raise
        except Exception as error:
            # Only its words are kept: its frames may hold a GPU's memory, which the next try needs.
            trouble = first_line(error)[:_REASON_CHARS]
        if trouble is None or attempt.rows == 1:
            for pair in chain(taken.values(), attempt.pairs):
                yield Prediction(pair.id, "", "failed", trouble or "no answer")
            continue
        # If it failed before it took a row, the rows ahead are what to divide.
        failed = list(taken.values()) or list(islice(attempt.pairs, _BLOCK))
        ahead = list(islice(attempt.pairs, 1))
        if ahead:
            work.append(_Attempt(chain(ahead, attempt.pairs)))
        half = (len(failed) + 1) // 2
        work += [_Attempt(iter(part), len(part)) for part in (failed[half:], failed[:half]) if part]


def _checked(prediction: Prediction) -> Prediction:
    text = storable(prediction.text)
    if prediction.status == "ok" and is_blank(text):
        return replace(prediction, text="", status="failed", reason="empty answer")
    return prediction if text == prediction.text else replace(prediction, text=text)
