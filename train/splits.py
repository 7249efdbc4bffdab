"""Splits that share nothing: no prompt, no style and no text, neither to the letter nor nearly.

Rows that have one of these in common, directly or over other rows, form a group; whole groups go to a split.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.encoders import Encoder
from eval.grouping import NEAR, connected, near_duplicate_groups
from eval.words import NEAR_TEXTS, near_groups
from submission.errors import UserError
from train.cleaning import DataRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Splitting:
    """How rows are divided.

    Attributes:
        train, validation, test: shares of the rows, which need not add up to 1.
        by: "group" for disjoint splits; "row" reproduces the seed, and leaks.
        near_prompts: how near near-duplicate prompts are; see `eval.grouping.NEAR`.
        near_texts: how alike near-duplicate texts are; see `eval.words.NEAR_TEXTS`.
        seed: of the order of groups.
        folds, fold: the test set is part `fold` (from 0) of `folds` parts; train and validation share the others. 0
            folds: the test set has its share.
    """

    train: float = 0.8
    validation: float = 0.1
    test: float = 0.1
    by: str = "group"
    near_prompts: float = NEAR
    near_texts: float = NEAR_TEXTS
    seed: int = 0
    folds: int = 0
    fold: int = 0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: names the key.
        """
        if self.by not in ("group", "row"):
            raise UserError(f"option by={self.by!r} of [split] must be group or row")
        if min(self.train, self.validation, self.test) < 0 or self.train <= 0:
            raise UserError("the shares of [split] must not be negative, and train must have one")
        if not 0 < self.near_texts <= 1:
            raise UserError(f"option near_texts={self.near_texts:g} of [split] must be above 0, and 1 at most")

    @property
    def shares(self) -> dict[str, float]:
        """By split, adding up to 1."""
        test = (self.train + self.validation) / max(1, self.folds - 1) if self.folds else self.test
        shares = {"train": self.train, "validation": self.validation, "test": test}
        return {name: share / sum(shares.values()) for name, share in shares.items()}


def group_rows(rows: Sequence[DataRow], encoder: Encoder, splitting: Splitting) -> NDArray[np.int64]:
    """A label for each row, shape (rows,): rows with the same label must stay together."""
    import numpy as np

    # Prompts that ask for the same style are one, whatever their words; without styles near-duplicates are.
    marks = [
        near_duplicate_groups([row.rewrite_prompt for row in rows], encoder, splitting.near_prompts),
        _labels([row.style.casefold() for row in rows]),
        near_groups((row.original_text for row in rows), splitting.near_texts),
        near_groups((row.rewritten_text for row in rows), splitting.near_texts),
    ]
    return connected(np.stack(marks, axis=1))


def split(groups: Sequence[int], splitting: Splitting) -> list[str]:
    """The split of each row; groups are not divided.

    Raises:
        UserError: there are fewer groups than splits with a share, or shares that make no sense.
    """
    splitting.check()
    if splitting.by == "row":
        groups = range(len(groups))
    wanted = {name: share for name, share in splitting.shares.items() if share > 0}
    if not splitting.folds:
        return _dealt(groups, wanted, splitting.seed)
    if splitting.folds < 2 or not 0 <= splitting.fold < splitting.folds:
        raise UserError(f"fold {splitting.fold} of {splitting.folds}: [split] folds must be 2 or more, and fold below")
    folds = {f"fold {number + 1}": 1 / splitting.folds for number in range(splitting.folds)}
    parts, own = _dealt(groups, folds, splitting.seed), f"fold {splitting.fold + 1}"
    kept = [group for group, part in zip(groups, parts, strict=True) if part != own]
    total = 1 - wanted.pop("test")
    rest = iter(_dealt(kept, {name: share / total for name, share in wanted.items()}, splitting.seed))
    return ["test" if part == own else next(rest) for part in parts]


def _dealt(groups: Sequence[int], wanted: Mapping[str, float], seed: int) -> list[str]:
    """The part of each row: whole groups, the largest first, each to the part that lacks most of its share."""
    sizes = Counter(groups)
    if len(sizes) < len(wanted):
        largest = max(sizes.values(), default=0)
        raise UserError(
            f"{len(groups)} rows form {len(sizes)} groups that share no prompt, style or text, too few for "
            f"{len(wanted)} splits ({', '.join(wanted)}): the largest group has {largest} rows\n"
            "Add sources with other prompts and texts, or give fewer splits a share."
        )
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -sizes[group])
    filled = dict.fromkeys(wanted, 0)
    place: dict[int, str] = {}
    left = len(order)
    for group in order:
        empty = [name for name in wanted if not filled[name]]
        # The last groups are kept for splits that would otherwise stay empty.
        choice = empty if left <= len(empty) else list(wanted)
        place[group] = max(choice, key=lambda name: wanted[name] * len(groups) - filled[name])
        filled[place[group]] += sizes[group]
        left -= 1
    return [place[group] for group in groups]


def shared(rows: Mapping[str, Sequence[DataRow]]) -> list[str]:
    """What two splits have in common to the letter, one sentence each; an empty list means nothing."""
    found = []
    names = list(rows)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            for what in ("rewrite_prompt", "style", "original_text", "rewritten_text"):
                a, b = (
                    {hash(value) for row in rows[name] if (value := getattr(row, what))} for name in (first, second)
                )
                if a & b:
                    found.append(f"{first} and {second} share {len(a & b)} values of {what}")
    return found


def _labels(texts: Sequence[str]) -> NDArray[np.int64]:
    """A number for each distinct text; -1 for blanks."""
    import numpy as np

    first: dict[str, int] = {}
    return np.array([first.setdefault(text, len(first)) if text else -1 for text in texts], np.int64)
