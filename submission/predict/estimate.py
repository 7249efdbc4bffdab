"""What a run would take, before it is started: rows, tokens, memory, time.

python -m submission predict test.csv -o submission.csv --dry-run
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable, Iterator

from submission.errors import BackendError, UserError
from submission.calls.journal import journal_path, read_finished
from submission.predict.plan import RunConfig, plan
from submission.calls.retry import answer_all
from submission.data.tables import says_something
from submission.types import Budget, Pair

_SAMPLE = 5  # rows that are answered to measure the speed


def rehearse(config: RunConfig, say: Callable[[str], None]) -> dict[str, float]:
    """Count the prompts' tokens and time a few rows of every length; writes nothing.

    Returns:
        rows, rows_left, tokens (prompt tokens in all), longest (of one prompt), truncated (rows),
        memory_mb (peak so far, model included), seconds (to be expected for the rows left, loading included).

    Raises:
        UserError: as `predict`.
    """
    checked = plan(config)
    finished = {} if config.fresh else read_finished(journal_path(config.output), checked.fingerprint)

    def left() -> Iterator[Pair]:
        return (pair for pair in checked.pairs if pair.id not in finished and says_something(pair.rewritten_text))

    rows_left = sum(1 for _ in left())
    figures: dict[str, float] = {"rows": len(checked.pairs), "rows_left": rows_left}
    if checked.spec is None:
        say("no model is used: the run takes no time to speak of")
        return figures
    encoder = checked.spec.load_encoder()
    lengths, truncated = array("I"), 0
    try:
        for pair in left():
            prompt = encoder.encode_for(checked.template.render(pair, checked.shots), config.sampling.max_new_tokens)
            lengths.append(len(prompt.ids))
            truncated += prompt.truncated
    except BackendError as error:
        raise UserError(str(error)) from None
    by_length = sorted(range(rows_left), key=lengths.__getitem__)
    step = max(1, rows_left // _SAMPLE)
    chosen = set(by_length[step // 2 :: step][:_SAMPLE])
    sample = [pair for number, pair in enumerate(left()) if number in chosen]
    began = time.monotonic()
    recover = checked.recover.make(checked.setup())
    loading = time.monotonic() - began
    began = time.monotonic()
    answers = list(answer_all(recover, sample, Budget()))
    each = (time.monotonic() - began) / len(answers) if answers else 0.0
    figures |= {
        "tokens": sum(lengths),
        "longest": max(lengths, default=0),
        "truncated": truncated,
        "memory_mb": round(_peak_memory() / 1e6),
        "seconds": round(loading + each * rows_left, 1),
    }
    say(f"rows       {rows_left} to compute of {len(checked.pairs)}")
    say(f"tokens     {figures['tokens']:.0f} in the prompts, {figures['longest']:.0f} in the longest, up to "
        f"{config.sampling.max_new_tokens * rows_left} new ones")  # fmt: skip
    say(f"truncated  {figures['truncated']:.0f} rows have texts cut to fit a context of {encoder.context} tokens")
    say(f"memory     {figures['memory_mb']:.0f} MB at the peak of {len(sample)} sample rows")
    say(f"time       about {figures['seconds']:.0f} s ({loading:.1f} s loading, {each:.2f} s a row)")
    return figures


def _peak_memory() -> float:
    """Peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
