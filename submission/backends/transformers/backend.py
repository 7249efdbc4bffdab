"""Causal language models through transformers, on CUDA or the CPU, optionally in 4 bits and with a PEFT adapter.

python -m submission predict test.csv -o submission.csv --backend transformers --model DIR --load-in-4bit
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from submission.backends.common import PendingRequest, scorable, stop_at, stream_seed, thread_count
from submission.backends.models import check_peft_adapter, resolve_folder
from submission.backends.transformers.loading import (
    end_tokens,
    load_config,
    load_model,
    load_tokenizer,
    stay_offline_and_quiet,
)
from submission.backends.transformers.sampling import Stopper, TransformersSampler
from submission.backends.transformers.tokenizer import HfTokenizer
from submission.backends.window import Window, common_length
from submission.data.hashing import content_hash
from submission.errors import BackendError, PromptRecoveryError, UserError, first_line
from submission.prompts.encoding import ChatEncoder, EncodedPrompt
from submission.types import Chat, Completion, Failure, LogLikelihood, Request, Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from submission.backends import ModelSpec

_CPU_BATCH, _GPU_BATCH = 16, 64  # answers decoded together
_TOKENS_PER_ANSWER = 1024  # on average, that the batch's share of the token budget allows for
_SCORED_BYTES = 256 << 20  # of logits that a batch of likelihoods may bring
_WORTH_SHARING = 16  # tokens of a common beginning below which it is not computed apart


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    threads: of the CPU; 0 means every core this process may use.
    batch: answers (rows times samples) decoded together at most; 0 means 16 on a CPU and 64 on a GPU.
    batch_tokens: tokens of all answers and prompts of a batch, padding included; 0 means 1024 times `batch`.
    load_in_4bit: quantise the weights to nf4 with double quantisation on loading (bitsandbytes).
    dtype: auto (bfloat16 or float16 on a GPU, float32 on a CPU), float32, bfloat16 or float16.
    device: auto, cpu, cuda, cuda:1 ...
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
    if spec.options.context < 128:
        raise UserError("option context for backend transformers must be at least 128 tokens")


def fingerprint(spec: ModelSpec) -> dict[str, str]:
    """What decides the answers: weights, adapter, precision and the room for a prompt."""
    options = spec.options
    marks = {
        "model": content_hash(resolve_folder(spec.model)),
        "context": str(options.context),
        "precision": f"{options.dtype}{', 4 bit' if options.load_in_4bit else ''}",
    }
    if spec.adapter:
        marks["adapter"] = content_hash(spec.adapter)
    return marks


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


@dataclass(slots=True, eq=False)
class _Prompt:
    """Answers of these numbers to a request are wanted."""

    ids: NDArray[np.int32]
    asked: PendingRequest
    numbers: range
    answers: list[Completion] = field(default_factory=list)
    outputs = 1

    @property
    def need(self) -> int:
        return len(self.ids) + self.asked.request.sampling.max_new_tokens

    @property
    def rows(self) -> int:
        return len(self.numbers)

    @property
    def most_shared(self) -> int:
        return len(self.ids) - 1

    @property
    def plain(self) -> bool:
        """Greedy, once, without stop strings."""
        sampling = self.asked.request.sampling
        return sampling.temperature <= 0 and sampling.n == 1 and not sampling.stop

    def fits(self, other: _Prompt) -> bool:
        return self.asked.request.sampling == other.asked.request.sampling

    def parts(self) -> list[_Prompt]:
        half = (len(self.numbers) + 1) // 2
        return [_Prompt(self.ids, self.asked, n) for n in (self.numbers[:half], self.numbers[half:]) if n]


@dataclass(slots=True, eq=False)
class _Text:
    """Tokens whose probabilities are wanted from index `scored_from` (at least 1) on."""

    ids: NDArray[np.int32]
    scored_from: int
    key: str
    total: float = 0.0
    rows = 1
    plain = False

    @property
    def outputs(self) -> int:
        return len(self.ids) - self.scored_from

    @property
    def need(self) -> int:
        return len(self.ids)

    @property
    def most_shared(self) -> int:
        return self.scored_from - 1

    def fits(self, other: _Text) -> bool:
        return True

    def parts(self) -> list[_Text]:
        return [self]


T = TypeVar("T", _Prompt, _Text)


class Transformers:
    """A transformers model that computes in batches of similar length; common beginnings once."""

    def __init__(self, model: Path, adapter: Path | None, options: Options) -> None:
        import torch
        from transformers import GenerationConfig

        torch.set_num_threads(thread_count(options.threads))
        self._torch = torch
        self.tokenizer = HfTokenizer(load_tokenizer(model))
        self._model = load_model(
            model, adapter, device=options.device, dtype=options.dtype, load_in_4bit=options.load_in_4bit
        )
        self.encoder = ChatEncoder(self.tokenizer, _context_size(self._model.config, options))
        self._ends = end_tokens(self._model, self.tokenizer)
        self._pad = self.tokenizer.hf.pad_token_id
        if self._pad is None:
            self._pad = self._ends[0]  # masked out, never trained on
        # A model's own settings (penalties, top-k ...) would answer another question than the one asked.
        self._model.generation_config = GenerationConfig(eos_token_id=self._ends, pad_token_id=self._pad)
        on_gpu = self._model.device.type == "cuda"
        self._batch = options.batch or (_GPU_BATCH if on_gpu else _CPU_BATCH)
        self._tokens = options.batch_tokens or self._batch * _TOKENS_PER_ANSWER
        self._most_outputs = _SCORED_BYTES // (4 * self._model.config.get_text_config().vocab_size)
        self._can_share = self._caches_plainly()
        self._continuous = options.continuous
        self._shared: tuple[NDArray[np.int32], Any] | None = None  # a beginning and its cache, for the next batch

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """See `submission.types.Backend`."""
        import numpy as np

        def prompts() -> Iterator[_Prompt]:
            for request in requests:
                encoded = self.encoder.encode_for(request.chat, request.sampling.max_new_tokens)
                asked = PendingRequest(request, encoded, [None] * request.sampling.n)
                ids = np.array(encoded.ids, np.int32)
                for first in range(0, request.sampling.n, self._batch):
                    yield _Prompt(ids, asked, range(first, min(request.sampling.n, first + self._batch)))

        for prompt in self._in_batches(prompts(), self._answer):
            for number, completion in zip(prompt.numbers, prompt.answers, strict=True):
                prompt.asked.completions[number] = completion
            yield from prompt.asked.when_complete()

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """See `submission.types.Backend`."""
        without: list[tuple[str, LogLikelihood | Failure]] = []  # what needs no computing
        texts = (_Text(ids, scored_from, key) for key, ids, scored_from in scorable(items, self.encoder, without))
        for text in self._in_batches(texts, self._score):
            yield text.key, LogLikelihood(text.total, text.outputs, text.scored_from)
        yield from without

    # -- batches --------------------------------------------------------------------------------------------

    def _in_batches(self, items: Iterable[T], work: Callable[[list[T]], None]) -> Iterator[T]:
        """Do the work for all items and yield each when it is done; smaller batches when memory runs out."""
        pending = Window(items)
        while pending.top_up():
            batch = self._next_batch(pending)
            trouble = self._try(batch, work)
            if trouble is None:
                yield from batch
                continue
            self._make_room()
            rows = sum(item.rows for item in batch)
            if rows == 1:
                raise BackendError(f"one row alone does not fit into memory: {trouble}")
            self._batch = rows // 2  # remembered: the next ones would fail as well
            pending.items.extendleft(reversed([part for item in batch for part in item.parts()]))
        pending.complain()

    def _try(self, batch: list[T], work: Callable[[list[T]], None]) -> str | None:
        """Do the work; if memory ran out, say so. The error is let go: its frames hold the memory."""
        try:
            with self._torch.inference_mode():
                work(batch)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            return first_line(error)
        return None

    def _make_room(self) -> None:
        self._shared = None
        gc.collect()
        if self._model.device.type == "cuda":
            self._torch.cuda.empty_cache()

    def _next_batch(self, pending: Window[T]) -> list[T]:
        """The next items that cost no more together, padding and common beginnings counted, than apart."""
        first = pending.items.popleft()
        batch, rows = [first], first.rows
        if self._continuous and first.plain:  # the library sees to lengths and beginnings
            while pending.items and first.fits(pending.items[0]):
                batch.append(pending.items.popleft())
            return batch
        longest, need, shared, outputs = len(first.ids), first.need, first.most_shared, first.outputs
        cost = longest
        while pending.items:
            item = pending.items[0]
            together = min(shared, common_length(first.ids, item.ids), item.most_shared) if self._can_share else 0
            width, most = max(longest, len(item.ids)), max(need, item.need)
            joint = together + (len(batch) + 1) * (width - together)
            if (
                not first.fits(item)
                or rows + item.rows > self._batch
                or (rows + item.rows) * most > self._tokens
                or (rows + item.rows) * max(outputs, item.outputs) > self._most_outputs
                or joint > 1.1 * (cost + len(item.ids))
            ):
                break
            batch.append(pending.items.popleft())
            rows += item.rows
            longest, need, shared, cost, outputs = width, most, together, joint, max(outputs, item.outputs)
        return batch

    # -- common beginnings ----------------------------------------------------------------------------------

    def _caches_plainly(self) -> bool:
        """Whether every layer's cache is a plain list of keys and values, so that padding may lie in its middle."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        with self._torch.inference_mode():
            cache = self._model(input_ids=self._on_device([[self._ends[0]]]), use_cache=True).past_key_values
        return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)

    def _common(self, batch: Sequence[_Prompt] | Sequence[_Text]) -> int:
        """Tokens at the beginning that are computed once for the whole batch."""
        if not self._can_share:
            return 0
        first = batch[0].ids
        most = min(item.most_shared for item in batch)
        most = min([most, *(common_length(first, item.ids) for item in batch[1:])])
        if len(batch) == 1:  # pays only if it is there already
            most = min(most, common_length(first, self._shared[0])) if self._shared else 0
        return most if most >= _WORTH_SHARING else 0

    def _cache_of(self, ids: NDArray[np.int32], rows: int) -> Any:
        """A cache that holds `ids` in each of so many rows; None for no ids."""
        if not len(ids):
            return None
        held = self._shared[0] if self._shared else ids[:0]
        if len(held) < len(ids) or common_length(held, ids) < len(ids):
            cache = self._model(
                input_ids=self._on_device([ids.tolist()]), use_cache=True, logits_to_keep=1
            ).past_key_values
            self._shared = (ids, cache)
        assert self._shared is not None
        cache = copy.deepcopy(self._shared[1])
        if len(self._shared[0]) > len(ids):
            cache.crop(len(ids) - len(self._shared[0]))
        cache.batch_repeat_interleave(rows)
        return cache

    # -- generating -----------------------------------------------------------------------------------------

    def _answer(self, batch: list[_Prompt]) -> None:
        torch = self._torch
        sampling = batch[0].asked.request.sampling
        if self._continuous and batch[0].plain:
            self._answer_continuously(batch, sampling)
            return
        width = max(len(prompt.ids) for prompt in batch)
        shared = self._common(batch)
        ids = torch.full((len(batch), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):  # padding lies between the common beginning and the rest
            given = torch.from_numpy(prompt.ids).long()
            ids[row, :shared], mask[row, :shared] = given[:shared], 1
            begin = width - (len(given) - shared)
            ids[row, begin:], mask[row, begin:] = given[shared:], 1
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        cache = self._cache_of(batch[0].ids[:shared], len(batch))
        copies = torch.tensor([prompt.rows for prompt in batch], device=ids.device)
        if int(copies.max()) > 1:
            if self._can_share:
                cache = self._prefill(ids, mask, cache, shared)
                cache.batch_select_indices(torch.arange(len(batch), device=ids.device).repeat_interleave(copies))
            ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        answers = [(prompt, number) for prompt in batch for number in prompt.numbers]
        seeds = [stream_seed(sampling.seed, p.asked.request.key, number) for p, number in answers]
        sampler = TransformersSampler(sampling, seeds)
        stopper = Stopper(sampling.stop, width, self.tokenizer.detokenize) if sampling.stop else None
        output = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, do_sample=False,
            logits_processor=[sampler], stopping_criteria=[stopper] if stopper else [],
            **({} if cache is None else {"past_key_values": cache}),
        )[:, width:].tolist()  # fmt: skip
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        for row, (prompt, _) in enumerate(answers):
            length = stopper.lengths.get(row) if stopper else None
            prompt.answers.append(self._completion(prompt.asked.encoded, output[row][:length], logprobs[row], sampling))

    def _answer_continuously(self, batch: list[_Prompt], sampling: Sampling) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=self._ends, pad_token_id=self._pad
        )
        room: dict[str, int] = {}
        if self._model.device.type != "cuda":  # where the library would take most of the memory there is
            room = {"num_blocks": sum(-(-prompt.need // 256) for prompt in batch) + 1, "max_batch_tokens": 512}
        with self._torch.inference_mode(mode=False):  # it works in a thread of its own, which shares no such mode
            outputs = self._model.generate_batch(
                [prompt.ids.tolist() for prompt in batch],
                generation_config=settings,
                continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True, **room),
            )
        # Named req_0, req_1 ... in the order of the prompts, and given as they finish.
        in_order = [outputs[name] for name in sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))]
        failed = next((output.error for output in in_order if output.error), None)
        if failed or len(in_order) != len(batch):
            raise BackendError(f"continuous batching failed: {failed or 'answers are missing'}")
        for prompt, output in zip(batch, in_order, strict=True):
            prompt.answers.append(
                self._completion(prompt.asked.encoded, output.generated_tokens, output.logprobs, sampling)
            )

    def _prefill(self, ids: Any, mask: Any, cache: Any, shared: int) -> Any:
        """Compute all but the last token of every prompt once, however many samples there are to be."""
        if ids.shape[1] - 1 == shared:
            return cache
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return self._model(
            input_ids=ids[:, shared:-1], attention_mask=mask[:, :-1], position_ids=positions[:, shared:-1],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).past_key_values  # fmt: skip

    def _completion(
        self, prompt: EncodedPrompt, ids: list[int], logprobs: list[float], sampling: Sampling
    ) -> Completion:
        end = next((place + 1 for place, token in enumerate(ids) if token in self._ends), None)
        text = self.tokenizer.continuation(prompt.ids, ids[:end])
        stopped = stop_at(text, sampling.stop)
        return Completion(
            text if stopped is None else stopped,
            sum(logprobs[: len(ids[:end])]),
            len(ids[:end]),
            "stop" if end is not None or stopped is not None else "length",
            len(prompt.ids),
            prompt.truncated,
        )

    # -- likelihoods ----------------------------------------------------------------------------------------

    def _score(self, batch: list[_Text]) -> None:
        torch = self._torch
        shared = self._common(batch)
        width = max(len(text.ids) for text in batch) - 1  # the last token predicts nothing that is asked
        ids = torch.full((len(batch), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids) - 1] = torch.from_numpy(text.ids[:-1]).long()
            mask[row, : len(text.ids) - 1] = 1
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        # The output head runs on the positions that predict a continuation, not on the prompts.
        first = min(text.scored_from for text in batch) - 1
        positions = torch.arange(shared, width, device=ids.device).expand(len(batch), -1)
        logits = self._model(
            input_ids=ids[:, shared:], attention_mask=mask, position_ids=positions,
            past_key_values=self._cache_of(batch[0].ids[:shared], len(batch)), use_cache=shared > 0,
            logits_to_keep=width - first,
        ).logits  # fmt: skip
        for row, text in enumerate(batch):
            part = logits[row, text.scored_from - 1 - first : len(text.ids) - 1 - first].float()
            chosen = torch.from_numpy(text.ids[text.scored_from :]).long().to(part.device)
            text.total = float((part.gather(1, chosen[:, None])[:, 0] - part.logsumexp(dim=-1)).double().sum())

    def _on_device(self, rows: list[list[int]]) -> Any:
        return self._torch.tensor(rows, device=self._model.device)


def _out_of_memory(error: BaseException) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def _context_size(config: Any, options: Options) -> int:
    """The context that was asked for, but no more than the model was trained with."""
    return min(options.context, getattr(config, "max_position_embeddings", None) or options.context)
