"""Memory of a model's device: the bytes that a batch takes, the room that there is, and how to tell that it ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_RESERVE = 512 << 20  # bytes that are left alone, beside a share: libraries' workspaces, one dequantised weight
_RESERVED_SHARE = 20  # one part in so many of a GPU
_GOOD_BATCHES = 4  # batches in a row that fit, after which a bound that memory set is raised by a quarter

_NO_CACHE = ("linear_attention", "conv", "mamba", "moe", "mlp")  # layers whose memory does not grow with the tokens
_OUT_OF_MEMORY = ("out of memory", "_status_alloc_failed", "cudnn_status_not_supported", "can't allocate memory",
                  "not enough memory", "bad_alloc")  # fmt: skip
_DEVICE_LOST = ("cuda error", "cudnn error", "hip error", "device-side assert", "cublas_status_", "cudnn_status_")
_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a batch takes, by the shape of a model.

    Attributes:
        kept: KV cache per token, of the layers that attend to every token.
        windowed: KV cache per token, of the layers that attend to the last `window` tokens.
        window: tokens; 0 without such layers.
        work: activations of one layer, per token of a prompt.
        pairs: attention scores of one layer, per pair of tokens of a prompt.
        row: logits and the arithmetic of sampling, per answer.
    """

    kept: int
    windowed: int = 0
    window: int = 0
    work: int = 0
    pairs: int = 0
    row: int = 0

    def cache(self, tokens: int) -> int:
        """KV cache of a sequence of so many tokens."""
        return self.kept * tokens + self.windowed * min(tokens, self.window)

    def batch(self, rows: int, prompts: int, fed: int, total: int) -> int:
        """The peak of a batch.

        Args:
            rows: answers that are decoded together.
            prompts: different prompts that they answer, each computed once.
            fed: tokens of the longest prompt.
            total: tokens of the longest prompt and its answer.
        """
        # Layers with a window hold the whole prompt until the step after it.
        prefill = prompts * fed * (self.kept + self.windowed + self.work + fed * self.pairs)
        return max(prefill, rows * (self.cache(total) + self.row))


TOKENS = Footprint(kept=1)
"""Counts tokens instead of bytes, padding included."""


def footprint(config: Any, value_bytes: int) -> Footprint:
    """The footprint of a model.

    Args:
        config: of transformers; the attention that was chosen on loading counts, where there is one.
        value_bytes: of a number that it computes with: 2 or 4. Quantised weights change nothing here.
    """
    text = config.get_text_config(decoder=True)
    heads, hidden = text.num_attention_heads, text.hidden_size
    kept = windowed = window = most_query = 0
    for kind, layer in _layers(text):
        size = getattr(layer, "head_dim", None) or hidden // heads
        most_query = max(most_query, heads * size)
        each = 2 * (getattr(layer, "num_key_value_heads", None) or heads) * size * value_bytes
        if kind == "full_attention":
            kept += each
        elif kind not in _NO_CACHE:
            windowed += each
            window = max(window, getattr(layer, "sliding_window", None) or layer.attention_chunk_size)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    eager = getattr(text, "_attn_implementation", None) == "eager"
    return Footprint(
        kept,
        windowed,
        window,
        # The MLP's gate, up and their product, or queries with keys and values repeated; residuals, norms in float32.
        work=(max(3 * inner, 4 * most_query) + 6 * hidden) * value_bytes,
        pairs=heads * (4 + 2 * value_bytes) if eager else 2,  # scores and their softmax in float32, or a mask
        row=text.vocab_size * (value_bytes + 24),  # logits, in float32, probabilities, their sum in float64, choices
    )


def _layers(text: Any) -> Iterator[tuple[str, Any]]:
    """The kind of each layer, and the configuration that holds its sizes."""
    layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [_kind(layer) for layer in layers]
    return zip(kinds, layers, strict=False)


def _kind(layer: Any) -> str:
    if getattr(layer, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(layer, "attention_chunk_size", None) is None else "chunked_attention"


def budget(free: int, total: int) -> int:
    """Bytes of a GPU that batches may take: those that are free, less a reserve."""
    return max(0, free - _RESERVE - total // _RESERVED_SHARE)


def free_bytes(devices: Sequence[Any]) -> int:
    """Bytes that batches may take on these GPUs, over which the layers of a model are spread evenly."""
    import torch

    found = []
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        free += torch.cuda.memory_reserved(device) - held  # which torch keeps for the next tensors
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):
            free = min(free, int(torch.cuda.get_per_process_memory_fraction(device) * total) - held)
        found.append(budget(free, total))
    return len(found) * min(found)


class Room:
    """What a batch may take: less after memory ran out, and step by step more again when batches fit.

    Args:
        rows: answers that are decoded together at most.
        footprint: of the model, or `TOKENS`.
        limit: what there is at the moment, in the units of the footprint.
    """

    def __init__(self, rows: int, footprint: Footprint, limit: Callable[[], int]) -> None:
        self.rows = rows
        self.footprint = footprint
        self._limit = limit
        self._bound = self._now = float("inf")
        self._good = 0

    def look(self) -> None:
        """See how much there is now."""
        self._now = min(self._limit(), self._bound)

    def holds(self, rows: int, prompts: int, fed: int, total: int) -> bool:
        """Whether there is room for a batch; see `Footprint.batch`."""
        return rows <= self.rows and self.footprint.batch(rows, prompts, fed, total) <= self._now

    def ran_out(self, rows: int, prompts: int, fed: int, total: int) -> None:
        """This batch did not fit: the next ones take half of it at most."""
        self._bound = max(1.0, self.footprint.batch(rows, prompts, fed, total) / 2)
        self._good = 0

    def went_well(self) -> None:
        """A batch fitted."""
        self._good += 1
        if self._good % _GOOD_BATCHES == 0:
            self._bound *= 1.25


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of the host."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY or any(words in text for words in _OUT_OF_MEMORY)


def device_lost(error: BaseException) -> bool:
    """Whether an exception says that this process can compute on its GPU no longer.

    After a device-side assert, an illegal access and the like every later call fails. Some errors of CUDA leave the
    context alive, and it cannot be told which: a new process is right after all of them.
    """
    import torch

    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    if isinstance(error, getattr(torch, "AcceleratorError", ())):  # torch 2.8 and later
        return True
    text = str(error).lower()
    return any(words in text for words in _DEVICE_LOST)
