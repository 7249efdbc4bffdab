"""No row is lost to a failing batch: it is split and tried again, down to single rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from submission.answers import is_blank, storable
from submission.errors import UserError, first_line
from submission.types import Budget, Pair, Prediction, Recover

_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class _Attempt:
    pairs: Sequence[Pair]
    again: bool  # these pairs have failed before, in other company


def answer_all(recover: Recover, pairs: Sequence[Pair], budget: Budget) -> Iterator[Prediction]:
    """Yield one prediction per pair, in any order; rows that fail alone, twice, come out as `failed`.

    When the way of predicting raises, the rows that it had taken without answering are split into halves
    and tried again before it goes on with the rest.

    Raises:
        UserError: passed on, since trying again would not help.
    """
    work = [_Attempt(pairs, again=False)]
    while work:
        attempt = work.pop()
        taken: dict[str, Pair] = {}
        rest = iter(attempt.pairs)

        def feed(rest: Iterator[Pair] = rest, taken: dict[str, Pair] = taken) -> Iterator[Pair]:
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
        untouched = list(rest)
        failed = list(taken.values())
        if trouble is None or (attempt.again and len(attempt.pairs) == 1):
            for pair in [*failed, *untouched]:
                yield Prediction(pair.id, "", "failed", trouble or "no answer")
            continue
        if not failed:  # it failed before it took a row: the rows ahead are what to divide
            failed, untouched = untouched, []
        if untouched:
            work.append(_Attempt(untouched, again=False))
        half = (len(failed) + 1) // 2
        work += [_Attempt(part, again=True) for part in (failed[half:], failed[:half]) if part]


def _checked(prediction: Prediction) -> Prediction:
    text = storable(prediction.text)
    if prediction.status == "ok" and is_blank(text):
        return replace(prediction, text="", status="failed", reason="empty answer")
    return prediction if text == prediction.text else replace(prediction, text=text)
