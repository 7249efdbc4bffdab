"""What is computed together: prompts and texts of like length, as many as there is room for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from submission.backends.transformers.items import Prompt, Text
from submission.backends.transformers.memory import Room, device_lost, out_of_memory
from submission.backends.transformers.prefixes import Prefixes
from submission.backends.window import Window, common_length
from submission.errors import DeviceLostError, first_line
from submission.types import Failure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WASTE = 1.1  # times the tokens that items cost apart may be computed for them together


T = TypeVar("T", Prompt, Text)


@dataclass(slots=True)
class _Batch:
    """The size of a batch as it grows."""

    rows: int
    prompts: int
    fed: int
    need: int
    shared: int
    outputs: int
    cost: int

    def room(self) -> tuple[int, int, int, int]:
        """See `Room.holds`."""
        return self.rows, self.prompts, self.fed, self.need


class Batches:
    """Divides work into batches.

    Args:
        room: what a batch may take.
        prefixes: common beginnings.
        outputs: tokens of a batch whose logits are wanted at once; None where that does not matter.
        continuous: leave plain prompts to the library, which sees to lengths and beginnings.
        release: lets go of memory that is held for later.
    """

    def __init__(
        self, room: Room, prefixes: Prefixes, *, outputs: int | None, continuous: bool, release: Callable[[], None]
    ) -> None:
        self._room, self._prefixes = room, prefixes
        self._outputs = float("inf") if outputs is None else outputs
        self._continuous = continuous
        self._release = release

    def run(self, items: Iterable[T], work: Callable[[list[T]], None]) -> Iterator[T]:
        """Do the work for all items and yield each when it is done; smaller batches when memory runs out.

        Raises:
            DeviceLostError: this process cannot go on.
        """
        pending = Window(items)
        while pending.top_up():
            batch, size = self._next(pending)
            trouble = self._try(batch, work)
            if trouble is None:
                self._room.went_well()
                yield from batch
            elif size.rows == 1 and batch[0].again:
                batch[0].fail(Failure(f"one row alone does not fit into memory: {trouble}"))
                yield batch[0]
            else:
                self._room.ran_out(*size.room())
                pending.items.extendleft(reversed([part for item in batch for part in item.parts()]))
        pending.complain()

    def _try(self, batch: list[T], work: Callable[[list[T]], None]) -> str | None:
        """Do the work; if memory ran out, say so. The error is let go: its frames hold the memory."""
        import torch

        trouble = None
        try:
            try:
                with torch.inference_mode():
                    work(batch)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                trouble = first_line(error)
            if trouble is not None:
                self._prefixes.forget()
                gc.collect()
                self._release()
        except RuntimeError as error:
            if device_lost(error):
                raise DeviceLostError(first_line(error)) from error
            raise
        return trouble

    def _next(self, pending: Window[T]) -> tuple[list[T], _Batch]:
        """The next items that cost no more together, padding and common beginnings counted, than apart."""
        self._room.look()
        first = pending.items.popleft()
        size = self._of_one(first)
        while first.rows > 1 and not self._room.holds(*size.room()):
            first, other = first.parts()
            pending.items.appendleft(other)
            size = self._of_one(first)
        batch = [first]
        if self._continuous and first.plain:
            while pending.items and pending.items[0].plain and first.fits(pending.items[0]):
                batch.append(pending.items.popleft())
            size.rows = size.prompts = len(batch)
            return batch, size
        while pending.items and first.fits(pending.items[0]):
            item = pending.items[0]
            grown = self._grown(size, batch, item)
            if (
                not self._room.holds(*grown.room())
                or grown.rows * grown.outputs > self._outputs
                or grown.cost > _WASTE * (size.cost + (grown.prompts - size.prompts) * len(item.ids))
            ):
                break
            batch.append(pending.items.popleft())
            size = grown
        return batch, size

    def _of_one(self, item: T) -> _Batch:
        fed = len(item.ids)
        prompts = 1 if self._prefixes.repeatable else item.rows
        return _Batch(item.rows, prompts, fed, item.need, item.most_shared, item.outputs, prompts * fed)

    def _grown(self, size: _Batch, batch: list[T], item: T) -> _Batch:
        """The size of a batch with one more item."""
        common = common_length(batch[0].ids, item.ids)
        fed, need = max(size.fed, len(item.ids)), max(size.need, item.need)
        shared = min(size.shared, common, item.most_shared) if self._prefixes.shareable(need) else 0
        if not self._prefixes.repeatable:
            new = item.rows
        else:  # equal ones lie side by side
            new = 0 if isinstance(item, Prompt) and same(batch[-1].ids, item.ids) else 1
        prompts = size.prompts + new
        cost = shared + prompts * (fed - shared)
        return _Batch(size.rows + item.rows, prompts, fed, need, shared, max(size.outputs, item.outputs), cost)


def same(a: NDArray[np.int32], b: NDArray[np.int32]) -> bool:
    """Whether two sequences of ids are equal."""
    return len(a) == len(b) == common_length(a, b)
