"""A look at what a recipe would train, without training: rows, lengths, parameters, memory, one example."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from submission.backends.transformers.loading import stay_offline_and_quiet
from submission.backends.transformers.tokenizer import HfTokenizer
from submission.progress import print_line, spelled_out
from train.bases import base_folder
from train.memory import planned
from train.sft import PreparedTuning, check_installed, prepare
from train.sft_config import Sft
from train.trainer import device_count


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
    size = planned(config, ready.base, ready.train)
    yield (
        f"{'parameters':<12}{size.parameters / 1e6:>7.1f} M, {size.trainable / 1e6:.2f} M of them trainable "
        f"({size.trainable / size.parameters:.2%})"
    )
    yield (
        f"{'memory':<12}{size.total / 1e9:>7.1f} GB estimated: weights {size.weights / 1e9:.1f}, adapter and optimizer "
        f"{size.optimizer / 1e9:.2f}, activations of the longest batch {size.activations / 1e9:.1f}"
        + (f", Python {size.process / 1e9:.1f}" if size.process else "")
    )


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
