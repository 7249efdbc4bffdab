"""What a user would pick instead of this program: the same prompts through other ways of running the same weights."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends.llama.library import library
from submission.backends.llama.streams import LlamaStreams
from submission.backends.schedule import PAD, QueuedText, Shape
from submission.backends.window import common_length, in_order
from submission.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from submission.backends.llama.backend import LlamaCpp

_CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts as token ids, each answered greedily with up to `new_tokens` tokens."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int


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


class TransformersRows:
    """transformers in 32-bit floats, one `generate` a row."""

    def __init__(self, model: Path, threads: int) -> None:
        import torch

        from submission.backends.transformers.loading import load_model

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = load_model(model, None, device="cpu", dtype="float32", load_in_4bit=False)

    def __call__(self, load: Load) -> None:
        with self._torch.inference_mode():
            for prompt in load.prompts:
                ids = self._torch.tensor([list(prompt)])
                self._model.generate(ids, max_new_tokens=load.new_tokens, do_sample=False, pad_token_id=0)


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
            with urllib.request.urlopen(request, timeout=600) as answer:
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
        for _ in range(600):
            if process.poll() is not None:
                raise UserError(f"--llama-server {binary} ended with exit code {process.returncode}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:  # not there yet, or still loading
                time.sleep(0.1)
        else:
            raise UserError(f"--llama-server {binary} did not answer within a minute")
        yield LlamaServer(url)
    finally:
        process.terminate()
        process.wait()


class BareLoop:
    """`llama_decode` and nothing else: the shared beginning once, prompts one by one, answers in lockstep.

    No sampling, no text: tokens are made up, their numbers are those of a real run. What remains between this and a
    real run is the price of everything else.
    """

    def __init__(self, backend: LlamaCpp) -> None:
        self._backend = backend

    def __call__(self, load: Load, answered: Sequence[int], streams: int) -> None:
        """Compute.

        Args:
            load: the prompts.
            answered: tokens of each answer.
            streams: answers that are decoded together.
        """
        import numpy as np

        order = sorted(range(len(load.prompts)), key=lambda row: -len(load.prompts[row]))
        prompts = [np.array(load.prompts[row], np.int32) for row in order]
        counts = [answered[row] for row in order]
        shared = min(common_length(prompts[0], prompt) for prompt in prompts) if len(prompts) > 1 else 0
        shared = min(shared, min(map(len, prompts)) - 1)
        longest = max(len(prompt) + count for prompt, count in zip(prompts, counts, strict=True))
        context = self._backend.new_context(Shape(min(streams, len(prompts)), -(-longest // PAD) * PAD))
        try:
            _feed(context, 0, prompts[0][:shared], 0, shared)
            for stream in range(1, context.shape.streams):
                context.copy(0, stream)
            for first in range(0, len(prompts), context.shape.streams):
                wave = slice(first, first + context.shape.streams)
                # The longest answers in the first streams: those that go on stay neighbours.
                rows = sorted(zip(prompts[wave], counts[wave], strict=True), key=lambda row: -row[1])
                for stream, (prompt, _) in enumerate(rows):
                    context.trim(stream, shared)
                    _feed(context, stream, prompt, shared, len(prompt) - 1)
                lengths = np.array([len(prompt) for prompt, _ in rows], np.int32)
                for step in range(1, max(count for _, count in rows)):
                    going = sum(count > step for _, count in rows)
                    tokens = np.full((going, 1), 100, np.int32)
                    context.run(0, tokens, lengths[:going] + step - 1, np.ones((going, 1), np.bool_))
        finally:
            context.close()

    def score(self, texts: Sequence[QueuedText]) -> None:
        """Compute texts, one after the other, with logits where they are scored; a shared beginning is kept."""
        context = self._backend.new_context(Shape(1, -(-max(text.need for text in texts) // PAD) * PAD))
        try:
            held: NDArray[np.int32] | None = None
            for text in in_order(texts):
                fed = text.ids[:-1]
                shared = min(common_length(held, fed), text.scored_from - 1) if held is not None else 0
                context.trim(0, shared)
                _feed(context, 0, fed, shared, text.scored_from - 1)
                held = fed
        finally:
            context.close()


def _feed(context: LlamaStreams, stream: int, ids: NDArray[np.int32], start: int, scored_from: int) -> None:
    import numpy as np

    while start < len(ids):
        width = min(context.batch, len(ids) - start, max(0, scored_from - start) + context.most_scored)
        scored: NDArray[Any] = np.arange(start, start + width) >= scored_from
        context.run(stream, ids[None, start : start + width], np.array([start], np.int32), scored[None])
        start += width
