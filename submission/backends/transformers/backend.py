"""Causal language models through transformers, on CUDA or the CPU, optionally in 4 bits and with a PEFT adapter.

python -m submission predict test.csv -o submission.csv --backend transformers --model DIR --load-in-4bit
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends.common import PendingRequest, check_context, scorable, thread_count
from submission.backends.models import check_peft_adapter, folder_fingerprint, resolve_folder
from submission.backends.transformers.batches import Batches
from submission.backends.transformers.devices import BALANCED
from submission.backends.transformers.generation import Generator
from submission.backends.transformers.items import Prompt, Text
from submission.backends.transformers.likelihoods import Scorer
from submission.backends.transformers.loading import (
    end_tokens,
    load_config,
    load_model,
    load_tokenizer,
    stay_offline_and_quiet,
)
from submission.backends.transformers.memory import TOKENS, Room, footprint, free_bytes
from submission.backends.transformers.prefixes import Prefixes
from submission.backends.transformers.tokenizer import HfTokenizer
from submission.errors import PromptRecoveryError, UserError, first_line
from submission.prompts.encoding import ChatEncoder
from submission.types import Chat, Completion, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    from submission.backends import ModelSpec

_CPU_BATCH, _GPU_BATCH = 16, 256  # answers decoded together
_TOKENS_PER_ANSWER = 1024  # on average, that the batch's share of the token budget allows for on a CPU
_SCORED_BYTES = 256 << 20  # of logits that likelihoods may bring at once on a CPU
_SCORED_SHARE = 4  # one part in so many of the free memory of a GPU


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    threads: of the CPU; 0 means every core this process may use.
    batch: answers (rows times samples) decoded together at most; 0 means 16 on a CPU and 256 on a GPU.
    batch_tokens: tokens of all answers and prompts of a batch, padding included; 0 means 1024 times `batch` on a CPU
        and as many as the free memory holds on a GPU.
    load_in_4bit: quantise the weights to nf4 with double quantisation on loading (bitsandbytes).
    dtype: auto (float32 on a CPU; bfloat16 on a GPU that has it, else float16, or float32 for Gemma 2 and 3, which
        overflow in float16), float32, bfloat16 or float16.
    device: auto, cpu, cuda, cuda:1 ..., or balanced: the layers of one copy are spread over all GPUs.
    continuous: leave greedy answers to transformers' own continuous batching (paged attention, made for GPUs), up to
        256 rows at a time. Off unless asked for, since it is yet to be measured on a GPU.
    """

    context: int = 2048
    threads: int = 0
    batch: int = 0
    batch_tokens: int = 0
    load_in_4bit: bool = False
    dtype: str = "auto"
    device: str = "auto"
    continuous: bool = False


def check(spec: ModelSpec) -> None:
    """Refuse a model or adapter that is not what this backend loads, and packages that are missing."""
    from submission.backends import require

    path = resolve_folder(spec.model)
    check_peft_adapter(spec.adapter)
    if spec.adapter:
        require("peft", "hf", "a PEFT adapter")
    if spec.options.load_in_4bit:
        require("bitsandbytes", "hf", "--load-in-4bit")
        if path.is_file():
            raise UserError("--load-in-4bit takes a transformers folder, not a GGUF file: name one with --model")
    if path.is_file():
        require("gguf", "hf", "a GGUF file as a transformers model")
    if spec.options.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"option dtype={spec.options.dtype!r} must be auto, float32, bfloat16 or float16")
    if spec.options.device == BALANCED and spec.placement.ray:
        raise UserError("device=balanced takes the GPUs of one machine: leave --ray out")
    check_context(spec.options.context, "transformers")


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """See `folder_fingerprint`."""
    options = spec.options
    return folder_fingerprint(
        spec.model, spec.adapter, context=options.context, dtype=options.dtype, load_in_4bit=options.load_in_4bit
    )


def load(spec: ModelSpec) -> Transformers:
    """Load model, adapter and tokenizer from disk; never from a hub."""
    stay_offline_and_quiet()
    path = resolve_folder(spec.model)
    try:
        return Transformers(path, spec.adapter, spec.options)
    except PromptRecoveryError:
        raise
    except Exception as error:  # of a configuration that the library takes and cannot compute with
        raise UserError(f"model {path} cannot be used by transformers: {first_line(error)}") from error


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """Load the tokenizer and the model's configuration only."""
    stay_offline_and_quiet()
    path = resolve_folder(spec.model)
    return ChatEncoder(HfTokenizer(load_tokenizer(path)), _context_size(load_config(path), spec.options))


class Transformers:
    """A transformers model that computes in batches of similar length; common beginnings once."""

    def __init__(self, model: Path, adapter: Path | None, options: Options) -> None:
        import torch
        from transformers import GenerationConfig

        torch.set_num_threads(thread_count(options.threads))
        self.tokenizer = HfTokenizer(load_tokenizer(model))
        self._model = load_model(
            model, adapter, device=options.device, dtype=options.dtype, load_in_4bit=options.load_in_4bit
        )
        self.encoder = ChatEncoder(self.tokenizer, _context_size(self._model.config, options))
        ends = end_tokens(self._model, self.tokenizer)
        pad = self.tokenizer.hf.pad_token_id
        if pad is None:
            pad = ends[0]  # masked out, never trained on
        # A model's own settings (penalties, top-k ...) would answer another question than the one asked.
        self._model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        places = {parameter.device for parameter in self._model.parameters()}
        self._gpus = sorted((place for place in places if place.type == "cuda"), key=str)
        self._room = self._make_room(options)
        prefixes = Prefixes(self._model, ends[0])
        self._generator = Generator(self._model, self.tokenizer, prefixes, ends, pad)
        self._scorer = Scorer(self._model, prefixes, pad, self._logit_bytes)
        self._continuous = options.continuous
        self._prompts = Batches(
            self._room, prefixes, outputs=None, continuous=options.continuous, release=self._release
        )
        self._texts = Batches(
            self._room, prefixes, outputs=self._scorer.outputs, continuous=False, release=self._release
        )

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]:
        """See `submission.types.Backend`."""
        import numpy as np

        def prompts() -> Iterator[Prompt]:
            most = self._room.rows
            for request in requests:
                encoded = self.encoder.encode_for(request.chat, request.sampling.max_new_tokens)
                asked = PendingRequest(request, encoded)
                ids = np.array(encoded.ids, np.int32)
                for first in range(0, request.sampling.n, most):
                    yield Prompt(ids, asked, range(first, min(request.sampling.n, first + most)))

        for prompt in self._prompts.run(prompts(), self._answer):
            for number, answer in zip(prompt.numbers, prompt.answers, strict=True):
                yield from prompt.asked.take(number, answer)

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`."""
        without: list[tuple[str, LogLikelihood | Failure]] = []  # what needs no computing
        texts = (Text(ids, scored_from, key) for key, ids, scored_from in scorable(items, self.encoder, without))
        for text in self._texts.run(texts, self._scorer.score):
            yield text.key, text.failure or LogLikelihood(text.total, text.outputs, text.scored_from)
        yield from without

    def _answer(self, batch: list[Prompt]) -> None:
        if self._continuous and batch[0].plain:
            self._generator.answer_continuously(batch)
        else:
            self._generator.answer(batch)

    def _make_room(self, options: Options) -> Room:
        rows = options.batch or (_GPU_BATCH if self._gpus else _CPU_BATCH)
        if not self._gpus or options.batch_tokens:
            tokens = options.batch_tokens or rows * _TOKENS_PER_ANSWER
            return Room(rows, TOKENS, lambda: tokens)
        shape = footprint(self._model.config, self._model.dtype.itemsize)
        return Room(rows, shape, lambda: free_bytes(self._gpus))

    def _logit_bytes(self) -> int:
        return free_bytes(self._gpus) // _SCORED_SHARE if self._gpus else _SCORED_BYTES

    def _release(self) -> None:
        if self._gpus:
            import torch

            torch.cuda.empty_cache()


def _context_size(config: Any, options: Options) -> int:
    """The context that was asked for, but no more than the model was trained with."""
    return min(options.context, getattr(config, "max_position_embeddings", None) or options.context)
