"""A submission from candidates: one selector's choice for every row.

python -m ensemble select candidates.parquet --selector consensus -o submission.csv
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ensemble import fitting
from ensemble.candidates import read_candidates
from ensemble.choose import answer_of, score_rows
from ensemble.models import RoleModel, open_models, roles_needed, tools
from ensemble.selectors import make_selectors
from ensemble.selectors.predicted import head_files
from eval.encoders import Encoder
from submission.backends.hardware import ALONE, Placement
from submission.data.hashing import content_hash
from submission.data.outputs import check_output, made_files
from submission.data.tables import write_predictions


def select(
    candidates: Path,
    output: Path,
    selector: str,
    models: Mapping[str, RoleModel],
    encoder: Encoder,
    *,
    weights: Sequence[Path] = (),
    rotations: int = 0,
    concat: int = 1,
    constant: str = "",
    placement: Placement = ALONE,
    fresh: bool = False,
) -> dict[str, int]:
    """Choose and write; answers of models are logged beside `output`.

    Returns:
        rows, rows without a candidate (they get the constant or the default prompt), rows that the selector said
        nothing of (they get the first candidate).

    Raises:
        UserError: something is missing or wrong.
    """
    named = [*(("file of weights", path) for path in weights), *(("head", path) for path in head_files([selector]))]
    check_output(output, [("table of candidates", candidates), *named])
    rows = read_candidates(candidates)
    known = fitting.read(weights, rows)
    parts = list(known.get(selector, {selector: 1.0}))
    with open_models(models, roles_needed(parts), output, placement=placement, fresh=fresh) as opened:
        made = make_selectors([selector], tools(encoder, opened, rotations=rotations, weights=known))
        scores = score_rows(rows, made)[selector]
    answers = [(row.pair.id, answer_of(row, said, concat, constant))
               for row, said in zip(rows, scores.values, strict=True)]  # fmt: skip
    counts = {"rows": len(rows), "without": sum(not row.candidates for row in rows), "undecided": scores.undecided}
    told = {
        "selector": selector, "concat": concat, "constant": constant, **counts, "candidates": content_hash(candidates),
        "tokens_per_row": scores.tokens, "seconds_per_row": scores.seconds,
    }  # fmt: skip
    with made_files(output, [output], told):
        write_predictions(output, answers)
    return counts
