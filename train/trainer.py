"""TRL's SFTTrainer, set up for examples that are encoded already."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from submission.backends.common import fast_dtype
from submission.backends.transformers.devices import choose_dtype, lowest_capability
from submission.backends.transformers.loading import from_disk, load_config
from submission.errors import UserError, first_line
from train.encoding import IGNORED, TrainingExample
from train.sft_config import Sft

FSDP = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`
_M_MMAP_THRESHOLD = -3  # of malloc.h


def device_count() -> int:
    """Processes of this run, one for each device."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_gpu() -> bool:
    """Whether training runs on a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def training_dtype(config: Sft, base: Path | None = None) -> str:
    """`auto` is what the base predicts in on a GPU (see `choose_dtype`), and what is fastest on a CPU."""
    if config.dtype != "auto":
        return config.dtype
    if not on_gpu():
        return fast_dtype()
    return choose_dtype(load_config(base).model_type if base else "", lowest_capability("cuda"), "auto")


def lora_config(config: Sft) -> Any:
    """As PEFT takes it."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, task_type="CAUSAL_LM",
        target_modules=config.target_modules,
    )  # fmt: skip


def make_trainer(
    config: Sft,
    base: Path,
    tokenizer: Any,
    train: Sequence[TrainingExample],
    validation: Sequence[TrainingExample],
    folder: Path,
    callbacks: Sequence[Any],
) -> Any:
    """A trainer that writes its checkpoints to `folder`.

    Raises:
        UserError: the model cannot be loaded, or has no such layers.
    """
    from datasets import Dataset
    from transformers import EarlyStoppingCallback
    from trl.trainer.sft_config import SFTConfig

    cuda = on_gpu()
    dtype = training_dtype(config, base)
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    if config.tracker == "wandb":
        os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
    arguments = SFTConfig(
        output_dir=str(folder), seed=config.seed, data_seed=config.seed,
        per_device_train_batch_size=config.batch, per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation, num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1, learning_rate=config.learning_rate, lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps, weight_decay=config.weight_decay, optim=config.optimizer,
        bf16=dtype == "bfloat16", fp16=dtype == "float16" and cuda,
        use_cpu=not cuda, gradient_checkpointing=config.gradient_checkpointing, logging_steps=1,
        eval_strategy="steps" if validation else "no", eval_steps=config.evaluate_every,
        save_strategy="steps", save_steps=config.save_every, save_total_limit=2,
        load_best_model_at_end=bool(validation) and config.save_every % config.evaluate_every == 0,
        metric_for_best_model="eval_loss" if validation else None, report_to=config.tracker, disable_tqdm=True,
        max_length=None, packing=False, shuffle_dataset=False, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, ddp_find_unused_parameters=False if device_count() > 1 else None,
    )  # fmt: skip

    def table(examples: Sequence[TrainingExample]) -> Any:
        return Dataset.from_dict({"input_ids": [list(e.ids) for e in examples], "labels": [e.labels for e in examples]})

    more = [EarlyStoppingCallback(config.patience)] if config.patience and validation else []
    try:
        trainer = _trainer_class(config, [len(example.ids) for example in train])(
            model=load_base(base, dtype, load_in_4bit=config.load_in_4bit, cuda=cuda),
            args=arguments, train_dataset=table(train), eval_dataset=table(validation) if validation else None,
            processing_class=tokenizer, callbacks=[*callbacks, *more], peft_config=lora_config(config),
            data_collator=collator(tokenizer),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"[sft] cannot be set up: {first_line(error)}") from error
    keep_trainable_in_float32(trainer.model)
    if arguments.bf16 or arguments.fp16:
        skip_casts(trainer.model)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":  # raw dictionaries: the watcher says it
            trainer.remove_callback(callback)
    return trainer


def keep_trainable_in_float32(model: Any) -> None:
    """Undo TRL's cast of the adapters of 4-bit models to bfloat16; adapters of other models are 32-bit already.

    At a learning rate of 2e-5 most entries of A cannot move in bfloat16, and under float16 training gradient clipping
    raises. Not under FSDP, which wants one dtype for all that it shards.
    """
    import torch

    if os.environ.get(FSDP) == "true":
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def skip_casts(model: Any) -> None:
    """Leave the inputs of adapters as they are under mixed precision, for autocast casts what is multiplied.

    PEFT would cast each to 32 bits, and autocast back: the same numbers, and a copy kept for the backward pass.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def return_freed_memory() -> None:
    """Have large tensors of a CPU come from the system one by one, and go back there when they are freed.

    The C library (glibc) would take tensors of up to 32 MB from its heap. There short-lived ones leave holes between
    those that the backward pass waits for, so that memory grows, and is never given back. But the system blanks the
    pages that it gives out, which takes a third of a step's time: this is for where memory is short.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def batch_order(lengths: Sequence[int], together: int, seed: int) -> list[int]:
    """Rows in the order of an epoch: random, but rows of one step are of like length, so that little is padded.

    Args:
        lengths: of all rows, in tokens.
        together: rows of a step.
        seed: of the epoch.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = torch.Generator().manual_seed(seed)
    found: list[int] = get_length_grouped_indices(list(lengths), together, generator=order)
    return found


def load_base(base: Path, dtype: str, *, load_in_4bit: bool, cuda: bool) -> Any:
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    more: dict[str, Any] = {}
    if load_in_4bit:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            # Sharding needs one dtype for all that is stored.
            bnb_4bit_quant_storage=getattr(torch, dtype) if os.environ.get(FSDP) == "true" else torch.uint8,
        )  # fmt: skip
        local = int(os.environ.get("LOCAL_RANK", "0"))
        more["device_map"] = {"": f"cuda:{local}" if cuda else "cpu"}
    return from_disk(base, base, dtype=getattr(torch, weights_dtype(dtype, load_in_4bit=load_in_4bit)), **more)


def weights_dtype(dtype: str, *, load_in_4bit: bool) -> str:
    """What frozen weights are held in.

    They may be of 16 bits, for LoRA's own stay 32-bit (PEFT casts them up). Those of 16-bit floats would overflow in
    training, so they are 32-bit under mixed precision.
    """
    return "float32" if dtype == "float16" and not load_in_4bit else dtype


def collator(tokenizer: Any) -> Any:
    """Pads a batch on the right to its longest row."""
    import torch

    blank = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), blank)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[place, :length] = torch.tensor(row["input_ids"])
            labels[place, :length] = torch.tensor(row["labels"])
            mask[place, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def _trainer_class(config: Sft, lengths: Sequence[int]) -> Any:
    """SFTTrainer with an order of rows that depends on seed and epoch only, and a loss that looks at answers only.

    The library's sampler draws from the global random stream, whose state at the beginning of an epoch is gone when a
    run is resumed in its middle: the rest of that epoch would see other rows. Its loss computes entropies and
    accuracies of every step, in 32 bits: a sixth of a step's time on a CPU.
    """
    import torch
    from torch.utils.data import Sampler
    from trl.trainer.sft_trainer import SFTTrainer

    together = config.batch * config.accumulation * device_count()

    class ByLength(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(lengths)

        def __iter__(self) -> Any:
            return iter(batch_order(lengths, together, config.seed + self.epoch))

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return ByLength()

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
        ) -> Any:
            """Mean over the answers' tokens of a whole step, all devices and accumulated batches together."""
            labels = inputs["labels"]
            first = int((labels != IGNORED).any(dim=0).nonzero()[0])  # column of the first answer
            # Places rather than their number: for a slice, which is not contiguous, the matrix product would copy the
            # head's weights once for every row (0.9 GB a step for eight rows of the embedded model).
            kept = torch.arange(first - 1, labels.shape[1], device=labels.device)
            outputs = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False,
                logits_to_keep=kept,
            )  # fmt: skip
            answers = labels[:, first:]
            counted = answers != IGNORED
            summed = torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1][counted].float(), answers[counted], reduction="sum"
            )
            if num_items_in_batch is None:
                loss = summed / counted.sum()
            else:  # of all devices, whose gradients are averaged
                loss = summed / num_items_in_batch * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

    return Trainer
