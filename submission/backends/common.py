"""What the backends share: thread counts, random streams, the arithmetic of a step."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def thread_count(wanted: int) -> int:
    """The number of threads to compute with: `wanted`, or every core this process may use for 0."""
    if wanted:
        return wanted
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stream_seed(seed: int, key: str, sample: int) -> int:
    """The 32-bit seed of one sample's random stream: depends on nothing but its three arguments."""
    digest = hashlib.sha256(f"{seed}\x1f{key}\x1f{sample}".encode("utf-8", "surrogatepass")).digest()
    # 0xFFFFFFFF asks llama.cpp for a random seed, so it is left out.
    return int.from_bytes(digest[:4], "little") % 0xFFFFFFFF


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """log softmax(logits)[token], natural log, for logits of shape (vocabulary,)."""
    import numpy as np

    peak = float(logits.max())
    return float(logits[token]) - peak - float(np.log(np.exp(logits - peak).sum()))


def stop_at(text: str, stop: tuple[str, ...]) -> str | None:
    """The text up to the first stop string in it; None when there is none."""
    found = [text.index(string) for string in stop if string in text]
    return text[: min(found)] if found else None
