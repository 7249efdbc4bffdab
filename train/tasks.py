"""The two tasks that a model is tuned for: recovering a prompt, and judging a candidate for it.

A task turns triplets into examples, and says during training how well the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from submission.backends.transformers.tokenizer import HfTokenizer
from submission.prompts.encoding import ChatEncoder
from submission.prompts.templates import get_template
from submission.types import Triplet
from train.encoding import AnswerEncoder, TrainingExample
from train.judging import QuestionEncoder, questions
from train.sft_config import Sft

if TYPE_CHECKING:
    from eval.encoders import Encoder

_NEW_TOKENS = 40
_SHOWN = 3


class TuningTask(Protocol):
    """What the trainer is told."""

    def examples(self, triplets: Sequence[Triplet]) -> list[TrainingExample | None]:
        """Token ids; None for what does not fit."""
        ...

    def measure(self, model: Any, triplets: Sequence[Triplet]) -> tuple[dict[str, float], list[str]]:
        """Figures by name, and lines to print, of a model in evaluation mode."""
        ...


def make_task(config: Sft, tokenizer: Any) -> TuningTask:
    """The task of a recipe, for one tokenizer."""
    return (_Judge if config.task == "judge" else _Recover)(config, HfTokenizer(tokenizer))


class _Recover:
    def __init__(self, config: Sft, tokenizer: HfTokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._template = get_template(config.template)
        self._answers = AnswerEncoder(tokenizer, self._template, config.max_tokens)
        self._prompts = ChatEncoder(tokenizer, config.max_tokens)
        self._metric: Encoder | None = None

    def examples(self, triplets: Sequence[Triplet]) -> list[TrainingExample | None]:
        return [self._answers.encode(triplet) for triplet in triplets]

    def measure(self, model: Any, triplets: Sequence[Triplet]) -> tuple[dict[str, float], list[str]]:
        """Greedy answers to the first rows, and their mean score."""
        from eval.encoders import find_encoder
        from eval.metric import sharpened_cosine

        asked = triplets[: self._config.samples]
        if not asked:
            return {}, []
        answers = [self._answer(model, triplet) for triplet in asked]
        self._metric = self._metric or find_encoder(self._config.encoder)
        vectors = self._metric.embed([*answers, *(triplet.rewrite_prompt for triplet in asked)], keep=False)
        score = float(sharpened_cosine(vectors[: len(asked)], vectors[len(asked) :]).mean())
        lines = [f"  {answer!r} for {triplet.rewrite_prompt!r}"
                 for answer, triplet in zip(answers[:_SHOWN], asked, strict=False)]  # fmt: skip
        return {"eval_score": score}, [f"  {self._metric.metric} of {len(asked)} greedy answers: {score:.3f}", *lines]

    def _answer(self, model: Any, triplet: Triplet) -> str:
        import torch

        chat = self._template.render(triplet.pair)
        prompt = self._prompts.encode_for(chat, _NEW_TOKENS).ids
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False,
                eos_token_id=self._answers.end, pad_token_id=self._answers.end, use_cache=True,
            )  # fmt: skip
        return self._template.parse(self._tokenizer.continuation(prompt, found[0, len(prompt) :].tolist()))


class _Judge:
    def __init__(self, config: Sft, tokenizer: HfTokenizer) -> None:
        self._config = config
        self._encoder = QuestionEncoder(tokenizer, config.max_tokens)
        self._measured: list[TrainingExample | None] = []

    def examples(self, triplets: Sequence[Triplet]) -> list[TrainingExample | None]:
        from eval.encoders import find_encoder

        asked = questions(triplets, find_encoder(self._config.encoder), self._config.hard, self._config.seed)
        return [self._encoder.encode(question) for question in asked]

    def measure(self, model: Any, triplets: Sequence[Triplet]) -> tuple[dict[str, float], list[str]]:
        """How often the true candidate gets more than even odds and the wrong one less, and more than the wrong one."""
        import torch

        odds: dict[bool, list[float]] = {True: [], False: []}
        self._measured = self._measured or self.examples(triplets)
        for example in self._measured:
            if example is None:
                continue
            with torch.no_grad():
                ids = torch.tensor([example.ids[:-1]], device=model.device)
                logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
            odds[example.ids[-1] == self._encoder.yes].append(
                float(logits[self._encoder.yes] - logits[self._encoder.no])
            )
        right = [value > 0 for value in odds[True]] + [value < 0 for value in odds[False]]
        if not odds[True] or not odds[False]:
            return {}, []
        above = [(yes > no) + (yes == no) / 2 for yes in odds[True] for no in odds[False]]
        figures = {"eval_accuracy": sum(right) / len(right), "eval_auc": sum(above) / len(above)}
        return figures, [
            f"  {figures['eval_accuracy']:.0%} of {len(right)} questions answered rightly (chance 50 %), "
            f"area under the curve {figures['eval_auc']:.2f}"
        ]
