"""How much time the trainer adds to a bare loop of PyTorch on the same batches, and how much of them is padding.

    python -m tests.bench.training_speed train/recipes/embedded.toml --set train=triplets.csv

Both train the same adapter on the same rows, in one process, one after the other and again; the first steps of each are
not counted. A command, for its figures are of one machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from submission.backends.transformers.loading import stay_offline_and_quiet
from train.bases import base_folder
from train.encoding import TrainingExample
from train.sft import prepare
from train.sft_config import Sft, read_sft
from train.trainer import batch_order, collator, load_base, lora_config, make_trainer, training_dtype

_WARM = 2  # steps that are not counted


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    steps = _WARM + asked.steps
    settings = [*asked.settings, f"max_steps={steps}", "validation=", f"save_every={steps + 1}"]
    config = read_sft(asked.recipe, settings)
    stay_offline_and_quiet()
    ready = prepare(config, base_folder(config.base))
    rows = batches(config, ready.train, steps)
    tokens = [sum(len(example.ids) for example in batch) for batch in rows]
    padded = [max(len(example.ids) for example in batch) * len(batch) for batch in rows]
    everything = batches(config, ready.train, 10**9)
    waste = 1 - sum(len(e.ids) for b in everything for e in b) / sum(
        max(len(e.ids) for e in b) * len(b) for b in everything
    )
    print(f"padding: {waste:.1%} of an epoch's {len(everything)} batches")
    with TemporaryDirectory() as folder:  # memory is slow when it is touched first
        in_trainer(config, ready.base, ready.tokenizer, ready.train, Path(folder))
    for _ in range(asked.repeats):
        bare = bare_loop(config, ready.base, ready.tokenizer, rows)
        with TemporaryDirectory() as folder:
            ours = in_trainer(config, ready.base, ready.tokenizer, ready.train, Path(folder))
        counted = sum(tokens[_WARM:])
        print(
            f"bare loop {counted / bare:.0f} tokens/s, trainer {counted / ours:.0f} tokens/s: "
            f"{ours / bare:.3f} x the time ({counted} tokens, {sum(padded[_WARM:])} with padding)",
            flush=True,
        )


def batches(config: Sft, examples: Sequence[TrainingExample], steps: int) -> list[list[TrainingExample]]:
    """The first batches of a run, as the trainer makes them."""
    order = batch_order([len(example.ids) for example in examples], config.batch * config.accumulation, config.seed)
    rows = [examples[number] for number in order]
    return [rows[start : start + config.batch] for start in range(0, len(rows), config.batch)][:steps]


def bare_loop(config: Sft, base: Path, tokenizer: Any, rows: Sequence[Sequence[TrainingExample]]) -> float:
    """Seconds of the counted steps."""
    import torch
    from peft import get_peft_model

    cuda = torch.cuda.is_available()
    dtype = training_dtype(config, base)
    model = get_peft_model(load_base(base, dtype, load_in_4bit=config.load_in_4bit, cuda=cuda), lora_config(config))
    model = (model.cuda() if cuda and not config.load_in_4bit else model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    collate = collator(tokenizer)
    began = 0.0
    for step, batch in enumerate(rows):
        if step == _WARM:
            began = time.perf_counter()
        inputs = collate([{"input_ids": list(e.ids), "labels": e.labels} for e in batch])
        if cuda:
            inputs = {key: value.cuda() for key, value in inputs.items()}
        with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            # Logits of answers only, as the trainer's.
            hidden = model.base_model.model.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state[:, :-1]
            labels = inputs["labels"][:, 1:]
            logits = model.base_model.model.lm_head(hidden[labels != -100])
        loss: Any = torch.nn.functional.cross_entropy(logits.float(), labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_trainer(config: Sft, base: Path, tokenizer: Any, train: Sequence[TrainingExample], folder: Path) -> float:
    """Seconds of the counted steps."""
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    make_trainer(config, base, tokenizer, train, [], folder, [Clock()]).train()
    return float(times[-1] - times[_WARM - 1])


if __name__ == "__main__":
    main()
