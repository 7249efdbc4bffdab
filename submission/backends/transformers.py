"""Causal language models through transformers, on CUDA or the CPU, optionally in 4 bits and with a PEFT adapter.

python -m submission predict test.csv -o submission.csv --backend transformers --model DIR --load-in-4bit
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends.common import stop_at, stream_seed, thread_count
from submission.errors import MissingExtra, UserError, first_line
from submission.models import check_peft_adapter, content_hash, resolve_folder
from submission.prompts import ChatEncoder, EncodedPrompt, SpecialToken, looks_like_markup, plain_layout
from submission.types import Chat, Completion, LogLikelihood, Request, Sampling

if TYPE_CHECKING:
    from submission.backends import ModelSpec

_WINDOW = 8  # batches' worth of requests that are sorted by length together


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    threads: of the CPU; 0 means every core this process may use.
    batch: answers (rows times samples) that are decoded together.
    load_in_4bit: quantise the weights to nf4 with double quantisation on loading (bitsandbytes).
    dtype: auto (bfloat16 or float16 on a GPU, float32 on a CPU), float32, bfloat16 or float16.
    device: auto, cpu, cuda, cuda:1 ...
    """

    context: int = 2048
    threads: int = 0
    batch: int = 16
    load_in_4bit: bool = False
    dtype: str = "auto"
    device: str = "auto"


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
    if spec.options.context < 128 or spec.options.batch < 1:
        raise UserError("for backend transformers, option context must be at least 128 and batch at least 1")


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
    _stay_offline_and_quiet()
    return Transformers(resolve_folder(spec.model), spec.adapter, spec.options)


def load_encoder(spec: ModelSpec) -> ChatEncoder:
    """Load the tokenizer and the model's configuration only."""
    _stay_offline_and_quiet()
    path = resolve_folder(spec.model)
    return ChatEncoder(HfTokenizer(_load_tokenizer(path)), _context_size(_load_config(path), spec.options))


class HfTokenizer:
    """A transformers tokenizer; see `submission.prompts.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self.hf = tokenizer
        added = tokenizer.added_tokens_decoder
        self.specials: Mapping[str, SpecialToken] = {
            token.content: SpecialToken(number, token.lstrip, token.rstrip)
            for number, token in added.items()
            if token.special or looks_like_markup(token.content)
        }
        self._at_start, self._inside = _plain(tokenizer)
        first = tokenizer("x").input_ids[:1]
        self.bos: int | None = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        if not self.hf.chat_template:
            return plain_layout(messages)
        return str(self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def tokenize(self, text: str, *, at_start: bool) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")
        encoder = self._at_start if at_start else self._inside
        return list(encoder.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add behind a prompt: the blank of a first word is kept, special tokens go."""
        special = {token.id for token in self.specials.values()}
        anchor = list(prompt[-4:])
        before = self.detokenize(anchor)
        return self.detokenize([*anchor, *(token for token in ids if token not in special)])[len(before) :]


class Transformers:
    """A transformers model that answers in batches, left-padded, sorted by length within a window."""

    def __init__(self, model: Path, adapter: Path | None, options: Options) -> None:
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(thread_count(options.threads))
        self._options = options
        self._torch = torch
        self.tokenizer = HfTokenizer(_load_tokenizer(model))
        self._model = _load_model(model, adapter, options)
        self.encoder = ChatEncoder(self.tokenizer, _context_size(self._model.config, options))
        self._ends = _end_tokens(self._model, self.tokenizer)
        self._pad = self.tokenizer.hf.pad_token_id
        if self._pad is None:
            self._pad = self._ends[0]  # masked out, never trained on

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """See `submission.types.Backend`."""
        stream = iter(requests)
        while window := list(islice(stream, _WINDOW * self._options.batch)):
            encoded = [
                (
                    request,
                    self.encoder.encode_for(request.chat, request.sampling.max_new_tokens),
                )
                for request in window
            ]
            encoded.sort(key=lambda item: (hash(item[0].sampling), len(item[1].ids)))
            while encoded:
                sampling = encoded[0][0].sampling
                size = max(1, self._options.batch // sampling.n)
                batch = [item for item in encoded[:size] if item[0].sampling == sampling]
                del encoded[: len(batch)]
                yield from self._answer(batch, sampling)

    def loglikelihood(self, items: Iterable[tuple[str, Chat, str]]) -> Iterator[tuple[str, LogLikelihood]]:
        """See `submission.types.Backend`."""
        torch = self._torch
        for key, chat, continuation in items:
            ids = self.encoder.encode_continuation(continuation)
            prompt = self.encoder.encode_for(chat, len(ids))
            with torch.inference_mode():
                fed = torch.tensor([[*prompt.ids, *ids]], device=self._model.device)
                # The output head runs on the positions that predict the continuation, not on the prompt.
                logits = self._model(fed, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
                chosen = torch.log_softmax(logits, dim=-1).gather(1, fed[0, len(prompt.ids) :, None])
            yield key, LogLikelihood(float(chosen.sum()), len(ids))

    def _answer(
        self, batch: Sequence[tuple[Request, EncodedPrompt]], sampling: Sampling
    ) -> Iterator[tuple[str, list[Completion]]]:
        torch = self._torch
        width = max(len(prompt.ids) for _, prompt in batch)
        ids = torch.full((len(batch), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (_, prompt) in enumerate(batch):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            # One stream per batch: keys and seed decide it.
            torch.manual_seed(stream_seed(sampling.seed, "\x1f".join(r.key for r, _ in batch), 0))
            options = {
                "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
                "min_p": sampling.min_p or None, "top_k": 0,
            }  # fmt: skip
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._model.device), attention_mask=mask.to(self._model.device),
                max_new_tokens=sampling.max_new_tokens, num_return_sequences=sampling.n,
                eos_token_id=self._ends, pad_token_id=self._pad, return_dict_in_generate=True,
                output_logits=True, **options,
            )  # fmt: skip
        answers = output.sequences[:, width:]
        logprobs = torch.stack(
            [
                torch.log_softmax(logits.float(), dim=-1).gather(1, answers[:, step, None].to(logits.device))[:, 0]
                for step, logits in enumerate(output.logits)
            ],
            dim=1,
        )
        for row, (request, prompt) in enumerate(batch):
            first = row * sampling.n
            yield (
                request.key,
                [
                    self._completion(prompt, answers[index].tolist(), logprobs[index].tolist(), sampling)
                    for index in range(first, first + sampling.n)
                ],
            )

    def _completion(
        self, prompt: EncodedPrompt, ids: list[int], logprobs: list[float], sampling: Sampling
    ) -> Completion:
        end = next((place + 1 for place, token in enumerate(ids) if token in self._ends), None)
        text = self.tokenizer.continuation(prompt.ids, ids[:end])
        stopped = stop_at(text, sampling.stop)
        return Completion(
            text if stopped is None else stopped,
            sum(logprobs[:end]),
            len(ids[:end]),
            "stop" if end is not None or stopped is not None else "length",
            len(prompt.ids),
            prompt.truncated,
        )


def _stay_offline_and_quiet() -> None:
    # Read when huggingface_hub is first imported; `local_files_only` alone leaves some look-ups.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # the run has a progress bar of its own


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, path, "tokenizer")


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, path, "configuration")


def _from_pretrained(kind: Any, path: Path, what: str) -> Any:
    folder, file = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **file)
    except Exception as error:
        raise UserError(f"the {what} of {path} cannot be loaded: {first_line(error)}") from error


def _context_size(config: Any, options: Options) -> int:
    """The context that was asked for, but no more than the model was trained with."""
    return min(options.context, getattr(config, "max_position_embeddings", None) or options.context)


def _load_model(path: Path, adapter: Path | None, options: Options) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        on_gpu = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise UserError(f"option device={device!r} is no device of torch: {first_line(error)[:200]}") from None
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"option device={device!r}: torch finds no CUDA GPU; use device=cpu")
    dtype = options.dtype
    if dtype == "auto":
        # T4 and older have no bfloat16 units.
        dtype = ("bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16") if on_gpu else "float32"
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "local_files_only": True,
        "trust_remote_code": False,
    }
    folder = path
    if path.is_dir():
        arguments["use_safetensors"] = True
    else:
        from transformers import GgufConfig

        folder = path.parent
        # Without `dequantize` the weights stay packed, at half the speed.
        arguments |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    if options.load_in_4bit:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )  # fmt: skip
        arguments["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except Exception as error:
        raise UserError(f"model {path} cannot be loaded by transformers: {first_line(error)}") from error
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        except Exception as error:
            raise UserError(f"adapter {adapter} does not fit this model: {first_line(error)}") from error
        if not options.load_in_4bit:
            model = model.merge_and_unload()  # an unmerged adapter nearly halves the speed
    if not options.load_in_4bit:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # unknown, or not there, or too small
            raise UserError(f"the model cannot be put on device={device!r}: {first_line(error)}") from error
    return model.eval()


def _end_tokens(model: Any, tokenizer: HfTokenizer) -> list[int]:
    """All ids that end an answer: the model's, the tokenizer's and the usual end-of-turn markers."""
    configured = model.generation_config.eos_token_id
    ends = [*(configured if isinstance(configured, list) else [configured]), tokenizer.hf.eos_token_id]
    markers = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "</s>")
    ends += [tokenizer.specials[name].id for name in markers if name in tokenizer.specials]
    found = [end for end in dict.fromkeys(ends) if end is not None]
    if not found:
        raise UserError("the model names no end-of-text token")
    return found


def _plain(tokenizer: Any) -> tuple[Any, Any]:
    """The tokenizer without its special tokens, so that none of their names in a text is parsed.

    Returns:
        one for the beginning of a prompt, and one for text behind other text, which puts no blank before it.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MissingExtra("this tokenizer", "tokenizers", "hf")
    description = json.loads(backend.to_str())
    description["post_processor"] = None
    description["truncation"] = description["padding"] = None
    description["added_tokens"] = [
        token
        for token in description["added_tokens"]
        if not token["special"] and not looks_like_markup(token["content"])
    ]
    at_start = Tokenizer.from_str(json.dumps(description))
    if not _drop_leading_blank(description["pre_tokenizer"]):
        return at_start, at_start
    return at_start, Tokenizer.from_str(json.dumps(description))


def _drop_leading_blank(step: Any) -> bool:
    """Metaspace with the scheme "first" marks the beginning of a text only, not what follows a token.

    Returns:
        whether there was one to change.
    """
    if not isinstance(step, dict):
        return False
    changed = step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first"
    if changed:
        step["prepend_scheme"] = "never"
    return any([changed, *map(_drop_leading_blank, step.get("pretokenizers", []))])
