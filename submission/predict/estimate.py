"""What a run would take, before it is started: models, rows, tokens, memory, time.

    python -m submission predict test.csv -o submission.csv --dry-run

A few rows are timed here; for transformers folders it is also computed from their sizes what Kaggle's GPUs would take.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from submission.backends import ModelSpec
from submission.backends.common import memory_budget
from submission.backends.hardware import visible_gpus
from submission.backends.models import weight_bytes
from submission.calls.log import Log, log_path
from submission.calls.models import Models, encode, open_models
from submission.data.files import read_json
from submission.data.tables import has_text
from submission.errors import PromptRecoveryError, UserError
from submission.predict.asking import answer_all
from submission.predict.capacity import MACHINES, Fit, ModelShape, Precision, Work, fit, shown, together
from submission.predict.plan import Plan, RunConfig, plan
from submission.predict.strategies import Ask
from submission.types import Budget, Failure, Pair

LOG = logging.getLogger(__name__)

_OF_FOLDERS = ("transformers", "vllm")  # backends whose models have a config.json
_CHARACTERS = 4  # of a token, about
_SAMPLE = 5  # rows that are answered to measure the speed


def estimate(config: RunConfig) -> dict[str, float]:
    """Count the prompts' tokens and time a few rows of every length; writes nothing.

    Returns:
        rows, rows_left; of strategies that ask models also memory_mb (peak of a worker so far) and seconds (to be
        expected for the rows left, loading included); of those that ask by the template also tokens (prompt tokens in
        all), longest (of one prompt) and truncated (rows); of transformers folders also minutes_t4x2 and so on, as
        computed for each machine on which the models fit. A model that is too large for this machine is not timed.

    Raises:
        UserError: as `predict`.
    """
    made = plan(config)
    for role in made.roles:
        about = made.describe(role)
        LOG.info(
            f"role       {role}: {about.get('model')}" + (f" with {about['adapter']}" if about.get("adapter") else "")
        )
    known = set() if config.fresh else _known(made)

    def left() -> Iterator[Pair]:
        return (pair for pair in made.pairs if pair.id not in known and has_text(pair.rewritten_text))

    rows_left = sum(1 for _ in left())
    figures: dict[str, float] = {"rows": len(made.pairs), "rows_left": rows_left}
    if not made.roles:
        LOG.info("no model is used: the run takes no time to speak of")
        return figures
    if not rows_left:
        LOG.info("every answer is in the log: the run computes nothing")
        return figures
    role = getattr(made.strategy, "prompted", "")
    spec = made.roles.get(role)
    if isinstance(spec, ModelSpec):
        lengths, truncated, context = _count(made, spec, left())
        figures |= {"tokens": sum(lengths), "longest": max(lengths, default=0), "truncated": truncated}
        answers, new_tokens = _asked_of(made, role)
        LOG.info(f"tokens     {sum(lengths)} in the prompts, {max(lengths, default=0)} in the longest, up to "
            f"{answers * new_tokens * rows_left} new ones")  # fmt: skip
        LOG.info(f"truncated  {truncated} rows have texts cut to fit a context of {context} tokens")
    else:
        lengths = array("I", (len(pair.original_text) + len(pair.rewritten_text) for pair in left()))
    prompt = sum(lengths) / (rows_left if "tokens" in figures else _CHARACTERS * rows_left)
    figures |= _capacity(made, rows_left, round(prompt))
    if too_large := _too_large(made):
        LOG.info(f"{too_large} is larger than this machine's memory: nothing is timed here")
        return figures
    by_length = sorted(range(rows_left), key=lengths.__getitem__)
    step = max(1, rows_left // _SAMPLE)
    chosen = set(by_length[step // 2 :: step][:_SAMPLE])
    sample = [pair for number, pair in enumerate(left()) if number in chosen]
    loading, each, memory = _time(made, sample)
    figures |= {"memory_mb": round(memory / 1e6), "seconds": round(loading + each * rows_left, 1)}
    LOG.info(f"rows       {rows_left} to compute of {len(made.pairs)}")
    LOG.info(f"memory     {figures['memory_mb']:.0f} MB at the peak of {len(sample)} sample rows")
    parts = f"{loading:.1f} s loading, {each:.2f} s a row" if each else "loading included"
    LOG.info(f"time       about {figures['seconds']:.0f} s ({parts})")
    return figures


def _capacity(made: Plan, rows: int, prompt_tokens: int) -> dict[str, float]:
    """Minutes by machine where all models fit, one after the other; all figures are told."""
    totals: list[list[Fit]] = []
    for role, spec in made.roles.items():
        if not isinstance(spec, ModelSpec) or spec.backend not in _OF_FOLDERS or not Path(spec.model).is_dir():
            continue
        answers, new_tokens = _asked_of(made, role)
        try:
            shape = ModelShape.from_config(read_json(Path(spec.model) / "config.json"))
        except UserError as error:  # of a kind that the plan does not know
            LOG.info(f"capacity   {role}: {error}")
            continue
        adapter = weight_bytes(spec.adapter) if spec.adapter else 0
        in_4bit, dtype = getattr(spec.options, "load_in_4bit", False), getattr(spec.options, "dtype", "auto")
        precision = Precision(4 if in_4bit else 16, adapter, dtype)
        work = Work(rows, prompt_tokens, new_tokens, answers)
        totals.append([fit(machine, shape, work, precision) for machine in MACHINES])
        LOG.info(f"capacity   {role}: {shape.parameters / 1e9:.2f}B parameters in {precision.bits} bits, computed")
        for line in shown(totals[-1]):
            LOG.info(f"           {line}")
    machines = [together(fits) for fits in zip(*totals, strict=True)]
    return {f"minutes_{one.machine.name}": round(one.minutes, 1) for one in machines if one.fits}


def _asked_of(made: Plan, role: str) -> tuple[int, int]:
    """Answers that a row asks of a role at most, and their most tokens; the run's where the strategy does not say."""
    asked: Mapping[str, tuple[int, int]] = getattr(made.strategy, "answers", {})
    return asked.get(role, (max(1, made.config.sampling.n), made.config.sampling.max_new_tokens))


def _too_large(made: Plan) -> str:
    """The first model whose weights are more than this machine could hold; "" if there is none."""
    most = 4 * memory_budget() if not visible_gpus() else math.inf
    for spec in made.roles.values():
        if isinstance(spec, ModelSpec) and spec.backend == "transformers":
            size = weight_bytes(Path(spec.model))
            if 2 * size > most:  # 16 bits become 32 on a CPU
                return f"model {spec.model} ({size / 1e9:.1f} GB)"
    return ""


def _known(made: Plan) -> set[str]:
    """Rows whose answers are in the log."""
    with open_models(made.roles, Log(log_path(made.config.output), read_only=True), compute=False) as models:
        try:
            status = _answer(made, made.pairs, models)
        except PromptRecoveryError:  # of a strategy that cannot do without an answer
            return set()
        # Only where a row is one call does an answer tell that nothing of it is missing.
        whole = isinstance(made.strategy, Ask) or not models.missing
        return {row for row, of in status.items() if of == "ok"} if whole else set()


def _count(made: Plan, spec: ModelSpec, pairs: Iterator[Pair]) -> tuple[array[int], int, int]:
    """Tokens of the prompts in the order of the pairs, how many are cut, and the context's size."""
    new_tokens = made.config.sampling.max_new_tokens
    items = ((str(number), made.template.render(pair, made.shots), new_tokens) for number, pair in enumerate(pairs))
    found: dict[int, int] = {}
    truncated = context = 0
    for key, seen in encode(spec, items):
        if isinstance(seen, Failure):
            raise UserError(seen.reason)
        found[int(key)] = seen.tokens
        truncated, context = truncated + seen.truncated, seen.context
    return array("I", (found[number] for number in range(len(found)))), truncated, context


def _time(made: Plan, sample: list[Pair]) -> tuple[float, float, float]:
    """Seconds of loading, seconds a row, and the peak of the workers' memory in bytes, of rows that are answered."""
    with tempfile.TemporaryDirectory() as folder, \
            open_models(made.roles, Log(Path(folder) / "sample.calls.jsonl")) as models:  # fmt: skip
        began = time.monotonic()
        _answer(made, sample[:1], models)
        with_loading = time.monotonic() - began
        began = time.monotonic()
        rest = _answer(made, sample[1:], models)
        seconds = time.monotonic() - began
        each = seconds / len(rest) if rest else 0.0  # of one row alone nothing tells loading from answering
        return max(0.0, with_loading - each), each, models.peak_memory()


def _answer(made: Plan, pairs: Iterable[Pair], models: Models) -> dict[str, str]:
    """The status of each row's last answer, by id."""
    status: dict[str, str] = {}
    for answer in answer_all(made.strategy, pairs, models, Budget(), status.__contains__):
        status[answer.id] = answer.status
    return status
