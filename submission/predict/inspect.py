"""One row of a run, looked at closely: its texts, the exact prompt, the raw and the parsed answer.

python -m submission inspect ID --run submission.csv
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from submission.backends import ModelSpec, model_spec
from submission.errors import UserError, first_line
from submission.calls.journal import journal_path, read_finished
from submission.data.manifest import manifest_path, read_manifest
from submission.data.pairs import Pairs
from submission.data.tables import PREDICTION_COLUMNS, read_triplets, stream_table
from submission.prompts.templates import get_template
from submission.types import Pair


def inspect_row(row_id: str, output: Path) -> str:
    """A readable page about one row.

    Args:
        row_id: the id, as in the input.
        output: the output of the run, whose journal and manifest lie beside it.

    Raises:
        UserError: there is no such run, input or row.
    """
    told = _read(output)
    pairs = Pairs(Path(told.input), told.encoding)
    pair = next((pair for pair in pairs if pair.id == row_id), None)
    if pair is None:
        raise UserError(f"id {row_id!r} is not in {told.input}; its ids begin with {', '.join(islice(pairs.ids, 5))}")
    if pairs.digest != told.digest:
        raise UserError(f"{told.input} was changed after the run that made {output}: run predict again")
    sections = [
        ("id", row_id),
        ("original text", pair.original_text),
        ("rewritten text", pair.rewritten_text),
    ]
    if told.spec is not None:
        prompt, tokens, note = _prompt(pair, told, told.spec)
        sections.append((f"prompt ({tokens} tokens{note})", prompt))
    prediction = read_finished(journal_path(output)).get(row_id)
    if prediction is None:
        sections.append(("status", "not finished: it is not in the journal"))
    else:
        sections.append(("raw answer", prediction.raw))
        sections.append(("parsed answer", prediction.text))
        reason = f": {prediction.reason}" if prediction.reason else ""
        sections.append(("status", prediction.status + reason))
    sections.append(("in the output", _written(row_id, output)))
    return "\n\n".join(f"== {title}\n{text}" for title, text in sections)


@dataclass(frozen=True, slots=True)
class _Told:
    """What the manifest of a run says, as far as it is needed here; `spec` is None for a run without a model."""

    input: str
    encoding: str
    digest: str
    spec: ModelSpec | None
    template: str
    shots: str
    n_shots: int
    max_new_tokens: int


def _read(output: Path) -> _Told:
    manifest = read_manifest(output)
    try:
        config, model = manifest["config"], manifest["model"]
        spec = None
        if model is not None:
            adapter = Path(model["adapter"]) if model["adapter"] else None
            spec = model_spec(str(model["backend"]), str(model["model"]), adapter, list(map(str, model["settings"])))
        return _Told(
            str(config["input"]), str(config["encoding"]), str(manifest["fingerprint"]["input"]), spec,
            str(manifest["template"]), str(config["shots"] or ""), int(config["n_shots"]),
            int(config["sampling"]["max_new_tokens"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{manifest_path(output)} is not the manifest of a run: {first_line(error)}") from None


def _prompt(pair: Pair, told: _Told, spec: ModelSpec) -> tuple[str, int, str]:
    encoder = spec.load_encoder()
    shots = read_triplets(Path(told.shots), told.encoding)[: told.n_shots] if told.shots else []
    chat = get_template(told.template).render(pair, shots)
    encoded = encoder.encode_for(chat, told.max_new_tokens)
    return encoder.text(encoded.ids), len(encoded.ids), ", texts cut to fit" if encoded.truncated else ""


def _written(row_id: str, output: Path) -> str:
    if not output.exists():
        return f"{output} is not written yet"
    for row in stream_table(output, PREDICTION_COLUMNS):
        if row.cells[0] == row_id:
            return row.cells[1]
    return f"{output} has no row with this id"
