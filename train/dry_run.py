"""A look at what a recipe would train, without training: rows, lengths, parameters, memory, one example."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.backends.transformers.loading import load_config, stay_offline_and_quiet
from submission.backends.transformers.tokenizer import HfTokenizer
from submission.errors import UserError, first_line
from submission.progress import print_line, spelled_out
from train.bases import base_folder
from train.sft import PreparedTuning, check_installed, prepare
from train.sft_config import Sft
from train.trainer import device_count, lora_config, training_dtype

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_NF4_BYTES = 0.52  # with double quantisation, of weights in linear layers
_ACTIVATIONS = 34  # hidden states that a layer keeps for its backward pass, as in arxiv.org/abs/2205.05198


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters of a model, `linear` those that multiply each token, and the bytes that training takes."""

    parameters: int
    linear: int
    in_4bit: int
    trainable: int
    weights: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.weights + self.optimizer + self.activations


def look(config: Sft) -> None:
    """Print it all.

    Raises:
        UserError: what `sft` would refuse.
    """
    check_installed(config)
    stay_offline_and_quiet()
    ready = prepare(config, base_folder(config.base))
    for line in lines(config, ready):
        print_line(line, sys.stdout)
    print_line("", sys.stdout)
    show_example(ready)


def lines(config: Sft, ready: PreparedTuning) -> Iterator[str]:
    """Lines to print.

    Raises:
        UserError: the model has no such layers.
    """
    for name, path, examples in (
        ("training", config.train, ready.train), ("validation", config.validation, ready.validation),
    ):  # fmt: skip
        if path:
            yield f"{name:<12}{len(examples):>7} examples, {ready.dropped.get(path, 0)} dropped for length or template"
            yield f"{'':<12}tokens: {_quantiles([len(e.ids) for e in examples])}"
            yield f"{'':<12}of the answer: {_quantiles([len(e.ids) - e.answer_from for e in examples])}"
    epoch, steps = config.steps(len(ready.train), device_count())
    tokens = sum(len(example.ids) for example in ready.train)
    yield f"{'steps':<12}{steps:>7}, {epoch} an epoch; {tokens / epoch:.0f} tokens a step"
    size = planned(config, ready)
    yield (
        f"{'parameters':<12}{size.parameters / 1e6:>7.1f} M, {size.trainable / 1e6:.2f} M of them trainable "
        f"({size.trainable / size.parameters:.2%})"
    )
    yield (
        f"{'memory':<12}{size.total / 1e9:>7.1f} GB estimated: weights {size.weights / 1e9:.1f}, adapter and optimizer "
        f"{size.optimizer / 1e9:.2f}, activations of the longest batch {size.activations / 1e9:.1f}"
    )


def planned(config: Sft, ready: PreparedTuning) -> Size:
    """What training on these examples takes; see `measure`."""
    answer = max(len(example.ids) - example.answer_from for example in ready.train)
    return measure(config, ready.base, max(len(example.ids) for example in ready.train), answer)


def measure(config: Sft, base: Path, longest: int, answer: int) -> Size:
    """Count parameters on a model without weights, and estimate bytes.

    Args:
        config: of the training.
        base: folder of the base model.
        longest: tokens of an example.
        answer: tokens of an answer, of which logits are computed.

    Raises:
        UserError: the model has no such layers.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    shape = load_config(base)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape)
        parameters = sum(p.numel() for p in model.parameters())
        head = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m.weight) not in head]
        in_4bit = sum(weight.numel() for weight in linear) if config.load_in_4bit else 0
        try:
            warnings.simplefilter("ignore", FutureWarning)  # of one library about another
            trainable = get_peft_model(model, lora_config(config)).get_nb_trainable_parameters()[0]
        except ValueError as error:
            raise UserError(f"[sft] cannot be set up: {first_line(error)}") from error
    width = _BYTES[training_dtype(config)]
    text = shape.get_text_config()
    longest *= config.batch
    kept = _ACTIVATIONS * text.hidden_size * longest * width / 2
    layers = text.num_hidden_layers
    activations = (2 * text.hidden_size * longest * layers + kept) if config.gradient_checkpointing else kept * layers
    return Size(
        parameters, sum(weight.numel() for weight in linear), in_4bit, trainable,
        weights=in_4bit * _NF4_BYTES + (parameters - in_4bit) * width,
        optimizer=trainable * (4 + 4 + (2 if "8bit" in config.optimizer else 8)),
        activations=activations + 3 * 4 * answer * config.batch * text.vocab_size,
    )  # fmt: skip


def show_example(ready: PreparedTuning) -> None:
    """Print the first example; what the loss counts is green, and between ⟦ ⟧ where there is no colour."""
    from rich.console import Console
    from rich.text import Text

    example = ready.train[0]
    tokenizer = HfTokenizer(ready.tokenizer)
    shown = Text(spelled_out(tokenizer.detokenize(example.ids[: example.answer_from])), style="dim")
    shown.append("⟦", style="dim")
    shown.append(spelled_out(tokenizer.detokenize(example.ids[example.answer_from :])), style="bold green")
    shown.append("⟧", style="dim")
    Console(soft_wrap=True).print(shown)


def _quantiles(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.0, 0.5, 0.95, 1.0)]
    return f"shortest {at[0]}, median {at[1]}, 95 % up to {at[2]}, longest {at[3]}"
