"""LoRA and QLoRA fine-tuning on triplets, with TRL's SFTTrainer and PEFT.

    python -m train sft train/recipes/smoke.toml -o runs/smoke

The model is trained on the very ids that predicting feeds (see `train.encoding`). A run that was killed goes on from
its last checkpoint with the same losses as one that was not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from submission.backends import require
from submission.backends.common import free_memory
from submission.backends.models import NOTE
from submission.backends.transformers.loading import load_tokenizer, stay_offline_and_quiet
from submission.data.files import atomic_path, read_json, write_json
from submission.data.hashing import content_hash
from submission.data.outputs import check_apart, check_free, claim, made_by, made_folder, up_to_date, write_manifest
from submission.data.tables import read_triplets
from submission.errors import UserError, first_line
from submission.progress import show_progress
from submission.prompts.templates import get_template
from submission.types import Triplet
from train.bases import base_folder
from train.encoding import TrainingExample
from train.memory import planned
from train.session import steps_of
from train.sft_config import Sft
from train.tasks import TuningTask, make_task
from train.trainer import FSDP, device_count, make_trainer, on_gpu, return_freed_memory, training_dtype
from train.watch import watcher

LOG = logging.getLogger(__name__)


ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
_CURVE, _MARKS = "training.png", "sft.json"
_HEAP = 3  # times the planned memory must be free, or freed tensors go back to the system: the heap is left with holes


@dataclass(frozen=True, slots=True)
class PreparedTuning:
    """Everything that is known before a model is loaded."""

    base: Path
    tokenizer: Any
    task: TuningTask
    train: list[TrainingExample]
    validation: list[TrainingExample]
    watched: list[Triplet]
    dropped: dict[str, int]


def sft(config: Sft, output: Path, *, fresh: bool = False) -> Path:
    """Train an adapter; goes on from the last checkpoint in `output` if there is one.

    Returns:
        the folder of the adapter, `output/adapter`.

    Raises:
        UserError: something is missing or wrong, or `output` holds another run.
    """
    check_installed(config)
    main = int(os.environ.get("RANK", "0")) == 0
    if not main:
        logging.getLogger("train").setLevel(logging.WARNING)  # the first process tells
    adapter, checkpoints = output / ADAPTER, output / CHECKPOINTS
    stay_offline_and_quiet()
    with _one_by_one():
        base = base_folder(config.base)
        marks = _marks(config, base)
        get_template(config.template)
        if main and not fresh:
            check_same_run(output, marks)
        if up_to_date(adapter, marks) and not fresh:
            LOG.info(f"{adapter} is trained by the same recipe: nothing to do (--fresh trains anew)")
            return adapter
        if main:
            _check_output(output, config, base)
        ready = prepare(config, base)
        if main:  # all is checked: from here on files change
            _begin(output, marks, fresh=fresh)
    epoch, steps = config.steps(len(ready.train), device_count())
    dtype = training_dtype(config, base)
    LOG.info(f"{len(ready.train)} rows, {sum(len(e.ids) for e in ready.train)} tokens, {epoch} steps an epoch, "
        f"{dtype}{', 4 bits' if config.load_in_4bit else ''}")  # fmt: skip
    if on_gpu() and config.dtype == "auto" and dtype == "float32":
        LOG.warning("in float32, which is slow: this GPU has no bfloat16, and float16 is too narrow for this base")
    if not on_gpu() and _is_short_of_memory(config, base, ready.train):
        return_freed_memory()
    last = _last_checkpoint(checkpoints)
    done = int(last.name.rpartition("-")[2]) if last else 0
    if last:
        LOG.info(f"resuming from {last}")
    with show_progress(steps, done, doing="training", unit="steps") if main else nullcontext(_Unseen()) as progress:
        callback = watcher(progress, ready.task, ready.watched)
        trainer = make_trainer(
            config, base, ready.tokenizer, ready.train, ready.validation, checkpoints, [callback]
        )  # fmt: skip
        try:
            result = trainer.train(resume_from_checkpoint=str(last) if last else None)
            _save_adapter(trainer, adapter, config)
        except Exception as error:
            raise _explained(error, output) from error
    if trainer.accelerator.is_main_process:
        history = [entry for entry in trainer.state.log_history if {"loss", "eval_loss", *_MEASURED} & set(entry)]
        plot_curve(output / _CURVE, history)
        write_manifest(adapter, {
            "made_from": marks, "base": str(base), "template": config.template, "steps": trainer.state.global_step,
            "loss": result.training_loss, "seconds": result.metrics.get("train_runtime"),
            "best": {"loss": trainer.state.best_metric, "step": trainer.state.best_global_step},
            "history": history, "rows": len(ready.train), "dropped": ready.dropped,
        })  # fmt: skip
        LOG.info(f"written to {adapter}: {trainer.state.global_step} steps, mean loss {result.training_loss:.4f}")
    return adapter


def _is_short_of_memory(config: Sft, base: Path, train: Sequence[TrainingExample]) -> bool:
    try:
        return _HEAP * planned(config, base, train).total > free_memory()
    except Exception as error:  # a model that cannot be built without its weights
        LOG.info(f"the memory of this training is not known: {first_line(error)}")
        return True


def _check_output(output: Path, config: Sft, base: Path) -> None:
    """Refuse to write over what is read, or over what no earlier run made.

    Raises:
        UserError: names it.
    """
    files = [output / name for name in (ADAPTER, _CURVE, _MARKS)]
    sets = ((key, Path(getattr(config, key))) for key in ("train", "validation") if getattr(config, key))
    check_apart(output / "sft", files, [*sets, ("base", base)])
    check_free(output / "sft", [output / _CURVE, output / _MARKS])
    check_free(output / ADAPTER, [output / ADAPTER])
    checkpoints = output / CHECKPOINTS
    if checkpoints.is_dir() and not made_by(output / "sft") and any(checkpoints.iterdir()):
        raise UserError(
            f"{checkpoints} is in the way, and not made by this command\nMove it away, or name another output."
        )


def _begin(output: Path, marks: dict[str, Any], *, fresh: bool) -> None:
    """Note what is trained; with `fresh` remove what an earlier run made."""
    output.mkdir(parents=True, exist_ok=True)
    claim(output / "sft", [output / _MARKS, output / _CURVE])
    if fresh:
        for file in made_by(output / ADAPTER):
            file.unlink(missing_ok=True)
        for _, checkpoint in _checkpoints(output / CHECKPOINTS):
            shutil.rmtree(checkpoint)
    write_json(output / _MARKS, marks)


def check_installed(config: Sft) -> None:
    """Refuse a recipe that cannot be meant, or that needs packages that are not there.

    Raises:
        UserError: see `Sft.check`; `MissingExtra` with the pip command.
    """
    config.check()
    for package in ("torch", "transformers", "peft", "trl", "datasets"):
        require(package, "train", "train sft")
    if config.tracker != "none":
        require(config.tracker, "trackers", f"tracker {config.tracker}")
    if config.load_in_4bit or config.optimizer.endswith("8bit"):
        require("bitsandbytes", "train", "train sft in 4 or 8 bits")


def prepare(config: Sft, base: Path) -> PreparedTuning:
    """Read and encode the sets.

    Raises:
        UserError: a table is missing or wrong, or none of its rows fits.
    """
    tokenizer = load_tokenizer(base)
    task = make_task(config, tokenizer)
    dropped: dict[str, int] = {}

    def encoded(path: str, limit: int) -> tuple[list[Triplet], list[TrainingExample]]:
        triplets = read_triplets(Path(path))[: limit or None]
        found = task.examples(triplets)
        kept = [example for example in found if example is not None]
        dropped[path] = len(found) - len(kept)
        why = f"{dropped[path]} of {len(found)} rows {_misfit(config)}"
        if not kept:
            raise UserError(f"{path}: no row is left to train on: {why}")
        if dropped[path]:
            LOG.info(f"{path}: {why}")
        return triplets, kept

    _, train = encoded(config.train, config.rows)
    watched, validation = encoded(config.validation, config.evaluation_rows) if config.validation else ([], [])
    return PreparedTuning(base, tokenizer, task, train, validation, watched, dropped)


def _misfit(config: Sft) -> str:
    """Why examples are left out, in words that go on from a number of rows."""
    why = f"do not fit {config.max_tokens} tokens"
    prefix = get_template(config.template).prefix if config.task == "recover" else ""
    wanted = f", or their prompt does not begin with {prefix!r}, as template {config.template} wants"
    return why + wanted if prefix else why


_MEASURED = {"eval_score": "score of greedy answers", "eval_accuracy": "accuracy", "eval_auc": "area under the curve"}


def plot_curve(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Losses by step, of training and validation, and below them what was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, dict[str, str]]] = [
        ("loss of the answer's tokens, nats", {"loss": "training", "eval_loss": "validation"})
    ]
    if any(key in entry for entry in history for key in _MEASURED):
        panels.append(("validation", _MEASURED))
    figure = Figure(figsize=(6, 2.8 * len(panels) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, series) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for key, label in series.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else "", label=label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    axes.set_xlabel("step")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _marks(config: Sft, base: Path) -> dict[str, Any]:
    files = {key: content_hash(Path(path)) for key in ("train", "validation")
             if (path := getattr(config, key)) and Path(path).is_file()}  # fmt: skip
    # What is in the sets and the base decides, not where they lie.
    asked = {key: value for key, value in asdict(config).items() if key not in ("train", "validation", "base")}
    asked["dtype"] = training_dtype(config, base)  # `auto` is another one on another machine
    marks = {"config": asked, "files": files, "base": content_hash(base), "devices": device_count()}
    plain: dict[str, Any] = json.loads(json.dumps(marks))
    return plain


def check_same_run(output: Path, marks: dict[str, Any]) -> None:
    """Refuse a folder that holds another run.

    Raises:
        UserError: says what is different.
    """
    if not (output / _MARKS).exists():
        return
    theirs = read_json(output / _MARKS)
    if theirs != marks:
        theirs = theirs if isinstance(theirs, dict) else {}
        ours, before = marks["config"], theirs.get("config", {})
        before = before if isinstance(before, dict) else {}
        different = [
            f"{key}: {before.get(key)!r} there, {ours[key]!r} here" for key in ours if before.get(key) != ours[key]
        ]
        different += [f"the content of {key} has changed" for key in ("files", "base", "devices")
                      if theirs.get(key) != marks[key]]  # fmt: skip
        raise UserError(
            f"{output} holds another run: {'; '.join(different)}\nName another output, or begin anew with --fresh."
        )


_FAILED_WRITES = ("SafetensorError", "PytorchStreamWriter", "(os error ")


def _explained(error: Exception, output: Path) -> Exception:
    """What the user can do about it, if it is theirs: too little memory, or no room on the disk."""
    import torch

    said = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in said:
        return UserError(
            f"too little memory for training: {first_line(error)[:200]}\nLower batch (and raise accumulation) or "
            "max_tokens, or set gradient_checkpointing=true, load_in_4bit=true."
        )
    # Libraries that write weights and tokenizers have errors of their own for a failed write.
    failed_write = any(mark in f"{type(error).__name__}: {said}" for mark in _FAILED_WRITES)
    if isinstance(error, OSError) or failed_write:
        return UserError(
            f"{output} cannot be written: {first_line(error)[:200]}\n"
            "Make room and run the same command again: it goes on from the last whole checkpoint."
        )
    return error


@contextmanager
def _one_by_one() -> Iterator[None]:
    """With several processes the first one goes first, and the others find what it has made."""
    if device_count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


class _Unseen:
    """The progress of all processes but the first."""

    def advance(self, *, fell_back: bool = False, computed: bool = True) -> None:
        """Show nothing."""


def _last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint."""
    whole = [(step, path) for step, path in _checkpoints(folder) if steps_of(path)]
    return max(whole, default=(0, None))[1]


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints with their steps: folders that are called as the trainer calls them."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return [(int(match[1]), path) for match, path in named if match and path.is_dir() and not path.is_symlink()]


def _save_adapter(trainer: Any, adapter: Path, config: Sft) -> None:
    sharded = os.environ.get(FSDP) == "true"
    state = trainer.accelerator.get_state_dict(trainer.model) if sharded else None  # all processes take part
    if not trainer.accelerator.is_main_process:
        return
    with made_folder(adapter) as part:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(part, state_dict=state)
        (part / NOTE).write_text(json.dumps({"template": config.template, "base": config.base}))
