"""LoRA and QLoRA fine-tuning on triplets, with TRL's SFTTrainer and PEFT.

    python -m train sft train/recipes/smoke.toml

The model is trained on the very ids that predicting feeds (see `train.encoding`). A run that was killed goes on from
its last checkpoint with the same losses as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from submission.backends import require
from submission.backends.hf_loading import load_tokenizer, stay_offline_and_quiet
from submission.backends.hf_tokenizer import HfTokenizer
from submission.errors import UserError, first_line
from submission.models import content_hash
from submission.tables import atomic_path, read_triplets
from submission.templates import get_template
from submission.types import Triplet
from train.bases import base_folder
from train.encoding import AnswerEncoder, Example
from train.stages import write_manifest

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sft:
    """What is trained, on what and how; the defaults are the seed's.

    Attributes:
        base: transformers folder, GGUF file or `embedded`.
        train, validation: tables of triplets; "" for no validation.
        template: the one that predicting will use.
        max_tokens: of a prompt and its answer.
        rank, alpha, dropout, targets: of LoRA; targets are names of layers with commas, or all-linear.
        learning_rate, schedule, warmup_steps, weight_decay: of the optimizer; schedule is linear or cosine.
        optimizer: as transformers calls it, such as adamw_torch or paged_adamw_8bit.
        batch, accumulation: sequences of a step are batch x accumulation (x devices).
        epochs, max_steps: how long; max_steps of 0 leaves it to epochs.
        evaluate_every, evaluation_rows: steps between losses on the first rows of validation.
        patience: evaluations without a better loss before it stops; 0 never stops.
        save_every: steps between checkpoints.
        load_in_4bit: nf4 with double quantisation (QLoRA).
        dtype: auto, float32, bfloat16 or float16.
        gradient_checkpointing: less memory for a third more time.
        tracker: none, wandb or tensorboard.
        seed: of everything that is drawn.
    """

    base: str = "embedded"
    train: str = ""
    validation: str = ""
    template: str = "detailed"
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
        for key, allowed in {
            "schedule": ("linear", "cosine"), "dtype": ("auto", "float32", "bfloat16", "float16"),
            "tracker": ("none", "wandb", "tensorboard"),
        }.items():  # fmt: skip
            if getattr(self, key) not in allowed:
                raise UserError(f"option {key}={getattr(self, key)!r} of [sft] must be one of: {', '.join(allowed)}")
        for key in ("rank", "alpha", "batch", "accumulation", "max_tokens", "save_every", "evaluate_every"):
            if getattr(self, key) < 1:
                raise UserError(f"option {key}={getattr(self, key)!r} of [sft] must be at least 1")
        if not self.train:
            raise UserError("[sft] names no training set: train = 'sets/train.parquet'")


def sft(config: Sft, output: Path, say: Say, *, fresh: bool = False) -> Path:
    """Train an adapter; goes on from the last checkpoint in `output` if there is one.

    Returns:
        the folder of the adapter, `output/adapter`.

    Raises:
        UserError: something is missing or wrong, or `output` holds another run.
    """
    config.check()
    for package in ("torch", "transformers", "peft", "trl", "datasets"):
        require(package, "train", "train sft")
    marks = _marks(config)
    adapter, checkpoints = output / "adapter", output / "checkpoints"
    if fresh:
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
    _check_same_run(output, marks)
    if (adapter / "adapter_model.safetensors").is_file():
        say(f"{adapter} is trained by the same recipe: nothing to do (--fresh trains anew)")
        return adapter
    stay_offline_and_quiet()
    output.mkdir(parents=True, exist_ok=True)
    with atomic_path(output / "sft.json") as temporary:
        temporary.write_text(json.dumps(marks, indent=2))
    base = base_folder(config.base)
    tokenizer = load_tokenizer(base)
    encoder = AnswerEncoder(HfTokenizer(tokenizer), get_template(config.template), config.max_tokens)
    train = _encoded(config.train, encoder, 0, say)
    validation = _encoded(config.validation, encoder, config.evaluation_rows, say) if config.validation else []
    trainer = _trainer(config, base, tokenizer, train, validation, checkpoints, say)
    last = _last_checkpoint(checkpoints)
    if last:
        say(f"resuming from {last}")
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.accelerator.is_main_process:
        _save_adapter(trainer, adapter, config)
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        plot_curve(output / "training.png", history)
        write_manifest(output / "adapter", {
            "made_from": marks, "base": str(base), "steps": trainer.state.global_step,
            "loss": result.training_loss, "history": history, "rows": len(train),
        })  # fmt: skip
        say(f"written to {adapter}: {trainer.state.global_step} steps, mean loss {result.training_loss:.4f}")
    return adapter


def plot_curve(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Losses by step, of training and validation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the answer's tokens, nats")
    axes.grid(alpha=0.3)
    if history:
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _marks(config: Sft) -> dict[str, Any]:
    files = {key: content_hash(Path(path)) for key in ("train", "validation")
             if (path := getattr(config, key)) and Path(path).is_file()}  # fmt: skip
    return {"config": asdict(config), "files": files}


def _check_same_run(output: Path, marks: dict[str, Any]) -> None:
    try:
        theirs = json.loads((output / "sft.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        theirs = {}
    if theirs != json.loads(json.dumps(marks)):
        ours, before = marks["config"], theirs.get("config", {})
        different = [
            f"{key}: {before.get(key)!r} there, {ours[key]!r} here" for key in ours if before.get(key) != ours[key]
        ]
        raise UserError(
            f"{output} holds another run: {'; '.join(different) or 'the files of triplets have changed'}\n"
            "Name another output, or begin anew with --fresh."
        )


def _encoded(path: str, encoder: AnswerEncoder, limit: int, say: Say) -> list[Example]:
    triplets: list[Triplet] = read_triplets(Path(path))
    found = [encoder.encode(triplet) for triplet in triplets[: limit or None]]
    kept = [example for example in found if example is not None]
    if len(kept) < len(found):
        say(f"{path}: {len(found) - len(kept)} of {len(found)} rows do not fit the template or the length")
    if not kept:
        raise UserError(f"{path}: no row is left to train on")
    return kept


def _trainer(
    config: Sft,
    base: Path,
    tokenizer: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    folder: Path,
    say: Say,
) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import EarlyStoppingCallback
    from trl.trainer.sft_config import SFTConfig

    cuda = torch.cuda.is_available()
    if config.dtype == "auto":
        dtype = ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if cuda else "float32"
    else:
        dtype = config.dtype
    steps = max(1, math.ceil(len(train) / (config.batch * config.accumulation)))
    say(f"{len(train)} rows, {sum(len(e.ids) for e in train)} tokens, {steps} steps an epoch, {dtype}"
        f"{', 4 bits' if config.load_in_4bit else ''}")  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(folder), seed=config.seed, data_seed=config.seed,
        per_device_train_batch_size=config.batch, per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation, num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1, learning_rate=config.learning_rate, lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps, weight_decay=config.weight_decay, optim=config.optimizer,
        bf16=dtype == "bfloat16" and cuda, fp16=dtype == "float16",
        use_cpu=not cuda, gradient_checkpointing=config.gradient_checkpointing, logging_steps=1,
        eval_strategy="steps" if validation else "no", eval_steps=config.evaluate_every,
        save_strategy="steps", save_steps=config.save_every, save_total_limit=2,
        load_best_model_at_end=bool(validation) and config.save_every % config.evaluate_every == 0,
        metric_for_best_model="eval_loss" if validation else None, report_to=config.tracker, disable_tqdm=True,
        max_length=None, packing=False, shuffle_dataset=False, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )  # fmt: skip

    def table(examples: Sequence[Example]) -> Any:
        return Dataset.from_dict({"input_ids": [list(e.ids) for e in examples], "labels": [e.labels for e in examples]})

    callbacks: list[Any] = [_teller(say)]
    if config.patience and validation:
        callbacks.append(EarlyStoppingCallback(config.patience))
    targets: str | list[str] = [name.strip() for name in config.targets.split(",") if name.strip()]
    try:
        trainer = _trainer_class(config, [len(example.ids) for example in train])(
            model=_load(base, dtype, load_in_4bit=config.load_in_4bit, cuda=cuda),
            args=arguments, train_dataset=table(train), eval_dataset=table(validation) if validation else None,
            processing_class=tokenizer, callbacks=callbacks,
            peft_config=LoraConfig(
                r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, task_type="CAUSAL_LM",
                target_modules="all-linear" if targets == ["all-linear"] else targets,
            ),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"[sft] cannot be set up: {first_line(error)}") from error
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":  # raw dictionaries: `_teller` says it
            trainer.remove_callback(callback)
    return trainer


def _load(base: Path, dtype: str, *, load_in_4bit: bool, cuda: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    more: dict[str, Any] = {}
    if load_in_4bit:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )  # fmt: skip
        local = int(os.environ.get("LOCAL_RANK", "0"))
        more["device_map"] = {"": f"cuda:{local}" if cuda else "cpu"}
    # Without 4 bits the weights stay 32-bit on a GPU with mixed precision, or LoRA's small steps are lost.
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype if load_in_4bit or not cuda else "float32"), local_files_only=True,
        trust_remote_code=False, use_safetensors=True, **more,
    )  # fmt: skip


def _trainer_class(config: Sft, lengths: Sequence[int]) -> Any:
    """SFTTrainer with an order of rows that depends on seed and epoch only.

    The library's sampler draws from the global random stream, whose state at the beginning of an epoch is gone when a
    run is resumed in its middle: the rest of that epoch would see other rows.
    """
    import torch
    from torch.utils.data import Sampler
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from trl.trainer.sft_trainer import SFTTrainer

    class ByLength(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(lengths)

        def __iter__(self) -> Any:
            order = torch.Generator().manual_seed(config.seed + self.epoch)
            together = config.batch * config.accumulation
            return iter(get_length_grouped_indices(list(lengths), together, generator=order))

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return ByLength()

    return Trainer


def _teller(say: Say) -> Any:
    from transformers import TrainerCallback

    class Teller(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not state.is_world_process_zero or not logs:
                return
            if "eval_loss" in logs:
                say(f"step {state.global_step} of {state.max_steps}: validation loss {logs['eval_loss']:.4f}")
            elif "loss" in logs and (state.global_step % 10 == 0 or state.global_step == state.max_steps):
                say(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}")

    return Teller()


def _last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint: the trainer writes its state last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _save_adapter(trainer: Any, adapter: Path, config: Sft) -> None:
    part = adapter.with_name(f".adapter.{os.getpid()}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    trainer.model.save_pretrained(part)
    (part / "prompt-recovery.json").write_text(json.dumps({"template": config.template, "base": config.base}))
    shutil.rmtree(adapter, ignore_errors=True)
    part.rename(adapter)
