"""What a run would take, before it is started: models, rows, tokens, memory, time.

python -m submission predict test.csv -o submission.csv --dry-run
"""

from __future__ import annotations

import logging
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

from submission.backends import ModelSpec
from submission.calls.log import Log, log_path
from submission.calls.models import encode, open_models
from submission.data.tables import has_text
from submission.errors import UserError
from submission.predict.asking import answer_all
from submission.predict.plan import Plan, RunConfig, plan
from submission.predict.strategies import GENERATOR, Ask
from submission.types import Budget, Failure, Pair

LOG = logging.getLogger(__name__)

_SAMPLE = 5  # rows that are answered to measure the speed


def estimate(config: RunConfig) -> dict[str, float]:
    """Count the prompts' tokens and time a few rows of every length; writes nothing.

    Returns:
        rows, rows_left; of strategies that ask models also memory_mb (peak of a worker so far) and seconds (to be
        expected for the rows left, loading included); of zero-shot and few-shot also tokens (prompt tokens in all),
        longest (of one prompt) and truncated (rows).

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
    spec = made.roles.get(GENERATOR)
    if isinstance(made.strategy, Ask) and isinstance(spec, ModelSpec):
        lengths, truncated, context = _count(made, spec, left())
        figures |= {"tokens": sum(lengths), "longest": max(lengths, default=0), "truncated": truncated}
        LOG.info(f"tokens     {sum(lengths)} in the prompts, {max(lengths, default=0)} in the longest, up to "
            f"{config.sampling.max_new_tokens * rows_left} new ones")  # fmt: skip
        LOG.info(f"truncated  {truncated} rows have texts cut to fit a context of {context} tokens")
    else:
        lengths = array("I", (len(pair.original_text) + len(pair.rewritten_text) for pair in left()))
    by_length = sorted(range(rows_left), key=lengths.__getitem__)
    step = max(1, rows_left // _SAMPLE)
    chosen = set(by_length[step // 2 :: step][:_SAMPLE])
    sample = [pair for number, pair in enumerate(left()) if number in chosen]
    loading, each, memory = _time(made, sample)
    figures |= {"memory_mb": round(memory / 1e6), "seconds": round(loading + each * rows_left, 1)}
    LOG.info(f"rows       {rows_left} to compute of {len(made.pairs)}")
    LOG.info(f"memory     {figures['memory_mb']:.0f} MB at the peak of {len(sample)} sample rows")
    LOG.info(f"time       about {figures['seconds']:.0f} s ({loading:.1f} s loading, {each:.2f} s a row)")
    return figures


def _known(made: Plan) -> set[str]:
    """Rows whose answers are in the log."""
    with open_models(made.roles, Log(log_path(made.config.output), read_only=True), compute=False) as models:
        known: set[str] = set()
        for answer in answer_all(made.strategy, made.pairs, models, Budget(), known.__contains__):
            if answer.status == "ok":
                known.add(answer.id)
        # Only where a row is one call does an answer tell that nothing of it is missing.
        return known if isinstance(made.strategy, Ask) or not models.missing else set()


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
        list(answer_all(made.strategy, sample[:1], models, Budget()))
        with_loading = time.monotonic() - began
        began = time.monotonic()
        rest = list(answer_all(made.strategy, sample[1:], models, Budget()))
        seconds = time.monotonic() - began
        each = seconds / len(rest) if rest else 0.0
        return max(0.0, with_loading - each), each or with_loading, models.peak_memory()
