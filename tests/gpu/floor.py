"""The least time that work can take on a device, by figures that are measured on the spot.

Weights are read once a step and every product is computed once, at the pace of a bare matrix product and a bare copy.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from submission.predict.capacity import ModelShape, Precision, prefill_flop

_SIDE, _COPIED = 8192, 2 << 30  # of the matrices; bytes of the copy
_SMALL_SIDE, _SMALL_COPIED = 256, 1 << 20
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Pace:
    """FLOP and bytes a second that a device reaches."""

    flops: float
    bandwidth: float

    def answers(self, shape: ModelShape, precision: Precision, work: Done) -> float:
        """Seconds that answers take at least: prompts by their arithmetic, steps by bytes or arithmetic."""
        prefill = work.prompts * prefill_flop(shape, work.prompt_tokens)
        together = max(1, min(work.together, work.answers))
        head = shape.vocabulary * shape.hidden
        cache = together * (work.prompt_tokens + work.new_tokens / 2) * shape.kv_bytes
        step = max(
            (read_bytes(shape, precision) + cache) / self.bandwidth,
            2 * together * (shape.layer_parameters + head) / self.flops,
        )
        return prefill / self.flops + math.ceil(work.answers / together) * work.new_tokens * step

    def texts(self, shape: ModelShape, count: int, tokens: float, scored: float) -> float:
        """Seconds that likelihoods of so many texts take at least; logits are wanted of `scored` tokens of each."""
        head = 2 * shape.vocabulary * shape.hidden
        return count * (prefill_flop(shape, round(tokens)) + (scored - 1) * head) / self.flops


@dataclass(frozen=True, slots=True)
class Done:
    """Answers that were computed: different prompts, answers, their mean lengths in tokens, and how many together."""

    prompts: int
    answers: int
    prompt_tokens: int
    new_tokens: float
    together: int


def read_bytes(shape: ModelShape, precision: Precision) -> float:
    """Bytes of weights that a step has to read: all but an embedding that is not the head."""
    embedding = 0 if shape.tied else 2 * shape.vocabulary * shape.hidden
    return precision.weight_bytes(shape) - embedding


def measure(device: str, dtype: str, *, small: bool) -> Pace:
    """The pace of a device, the best of some tries.

    Args:
        device: cuda or cpu.
        dtype: of torch, that is computed in.
        small: tiny matrices, whose pace means nothing.
    """
    import torch

    side, copied = (_SMALL_SIDE, _SMALL_COPIED) if small else (_SIDE, _COPIED)
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    product = _best(device, lambda: a @ b)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(device, lambda: target.copy_(source))
    return Pace(2 * side**3 / product, 2 * copied / copy)  # a copy reads and writes


def _best(device: str, work: Any) -> float:
    """Seconds of the best of some tries, after one that does not count."""
    times = []
    for _ in range(_TRIES + 1):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def synchronise(device: str) -> None:
    """Wait until the device has done all that it was asked."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
