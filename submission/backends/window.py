"""The requests that a backend looks at together, in the order in which they are best computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIZE = 256  # requests that are looked at together: memory does not grow with their number
GROUP = 32  # tokens that sequences must share, beyond what all share, to be kept together


class Sized(Protocol):
    """Something to be computed."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """The tokens to feed."""
        ...

    @property
    def need(self) -> int:
        """Tokens that it takes in all, the answer's included."""
        ...


T = TypeVar("T", bound=Sized)


class Window(Generic[T]):
    """Takes items from a source as room falls free; `items` are those that wait, the next one first."""

    def __init__(self, source: Iterable[T]) -> None:
        self._source: Iterator[T] | None = iter(source)
        self._trouble: Exception | None = None
        self.items: deque[T] = deque()

    def top_up(self) -> bool:
        """Take more from the source when few are left; False if none is left."""
        if self._source is not None and len(self.items) <= SIZE // 2:
            before = len(self.items)
            try:
                # One by one: what was taken before the source failed is not lost.
                for item in islice(self._source, SIZE - before):
                    self.items.append(item)
            except Exception as error:
                self._trouble, self._source = error, None
            if len(self.items) < SIZE:
                self._source = None
            if len(self.items) > before:
                self.items = deque(in_order(self.items))
        return bool(self.items)

    def longest(self) -> int:
        """Tokens that the longest of those that wait needs."""
        return max(item.need for item in self.items)

    def complain(self) -> None:
        """Pass on the error of the source, now that all it gave before is done.

        Raises:
            Exception: that error.
        """
        if self._trouble is not None:
            raise self._trouble


def in_order(items: Iterable[T]) -> list[T]:
    """Items with a long common beginning side by side; the groups by length, the longest first."""
    import numpy as np

    items = sorted(items, key=lambda item: item.ids.tobytes())
    common = [common_length(a.ids, b.ids) for a, b in pairwise(items)]
    # What (nearly) all share makes no group; a few that share nothing must not hide it.
    root = float(np.quantile(common, 0.02)) if common else 0.0
    groups: list[list[T]] = []
    for item, shared in zip(items, [-1, *common], strict=False):
        if groups and shared >= root + GROUP:
            groups[-1].append(item)
        else:
            groups.append([item])
    groups.sort(key=lambda group: -max(item.need for item in group))
    return [item for group in groups for item in group]


def common_length(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many ids two sequences begin with alike."""
    shortest = min(len(a), len(b))
    differ = (a[:shortest] != b[:shortest]).nonzero()[0]
    return int(differ[0]) if len(differ) else shortest
