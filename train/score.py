"""The last stage of `train run`: the tuned model beside constants, its base and the default, and a page on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.baselines import BASELINES, BEST_OF, BEST_OF_FILE, EXPLOIT, BaselinesConfig, check_names, run_baselines
from eval.compare import Comparison, compare, figures, read_system, table
from eval.encoders import Encoder
from eval.report import write_report
from eval.scoring import read_truth
from eval.sections import Subject, sections
from submission.backends import AUTO
from submission.data.files import write_json
from submission.data.outputs import check_free, claim, made_files, read_manifest
from submission.data.tables import PAIR_COLUMNS, PREDICTION_COLUMNS, read_table, write_predictions, write_table

LOG = logging.getLogger(__name__)

TUNED = "tuned"
_FIGURES, _REPORT, _RUNS = "score.json", "report.html", "score"


@dataclass(frozen=True, slots=True)
class Score:
    """What the tuned model is compared with on the test set.

    Attributes:
        baselines: as `python -m eval baselines` names them.
        base: model of zero-shot and few-shot; "" for the one that was tuned.
        quantization: of the GGUF file that predicts; "" for the first one made.
        backend: transformers predicts with the merged folder, any other with the GGUF file; auto follows the model.
        max_new_tokens: of an answer.
        limit: first rows of the test set only; 0 for all.
    """

    baselines: tuple[str, ...] = ("constant", "constant_fitted", "zero_shot")
    base: str = ""
    quantization: str = ""
    backend: str = AUTO
    max_new_tokens: int = 40
    limit: int = 0

    def check(self, output: Path) -> None:
        """Refuse what would be refused after hours of training.

        Raises:
            UserError: an unknown baseline, or a file of the user's is in the way.
        """
        check_names(self.baselines)
        chosen = (f"{_RUNS}/{BEST_OF_FILE}",) if BEST_OF in self.baselines else ()
        for name in (_FIGURES, _REPORT, *chosen):
            check_free(output / name, [output / name])


def score_run(
    score: Score, output: Path, base: str, encoder: Encoder, *, model: str = "", adapter: Path | None = None,
    fresh: bool = False,
) -> None:  # fmt: skip
    """Predict the test set of a run with all systems, compare, and write score.json and report.html.

    Args:
        score: what is compared.
        output: of the run.
        base: that was tuned.
        encoder: of the metric.
        model: the tuned one; "" for base and adapter.
        adapter: beside the base.
        fresh: forget answers of an earlier run.
    """
    result = run_baselines(
        BaselinesConfig(
            train=output / "sets" / "train.parquet", test=output / "sets" / "test.parquet", output=output / _RUNS,
            only=(*score.baselines, TUNED), reference=TUNED, backend=score.backend, model=score.base or base,
            tuned_model=model or base, tuned_adapter=adapter, max_new_tokens=score.max_new_tokens, limit=score.limit,
            fresh=fresh,
        ),
        encoder,
    )  # fmt: skip
    for line in result.lines():
        LOG.info(line)
    _write(output, result.figures(), result.comparisons["test"])


def truth_file(output: Path) -> Path:
    """Where the test rows of all folds lie."""
    return output / "folds" / "truth.parquet"


def score_folds(score: Score, parts: Sequence[Path], output: Path, encoder: Encoder) -> None:
    """Put the test sets of all folds together, each row answered by the model that had not seen it.

    Args:
        score: what was compared in each.
        parts: outputs of the folds.
        output: of the run, gets score.json and report.html.
        encoder: of the metric.
    """
    truth, columns = truth_file(output), (*PAIR_COLUMNS, "rewrite_prompt")
    rows = [row.cells for part in parts
            for row in read_table(part / "sets" / "test.parquet", columns)[: score.limit or None]]  # fmt: skip
    with made_files(truth, [truth], {"rows": len(rows)}):
        write_table(truth, columns, rows)
    known = read_truth(truth, encoder)
    names = [name for name in BASELINES if name in (*score.baselines, TUNED) and _answers(parts[0], name).is_file()]
    systems = [read_system(str(_join(parts, output / "folds", name)), known, encoder, [EXPLOIT]) for name in names]
    compared = compare(systems, known, encoder, TUNED)
    LOG.info("")
    LOG.info(f"{len(parts)} folds: each row is answered by a model that did not learn from it")
    for line in table(compared):
        LOG.info(line)
    _write(output, {"folds": len(parts), **figures(compared)}, compared)


def best_of_file(output: Path, folds: int) -> Path:
    """Where a run, or the first of its folds, keeps the configuration of `best_of`, if it was scored."""
    return (output / "folds" / "1" if folds else output) / _RUNS / BEST_OF_FILE


def _join(parts: Sequence[Path], output: Path, name: str) -> Path:
    """The folder of what a system answered in all folds, as one file."""
    given, joined = [_answers(part, name) for part in parts], output / _RUNS / name / "submission.csv"
    joined.parent.mkdir(parents=True, exist_ok=True)
    with made_files(joined, [joined], {"result": {"fallbacks": sum(map(_fallbacks, given))}}):
        cells = (row.cells for file in given for row in read_table(file, PREDICTION_COLUMNS))
        write_predictions(joined, ((row_id, prompt) for row_id, prompt in cells))
    return joined.parent


def _answers(output: Path, name: str) -> Path:
    """What a system answered to the test set of a run."""
    return output / _RUNS / "test" / name / "submission.csv"


def _fallbacks(answers: Path) -> int:
    """Rows of a run that took the fallback, by its manifest."""
    result = read_manifest(answers).get("result")
    count = result.get("fallbacks") if isinstance(result, dict) else None
    return count if isinstance(count, int) else 0


def _write(output: Path, content: dict[str, Any], compared: Comparison) -> None:
    """Write score.json and report.html."""
    claim(output / _FIGURES, [output / _FIGURES])
    write_json(output / _FIGURES, content)
    title = f"{output.name}: tuned beside others"
    page, *_ = write_report(output / _REPORT, title, list(sections(Subject.of(compared))))
    LOG.info(f"written to {page}")
