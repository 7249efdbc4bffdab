"""GGUF models on the CPU (or whatever llama.cpp was built for), through llama-cpp-python's low-level API.

    python -m submission predict test.csv -o submission.csv --backend llama_cpp --model model.gguf

Rows are answered one after the other; the beginning that a prompt shares with the one before it is not
computed again, and the samples of a row share its prompt.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends.common import log_probability, stop_at, stream_seed, thread_count
from submission.errors import BackendError, UserError
from submission.models import check_gguf_adapter, content_hash, resolve_gguf
from submission.prompts import ChatEncoder, EncodedPrompt, SpecialToken, looks_like_markup, plain_layout
from submission.types import Chat, Completion, LogLikelihood, Request, Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from submission.backends import ModelSpec

# llama_token_attr in llama.h
_CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1 << 3, 1 << 4, 1 << 7, 1 << 8


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    threads: 0 means every core this process may use.
    batch: prompt tokens per call of llama_decode.
    gpu_layers: layers to put on a GPU where llama.cpp was built for one.
    adapter_scale: strength of the LoRA adapter.
    """

    context: int = 2048
    threads: int = 0
    batch: int = 512
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


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """What decides the answers: weights, adapter, its scale and the room for a prompt."""
    marks = {"model": content_hash(resolve_gguf(spec.model)), "context": str(spec.options.context)}
    if spec.adapter:
        marks["adapter"] = f"{content_hash(spec.adapter)} x {spec.options.adapter_scale:g}"
    return marks


def load(spec: ModelSpec) -> LlamaCpp:
    """Load the model and make a context for one sequence."""
    return LlamaCpp(resolve_gguf(spec.model), spec.adapter, spec.options)


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """Load the vocabulary only."""
    model = _load_model(resolve_gguf(spec.model), spec.options, vocab_only=True)
    return ChatEncoder(GgufTokenizer(model), _context_size(model, spec.options))


class GgufTokenizer:
    """The tokenizer and chat template of a GGUF file; see `submission.prompts.Tokenizer`."""

    def __init__(self, model: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._model = model
        self.vocab = llama_cpp.llama_model_get_vocab(model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        special: dict[str, SpecialToken] = {}
        for token in range(self.size):
            attributes = llama_cpp.llama_vocab_get_attr(self.vocab, token)
            if not attributes & (_CONTROL | _USER_DEFINED):
                continue
            text = llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")
            if not text or not (attributes & _CONTROL or looks_like_markup(text)):
                continue
            special[text] = SpecialToken(token, bool(attributes & _LSTRIP), bool(attributes & _RSTRIP))
        self.specials: Mapping[str, SpecialToken] = special
        adds_bos = llama_cpp.llama_vocab_get_add_bos(self.vocab)
        self.bos: int | None = llama_cpp.llama_vocab_bos(self.vocab) if adds_bos else None
        self._format = self._chat_format()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self._format is None:
            return plain_layout(messages)
        return str(self._format(messages=list(messages)).prompt)

    def tokenize(self, text: str, *, at_start: bool) -> list[int]:
        del at_start  # llama.cpp puts its blank before any text that follows a special token
        content = text.encode("utf-8", "replace")
        room = len(content) + 8
        while True:
            buffer = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self.vocab, content, len(content), buffer, room, False, False)
            if count >= 0:
                return list(buffer[:count])
            room = -count

    def detokenize(self, ids: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in ids).decode("utf-8", "replace")

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """The bytes of one token; those of a special token are empty unless `special`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = self._lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def _chat_format(self) -> Any:
        template = self._lib.llama_model_chat_template(self._model, None)
        if not template:
            return None
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def text_of(token: int) -> str:
            return self._lib.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace") if token >= 0 else ""

        try:
            return Jinja2ChatFormatter(
                template=template.decode("utf-8", "replace"),
                eos_token=text_of(self._lib.llama_vocab_eos(self.vocab)),
                bos_token=text_of(self._lib.llama_vocab_bos(self.vocab)),
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template cannot be read: {error}") from error


class LlamaCpp:
    """A GGUF model and one llama.cpp context."""

    def __init__(self, model: Path, adapter: Path | None, options: Options) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._options = options
        self._model = _load_model(model, options, vocab_only=False)
        self.tokenizer = GgufTokenizer(self._model)
        self.encoder = ChatEncoder(self.tokenizer, _context_size(self._model, options))
        self._context = self._new_context()
        self._memory = llama_cpp.llama_get_memory(self._context)
        if adapter is not None:
            self._set_adapter(adapter)
        self._batch = llama_cpp.llama_batch_init(options.batch, 0, 1)
        self._fed: list[int] = []  # what the context holds

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """See `submission.types.Backend`."""
        for request in requests:
            prompt = self.encoder.encode_for(request.chat, request.sampling.max_new_tokens)
            yield request.key, self._answer(prompt, request)

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood]]:
        """See `submission.types.Backend`."""
        for key, chat, continuation in items:
            ids = self.encoder.encode_continuation(continuation)
            prompt = self.encoder.encode_for(chat, len(ids))
            total = 0.0
            for position, token in enumerate(ids):
                self._feed([*prompt.ids, *ids[:position]])
                total += log_probability(self._logits(), token)
            yield key, LogLikelihood(total, len(ids))

    def _answer(self, prompt: EncodedPrompt, request: Request) -> list[Completion]:
        sampling = request.sampling
        self._feed(prompt.ids)
        logits = self._logits().copy()
        chains = [
            self._chain(sampling, stream_seed(sampling.seed, request.key, sample)) for sample in range(sampling.n)
        ]
        try:
            # The first tokens are all drawn now: the next decode overwrites the prompt's logits.
            first = [self._draw(chain, logits) for chain in chains]
            return [
                self._continue(prompt, logits, token, chain, sampling)
                for token, chain in zip(first, chains, strict=True)
            ]
        finally:
            for chain in chains:
                if chain is not None:
                    self._lib.llama_sampler_free(chain)

    def _continue(
        self, prompt: EncodedPrompt, logits: NDArray[np.float32], token: int, chain: Any, sampling: Sampling
    ) -> Completion:
        """Decode one answer whose first token is `token`, drawn from the prompt's `logits`."""
        answer: list[int] = []
        content = b""
        logprob = 0.0
        while True:
            logprob += log_probability(logits, token)
            answer.append(token)
            ended = self._lib.llama_vocab_is_eog(self.tokenizer.vocab, token)
            content += b"" if ended else self.tokenizer.piece(token, special=False)
            text = content.decode("utf-8", "replace")
            stopped = stop_at(text, sampling.stop)
            if ended or stopped is not None or len(answer) == sampling.max_new_tokens:
                return Completion(
                    text if stopped is None else stopped,
                    logprob,
                    len(answer),
                    "stop" if ended or stopped is not None else "length",
                    len(prompt.ids),
                    prompt.truncated,
                )
            self._feed([*prompt.ids, *answer])
            logits = self._logits()
            token = self._draw(chain, logits)

    def _feed(self, ids: Sequence[int]) -> None:
        """Make the context hold `ids`, computing what it does not hold yet; the last id always."""
        keep = 0
        for held, wanted in zip(self._fed, ids[:-1], strict=False):
            if held != wanted:
                break
            keep += 1
        if not self._lib.llama_memory_seq_rm(self._memory, 0, keep, -1):
            keep = 0  # recurrent models cannot go back a step
            self._lib.llama_memory_clear(self._memory, True)
        self._fed = list(ids[:keep])
        for start in range(keep, len(ids), self._options.batch):
            self._decode(ids[start : start + self._options.batch], start, last=start + self._options.batch >= len(ids))
            self._fed = list(ids[: start + self._options.batch])

    def _decode(self, ids: Sequence[int], position: int, *, last: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 0
        batch.logits[len(ids) - 1] = last
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            self._lib.llama_memory_clear(self._memory, True)
            self._fed = []
            raise BackendError(f"llama_decode failed with status {status} {_LOG.last_error()}".strip())

    def _logits(self) -> NDArray[np.float32]:
        """Logits after the last id fed, shape (vocabulary,): a view that the next decode overwrites."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.tokenizer.size,))

    def _chain(self, sampling: Sampling, seed: int) -> Any:
        """llama.cpp's sampler chain; None for greedy."""
        if sampling.temperature <= 0:
            return None
        lib = self._lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(sampling.temperature))
        if sampling.top_p < 1:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(sampling.min_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
        return chain

    def _draw(self, chain: Any, logits: NDArray[np.float32]) -> int:
        """The next token from the context's current logits."""
        if chain is None:
            return int(logits.argmax())
        return int(self._lib.llama_sampler_sample(chain, self._context, -1))

    def _new_context(self) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.encoder.context
        params.n_batch = self._options.batch
        params.n_ubatch = self._options.batch
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = thread_count(self._options.threads)
        params.no_perf = True
        context = _call_aside(lambda: self._lib.llama_init_from_model(self._model, params))
        if not context:
            raise UserError(
                f"a context of {self.encoder.context} tokens could not be made {_LOG.last_error()}\n"
                "Ask for less: --set context=1024"
            )
        return context

    def _set_adapter(self, path: Path) -> None:
        adapter = _call_aside(lambda: self._lib.llama_adapter_lora_init(self._model, os.fsencode(path)))
        if not adapter:
            raise UserError(f"adapter {path} does not fit this model {_LOG.last_error()}")
        adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(self._options.adapter_scale)
        if self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise UserError(f"adapter {path} could not be applied {_LOG.last_error()}")


class _Log:
    """Keeps llama.cpp quiet and remembers its last error line, for our own messages."""

    def __init__(self) -> None:
        self._callback: Any = None
        self._error = ""

    def capture(self, lib: Any) -> None:
        if self._callback is None:

            @lib.llama_log_callback  # type: ignore[untyped-decorator]
            def callback(level: int, text: bytes, user_data: object) -> None:
                if level == 4 and text.strip():  # GGML_LOG_LEVEL_ERROR
                    self._error = text.decode("utf-8", "replace").strip()

            self._callback = callback
            lib.llama_backend_init()
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))
        self._error = ""

    def last_error(self) -> str:
        return f"({self._error})" if self._error else ""


_LOG = _Log()


def _load_model(path: Path, options: Options, *, vocab_only: bool) -> Any:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"llama-cpp-python is installed but cannot be loaded: {error}") from error
    _LOG.capture(llama_cpp)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = options.gpu_layers
    model = _call_aside(lambda: llama_cpp.llama_model_load_from_file(os.fsencode(path), params))
    if not model:
        raise UserError(f"model {path} cannot be loaded by llama.cpp {_LOG.last_error()}")
    return model


def _call_aside(function: Callable[[], Any]) -> Any:
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


def _context_size(model: Any, options: Options) -> int:
    """The context that was asked for, but no more than the model was trained with."""
    architecture = _metadata(model, b"general.architecture")
    # Read from the metadata: a model loaded for its vocabulary only does not know its sizes.
    trained = _metadata(model, architecture + b".context_length")
    return min(options.context, int(trained)) if trained.isdigit() else options.context


def _metadata(model: Any, key: bytes) -> bytes:
    import llama_cpp

    buffer = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_meta_val_str(model, key, buffer, len(buffer))
    return buffer.value
