"""The last stage of `train run`: the tuned model beside constants, its base and the default, and a page on it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.baselines import EXPLOIT, BaselinesConfig, check_names, run_baselines
from eval.compare import compare, figures, read_system, table
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
        for name in (_FIGURES, _REPORT):
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
    claim(output / _FIGURES, [output / _FIGURES])
    write_json(output / _FIGURES, result.figures())
    truth = output / "sets" / "test.parquet"
    if score.limit:
        truth = output / _RUNS / "truth.parquet"
        _write_truth(truth, [output], score.limit)
    _write_page(output, truth, _systems(output), encoder)


def truth_file(output: Path) -> Path:
    """Where the test rows of all folds lie."""
    return output / "folds" / "truth.parquet"


def score_folds(parts: Sequence[Path], output: Path, encoder: Encoder, limit: int = 0) -> None:
    """Put the test sets of all folds together, each row answered by the model that had not seen it.

    Args:
        parts: outputs of the folds.
        output: of the run, gets score.json and report.html.
        encoder: of the metric.
        limit: rows of each fold that were predicted; 0 for all.
    """
    truth, joined = truth_file(output), output / "folds" / _RUNS
    _write_truth(truth, parts, limit)
    systems = []
    for name in [path.name for path in _systems(parts[0])]:
        answers = joined / name / "submission.csv"
        answers.parent.mkdir(parents=True, exist_ok=True)
        given = [part / _RUNS / "test" / name / "submission.csv" for part in parts]
        found = (row.cells for file in given for row in read_table(file, PREDICTION_COLUMNS))
        with made_files(answers, [answers], {"result": {"fallbacks": sum(map(_fallbacks, given))}}):
            write_predictions(answers, ((row_id, prompt) for row_id, prompt in found))
        systems.append(answers.parent)
    known = read_truth(truth, encoder)
    compared = compare([read_system(str(path), known, encoder, [EXPLOIT]) for path in systems], known, encoder, TUNED)
    LOG.info("")
    LOG.info(f"{len(parts)} folds: each row is answered by a model that did not learn from it")
    for line in table(compared):
        LOG.info(line)
    claim(output / _FIGURES, [output / _FIGURES])
    write_json(output / _FIGURES, {"folds": len(parts), **figures(compared)})
    _write_page(output, truth, systems, encoder)


def _write_truth(truth: Path, parts: Sequence[Path], limit: int) -> None:
    """The test rows of several outputs as one table; of each the first `limit`, 0 for all."""
    columns = (*PAIR_COLUMNS, "rewrite_prompt")
    rows = [row.cells for part in parts
            for row in read_table(part / "sets" / "test.parquet", columns)[: limit or None]]  # fmt: skip
    with made_files(truth, [truth], {"rows": len(rows)}):
        write_table(truth, columns, rows)


def _fallbacks(answers: Path) -> int:
    """Rows of a run that took the fallback, by its manifest."""
    result = read_manifest(answers).get("result")
    count = result.get("fallbacks") if isinstance(result, dict) else None
    return count if isinstance(count, int) else 0


def _systems(output: Path) -> list[Path]:
    """Folders of what was predicted, in the order of the table."""
    order = json.loads((output / _FIGURES).read_text(encoding="utf-8"))["systems"]
    return [output / _RUNS / "test" / name for name in order]


def _write_page(output: Path, truth: Path, systems: Sequence[Path], encoder: Encoder) -> None:
    subject = Subject.read([str(path) for path in systems], truth, encoder, reference=TUNED, exploits=[EXPLOIT])
    page, *_ = write_report(output / _REPORT, f"{output.name}: tuned beside others", list(sections(subject)))
    LOG.info(f"written to {page}")
