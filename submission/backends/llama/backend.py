"""GGUF models on the CPU (or whatever llama.cpp was built for), many sequences at a time.

    python -m submission predict test.csv -o submission.csv --backend llama_cpp --model model.gguf

llama-cpp-python's low-level API does the computing; `submission.backends.llama.schedule` says what is computed when.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends.common import PendingRequest, check_context, memory_budget, scorable, thread_count
from submission.backends.hardware import free_gpu_memory, visible_gpus
from submission.backends.llama.library import (
    cache_bytes_per_token,
    library,
    open_adapter,
    open_model,
    trained_context,
)
from submission.backends.llama.probe import probe
from submission.backends.llama.sampling import LlamaSampler
from submission.backends.llama.schedule import ContextLimits, QueuedPrompt, QueuedText, Scheduler, Shape
from submission.backends.llama.streams import LlamaStreams
from submission.backends.llama.tokenizer import GgufTokenizer
from submission.backends.models import adapter_of, check_gguf_adapter, resolve_gguf
from submission.data.hashing import content_hash
from submission.errors import UserError
from submission.prompts.encoding import ChatEncoder
from submission.types import Chat, Completion, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    from submission.backends import ModelSpec

LOG = logging.getLogger(__name__)

# Measured: with more streams a step costs less per token, up to here; each takes memory.
_STREAMS = 48
_CELLS = 512  # tokens that each of so many streams has room for; longer prompts get fewer streams


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    threads: 0 means every core this process may use.
    batch: tokens per call of llama_decode.
    streams: sequences that are decoded together at most; 0 means what measured best.
    memory: megabytes that the KV cache may take; 0 means a quarter of what is free, or half of it on GPUs.
    gpu_layers: layers to put on a GPU where llama.cpp was built for one.
    adapter_scale: strength of the LoRA adapter.
    """

    context: int = 2048
    threads: int = 0
    batch: int = 512
    streams: int = 0
    memory: int = 0
    gpu_layers: int = 999
    adapter_scale: float = 1.0


def check(spec: ModelSpec) -> None:
    """Refuse a model or adapter that is not what this backend loads."""
    resolve_gguf(spec.model)
    check_gguf_adapter(adapter_of(spec.model, spec.adapter))
    check_context(spec.options.context, "llama_cpp")
    if spec.options.batch < 1:
        raise UserError("option batch for backend llama_cpp must be at least 1")
    if spec.options.streams > 255:
        raise UserError("option streams for backend llama_cpp must be at most 255")


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """What decides the answers: weights, adapter, its scale and the room for a prompt."""
    marks = {"model": content_hash(resolve_gguf(spec.model)), "context": str(spec.options.context)}
    if adapter := adapter_of(spec.model, spec.adapter):
        marks["adapter"] = f"{content_hash(adapter)} x {spec.options.adapter_scale!r}"
    return marks


def load(spec: ModelSpec) -> LlamaCpp:
    """Load the model; a context is made when the first requests tell what it must hold."""
    return LlamaCpp(resolve_gguf(spec.model), adapter_of(spec.model, spec.adapter), spec.options)


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """Load the vocabulary only."""
    path = resolve_gguf(spec.model)
    probe(path)
    model = open_model(path, vocab_only=True, gpu_layers=0)
    return ChatEncoder(GgufTokenizer(model), _context_size(model, spec.options))


class LlamaCpp:
    """A GGUF model and the contexts that it needs, one at a time."""

    def __init__(self, model: Path, adapter: Path | None, options: Options) -> None:
        if options.gpu_layers and visible_gpus() and not library().llama_supports_gpu_offload():
            LOG.warning(
                "%s is computed on the CPU and the GPU stands idle: this llama.cpp was built without CUDA. Install a "
                "CUDA build of llama-cpp-python, or choose the CPU with --set gpu_layers=0", model
            )  # fmt: skip
        self._free_model = library().llama_model_free  # at hand when the interpreter ends
        probe(model, adapter)
        self._model = open_model(model, vocab_only=False, gpu_layers=options.gpu_layers)
        self.tokenizer = GgufTokenizer(self._model)
        self.encoder = ChatEncoder(self.tokenizer, _context_size(self._model, options))
        self._adapter = (open_adapter(self._model, adapter), options.adapter_scale) if adapter else None
        self._batch = options.batch
        self._threads = thread_count(options.threads)
        self._sampler = LlamaSampler(self.tokenizer, self._threads)
        self._scheduler = Scheduler(self.new_context, _limits(self._model, options))

    def new_context(self, shape: Shape) -> LlamaStreams:
        """A context of this model.

        Raises:
            ContextFailed: there is no memory for it.
        """
        return LlamaStreams(self._model, shape, batch=self._batch, threads=self._threads, adapter=self._adapter)

    def __del__(self) -> None:
        # Contexts go before the model that they use. Either may be missing after a failed start.
        if (scheduler := getattr(self, "_scheduler", None)) is not None:
            scheduler.close()
        if (model := getattr(self, "_model", None)) is not None:
            self._free_model(model)

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]:
        """See `submission.types.Backend`."""
        import numpy as np

        def prompts() -> Iterator[QueuedPrompt]:
            for request in requests:
                encoded = self.encoder.encode_for(request.chat, request.sampling.max_new_tokens)
                asked = PendingRequest(request, encoded)
                ids = np.array(encoded.ids, np.int32)
                yield QueuedPrompt(ids, request.sampling.max_new_tokens, request.sampling.n, asked)

        for answer in self._scheduler.generate(prompts(), self._sampler):
            yield from answer.asked.take(answer.number, answer.completion())

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`."""
        without: list[tuple[str, LogLikelihood | Failure]] = []  # what needs no computing
        texts = (QueuedText(ids, scored_from, key) for key, ids, scored_from in scorable(items, self.encoder, without))
        for text in self._scheduler.score(texts, self._sampler.log_probabilities):
            yield text.payload, LogLikelihood(text.total, len(text.ids) - text.scored_from, text.scored_from)
        yield from without


def _context_size(model: Any, options: Options) -> int:
    """The context that was asked for, but no more than the model was trained with."""
    return min(options.context, trained_context(model) or options.context)


def _limits(model: Any, options: Options) -> ContextLimits:
    streams = options.streams or _STREAMS
    return ContextLimits(min(streams * _CELLS, _cache_budget(options) // cache_bytes_per_token(model)), streams)


def _cache_budget(options: Options) -> int:
    """Bytes that the KV cache may take, once the weights are loaded: it lies where they do."""
    if options.memory:
        return options.memory * 1_000_000
    if options.gpu_layers and library().llama_supports_gpu_offload() and (free := free_gpu_memory()):
        return free // 2  # the rest is for the buffers of a step
    return memory_budget()
