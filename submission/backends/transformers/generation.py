"""Answers by transformers: a prompt is computed once, whatever is sampled from it."""

from __future__ import annotations

import math
from typing import Any

from submission.backends.common import stop_at, stream_seed
from submission.backends.transformers.items import Prompt
from submission.backends.transformers.prefixes import Prefixes
from submission.backends.transformers.sampling import Stopper, TransformersSampler
from submission.backends.transformers.tokenizer import HfTokenizer
from submission.errors import BackendError
from submission.types import Completion, Failure

NOT_FINITE = "the model's logits are not finite: it overflows in this dtype, or its weights are damaged"


class Generator:
    """Answers batches of prompts.

    Args:
        model: of transformers.
        tokenizer: its own.
        prefixes: its common beginnings.
        ends: tokens that end an answer.
        pad: token that is masked out.
    """

    def __init__(self, model: Any, tokenizer: HfTokenizer, prefixes: Prefixes, ends: list[int], pad: int) -> None:
        self._model, self._tokenizer, self._prefixes = model, tokenizer, prefixes
        self._ends, self._pad = ends, pad

    def answer(self, batch: list[Prompt]) -> None:
        """Answer prompts that fit each other, together."""
        import torch

        rows: dict[bytes, int] = {}  # of different prompts
        row_of = [rows.setdefault(prompt.ids.tobytes(), len(rows)) for prompt in batch]
        prompts = [batch[row_of.index(row)] for row in range(len(rows))]
        shared = self._prefixes.common(prompts)
        ids, mask = self._padded(prompts, shared)
        width = ids.shape[1]
        cache = self._prefixes.cache(prompts[0].ids[:shared], len(prompts))
        answers = [(prompt, number) for prompt in batch for number in prompt.numbers]
        copies = torch.tensor([row for prompt, row in zip(batch, row_of, strict=True) for _ in prompt.numbers])
        if len(answers) > len(prompts):
            if self._prefixes.repeatable:
                cache = self._prefill(ids, mask, cache, shared)
                cache.batch_select_indices(copies)  # on the CPU: layers may lie on several GPUs
            ids, mask = ids[copies], mask[copies]
        sampling = batch[0].sampling  # what fits each other ends alike
        sampler = TransformersSampler(
            [(p.sampling, stream_seed(p.sampling.seed, p.asked.request.key, number)) for p, number in answers],
            self._ends[0],
        )
        stopper = Stopper(sampling.stop, width, self._tokenizer.detokenize) if sampling.stop else None
        output = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, do_sample=False,
            logits_processor=[sampler], stopping_criteria=[stopper] if stopper else [],
            **({} if cache is None else {"past_key_values": cache}),
        )[:, width:].tolist()  # fmt: skip
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        for row, (prompt, _) in enumerate(answers):
            length = stopper.lengths.get(row) if stopper else None
            prompt.answers.append(self._completion(prompt, output[row][:length], logprobs[row]))

    def answer_continuously(self, batch: list[Prompt]) -> None:
        """Answer plain prompts that fit each other, by the library's own continuous batching."""
        import torch
        from transformers import ContinuousBatchingConfig, GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=batch[0].sampling.max_new_tokens, do_sample=False, eos_token_id=self._ends,
            pad_token_id=self._pad,
        )  # fmt: skip
        room: dict[str, int] = {}
        if self._model.device.type != "cuda":  # where the library would take most of the memory there is
            room = {"num_blocks": sum(-(-prompt.need // 256) for prompt in batch) + 1, "max_batch_tokens": 512}
        with torch.inference_mode(mode=False):  # it works in a thread of its own, which shares no such mode
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
            prompt.answers.append(self._completion(prompt, output.generated_tokens, output.logprobs))

    def _padded(self, prompts: list[Prompt], shared: int) -> tuple[Any, Any]:
        """Ids and mask, (prompts, width), with padding between the common beginning and the rest."""
        import torch

        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            given = torch.from_numpy(prompt.ids).long()
            ids[row, :shared], mask[row, :shared] = given[:shared], 1
            begin = width - (len(given) - shared)
            ids[row, begin:], mask[row, begin:] = given[shared:], 1
        return ids.to(self._model.device), mask.to(self._model.device)

    def _prefill(self, ids: Any, mask: Any, cache: Any, shared: int) -> Any:
        """Compute all but the last token of every prompt once, however many answers there are to be."""
        if ids.shape[1] - 1 == shared:
            return cache
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return self._model(
            input_ids=ids[:, shared:-1], attention_mask=mask[:, :-1], position_ids=positions[:, shared:-1],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).past_key_values  # fmt: skip

    def _completion(self, prompt: Prompt, ids: list[int], logprobs: list[float]) -> Completion | Failure:
        encoded, sampling = prompt.asked.encoded, prompt.sampling
        end = next((place + 1 for place, token in enumerate(ids) if token in self._ends), None)
        logprob = sum(logprobs[: len(ids[:end])])
        if not math.isfinite(logprob):
            return Failure(NOT_FINITE)
        text = self._tokenizer.continuation(encoded.ids, ids[:end])
        stopped = stop_at(text, sampling.stop)
        return Completion(
            text if stopped is None else stopped,
            logprob,
            len(ids[:end]),
            "stop" if end is not None or stopped is not None else "length",
            len(encoded.ids),
            encoded.truncated,
        )
