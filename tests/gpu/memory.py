"""Gemma-7b within the memory of a smaller GPU: no row is lost, batches recover, the peak is the planned one."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from submission.predict.capacity import MACHINES
from submission.types import Failure, Sampling
from tests.gpu.models import base_model, load, release, sized_requests
from tests.gpu.report import Check
from tests.gpu.watch import Watch

_BYTES = {machine.gpu.name.lower(): machine.gpu.memory for machine in MACHINES}
_NEARLY = 0.95  # such a GPU itself may have a little less
_NF4 = "load_in_4bit=true"
# A T4 has no bfloat16: `dtype=auto` is float16 for Gemma 1 there, and float32 for Gemma 2 and 3.
_CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "t4": {"nf4, float32": (_NF4, "dtype=float32"), "nf4, float16": (_NF4, "dtype=float16")},
    "l4": {"bfloat16": ("dtype=bfloat16",), "nf4, bfloat16": (_NF4, "dtype=bfloat16")},
}  # fmt: skip
_ENDLESS = "batch_tokens=100000000"  # a budget that no GPU has
_PLAN = (0.9, 1.1)


def run(check: Check, gpu: str) -> None:
    """Answer long rows with the room that is planned, and with a budget that must run out of memory."""
    folder = base_model(check, "gemma-7b")
    if check.device == "cuda":
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        if total < _NEARLY * _BYTES[gpu]:
            check.leave_out("all", f"this GPU has {total / 1e9:.1f} GB")
            return
        torch.cuda.set_per_process_memory_fraction(min(1.0, _BYTES[gpu] / total))
    else:
        check.leave_out("its memory", "a CPU: memory runs out where batches have more than two rows instead")
    for name, settings in _CASES[gpu].items():
        for budget in ((), (_ENDLESS,)):
            _answer(check, f"{name}, {'endless' if budget else 'planned'} room", folder, (*settings, *budget))
            release()


def _answer(check: Check, name: str, folder: Path, settings: tuple[str, ...]) -> None:
    small = check.small
    backend = load(folder, check.device, *settings)
    watch = Watch(backend)
    if check.device == "cpu":
        _wall(backend, 2)
    count, prompt, new = (6, 90, 3) if small else (96, 984, 40)
    requests = list(sized_requests(backend.encoder, count, prompt, Sampling(max_new_tokens=new)))
    began = time.perf_counter()
    found = dict(backend.generate(requests))
    seconds = time.perf_counter() - began
    failed = [one.reason for one in found.values() if isinstance(one, Failure)]
    lost = count - len(found) + len(failed)
    check.put(f"{name}: rows lost", lost, f"of {count}", high=0, note=failed[0][:200] if failed else "")
    check.put(f"{name}: rows", count / seconds, "rows/s", note=f"up to {watch.rows} together")
    endless = _ENDLESS in settings
    forced = endless or check.device == "cpu"
    check.put(f"{name}: memory ran out", watch.ran_out, "times", low=1 if forced else None, high=None if forced else 0)
    if forced:
        check.put(f"{name}: rows of the largest batch after that", watch.after, "rows", low=1)
    batch = watch.largest()
    if check.device == "cuda" and batch is not None and not endless:
        import torch

        weights = torch.cuda.memory_allocated()
        peak = weights + batch.peak
        check.put(f"{name}: peak memory beside the plan", peak / (weights + batch.planned), "x", low=_PLAN[0],
                  high=_PLAN[1], note=f"{peak / 1e9:.2f} GB, of them weights {weights / 1e9:.2f} GB")  # fmt: skip


def _wall(backend: Any, most: int) -> None:
    """Have memory run out in batches of more than so many rows, as CUDA would say it."""
    forward = backend._model.forward

    @functools.wraps(forward)  # `generate` looks at its parameters
    def bounded(*args: Any, **kwargs: Any) -> Any:
        import torch

        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(*args, **kwargs)

    backend._model.forward = bounded
