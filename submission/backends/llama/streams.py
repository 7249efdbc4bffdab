"""A llama.cpp context with a KV cache stream for every sequence; see `submission.backends.llama.schedule.Context`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from submission.backends.llama.library import LOG, call_aside, library
from submission.backends.llama.schedule import ContextFailed, Shape
from submission.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCORED_BYTES = 64 << 20  # of logits that one call may bring


class LlamaStreams:
    """See `submission.backends.llama.schedule.Context`.

    A stream of its own for every sequence (`kv_unified` off): with one buffer for all, attention is computed
    across sequences and thrown away.

    Args:
        model: as `open_model` gave it.
        shape: streams and the tokens of each.
        batch: most tokens of one call.
        threads: to compute with.
        adapter: as `open_adapter` gave it, with its scale; None for none.

    Raises:
        ContextFailed: there is no memory for it.
        UserError: the adapter does not go with it.
    """

    def __init__(
        self, model: Any, shape: Shape, *, batch: int, threads: int, adapter: tuple[Any, float] | None = None
    ) -> None:
        import numpy as np

        lib = self._lib = library()
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.shape = shape
        self.batch = max(batch, shape.streams)
        self.most_scored = max(shape.streams, min(self.batch, SCORED_BYTES // (4 * self._vocabulary)))
        # Recurrent state cannot go back a step, so nothing is shared there.
        self.can_trim = not (lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model))
        params = lib.llama_context_default_params()
        params.n_ctx = shape.streams * shape.cells
        params.n_seq_max = shape.streams
        params.n_batch = params.n_ubatch = self.batch
        params.n_outputs_max = self.most_scored
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.no_perf = True
        self._context = call_aside(lambda: lib.llama_init_from_model(model, params))
        if not self._context:
            raise ContextFailed(f"no context for {shape.streams} x {shape.cells} tokens {LOG.error()}")
        self._memory = lib.llama_get_memory(self._context)
        if adapter is not None:
            adapters = (lib.llama_adapter_lora_p_ctypes * 1)(adapter[0])
            scales = (ctypes.c_float * 1)(adapter[1])
            if lib.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
                raise UserError(f"the adapter could not be applied {LOG.error()}")
        # llama_batch over arrays of numpy: filled without a loop.
        self._tokens = np.zeros(self.batch, np.int32)
        self._positions = np.zeros(self.batch, np.int32)
        self._sequences = np.zeros(self.batch, np.int32)
        self._scored = np.zeros(self.batch, np.int8)
        self._counts = np.ones(self.batch, np.int32)
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(self.batch + 1, dtype=np.uintp)
        self._pointers[-1] = 0

        def as_pointer(array: NDArray[Any], kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        self._batch = lib.llama_batch(
            n_tokens=0,
            token=as_pointer(self._tokens, ctypes.c_int32),
            embd=None,
            pos=as_pointer(self._positions, ctypes.c_int32),
            n_seq_id=as_pointer(self._counts, ctypes.c_int32),
            seq_id=as_pointer(self._pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=as_pointer(self._scored, ctypes.c_int8),
        )

    def run(
        self, first: int, tokens: NDArray[np.int32], starts: NDArray[np.int32], scored: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        import numpy as np

        rows, width = tokens.shape
        count = rows * width
        self._tokens[:count] = tokens.ravel()
        self._positions[:count] = (starts[:, None] + np.arange(width, dtype=np.int32)).ravel()
        self._sequences[:count] = np.repeat(np.arange(first, first + rows, dtype=np.int32), width)
        self._scored[:count] = scored.ravel()
        self._batch.n_tokens = count
        status = self._lib.llama_decode(self._context, self._batch)
        if status != 0:
            raise ContextFailed(f"llama_decode failed with status {status} {LOG.error()}".strip())
        outputs = int(self._scored[:count].sum())
        if not outputs:
            return np.empty((0, self._vocabulary), np.float32)
        pointer = self._lib.llama_get_logits(self._context)  # waits for the computation
        return np.ctypeslib.as_array(pointer, shape=(outputs, self._vocabulary))

    def copy(self, source: int, target: int) -> None:
        # Between streams only the whole is copied; a range would end the process.
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def trim(self, stream: int, length: int) -> bool:
        return bool(self._lib.llama_memory_seq_rm(self._memory, stream, length, -1))

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
