"""What a user would pick instead of this program: the same prompts through other ways of running the same weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.backends.llama.library import encode_weights, library
from submission.backends.models import EMBEDDED, resolve_gguf
from submission.errors import UserError

_CLIENTS = 8
_STARTS_WITHIN = 60  # seconds
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy: servers are on this machine
_F16 = 1  # llama_ftype in llama.h


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts as token ids, each answered with up to `new_tokens` tokens or until one of `ends`."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int
    ends: Collection[int]
    samples: int = 1
    temperature: float = 0.0


@contextmanager
def half_precision(model: str, threads: int) -> Iterator[Path]:
    """The GGUF file that others run: that of the embedded model in 16 bits, as this program computes it.

    Raises:
        UserError: there is no such file.
    """
    file = resolve_gguf(model)
    if model != EMBEDDED:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        encoded = Path(folder) / "embedded-f16.gguf"
        if not encode_weights(file, encoded, _F16, threads):
            raise UserError(f"llama.cpp cannot encode {file} in 16 bits")
        yield encoded


class LlamaCppPython:
    """llama-cpp-python's own class, one `create_completion` a row; it reuses what a row shares with the one before."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        library()
        from llama_cpp import Llama

        self._model = Llama(
            str(model), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def __call__(self, load: Load) -> None:
        self._model.reset()
        for prompt in load.prompts:
            self._model.create_completion(list(prompt), max_tokens=load.new_tokens, temperature=0.0)


class GenAi:
    """OpenVINO GenAI's own continuous batching over the model that this program runs, loading left out."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.cache_size = 512, 48, 2
        scheduler.dynamic_split_fuse = scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_PRECISION_HINT": dtype, "INFERENCE_NUM_THREADS": threads}
        self._arguments = (folder, scheduler, "CPU", properties)
        self._model: Any = None

    def forget(self) -> None:
        """Begin with an empty cache of prompts."""
        self._model = None  # one at a time
        self._model = self._genai.ContinuousBatchingPipeline(*self._arguments)

    def __call__(self, load: Load) -> None:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.stop_token_ids = load.new_tokens, set(load.ends)
        config.do_sample = load.temperature > 0
        if config.do_sample:
            config.temperature, config.num_return_sequences = load.temperature, load.samples
        prompts = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in load.prompts]
        self._model.generate(prompts, [config] * len(prompts))


class LlamaServer:
    """llama.cpp's server with eight slots, asked by eight clients at once."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, load: Load) -> None:
        def ask(prompt: Sequence[int]) -> None:
            body = {
                "prompt": list(prompt), "n_predict": load.new_tokens, "temperature": 0.0, "cache_prompt": True,
            }  # fmt: skip
            request = urllib.request.Request(
                f"{self._url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with _open(request, timeout=600) as answer:
                json.load(answer)

        with ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(ask, load.prompts))


@contextmanager
def llama_server(binary: Path, model: Path, threads: int, context: int) -> Iterator[LlamaServer]:
    """Run a server on the loopback interface.

    Args:
        context: tokens of each slot.

    Raises:
        UserError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(binary), "-m", str(model), "-np", str(_CLIENTS), "-c", str(_CLIENTS * context), "-t", str(threads),
        "-tb", str(threads), "--host", "127.0.0.1", "--port", str(port),
        "--cache-ram", "0",  # or a second repeat would find its prompts computed
    ]  # fmt: skip
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"--llama-server {binary} cannot be run: {error}") from None
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + _STARTS_WITHIN
        while time.monotonic() < end:
            if process.poll() is not None:
                raise UserError(f"--llama-server {binary} ended with exit code {process.returncode}")
            try:
                with _open(f"{url}/health", timeout=5):
                    break
            except OSError:  # not there yet, or still loading
                time.sleep(0.1)
        else:
            raise UserError(f"--llama-server {binary} did not answer within {_STARTS_WITHIN} s")
        yield LlamaServer(url)
    finally:
        process.terminate()
        process.wait()


class Vllm:
    """vLLM in the Python of another environment, loading left out; see `eval.vllm_peer`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def forget(self) -> None:
        """Begin with an empty cache of prompts."""
        self._ask(do="forget")

    def __call__(self, load: Load) -> None:
        self._ask(
            do="generate", prompts=[list(prompt) for prompt in load.prompts], new_tokens=load.new_tokens,
            ends=sorted(load.ends), samples=load.samples, temperature=load.temperature,
        )  # fmt: skip

    def score(self, texts: Sequence[Sequence[int]]) -> None:
        """Probabilities of all tokens of texts."""
        self._ask(do="score", texts=[list(ids) for ids in texts])

    def wait(self) -> None:
        """Wait for a line that it tells.

        Raises:
            UserError: it ended.
        """
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise UserError(f"vLLM ended with exit code {self._process.wait()}: see what it says above")

    def _ask(self, **command: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which its answer tells
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        self.wait()


@contextmanager
def vllm_peer(python: Path, model: Path, dtype: str, threads: int, context: int) -> Iterator[Vllm]:
    """Run vLLM with the weights of a GGUF file, dequantised to a folder for it; see `vllm_with`."""
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-vllm-") as folder:
        _dequantise(model, Path(folder), dtype)
        with vllm_with(python, Path(folder), dtype, threads, context) as peer:
            yield peer


@contextmanager
def vllm_with(python: Path, folder: Path, dtype: str, threads: int, context: int) -> Iterator[Vllm]:
    """Run vLLM with a transformers folder.

    Args:
        python: of an environment that has vLLM.
        folder: of the model.
        dtype: float32 or bfloat16.
        threads: of a CPU.
        context: tokens of a prompt and its answer.

    Raises:
        UserError: it does not start.
    """
    program = Path(__file__).with_name("vllm_peer.py")
    command = [str(python), "-P", str(program), str(folder), dtype, str(context)]
    more = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    try:
        process = subprocess.Popen(
            command, env={**os.environ, **more}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise UserError(f"--vllm {python} cannot be run: {error}") from None
    with process:
        try:
            peer = Vllm(process)
            peer.wait()
            yield peer
        finally:
            process.kill()


def _dequantise(model: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype), local_files_only=True,
    )  # fmt: skip
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config  # its weights are plain now
    loaded.save_pretrained(folder)
