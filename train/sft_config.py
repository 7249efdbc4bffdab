"""What `python -m train sft` is asked to do: the section [sft] of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from submission.config import from_mapping, read_toml, split_list, split_settings
from submission.errors import UserError

_CHOICES = {
    "task": ("recover", "judge"),
    "schedule": ("linear", "cosine"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "tracker": ("none", "wandb", "tensorboard"),
}
_AT_LEAST = {
    "rank": 1, "alpha": 1, "batch": 1, "accumulation": 1, "max_tokens": 16, "save_every": 1, "evaluate_every": 1,
    "max_steps": 0, "warmup_steps": 0, "samples": 0, "patience": 0, "evaluation_rows": 0, "rows": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sft:
    """What is trained, on what and how; the defaults are the seed's.

    Attributes:
        task: recover (answer with the prompt), or judge (say Yes or No to a candidate).
        base: transformers folder, GGUF file or `embedded`.
        train, validation: tables of triplets; "" for no validation.
        rows: of the training set, from its beginning; 0 for all.
        template: of the task recover: the one that predicting will use.
        hard: of the task judge: share of wrong candidates that are near the true prompt.
        encoder: finds near prompts and scores samples; "" is the one `python -m eval score` takes.
        max_tokens: of a prompt and its answer.
        rank, alpha, dropout, targets: of LoRA; targets are names of layers with commas, or all-linear.
        learning_rate, schedule, warmup_steps, weight_decay: of the optimizer; schedule is linear or cosine.
        optimizer: as transformers calls it, such as adamw_torch or paged_adamw_8bit.
        batch, accumulation: sequences of a step are batch x accumulation (x devices).
        epochs, max_steps: how long; max_steps of 0 leaves it to epochs.
        evaluate_every, evaluation_rows: steps between evaluations, on the first rows of validation (0: all).
        samples: rows of an evaluation that are answered and scored.
        patience: evaluations without a better loss before it stops; 0 never stops.
        save_every: steps between checkpoints. The best one is kept if it is a multiple of evaluate_every.
        load_in_4bit: nf4 with double quantisation (QLoRA).
        dtype: auto (bfloat16 where it is fast; else float16 on GPUs, but float32 for Gemma 2 and 3; float32 on a CPU),
            float32, bfloat16 or float16.
        gradient_checkpointing: less memory for a third more time.
        tracker: none, wandb or tensorboard.
        seed: of everything that is drawn.
    """

    task: str = "recover"
    base: str = "embedded"
    train: str = ""
    validation: str = ""
    rows: int = 0
    template: str = "detailed"
    hard: float = 0.5
    encoder: str = ""
    max_tokens: int = 2048
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1
    targets: str = "q_proj,k_proj,v_proj,o_proj"
    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    optimizer: str = "paged_adamw_8bit"
    batch: int = 1
    accumulation: int = 4
    epochs: float = 4.0
    max_steps: int = 0
    evaluate_every: int = 20
    evaluation_rows: int = 100
    samples: int = 4
    patience: int = 0
    save_every: int = 100
    load_in_4bit: bool = False
    dtype: str = "auto"
    gradient_checkpointing: bool = True
    tracker: str = "none"
    seed: int = 3407

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: names the key, its value and what is allowed.
        """
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"option {key}={getattr(self, key)!r} of [sft] must be one of: {', '.join(allowed)}")
        for key, least in _AT_LEAST.items():
            if getattr(self, key) < least:
                raise UserError(f"option {key}={getattr(self, key)!r} of [sft] must be at least {least}")
        for key, most in {"dropout": 1.0, "hard": 1.0}.items():
            if not 0 <= getattr(self, key) <= most:
                raise UserError(f"option {key}={getattr(self, key)!r} of [sft] must be from 0 to 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"option learning_rate={self.learning_rate!r} of [sft] must be above 0")
        if not (self.max_steps or self.epochs > 0):
            raise UserError(f"option epochs={self.epochs!r} of [sft] must be above 0")
        if not self.train:
            raise UserError("[sft] names no training set: train = 'sets/train.parquet'")

    @property
    def target_modules(self) -> str | list[str]:
        """`targets` as PEFT takes it."""
        names = split_list(self.targets)
        return "all-linear" if names == ["all-linear"] else names

    def steps(self, rows: int, devices: int = 1) -> tuple[int, int]:
        """Steps of an epoch, and of the whole run, as the trainer counts them."""
        batches = math.ceil(rows / (self.batch * devices))
        epoch = max(1, math.ceil(batches / self.accumulation))
        return epoch, self.max_steps or math.ceil(self.epochs * epoch)


def read_sft(path: Path, settings: Sequence[str] = ()) -> Sft:
    """The section [sft] of a recipe, with settings that go before it; sets are those of the recipe's `output`.

    Raises:
        UserError: the recipe has no such section, or an unknown key or bad value.
    """
    content = read_toml(path, "RECIPE")
    section = content.get("sft", {})
    if not isinstance(section, dict):
        raise UserError(f"{path}: [sft] must be a table")
    given = {key.removeprefix("sft."): value for key, value in split_settings(settings).items()}
    return with_sets(from_mapping(Sft, {**section, **given}, "[sft]"), str(content.get("output", "")))


def with_sets(config: Sft, output: str) -> Sft:
    """With the sets that `train run` makes in a folder, where the recipe names none; checked."""
    if output and not config.train:
        sets = Path(output).expanduser() / "sets"
        config = replace(
            config, train=str(sets / "train.parquet"), validation=config.validation or str(sets / "validation.parquet")
        )
    config.check()
    return config
