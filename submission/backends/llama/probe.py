"""Loads a GGUF file in a process of its own first: llama.cpp ends the process that loads a damaged or hostile one.

    python -m submission.backends.llama.probe model.gguf [adapter.gguf]

A file that loaded is remembered until it changes, so that this is done once.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from submission.backends.common import package_path
from submission.backends.models import embedded_gguf, tuned_adapter
from submission.data.files import cache_folder
from submission.data.hashing import recall, remember
from submission.data.outputs import installed_version
from submission.errors import PromptRecoveryError, UserError

_SECONDS = 300.0  # for the largest file on a slow disk
_MEMORY = 8 << 30  # bytes beyond twice the file
_MARKS = ("GGML_ASSERT", "error", "terminate", "what()", "Error")  # in the line that tells why


def probe(model: Path, adapter: Path | None = None) -> None:
    """Refuse a model, or an adapter for it, that cannot be loaded.

    Raises:
        UserError: the process that tried it died or refused; with its last words.
    """
    last = adapter or model
    if _is_packaged(last) and _is_packaged(model):
        return
    mark = [installed_version("llama-cpp-python"), str(model) if adapter else ""]
    if recall(last, "loaded") == mark and (adapter is None or recall(model, "loaded") is not None):
        return
    before = last.stat()
    what = f"adapter {adapter}" if adapter else f"model {model}"
    command = [
        sys.executable,
        "-m",
        "submission.backends.llama.probe",
        str(model),
        *([str(adapter)] if adapter else []),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
            env={**os.environ, **package_path(), "GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"{what} cannot be loaded by llama.cpp: it did not finish in {_SECONDS:.0f} s") from None
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise UserError(
            f"{what} cannot be loaded by llama.cpp: it ended the process with {how}{_reason(done.stderr)}\n"
            "The file is damaged, or made to do harm."
        )
    remember(last, "loaded", mark, before)


def _is_packaged(path: Path) -> bool:
    return path in (embedded_gguf(), tuned_adapter()) or path.is_relative_to(cache_folder("models"))


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if any(mark in line for mark in _MARKS)]
    return f" ({lines[-1][-200:]})" if lines else ""


def main() -> int:
    """Load what the command line names and compute with it; 0 if that can be done, 2 if llama.cpp refuses it."""
    import numpy as np

    from submission.backends.llama.library import open_adapter, open_model
    from submission.backends.llama.schedule import Shape
    from submission.backends.llama.streams import LlamaStreams
    from submission.backends.llama.tokenizer import GgufTokenizer

    model, adapter = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
    limit = 2 * model.stat().st_size + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # a header may ask for more than there is
    try:
        loaded = open_model(model, vocab_only=False, gpu_layers=0)
        beside = (open_adapter(loaded, adapter), 1.0) if adapter else None
        tokenizer = GgufTokenizer(loaded)
        tokens = np.array([tokenizer.tokenize("A b c", at_start=True)[:4]], np.int32)
        tokenizer.detokenize(tokens[0].tolist())
        context = LlamaStreams(loaded, Shape(1, 64), batch=8, threads=1, adapter=beside)
        logits = context.run(0, tokens, np.zeros(1, np.int32), np.ones(tokens.shape, np.bool_))
        if not np.isfinite(logits).all():
            raise UserError(f"{adapter or model} gives numbers that are not finite: its weights are damaged")
    except PromptRecoveryError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # what llama.cpp would free need not be freed
