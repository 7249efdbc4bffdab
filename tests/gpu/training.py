"""QLoRA of Gemma-7b through `train sft`, stopped and resumed, and an adapter merged into it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from tests.gpu.models import base_model
from tests.gpu.report import Check

_TRIPLETS = Path(__file__).resolve().parents[2] / "examples" / "triplets.csv"
_PLAN = (0.9, 1.1)
_SAME_LOSS = 1e-3  # nats


def run(check: Check, dtype: str) -> None:
    """Train so many steps, then again from a checkpoint in their middle, in this process."""
    from train.sft import sft
    from train.sft_config import read_sft

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = check.own_folder()
    config = read_sft(_recipe(check, folder, dtype), [])
    planned = _planned(config)
    check.put("planned by --dry-run", planned.total / 1e9, "GB", note=f"weights {planned.weights / 1e9:.2f} GB, "
              f"{planned.trainable / 1e6:.1f} M trained")  # fmt: skip
    _reset_peak(check)
    adapter = sft(config, folder / "whole")
    told = json.loads((folder / "whole" / "adapter.run.json").read_text(encoding="utf-8"))
    check.put("steps", told["steps"], "", low=config.max_steps, high=config.max_steps)
    check.put("time of a step", told["seconds"] / told["steps"], "s")
    check.put("dtypes of what is trained", ", ".join(_dtypes(adapter)))
    check.put("trained tensors that are not in float32", sum(name != "F32" for name in _dtypes(adapter)), "", high=0)
    losses = _losses(told)
    check.put("losses that are not numbers", sum(loss != loss for loss in losses.values()), "", high=0)
    check.put("loss, first and last", f"{losses[1]:.3f} {losses[max(losses)]:.3f}", "nats")
    if check.device == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated()
        check.put("peak memory", peak / 1e9, "GB", note="caches of the allocator not counted")
        check.put("peak memory beside --dry-run", peak / planned.total, "x", low=_PLAN[0], high=_PLAN[1])
    else:
        check.leave_out("peak memory beside --dry-run", "a CPU tells no peak")
    if check.left() < told["seconds"]:
        check.leave_out("losses of a resumed run", "no time was left")
        return
    _stopped_in_the_middle(folder / "whole", folder / "resumed", config.save_every)
    sft(config, folder / "resumed")
    again = _losses(json.loads((folder / "resumed" / "adapter.run.json").read_text(encoding="utf-8")))
    gap = max(abs(again[step] - loss) for step, loss in losses.items())
    check.put("losses of a resumed run, largest difference", gap, "nats", high=_SAME_LOSS)


def _recipe(check: Check, folder: Path, dtype: str) -> Path:
    path = folder / "recipe.toml"
    steps, batch, tokens = (4, 1, 640) if check.small else (20, 4, 1024)
    sft: dict[str, Any] = {
        "base": str(base_model(check, "gemma-7b")), "train": str(_TRIPLETS), "rows": 8 if check.small else 200,
        "max_tokens": tokens, "batch": batch, "accumulation": 1, "max_steps": steps, "save_every": steps // 2,
        "warmup_steps": 1, "learning_rate": 1e-4, "load_in_4bit": True, "dtype": dtype,
    }  # fmt: skip
    path.write_text("[sft]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in sft.items()))
    return path


def _planned(config: Any) -> Any:
    """What `train sft --dry-run` estimates."""
    from submission.backends.transformers.loading import stay_offline_and_quiet
    from train.bases import base_folder
    from train.memory import planned
    from train.sft import prepare

    stay_offline_and_quiet()
    ready = prepare(config, base_folder(config.base))
    return planned(config, ready.base, ready.train)


def _stopped_in_the_middle(whole: Path, stopped: Path, step: int) -> None:
    """What a run would have left that was killed behind its checkpoint at a step."""
    shutil.copytree(whole, stopped)
    for path in (*stopped.glob("adapter*"), *stopped.glob("training.png*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (stopped / "checkpoints").glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


def _losses(told: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in told["history"] if "loss" in entry}


def _dtypes(adapter: Path) -> list[str]:
    """Different dtypes of an adapter's tensors, as safetensors calls them."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return sorted({file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118


def _reset_peak(check: Check) -> None:
    if check.device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def run_merge(check: Check) -> None:
    """Merge a random adapter; the memory is that of the command's process."""
    from tests.bench.merge_memory import make_adapter, step

    base, folder = base_model(check, "gemma-7b"), check.own_folder()
    room = shutil.disk_usage(check.work).free
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    if room < 1.1 * size:
        check.leave_out("merge", f"it takes {size / 1e9:.0f} GB of disk, and {room / 1e9:.0f} GB are free")
        return
    make_adapter(base, folder / "adapter")
    took = step("merge", "merge", folder / "adapter", "-o", folder / "merged", "--base", base)
    told = json.loads((folder / "merged.run.json").read_text(encoding="utf-8"))
    check.put("merge", took.seconds, "s")
    check.put("RAM of its own at the peak", took.own / 1e9, "GB", high=6)
    check.put("RAM with mapped files at the peak", took.with_files / 1e9, "GB")
    check.put("divergence from base and adapter", told["divergence"], "nats/token", high=1e-2)
    check.put("same most probable token", told["same_first"], "of 1", low=0.9)
