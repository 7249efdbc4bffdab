"""GGUF models on the CPU (or whatever llama.cpp was built for), many sequences at a time.

    python -m submission predict test.csv -o submission.csv --backend llama_cpp --model model.gguf

llama-cpp-python's low-level API does the computing; `submission.backends.schedule` says what is computed when.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from submission.backends.common import Asked, log_probabilities, memory_budget, stop_at, stream_seed, thread_count
from submission.backends.embedded import fast_embedded
from submission.backends.llama_library import (
    cache_bytes_per_token,
    library,
    load_adapter,
    load_model,
    trained_context,
)
from submission.backends.llama_streams import LlamaStreams
from submission.backends.llama_tokenizer import GgufTokenizer
from submission.backends.schedule import Limits, Prompt, Scheduler, Shape, Text
from submission.errors import UserError
from submission.models import EMBEDDED, check_gguf_adapter, content_hash, resolve_gguf
from submission.prompts import ChatEncoder
from submission.types import Chat, Completion, LogLikelihood, Request, Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from submission.backends import ModelSpec

T = TypeVar("T")

# Measured: with more streams a step costs less per token, up to here; each takes memory.
_STREAMS = 32
_CELLS = 768  # tokens that each of so many streams has room for unless memory is short


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    threads: 0 means every core this process may use.
    batch: tokens per call of llama_decode.
    streams: sequences that are decoded together at most; 0 means what measured best.
    memory: megabytes that the KV cache may take; 0 means a quarter of what is free.
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
    check_gguf_adapter(spec.adapter)
    if spec.options.context < 128:
        raise UserError("option context for backend llama_cpp must be at least 128 tokens")
    if spec.options.batch < 1:
        raise UserError("option batch for backend llama_cpp must be at least 1")
    if spec.options.streams > 255:
        raise UserError("option streams for backend llama_cpp must be at most 255")


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """What decides the answers: weights, adapter, its scale and the room for a prompt."""
    marks = {"model": content_hash(_model_file(spec.model)), "context": str(spec.options.context)}
    if spec.adapter:
        marks["adapter"] = f"{content_hash(spec.adapter)} x {spec.options.adapter_scale:g}"
    return marks


def load(spec: ModelSpec) -> LlamaCpp:
    """Load the model; a context is made when the first requests tell what it must hold."""
    return LlamaCpp(_model_file(spec.model), spec.adapter, spec.options)


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """Load the vocabulary only."""
    model = load_model(resolve_gguf(spec.model), vocab_only=True, gpu_layers=0)
    return ChatEncoder(GgufTokenizer(model), _context_size(model, spec.options))


class LlamaCpp:
    """A GGUF model and the contexts that it needs, one at a time."""

    def __init__(self, model: Path, adapter: Path | None, options: Options) -> None:
        self._model = load_model(model, vocab_only=False, gpu_layers=options.gpu_layers)
        self.tokenizer = GgufTokenizer(self._model)
        self.encoder = ChatEncoder(self.tokenizer, _context_size(self._model, options))
        loaded = (load_adapter(self._model, adapter), options.adapter_scale) if adapter else None
        threads = thread_count(options.threads)
        self._drawer = _Drawer(self.tokenizer, threads)

        def new_context(shape: Shape) -> LlamaStreams:
            return LlamaStreams(self._model, shape, batch=options.batch, threads=threads, adapter=loaded)

        self._scheduler = Scheduler(new_context, _limits(self._model, options))

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """See `submission.types.Backend`."""
        import numpy as np

        def prompts() -> Iterator[Prompt]:
            for request in requests:
                encoded = self.encoder.encode_for(request.chat, request.sampling.max_new_tokens)
                asked = Asked(request, encoded, [None] * request.sampling.n)
                ids = np.array(encoded.ids, np.int32)
                yield Prompt(ids, request.sampling.max_new_tokens, request.sampling.n, asked)

        for answer in self._scheduler.generate(prompts(), self._drawer):
            answer.asked.completions[answer.number] = answer.completion()
            yield from answer.asked.when_complete()

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood]]:
        """See `submission.types.Backend`."""
        import numpy as np

        empty: list[str] = []

        def texts() -> Iterator[Text]:
            for key, chat, continuation in items:
                ids = self.encoder.encode_continuation(continuation)
                prompt = self.encoder.encode_for(chat, len(ids)).ids
                if ids:
                    yield Text(np.array([*prompt, *ids], np.int32), len(prompt), key)
                else:
                    empty.append(key)

        for text in self._scheduler.score(texts(), self._drawer.log_probabilities):
            yield text.payload, LogLikelihood(text.total, len(text.ids) - text.scored_from)
        for key in empty:
            yield key, LogLikelihood(0.0, 0)


class _Answer:
    """One answer on its way."""

    def __init__(self, asked: Asked, number: int, chain: Any) -> None:
        self.asked = asked
        self.number = number
        self.chain = chain
        self._content = b""
        self._text: str | None = None  # the final one, if a stop string ended it
        self._tokens = 0
        self._logprob = 0.0
        self._ended = False

    def add(self, token: int, logprob: float, tokenizer: GgufTokenizer) -> bool:
        """Add a token; True if the answer is complete with it."""
        sampling = self.asked.request.sampling
        self._tokens += 1
        self._logprob += logprob
        if tokenizer.ends_answer(token):
            self._ended = True
            return True
        piece = tokenizer.piece(token, special=False)
        self._content += piece
        if sampling.stop:
            # Only the end can hold a new one.
            tail = len(piece) + max(len(stop.encode()) for stop in sampling.stop) + 4
            if stop_at(self._content[-tail:].decode("utf-8", "replace"), sampling.stop) is not None:
                self._text = stop_at(self._content.decode("utf-8", "replace"), sampling.stop)
        return self._text is not None or self._tokens == sampling.max_new_tokens

    def completion(self) -> Completion:
        encoded = self.asked.encoded
        return Completion(
            self._content.decode("utf-8", "replace") if self._text is None else self._text,
            self._logprob,
            self._tokens,
            "stop" if self._ended or self._text is not None else "length",
            len(encoded.ids),
            encoded.truncated,
        )


class _Drawer:
    """Draws the next tokens: the best ones in numpy, random ones in llama.cpp's sampler chain."""

    def __init__(self, tokenizer: GgufTokenizer, threads: int) -> None:
        import numpy as np

        self._lib = library()
        self._tokenizer = tokenizer
        # numpy and llama.cpp let go of the interpreter's lock in the long loops over the vocabulary.
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="draw")
        self._blank = np.zeros(tokenizer.size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._blank["id"] = np.arange(tokenizer.size)

    def begin(self, prompt: Prompt, number: int) -> _Answer:
        """See `submission.backends.schedule.Answers`."""
        asked: Asked = prompt.payload
        sampling = asked.request.sampling
        return _Answer(asked, number, self._chain(sampling, stream_seed(sampling.seed, asked.request.key, number)))

    def extend(self, states: Sequence[_Answer], logits: NDArray[np.float32]) -> list[int | None]:
        """See `submission.backends.schedule.Answers`."""
        drawn = self._in_parts(lambda part: self._draw(states[part], logits[part]), len(states))
        tokens: list[int | None] = []
        for answer, (token, logprob) in zip(states, (pair for part in drawn for pair in part), strict=True):
            tokens.append(None if answer.add(token, logprob, self._tokenizer) else token)
        return tokens

    def log_probabilities(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """See `submission.backends.schedule.Scorer`."""
        import numpy as np

        parts = self._in_parts(lambda part: log_probabilities(logits[part], tokens[part]), len(tokens))
        return np.concatenate(parts)

    def _in_parts(self, work: Callable[[slice], T], count: int) -> list[T]:
        size = -(-count // self._threads)
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return [work(parts[0])] if len(parts) == 1 else list(self._pool.map(work, parts))

    def _draw(self, answers: Sequence[_Answer], logits: NDArray[np.float32]) -> list[tuple[int, float]]:
        import numpy as np

        tokens = np.array(
            [
                row.argmax() if answer.chain is None else self._sample(answer.chain, row)
                for answer, row in zip(answers, logits, strict=True)
            ],
            np.int32,
        )
        return list(zip(tokens.tolist(), log_probabilities(logits, tokens).tolist(), strict=True))

    def _sample(self, chain: _Chain, logits: NDArray[np.float32]) -> int:
        lib = self._lib
        candidates = self._blank.copy()
        candidates["logit"] = logits
        array = lib.llama_token_data_array(
            data=candidates.ctypes.data_as(lib.llama_token_data_p), size=len(candidates), selected=-1, sorted=False
        )
        lib.llama_sampler_apply(chain.pointer, ctypes.byref(array))
        # Samplers sort and cut in place.
        return int(candidates["id"][array.selected])

    def _chain(self, sampling: Sampling, seed: int) -> _Chain | None:
        """llama.cpp's sampler chain; None for greedy."""
        if sampling.temperature <= 0:
            return None
        lib = self._lib
        samplers = [lib.llama_sampler_init_temp(sampling.temperature)]
        if sampling.top_p < 1:
            samplers.append(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            samplers.append(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        return _Chain(lib, [*samplers, lib.llama_sampler_init_dist(seed)])


class _Chain:
    """A sampler chain that is freed with its answer."""

    def __init__(self, lib: Any, samplers: Sequence[Any]) -> None:
        self._free = lib.llama_sampler_free
        self.pointer = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in samplers:
            lib.llama_sampler_chain_add(self.pointer, sampler)

    def __del__(self) -> None:
        self._free(self.pointer)


def _model_file(model: str) -> Path:
    return fast_embedded() if model == EMBEDDED else resolve_gguf(model)


def _context_size(model: Any, options: Options) -> int:
    """The context that was asked for, but no more than the model was trained with."""
    return min(options.context, trained_context(model) or options.context)


def _limits(model: Any, options: Options) -> Limits:
    streams = options.streams or _STREAMS
    budget = options.memory * 1_000_000 or memory_budget()
    return Limits(min(streams * _CELLS, budget // cache_bytes_per_token(model)), streams)
