"""One row of a run, looked at closely: its texts, the exact prompt, the raw and the parsed answer.

python -m submission inspect ID --run submission.csv
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from submission.backends import model_spec
from submission.errors import UserError
from submission.journal import journal_path, read_finished
from submission.manifest import read_manifest
from submission.pairs import Pairs
from submission.tables import PREDICTION_COLUMNS, read_triplets, stream_table
from submission.templates import get_template
from submission.types import Pair


def inspect_row(row_id: str, output: Path) -> str:
    """A readable page about one row.

    Args:
        row_id: the id, as in the input.
        output: the output of the run, whose journal and manifest lie beside it.

    Raises:
        UserError: there is no such run, input or row.
    """
    manifest = read_manifest(output)
    config = manifest["config"]
    pairs = Pairs(Path(config["input"]), config["encoding"])
    pair = next((pair for pair in pairs if pair.id == row_id), None)
    if pair is None:
        raise UserError(
            f"id {row_id!r} is not in {config['input']}; its ids begin with {', '.join(islice(pairs.ids, 5))}"
        )
    if pairs.digest != manifest["fingerprint"]["input"]:
        raise UserError(f"{config['input']} was changed after the run that made {output}: run predict again")
    sections = [
        ("id", row_id),
        ("original text", pair.original_text),
        ("rewritten text", pair.rewritten_text),
    ]
    if manifest["model"] is not None:
        prompt, tokens, note = _prompt(pair, manifest)
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


def _prompt(pair: Pair, manifest: dict[str, Any]) -> tuple[str, int, str]:
    config, model = manifest["config"], manifest["model"]
    adapter = Path(model["adapter"]) if model["adapter"] else None
    spec = model_spec(model["backend"], model["model"], adapter, model["settings"])
    encoder = spec.load_encoder()
    shots = read_triplets(Path(config["shots"]), config["encoding"])[: config["n_shots"]] if config["shots"] else []
    chat = get_template(manifest["template"]).render(pair, shots)
    encoded = encoder.encode_for(chat, config["sampling"]["max_new_tokens"])
    return encoder.text(encoded.ids), len(encoded.ids), ", texts cut to fit" if encoded.truncated else ""


def _written(row_id: str, output: Path) -> str:
    if not output.exists():
        return f"{output} is not written yet"
    for row in stream_table(output, PREDICTION_COLUMNS):
        if row.cells[0] == row_id:
            return row.cells[1]
    return f"{output} has no row with this id"
