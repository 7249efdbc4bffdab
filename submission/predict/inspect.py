"""One row of a run, looked at closely: its texts, the exact prompts, the raw answers, and what came of them.

python -m submission inspect ID --run submission.csv

The run's strategy is run again for this row, with the log and without computing anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from submission.backends import ModelSpec
from submission.backends.hardware import Placement
from submission.calls.log import Log, log_path
from submission.calls.models import Models, RecordedCall, encode, open_models
from submission.data.outputs import manifest_path, read_manifest
from submission.data.tables import PREDICTION_COLUMNS, has_text, stream_table
from submission.errors import UserError, first_line
from submission.predict.outcome import BLANK_INPUT
from submission.predict.plan import RunConfig, plan
from submission.types import Budget, Completion, Failure, LogLikelihood, Prediction, Request, Sampling

_MOST = 20  # calls that are shown


def inspect_row(row_id: str, output: Path) -> str:
    """A readable page about one row.

    Args:
        row_id: the id, as in the input.
        output: the output of the run, whose log and manifest lie beside it.

    Raises:
        UserError: there is no such run, input or row.
    """
    manifest = read_manifest(output)
    config = dataclasses.replace(_config(manifest, output), output=output)
    made = plan(config, writes=False)
    pair = next((pair for pair in made.pairs if pair.id == row_id), None)
    if pair is None:
        raise UserError(
            f"id {row_id!r} is not in {config.input}; its ids begin with {', '.join(islice(made.pairs.ids, 5))}"
        )
    if made.pairs.digest != manifest.get("input_sha256"):
        raise UserError(f"{config.input} was changed after the run that made {output}: run predict again")
    sections = [("id", row_id), ("original text", pair.original_text), ("rewritten text", pair.rewritten_text)]
    answer: Prediction | None = None
    with open_models(made.roles, Log(log_path(output), read_only=True), compute=False) as models:
        asked: list[RecordedCall] = []
        models.asked = asked
        try:
            answer = list(made.strategy([pair], models, Budget()))[-1]
        except Exception:  # of a strategy that cannot do without an answer
            answer = None
        answer = None if models.missing else answer
        sections += _calls(asked, models)
    if not has_text(pair.rewritten_text):
        sections.append(("status", f"failed: {BLANK_INPUT}"))
    elif answer is None:
        sections.append(("status", "not all of its calls are in the log: some failed, or time was short"))
    else:
        sections.append(("parsed answer", answer.text))
        sections.append(("status", answer.status + (f": {answer.reason}" if answer.reason else "")))
    sections.append(("in the output", _written(row_id, output)))
    return "\n\n".join(f"== {title}\n{text}" for title, text in sections)


def _config(manifest: Mapping[str, Any], output: Path) -> RunConfig:
    """The configuration of a run, as its manifest has it."""
    try:
        values: dict[str, Any] = dict(manifest["config"])
        values |= {name: Path(values[name]) if values[name] else None
                   for name in ("input", "output", "adapter", "shots", "recover_config")}  # fmt: skip
        values["recover"] = values["recover"] or str(manifest["recover"])  # what an earlier version took by itself
        values["sampling"] = Sampling(**{**values["sampling"], "stop": tuple(values["sampling"]["stop"])})
        values["placement"] = Placement(**values["placement"])
        config = RunConfig(**values)
        if config.input is None or not all(isinstance(one, str) for one in config.settings):
            raise TypeError("input and settings must be there")
        _check_types(config)
        return config
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{manifest_path(output)} is not the manifest of a run: {first_line(error)}") from None


def _check_types(config: RunConfig) -> None:
    """Raise TypeError where a plain value is of another kind than its default."""
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if type(default) in (str, int, bool) and type(value) is not type(default):
            raise TypeError(f"{field.name} must be {type(default).__name__}")
    sampling = dataclasses.asdict(config.sampling)
    if not all(isinstance(value, int | float | tuple | list) for value in sampling.values()):
        raise TypeError("sampling must be numbers")


def _calls(asked: list[RecordedCall], models: Models) -> Iterator[tuple[str, str]]:
    """What the strategy asked, as the models saw it, and what they answered."""
    for call in asked[:_MOST]:
        role = next((role for role, model in models.items() if model.spec == call.spec), "model")
        named = role if len(models) > 1 or len(asked) > 1 else ""
        if isinstance(call.item, Request) and isinstance(call.spec, ModelSpec):
            ((_, seen),) = encode(call.spec, [("0", call.item.chat, call.item.sampling.max_new_tokens)])
            if isinstance(seen, Failure):
                yield f"prompt {named}".rstrip(), seen.reason
            else:
                note = ", texts cut to fit" if seen.truncated else ""
                yield f"prompt {named} ({seen.tokens} tokens{note})".replace("  ", " "), seen.text
        answer = call.answer
        if isinstance(answer, list) and all(isinstance(one, Completion) for one in answer):
            for place, one in enumerate(answer):
                which = f" {place + 1}" if len(answer) > 1 else ""
                yield f"raw answer{which} {named}".rstrip(), one.text
        elif isinstance(answer, LogLikelihood):
            yield f"likelihood {named}".rstrip(), f"{answer.sum:.3f} nats, {answer.tokens} tokens: {call.item[2]}"
    if len(asked) > _MOST:
        yield "more", f"{len(asked) - _MOST} more calls"


def _written(row_id: str, output: Path) -> str:
    if not output.exists():
        return f"{output} is not written yet"
    for row in stream_table(output, PREDICTION_COLUMNS):
        if row.cells[0] == row_id:
            return row.cells[1]
    return f"{output} has no row with this id"
