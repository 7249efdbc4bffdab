"""What the backends share: thread counts, random streams, requests as they are answered, the arithmetic of a step."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from submission.errors import BackendError, UserError, first_line
from submission.prompts.encoding import ChatEncoder, EncodedPrompt
from submission.types import Chat, Completion, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


LEAST_CONTEXT = 128  # tokens: below, no prompt is left of a pair
END_MARKERS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "</s>")
"""Special tokens that end an answer wherever a vocabulary has them, whatever its folder says."""
NOT_FINITE = "the model computes numbers that are not finite"


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request, what is fed for it, and its answers by number as they come."""

    request: Request
    encoded: EncodedPrompt
    _answers: dict[int, Completion | Failure] = field(default_factory=dict)

    def take(self, number: int, answer: Completion | Failure) -> Iterator[tuple[str, list[Completion] | Failure]]:
        """Take an answer. With the last one yield the key and all completions; the failure of one is that of all."""
        self._answers[number] = answer
        count = self.request.sampling.n
        if len(self._answers) == count:
            answers = [self._answers[number] for number in range(count)]
            failed = next((answer for answer in answers if isinstance(answer, Failure)), None)
            yield self.request.key, failed or [answer for answer in answers if isinstance(answer, Completion)]


def check_context(context: int, backend: str) -> None:
    """Refuse a context that no prompt fits.

    Raises:
        UserError: names the option.
    """
    if context < LEAST_CONTEXT:
        raise UserError(f"option context for backend {backend} must be at least {LEAST_CONTEXT} tokens")


def scorable(
    items: Iterable[tuple[str, Chat, str]],
    encoder: ChatEncoder,
    without: list[tuple[str, LogLikelihood | Failure]],
) -> Iterator[tuple[str, NDArray[np.int32], int]]:
    """Yield key, token ids, and where the continuation begins in them, of items whose likelihood is to be computed.

    Args:
        items: as `loglikelihood` of a backend takes them.
        encoder: of the model.
        without: takes the results of the others: continuations of no tokens, and those that do not fit the context.
    """
    import numpy as np

    for key, chat, continuation in items:
        try:
            ids, scored_from = encoder.encode_scored(chat, continuation)
        except BackendError as error:
            without.append((key, Failure(first_line(error))))
            continue
        if scored_from < len(ids):
            yield key, np.array(ids, np.int32), scored_from
        else:
            without.append((key, LogLikelihood(0.0, 0)))


def end_with(parent: int) -> None:
    """Have Linux end this process with its parent, even while a native call holds the interpreter.

    Args:
        parent: process that must be alive now.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before it could be noticed
        os._exit(1)


def package_path() -> dict[str, str]:
    """The environment in which another Python finds this very package, whatever its folder."""
    root = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)}


def thread_count(wanted: int) -> int:
    """The number of threads to compute with: `wanted`, or every core this process may use for 0."""
    if wanted:
        return wanted
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _processor() -> frozenset[bytes]:
    """The words of /proc/cpuinfo, features and vendor among them; none where there is no such file."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_bytes().split())
    except OSError:
        return frozenset()


def processor_has(feature: str) -> bool:
    """Whether the processor has a feature, by its name in /proc/cpuinfo."""
    return feature.encode() in _processor()


def fast_dtype() -> str:
    """bfloat16 where the processor multiplies matrices of it faster than those of float32; else float32.

    By tiles (AMX) six times as fast and more; by AVX512_BF16 two to three times on AMD's Zen 4. An Intel processor that
    was kept to AVX512_BF16 was slower with it (docs/SPEED.md).
    """
    fast = processor_has("amx_bf16") or (processor_has("avx512_bf16") and processor_has("AuthenticAMD"))
    return "bfloat16" if fast else "float32"


def stream_seed(seed: int, key: str, sample: int) -> int:
    """The 32-bit seed of one sample's random stream: depends on nothing but its three arguments."""
    digest = hashlib.sha256(f"{seed}\x1f{key}\x1f{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little")


def log_probabilities(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """log softmax(logits)[tokens] by row, natural log, for logits of shape (rows, vocabulary)."""
    import numpy as np

    found = np.empty(len(tokens), np.float64)
    shifted = row_buffer(logits.shape[1])
    for row, (values, token) in enumerate(zip(logits, tokens, strict=True)):  # a row stays in the cache
        np.subtract(values, values.max(), out=shifted)
        chosen = shifted[token]
        np.exp(shifted, out=shifted)
        found[row] = float(chosen) - math.log(float(shifted.sum(dtype=np.float64)))
    return found


_ROWS = threading.local()


def row_buffer(size: int) -> NDArray[np.float32]:
    """Room for the arithmetic of a row, one for each thread: fresh memory of this size costs more than the sums."""
    import numpy as np

    if len(getattr(_ROWS, "row", ())) != size:
        _ROWS.row = np.empty(size, np.float32)
    row: NDArray[np.float32] = _ROWS.row
    return row


def memory_budget() -> int:
    """Bytes that a KV cache may take when nobody says: a quarter of the memory that is free, at least 256 MB."""
    return max(256 << 20, free_memory() // 4)


def free_memory() -> int:
    """Bytes of memory that a new process could take; 8 GB where the system does not say."""
    free = 8 << 30
    with suppress(OSError, ValueError):
        fields = Path("/proc/meminfo").read_text(encoding="ascii").split()
        free = int(fields[fields.index("MemAvailable:") + 1]) * 1024
    with suppress(OSError, ValueError):  # a container may have less; "max" is no number
        bound, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
        free = min(free, bound - used)
    return free


def trim_heap() -> None:
    """Give freed memory back to the system: the C library (glibc) keeps it, in holes that what follows does not fit."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def stop_at(text: str, stop: tuple[str, ...]) -> str | None:
    """The text up to the first stop string in it; None when there is none."""
    found = [text.index(string) for string in stop if string in text]
    return text[: min(found)] if found else None
