"""Batches of the transformers backend as they are computed: their sizes, and their memory beside the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from submission.backends.transformers.memory import footprint


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of answers that was decoded.

    Attributes:
        rows: answers.
        planned: bytes by `Footprint.batch`.
        peak: bytes that it took beyond what lay there before; 0 on a CPU.
    """

    rows: int
    planned: int
    peak: int


class Watch:
    """Looks at a backend from now on.

    Attributes:
        batches: that were decoded.
        ran_out: how often memory ran out.
        after: the largest batch that was decoded after it ran out first; 0 if it did not, or none was.
    """

    def __init__(self, backend: Any) -> None:
        self.batches: list[Batch] = []
        self.ran_out = self.after = 0
        model = backend._model
        self._gpu: Any = next(iter(backend._gpus), None)
        self._shape = footprint(model.config, model.dtype.itemsize)
        self._answer, self._out = backend._generator.answer, backend._room.ran_out
        backend._generator.answer = self._watched
        backend._room.ran_out = self._count

    @property
    def rows(self) -> int:
        """Answers of the largest batch."""
        return max((batch.rows for batch in self.batches), default=0)

    def largest(self) -> Batch | None:
        """The batch that was planned to take most."""
        return max(self.batches, key=lambda batch: batch.planned, default=None)

    def forget(self) -> None:
        """Begin anew."""
        self.batches.clear()
        self.ran_out = self.after = 0

    def _watched(self, prompts: Sequence[Any]) -> None:
        before = self._mark()
        self._answer(prompts)
        rows = sum(prompt.rows for prompt in prompts)
        different = len({prompt.ids.tobytes() for prompt in prompts})
        sizes = rows, different, max(len(p.ids) for p in prompts), max(p.need for p in prompts)
        self.batches.append(Batch(rows, self._shape.batch(*sizes), self._peak() - before))
        if self.ran_out:
            self.after = max(self.after, rows)

    def _count(self, *sizes: int) -> None:
        self.ran_out += 1
        self._out(*sizes)

    def _mark(self) -> int:
        if self._gpu is None:
            return 0
        import torch

        torch.cuda.reset_peak_memory_stats(self._gpu)
        return torch.cuda.memory_allocated(self._gpu)

    def _peak(self) -> int:
        if self._gpu is None:
            return 0
        import torch

        return torch.cuda.max_memory_allocated(self._gpu)
