"""The predictor as a function, for notebooks and programs.

from submission import Pair, recover

recover([Pair("1", "The shoe may be refused.", "Arr, the boot be refused!")])[0].text
frame["rewrite_prompt"] = [found.text for found in recover(frame)]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends import AUTO
from submission.backends.hardware import Placement
from submission.backends.models import TUNED
from submission.calls.log import Log, is_log
from submission.calls.models import Limits, open_models
from submission.calls.supervisor import DeadlineReached
from submission.data.tables import PAIR_COLUMNS, has_text
from submission.errors import UserError
from submission.predict.asking import answer_all
from submission.predict.outcome import BLANK_INPUT, DEADLINE, NO_ANSWER
from submission.predict.plan import RunConfig, check_fallback, checked_model, choose_strategy, choose_template
from submission.predict.strategies import DEFAULT_PROMPT, Setup, find_recover, roles_of
from submission.types import Budget, Pair, Prediction, Sampling, Triplet

if TYPE_CHECKING:
    import pandas as pd


def recover(
    pairs: Iterable[Pair] | pd.DataFrame,
    *,
    model: str = TUNED,
    backend: str = AUTO,
    adapter: str | Path | None = None,
    settings: Sequence[str] = (),
    template: str = "",
    shots: Sequence[Triplet] = (),
    sampling: Sampling = Sampling(),
    strategy: str = "",
    config: Mapping[str, Any] | None = None,
    fallback: str = DEFAULT_PROMPT,
    workers: int = 1,
    log: str | Path | None = None,
    seconds: float | None = None,
) -> list[Prediction]:
    """Recover the prompt behind each pair; what `python -m submission predict` does, without files.

    Args:
        pairs: with ids that differ; or a DataFrame with the columns id, original_text, rewritten_text.
        model: `embedded-tuned`, `embedded`, a GGUF file or a transformers folder.
        backend: `auto` chooses by the model; see `predict --help`.
        adapter: LoRA adapter.
        settings: options of the backend, such as `context=2048`.
        template: layout of the prompt; "" takes what the model was trained on.
        shots: solved examples that are shown before each pair.
        sampling: how answers are sampled.
        strategy: zero_shot (one answer), few_shot, constant, best_of, search, or `module:object`; "" for few_shot with
            shots, best_of for the default model, else zero_shot.
        config: options of the strategy.
        fallback: the text of rows that failed.
        workers: copies of the model; 0 for one on each GPU.
        log: file that keeps every call, so that the same calls are not computed again; None keeps none.
        seconds: after which the rows that are left get the fallback; None for no limit.

    Returns:
        a prediction for each pair, in the same order. Where `status` is not "ok" the text is the fallback, and `reason`
        says why.

    Raises:
        UserError: an option, an id or a column is wrong, or a model is missing.
    """
    _check(sampling, shots, fallback, workers, seconds)
    asked = _pairs(pairs)
    budget = Budget(None if seconds is None else time.monotonic() + seconds)
    place = Path(adapter).expanduser() if adapter else None
    layout = choose_template(template, model, place, shots=bool(shots))
    run = RunConfig(
        Path(), Path(), backend=backend, model=model, adapter=place, settings=list(settings),
        placement=Placement(workers), sampling=sampling,
    )  # fmt: skip
    setup = Setup(cache(lambda: checked_model(run)), layout, list(shots), sampling, config or {}, run.placement)
    made = find_recover(strategy or choose_strategy(run, shots=bool(shots))).make(setup)
    found: dict[str, Prediction] = {}
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-") as folder:
        file = Path(log).expanduser() if log else Path(folder) / "calls.jsonl"
        if file.exists() and not is_log(file):
            raise UserError(f"{file} is no log of model calls: name another file")
        calls = Log(file)
        with open_models(roles_of(made, setup), calls, Limits(budget.end)) as models, suppress(DeadlineReached):
            rows = (pair for pair in asked if has_text(pair.rewritten_text))
            for prediction in answer_all(made, rows, models, budget, found.__contains__):
                known = found.get(prediction.id)
                if known is None or prediction.status == "ok" or known.status != "ok":
                    found[prediction.id] = prediction
                if budget.remaining() == 0:
                    break
    late = budget.remaining() == 0
    return [_whole(pair, found.get(pair.id), fallback, late=late) for pair in asked]


def _check(sampling: Any, shots: Any, fallback: Any, workers: Any, seconds: Any) -> None:
    """Refuse what is of another kind: within the run it would only make rows fail."""
    if not isinstance(sampling, Sampling):
        raise UserError(f"sampling={sampling!r:.40} must be a Sampling")
    if not all(isinstance(shot, Triplet) for shot in shots):
        raise UserError("shots must be Triplet(pair, rewrite_prompt)")
    if not isinstance(fallback, str):
        raise UserError(f"fallback={fallback!r:.40} must be a prompt")
    check_fallback(fallback)
    if type(workers) is not int or workers < 0:
        raise UserError(f"workers={workers!r:.40} must be a whole number from 0")
    if seconds is not None and (type(seconds) not in (int, float) or seconds != seconds):
        raise UserError(f"seconds={seconds!r:.40} must be a number, or None")


def _pairs(given: Iterable[Pair] | pd.DataFrame) -> list[Pair]:
    table: Any = given
    columns = getattr(table, "columns", None)
    pairs: list[Pair]
    if columns is None:
        if not isinstance(table, Iterable):
            raise UserError(f"pairs must be Pairs or a DataFrame, not {type(table).__name__}")
        pairs = list(table)
        for pair in pairs:
            if not isinstance(pair, Pair):
                raise UserError(f"pairs must be Pair(id, original_text, rewritten_text), not {type(pair).__name__}")
            odd = next((n for n in PAIR_COLUMNS if not isinstance(getattr(pair, n), str)), None)
            if odd is not None:
                raise UserError(f"pair {pair.id!r}: {odd} must be a text, not {type(getattr(pair, odd)).__name__}")
    else:
        names = list(columns)
        missing = [name for name in PAIR_COLUMNS if names.count(name) != 1]
        if missing:
            raise UserError(
                f"the table needs each of {', '.join(PAIR_COLUMNS)} once; {missing[0]} is there "
                f"{names.count(missing[0])} times, among: {', '.join(map(str, names))}"
            )
        cells = (_texts(table[name]) for name in PAIR_COLUMNS)
        pairs = [Pair(*row) for row in zip(*cells, strict=True)]
    seen: set[str] = set()
    for pair in pairs:
        if not pair.id.strip() or pair.id in seen:
            raise UserError(f"id {pair.id!r} is null, or is there twice: every pair needs an id of its own")
        seen.add(pair.id)
    return pairs


def _texts(column: Any) -> list[str]:
    """A column as texts; nulls are blank."""
    null = column.isna().tolist()
    return ["" if blank else str(value) for value, blank in zip(column.tolist(), null, strict=True)]


def _whole(pair: Pair, found: Prediction | None, fallback: str, *, late: bool) -> Prediction:
    """The row's prediction, with a text in any case."""
    if found is not None:
        return found if found.status == "ok" else replace(found, text=fallback)
    if not has_text(pair.rewritten_text):
        return Prediction(pair.id, fallback, "failed", BLANK_INPUT)
    return (
        Prediction(pair.id, fallback, "unfinished", DEADLINE)
        if late
        else Prediction(pair.id, fallback, "failed", NO_ANSWER)
    )
