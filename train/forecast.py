"""What `train run` will take, told before it starts: minutes, memory and disk of each stage, about.

    python -m train run --triplets mine.csv -o runs/mine --dry-run

Arithmetic is counted from the model's sizes and the lengths of texts, and divided by how fast this machine multiplies
matrices, which is timed for a second. The shares of that speed that stages reach were measured on two cores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from submission.backends.transformers.loading import stay_offline_and_quiet
from submission.errors import UserError
from train.bases import base_folder
from train.memory import measure
from train.recipe import Recipe
from train.run import Run
from train.sft_config import Sft
from train.sources import read_records, resolve
from train.trainer import device_count, training_dtype

_TEXTS = ("original_text", "rewritten_text")
_CHARACTERS = 4.2  # of a token of English, about
_TEMPLATE, _ANSWER = 60, 15  # tokens of a template, and of a prompt that was recovered
_EMBEDDED = 0.2  # of the rows: others are told apart by their words
_ENCODER, _TARGET = 10.6e6, 106e6  # parameters of the layers of MiniLM, and of the embedded model
_SHARES = {"prepare": 0.2, "sft": 0.4, "score": 0.7, "export": 0.3, "make": 0.1}  # of the matrices' pace
_PASSES = {"zero_shot": 1.0, "default": 5.3, "best_of": 5.3}  # times of one answer a row: two models choose among ten
_FIXED = {"prepare": 20.0, "sft": 30.0, "score": 60.0, "export": 60.0, "make": 60.0}  # seconds: loading, compiling
_EXPORTED_TOKENS = 2_000  # that merged weights and GGUF files are checked on
_DISK_PACE = 0.3e9  # bytes a second
_QUANTIZED = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 1.07, "Q4_K_M": 0.6, "Q5_K_M": 0.7, "Q4_0": 0.6}


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of the plan: seconds, and bytes of memory at the peak and on the disk in the end."""

    name: str
    seconds: float
    memory: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True, slots=True)
class _Rows:
    """How many triplets there are, and the tokens of original and rewrite together: mean and longest."""

    count: int
    mean: float
    longest: float


def forecast(run: Run) -> list[Stage]:
    """The stages that a run has, with what each takes.

    Args:
        run: with its recipe; nothing is written, but sources on Kaggle are downloaded to count their rows.

    Raises:
        UserError: a source or the base is missing or of another kind.
    """
    stay_offline_and_quiet()
    base = base_folder(run.sft.base) if run.sft else None
    stages, pace = [], measured_pace(run.sft, base)
    rows = _rows(run)
    if run.making:
        made = 2 * run.making.texts.write * run.making.texts.max_new_tokens + rows.count * rows.mean
        stages.append(Stage("make triplets", _FIXED["make"] + 2 * _TARGET * made / (pace * _SHARES["make"]), 1.7e9))
    if run.recipe:
        work = 2 * _ENCODER * rows.count * (_EMBEDDED * rows.mean + _ANSWER)
        stages.append(Stage("prepare", _FIXED["prepare"] + work / (pace * _SHARES["prepare"]), 1.0e9))
    if run.sft is None or base is None:
        return stages
    folds = run.folds
    split = replace(run.recipe.split, folds=folds).shares if run.recipe else {"train": 1.0, "test": 0.0}
    tokens = min(run.sft.max_tokens, _TEMPLATE + rows.mean + _ANSWER)
    size = measure(run.sft, base, round(min(run.sft.max_tokens, _TEMPLATE + rows.longest + _ANSWER)), 2 * _ANSWER)
    trained, tested = rows.count * split["train"], rows.count * split["test"]
    sft = _work(run.sft, size.linear, trained, tokens) / (pace * _SHARES["sft"]) + _FIXED["sft"]
    adapter = 4.0 * size.trainable
    score = 0.0
    if run.score:
        models = 1 + sum(_PASSES.get(name, 0.0) for name in run.score.baselines)
        shots = sum(3 * tokens for name in run.score.baselines if name.startswith("few_shot"))
        work = tested * (models * tokens + shots) * 2 * size.linear
        score = _FIXED["score"] + work / (pace * _SHARES["score"])
    if folds:
        stages.append(Stage(f"sft x {folds} folds", folds * sft, size.total, folds * 4 * adapter))
        stages.append(Stage(f"score x {folds} folds", folds * score, 1.7e9))
        sft *= rows.count / trained if trained else 1.0  # the exported model learns from the test sets too
    stages.append(Stage("sft", sft, size.total, 4 * adapter))
    merged = 2.0 * size.parameters
    files = sum(_QUANTIZED.get(name, 1.0) for name in run.gguf.quantizations) * size.parameters if run.gguf else 0.0
    checked = 2 * size.parameters * _EXPORTED_TOKENS / (pace * _SHARES["export"])
    export = _FIXED["export"] + checked + (3 * merged + 2 * files) / _DISK_PACE
    stages.append(Stage("merge and gguf", export, 2.0e9, merged + files + adapter))
    if run.score and not folds:
        stages.append(Stage("score", score, 1.7e9))
    return stages


def lines(stages: list[Stage]) -> Iterator[str]:
    """Lines to print."""
    yield f"{'stage':<22}{'minutes':>9}{'memory GB':>11}{'disk GB':>9}"
    for stage in stages:
        yield f"{stage.name:<22}{_minutes(stage.seconds):>9}{stage.memory / 1e9:>11.1f}{stage.disk / 1e9:>9.2f}"
    seconds, memory = sum(stage.seconds for stage in stages), max(stage.memory for stage in stages)
    yield f"{'in all, about':<22}{_minutes(seconds):>9}{memory / 1e9:>11.1f}{sum(s.disk for s in stages) / 1e9:>9.2f}"


def measured_pace(config: Sft | None, base: Path | None) -> float:
    """Floating-point operations a second of a product of matrices on the device that trains, in its dtype."""
    import torch

    dtype = getattr(torch, training_dtype(config or Sft(), base))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 4096 if device == "cuda" else 1024
    left = torch.randn(side, side, device=device).to(dtype)
    best, end = math.inf, time.perf_counter() + 1.0
    while time.perf_counter() < end:
        began = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best * device_count()


def _work(config: Sft, parameters: int, rows: float, tokens: float) -> float:
    """Floating-point operations of a training: forward, and backward to the activations; weights stay as they are."""
    each = 2 + 2 + (2 if config.gradient_checkpointing else 0)
    seen = config.max_steps * config.batch * config.accumulation if config.max_steps else config.epochs * rows
    watched = seen / (config.evaluate_every * config.batch * config.accumulation) * config.evaluation_rows
    return parameters * tokens * (each * seen + 2 * watched)


def _rows(run: Run) -> _Rows:
    if run.making:
        made = run.making
        count = made.rewrites.size or made.prompts.size
        length = float(made.texts.max_new_tokens + min(made.rewrites.max_new_tokens, 2 * made.texts.max_new_tokens))
        return _Rows(count, 0.7 * length, length)
    if run.recipe is None:
        assert run.sft is not None
        return _lengths([Path(run.sft.train)], Recipe(()))
    return _lengths([path for source in run.recipe.sources for path in resolve(source.path)], run.recipe)


def _lengths(paths: list[Path], recipe: Recipe) -> _Rows:
    names = {source.columns.get(name, name) for source in recipe.sources for name in _TEXTS} | set(_TEXTS)
    lengths = []
    for path in paths:
        there, records = read_records(path, names)
        if not names & set(there):
            raise UserError(
                f"{path}: missing column {', '.join(_TEXTS)}\nFound: {', '.join(there)}. Rename them, or name the "
                "table as a [[source]] of a recipe with columns = { original_text = 'their name' }"
            )
        lengths += [sum(map(len, record.values())) / _CHARACTERS for record in records]
    if not lengths:
        raise UserError(f"{', '.join(map(str, paths)) or 'the sources'}: no row to train on")
    return _Rows(len(lengths), sum(lengths) / len(lengths), max(lengths))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 600 else f"{seconds / 60:.1f}"
