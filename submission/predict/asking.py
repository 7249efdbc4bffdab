"""Rows of a strategy that raises are asked again in smaller parts, down to single ones; what it says is checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from submission.errors import BackendError, PromptRecoveryError, first_line, is_stop
from submission.prompts.answers import is_blank, strip_invalid_utf8
from submission.types import Budget, Model, Pair, Prediction, Recover

LOG = logging.getLogger(__name__)
_REASON_CHARS = 200


_BLOCK = 64  # rows that are suspected when a strategy fails before it took one


@dataclass(frozen=True, slots=True)
class _Attempt:
    pairs: Iterator[Pair]
    rows: int = 0  # of pairs that have failed before, in other company; 0 for untried ones


def answer_all(
    recover: Recover,
    pairs: Iterable[Pair],
    models: Mapping[str, Model],
    budget: Budget,
    known: Callable[[str], bool] = lambda _: False,
) -> Iterator[Prediction]:
    """Yield a prediction for every pair, in any order, and better ones as they come.

    Pairs are taken as the strategy takes them. When it raises, the rows that it had taken without answering
    are split into halves and tried again before it goes on with the rest; one that does it alone is `failed`.

    Args:
        recover: the strategy.
        pairs: of the run.
        models: by role.
        budget: of time.
        known: whether a row has a prediction already, which a better one may replace.

    Raises:
        PromptRecoveryError: passed on, since trying again would not help; or the pairs cannot be read to their end, or
            the strategy ended the process.
    """
    pairs = _Source(pairs)
    work = [_Attempt(iter(pairs))]
    while work:
        attempt = work.pop()
        taken: dict[str, Pair] = {}

        def feed(rest: Iterator[Pair] = attempt.pairs, taken: dict[str, Pair] = taken) -> Iterator[Pair]:
            for pair in rest:
                taken[pair.id] = pair
                yield pair

        try:
            for prediction in recover(feed(), models, budget):
                if not isinstance(prediction, Prediction):
                    raise TypeError(f"an answer that is no Prediction but {type(prediction).__name__}")
                first = taken.pop(prediction.id, None) if isinstance(prediction.id, str) else None
                if first is None and not (isinstance(prediction.id, str) and known(prediction.id)):
                    raise RuntimeError(f"an answer for id {prediction.id!r}, which was not asked for")
                yield checked(prediction)
            trouble = None
        except BackendError as error:
            trouble = first_line(error)[:_REASON_CHARS]
        except PromptRecoveryError:  # it would come again: a wrong option, a full disk, no worker that is left
            raise
        except SystemExit as error:
            raise PromptRecoveryError(f"the strategy called sys.exit({error.code!r}): it must not") from error
        except BaseException as error:  # libraries have others than Exception, such as asyncio's CancelledError
            if is_stop(error):
                raise
            # Only its words are kept: its frames may hold a GPU's memory, which the next try needs.
            trouble = first_line(error)[:_REASON_CHARS]
        pairs.check()
        if trouble is None or attempt.rows == 1:
            for pair in chain(taken.values(), attempt.pairs):
                yield Prediction(pair.id, "", "failed", trouble or "no answer")
            continue
        # If it failed before it took a row, the rows ahead are what to divide.
        failed = list(taken.values()) or list(islice(attempt.pairs, _BLOCK))
        if not failed:
            LOG.warning("the strategy failed when all rows had an answer: %s", trouble)
        ahead = list(islice(attempt.pairs, 1))
        if ahead:
            work.append(_Attempt(chain(ahead, attempt.pairs)))
        half = (len(failed) + 1) // 2
        work += [_Attempt(iter(part), len(part)) for part in (failed[half:], failed[:half]) if part]


class _Source:
    """The pairs of a run, as they are read; remembers when they could not be."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._pairs = iter(pairs)
        self._trouble: Exception | None = None

    def __iter__(self) -> Iterator[Pair]:
        return self

    def __next__(self) -> Pair:
        try:
            return next(self._pairs)
        except StopIteration:
            raise
        except Exception as error:
            self._trouble = error
            raise

    def check(self) -> None:
        """Raise what went wrong when a pair was read: no other pairs will come."""
        if isinstance(self._trouble, PromptRecoveryError):
            raise self._trouble
        if self._trouble is not None:
            raise PromptRecoveryError(
                f"the rows cannot be read to their end: {first_line(self._trouble)}\n"
                "What was computed is safe in the log."
            ) from self._trouble


def checked(prediction: Prediction) -> Prediction:
    """The prediction if it is sound, or as near as can be: a row with a text of another kind failed.

    It may come from a strategy of the user's own, so any field may hold anything.
    """
    text, status, reason = prediction.text, prediction.status, prediction.reason
    if not isinstance(text, str):
        text, status, reason = "", "failed", f"its text is no text but {type(text).__name__}"
    text = strip_invalid_utf8(text)
    if status not in ("ok", "failed", "unfinished"):
        text, status, reason = "", "failed", f"its status is {str(status)[:40]!r}"
    elif status == "ok" and is_blank(text):
        text, status, reason = "", "failed", "empty answer"
    reason, raw = strip_invalid_utf8(_as_text(reason)), strip_invalid_utf8(_as_text(prediction.raw))
    return Prediction(
        prediction.id, text, status, reason[:_REASON_CHARS], raw,
        _as_number(prediction.prompt_tokens), bool(_as_number(prediction.truncated)),
    )  # fmt: skip


def _as_text(value: object) -> str:
    return value if type(value) is str else "" if value is None else str(value)[:_REASON_CHARS]


def _as_number(value: Any) -> int:
    """A whole number of any kind, such as numpy's; 0 for what is none."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError, OverflowError):
        return 0
