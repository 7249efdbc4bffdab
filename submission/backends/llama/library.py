"""llama.cpp as a library: its log kept quiet, models loaded, facts about them, weights encoded anew."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submission.backends.common import processor_has
from submission.errors import UserError


class _Log:
    """Keeps llama.cpp quiet and remembers what it complains of, for our own messages."""

    def __init__(self) -> None:
        self._callback: Any = None
        self._errors: list[str] = []

    def capture(self, lib: Any) -> None:
        if self._callback is None:

            @lib.llama_log_callback  # type: ignore[untyped-decorator]
            def callback(level: int, text: bytes, user_data: object) -> None:
                if level == 4 and text.strip():  # GGML_LOG_LEVEL_ERROR
                    self._errors.append(text.decode("utf-8", "replace").strip())

            self._callback = callback
            lib.llama_backend_init()
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))
        self._errors.clear()

    def error(self) -> str:
        """The first complaint since the last call of `capture`: those after it say only that something failed."""
        return f"({self._errors[0][:300]})" if self._errors else ""


LOG = _Log()


def library() -> Any:
    """The module llama_cpp, made ready.

    Raises:
        UserError: it is installed and cannot be loaded.
    """
    # Read when OpenMP is loaded. Threads that wait in a loop for one that has no core are three times as slow beside
    # another such process; those that give way at once are a seventh slower alone. A short loop costs neither.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a debugger's pages are no message
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"llama-cpp-python is installed but cannot be loaded: {error}") from error
    LOG.capture(llama_cpp)
    if processor_has("amx_int8"):
        _leave_amx(llama_cpp.llama_cpp, llama_cpp)
    return llama_cpp


def _leave_amx(*modules: Any) -> None:
    """Have models loaded without llama.cpp's own layouts of quantised weights, those for AMX among them.

    Compiled by some versions of GCC it loads a tile configuration that the compiler has left out, and the process ends
    with a general protection fault at the first quantised product (llama.cpp pull request 26954, open; seen with GCC
    12.2). 16-bit weights are not concerned.
    """
    usual = modules[0].llama_model_default_params
    if getattr(usual, "leaves_amx", False):
        return

    def params() -> Any:
        found = usual()
        found.use_extra_bufts = False
        return found

    params.leaves_amx = True  # type: ignore[attr-defined]
    for module in modules:
        module.llama_model_default_params = params


def open_model(path: Path, *, vocab_only: bool, gpu_layers: int) -> Any:
    """Load a GGUF file; one that is damaged may end this process (see `submission.backends.llama.probe`).

    Raises:
        UserError: llama.cpp cannot load it.
    """
    lib = library()
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = gpu_layers
    model = call_aside(lambda: lib.llama_model_load_from_file(os.fsencode(path), params))
    if not model:
        raise UserError(f"model {path} cannot be loaded by llama.cpp {LOG.error()}{_advice()}")
    return model


def open_adapter(model: Any, path: Path) -> Any:
    """Load a GGUF LoRA file for a model; one that is damaged may end this process.

    Raises:
        UserError: it does not fit.
    """
    adapter = call_aside(lambda: library().llama_adapter_lora_init(model, os.fsencode(path)))
    if not adapter:
        raise UserError(f"adapter {path} does not fit this model {LOG.error()}{_advice()}")
    return adapter


def _advice() -> str:
    cut = any(words in LOG.error() for words in ("not within the file bounds", "failed to read", "remaining file size"))
    return "\nThe file is not whole: copy or download it again." if cut else ""


def encode_weights(source: Path, target: Path, file_type: int, threads: int) -> bool:
    """Write a GGUF file with its weights in another encoding (llama_ftype); False if llama.cpp could not."""
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = threads
    params.allow_requantize = True
    status = call_aside(
        lambda: lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    )
    return bool(status == 0)


def call_aside(function: Callable[[], Any]) -> Any:
    """Call in a thread of its own.

    Signal handlers run in the main thread, and inside a callback of ctypes the exception that they raise would
    be lost; llama.cpp calls back for every line of its log.
    """
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        thread.join()  # the library must not lose the interpreter under its feet
        raise
    return results[0]


def trained_context(model: Any) -> int | None:
    """The tokens that the model was trained to attend to; None if the file does not say."""
    architecture = _metadata(model, b"general.architecture")
    # Read from the metadata: a model loaded for its vocabulary only does not know its sizes.
    trained = _metadata(model, architecture + b".context_length")
    return int(trained) if trained.isdigit() else None


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that a token takes in the KV cache (16-bit floats, all layers)."""
    lib = library()
    architecture = _metadata(model, b"general.architecture")
    heads = max(1, lib.llama_model_n_head(model))
    width = lib.llama_model_n_embd(model) // heads
    sizes = [_metadata(model, architecture + name) for name in (b".attention.key_length", b".attention.value_length")]
    per_head = sum(int(size) if size.isdigit() else width for size in sizes)
    return int(2 * lib.llama_model_n_layer(model) * max(1, lib.llama_model_n_head_kv(model)) * per_head)


def _metadata(model: Any, key: bytes) -> bytes:
    import llama_cpp

    buffer = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_meta_val_str(model, key, buffer, len(buffer))
    return buffer.value
