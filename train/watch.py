"""What a person sees while a model is trained: a bar, losses, and now and then how well it does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from submission.progress import Progress
from submission.types import Triplet
from train.tasks import TuningTask

LOG = logging.getLogger(__name__)


def watcher(progress: Progress, task: TuningTask, validation: Sequence[Triplet]) -> Any:
    """A callback of transformers' trainer.

    Args:
        progress: is told of every step.
        task: measures the model at each evaluation; figures go to the trainer's history.
        validation: what it is measured on.
    """
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.advance(fell_back=False)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not state.is_world_process_zero or not logs:
                return
            step = f"step {state.global_step} of {state.max_steps}"
            if "eval_loss" in logs:
                LOG.info(f"{step}: validation loss {logs['eval_loss']:.4f}")
            elif "loss" in logs and (state.global_step % 10 == 0 or state.global_step == state.max_steps):
                LOG.info(f"{step}: loss {logs['loss']:.4f}")

        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if args.world_size > 1:
                return  # the other processes would wait for this one, and a sharded model cannot generate alone
            import torch

            training = model.training
            model.eval()
            mixed = torch.autocast(
                model.device.type, torch.bfloat16 if args.bf16 else torch.float16, enabled=args.bf16 or args.fp16
            )
            # Whatever is drawn here, a resumed run goes on with the random stream of one that was not killed.
            with torch.random.fork_rng(), mixed:
                figures, lines = task.measure(model, validation)
            model.train(training)
            if figures:
                state.log_history.append({"step": state.global_step, **figures})
            for line in lines:
                LOG.info(line)

    return Watcher()
