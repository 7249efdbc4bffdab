"""One table for all selectors on the same candidates, and the diagnosis of why they help or don't.

python -m ensemble experiment candidates.parquet --truth truth.csv -o experiment
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble import diagnosis, fitting
from ensemble.candidates import CandidateRow, read_candidates
from ensemble.choose import SelectorScores, answer_of, or_fallback, score_rows
from ensemble.measure import CONSTANT, FIRST, ORACLE, WORST, SelectorResult, chance, measure
from ensemble.models import RoleModel, open_models, roles_needed, tools
from ensemble.search import Searched, search_rows
from ensemble.selectors import SELECTORS, entry_of, make_selectors
from ensemble.selectors.posterior import Posterior
from ensemble.selectors.predicted import head_files
from eval.encoders import Encoder
from eval.head import read_head
from eval.intervals import Interval
from eval.leaks import check_unseen
from eval.scoring import Truth, check_same_ids, interval_figures, read_truth, score_texts
from eval.sections import kinds_of_prompt
from submission.data.files import write_json
from submission.data.outputs import check_apart, check_free, check_output, made_files
from submission.errors import UserError
from submission.predict.strategies import DEFAULT_PROMPT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALL = tuple(name for name, entry in SELECTORS.items() if not entry.file)
FIGURES, REPORT = "experiment.json", "report.html"
CONSENSUS, POSTERIOR = "consensus", "posterior"
SEARCH, SEARCH_ORACLE = "search", "search_oracle"


@dataclass(frozen=True)
class ExperimentConfig:
    """What is compared; see `experiment --help`. With `proposals` a search goes on from the answers."""

    candidates: Path
    truth: Path
    output: Path
    selectors: Sequence[str] = ALL
    models: Mapping[str, RoleModel] = field(default_factory=dict)
    constant: str = DEFAULT_PROMPT
    concat: Sequence[int] = (2, 3)
    concat_by: str = ""
    weights: Sequence[Path] = ()
    rotations: int = 0
    by: str = ""
    proposals: int = 0
    fresh: bool = False


@dataclass(frozen=True)
class Experiment:
    """All that came out; rows are in the truth's order.

    Attributes:
        rows, truths: candidates and their true scores; a pair without candidates has the default prompt.
        truth, encoder: that they were scored with.
        scores: of the selectors.
        lines: of selectors, oracle, worst, constant and search, and of the oracle of what the search chose from.
        joined: of answers that join several candidates, which are no choices.
        chance: see `measure.chance`.
        without: pairs that had no candidate.
        variance, correlations, curve, knowledge: see `ensemble.diagnosis`.
        kinds: kind of prompt of each row.
    """

    rows: list[CandidateRow]
    truths: list[list[float]]
    truth: Truth
    encoder: Encoder
    scores: dict[str, SelectorScores]
    lines: list[SelectorResult]
    joined: list[SelectorResult]
    chance: float
    without: int
    variance: diagnosis.Variance
    correlations: dict[tuple[str, str], Interval]
    curve: diagnosis.Curve
    knowledge: dict[str, diagnosis.Knowledge]
    kinds: list[str]

    def line(self, name: str) -> SelectorResult:
        """The line of that name."""
        return next(line for line in [*self.lines, *self.joined] if line.name == name)

    @property
    def best_selector(self) -> SelectorResult | None:
        """Of those that do not see the truth, the one with the highest mean; None if there is only the first answer."""
        blind = [line for line in self.lines if line.name in self.scores and line.name != FIRST]
        return blind[0] if blind else None

    def figures(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "encoder": self.encoder.name, "rows": len(self.rows), "without_candidates": self.without,
            "clusters": self.truth.number_of_clusters,
            "candidates": sum(len(row.candidates) for row in self.rows),
            "answers": sum(len(row.answers) for row in self.rows),
            "chance_of_the_best": self.chance,
            "selectors": {line.name: line.figures() for line in self.lines},
            "joined": {line.name: line.figures() for line in self.joined},
            "variance": {name: interval_figures(getattr(self.variance, name))
                         for name in ("between", "within", "correlation")},
            "correlations": [{"sources": list(pair), **interval_figures(value)}
                             for pair, value in self.correlations.items()],
            "curve": {"chosen": self.curve.chosen, "independent": self.curve.independent},
            "knowledge": {name: {"rows": known.rows, **interval_figures(known.rank_correlation)}
                          for name, known in self.knowledge.items()},
        }  # fmt: skip


def run_experiment(config: ExperimentConfig, encoder: Encoder) -> Experiment:
    """Score candidates by the truth and by all selectors, compare, and write experiment.json; `ensemble.report` writes
    the page.

    Raises:
        UserError: files are missing or wrong or don't go together, or a weighted sum was fitted on these rows.
    """
    for file in (config.output / FIGURES, config.output / REPORT):
        check_apart(file, [file], (("table of candidates", config.candidates), ("truth", config.truth)))
        check_free(file, [file])
    truth = read_truth(config.truth, encoder, config.by)
    given = _in_order(config.candidates, truth)
    rows = [or_fallback(row) for row in given]
    weights = fitting.read(config.weights, rows, truth)
    names = list(dict.fromkeys([FIRST, *config.selectors, *weights]))
    if config.concat_by and config.concat_by not in names:
        raise UserError(
            f"--concat-by {config.concat_by} is none of the selectors that are compared: {', '.join(names)}"
        )
    parts = [part for name in names for part in weights.get(name, {name: 1.0})]
    _check_heads(parts, rows, truth)
    config.output.mkdir(parents=True, exist_ok=True)
    truths = true_scores(rows, truth.prompts, encoder)
    roles = roles_needed([*parts, *([POSTERIOR] if config.proposals else [])])
    searched: Searched | None = None
    with open_models(config.models, roles, config.output / FIGURES, fresh=config.fresh) as models:
        kit = tools(encoder, models, rotations=config.rotations, weights=weights)
        selectors = make_selectors(names, kit)
        scores = score_rows(rows, selectors)
        if config.proposals:
            searched = search_rows(rows, models["target"], encoder, config.proposals)
    constant = score_texts([config.constant] * len(rows), truth.prompts, encoder)
    joined = _joined(config, rows, truth, encoder, scores)
    others = _searched(searched, truth, encoder) if searched else {}
    lines = measure(truths, scores, constant, truth.clusters, joined | others)
    if searched:
        lines = [replace(line, tokens=searched.tokens, seconds=searched.seconds) if line.name == SEARCH else line
                 for line in lines]  # fmt: skip
    by_source = _by_source(rows, truths)
    answers = [[row[place] for _, place in r.answers] for r, row in zip(rows, truths, strict=True)]
    said = {name: [[values[place] for _, place in r.answers] for r, values in zip(rows, s.values, strict=True)]
            for name, s in scores.items() if name != FIRST}  # fmt: skip
    experiment = Experiment(
        rows, truths, truth, encoder, scores, [line for line in lines if line.name not in joined],
        [line for line in lines if line.name in joined], chance(truths), sum(not row.candidates for row in given),
        diagnosis.variance(answers, truth.clusters), diagnosis.correlations(by_source, truth.clusters),
        diagnosis.curve(answers, said),
        {name: known for name, s in scores.items() if (known := diagnosis.knowledge(truths, s, truth.clusters))},
        truth.kinds or kinds_of_prompt(truth.prompts, encoder),
    )  # fmt: skip
    figures = config.output / FIGURES
    with made_files(figures, [figures], {"selectors": names, "proposals": config.proposals}):
        write_json(figures, experiment.figures())
    return experiment


def fit_weights(
    candidates: Path, truth_file: Path, output: Path, name: str, selectors: Sequence[str],
    models: Mapping[str, RoleModel], encoder: Encoder, *, rotations: int = 0, fresh: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Fit a weighted sum of selectors, or the powers of `posterior` alone, and write it; see `ensemble.fitting`.

    Raises:
        UserError: files are missing or wrong or don't go together.
    """
    heads = [("head", path) for path in head_files(selectors)]
    check_output(output, (("table of candidates", candidates), ("truth", truth_file), *heads))
    if name in (*SELECTORS, ORACLE, WORST, CONSTANT, SEARCH, SEARCH_ORACLE):
        raise UserError(f"--name {name} is the name of something else in an experiment: choose another one")
    if len(selectors) < 2 and list(selectors) != [POSTERIOR]:
        raise UserError("a sum needs two selectors or more: --selectors consensus,likelihood; or posterior alone")
    truth = read_truth(truth_file, encoder)
    rows = [or_fallback(row) for row in _in_order(candidates, truth)]
    _check_heads(selectors, rows, truth)
    truths = true_scores(rows, truth.prompts, encoder)
    with open_models(models, roles_needed(list(selectors)), output, fresh=fresh) as opened:
        made = make_selectors(list(selectors), tools(encoder, opened, rotations=rotations))
        scores = score_rows(rows, made)
        posterior = made.get(POSTERIOR)
        if len(made) == 1 and isinstance(posterior, Posterior):
            evidence, _ = fitting.fit_evidence(rows, truths, posterior)
            weights = {f"{POSTERIOR}:{evidence}": 1.0}
        else:
            weights = fitting.fit(truths, scores)
    fitting.write(output, name, weights, rows, truth)
    return weights


def true_scores(rows: Sequence[CandidateRow], prompts: Sequence[str], encoder: Encoder) -> list[list[float]]:
    """The score of every candidate of every row."""
    texts = [candidate.text for row in rows for candidate in row.candidates]
    wanted = [prompt for row, prompt in zip(rows, prompts, strict=True) for _ in row.candidates]
    flat = iter(score_texts(texts, wanted, encoder).tolist())
    return [[next(flat) for _ in row.candidates] for row in rows]


def lines_of(experiment: Experiment) -> Iterator[str]:
    """Lines to print."""
    yield f"{'selector':<28}{'mean':>8}{'over first':>28}{'headroom':>10}{'best one':>10}{'tokens':>9}{'s':>7}  a row"
    for line in [*experiment.lines, *experiment.joined]:
        difference = "" if line.name == FIRST else line.over_first.shown("+.4f")
        share = "" if line.headroom.mean != line.headroom.mean else f"{line.headroom.mean:.0%}"
        top = f"{line.top.mean:.0%}" if line.top else ""
        yield (
            f"{line.name[:27]:<28}{line.mean.mean:>8.4f}{difference:>28}{share:>10}{top:>10}{line.tokens:>9.0f}"
            f"{line.seconds:>7.2f}"
        )
    yield ""
    yield from sentences(experiment)


def sentences(experiment: Experiment) -> Iterator[str]:
    """The diagnosis in words, each with its figures."""
    e = experiment
    oracle, first = e.line(ORACLE), e.line(FIRST)
    if e.without:
        yield f"{e.without} of {len(e.rows)} pairs had no candidate: the default prompt stands for them."
    yield (
        f"Headroom: the best of {len(e.curve.independent)} answers scores {oracle.over_first.mean:.4f} more than the "
        f"first answer ({first.mean.mean:.4f}); were answers of a row no more alike than those of any rows, it would "
        f"be {e.curve.independent[-1] - first.mean.mean:.4f}."
    )
    yield (
        f"Correlation of two answers of one row: {e.variance.correlation}; of the variance of scores, "
        f"{e.variance.between.mean:.4f} lies between rows, {e.variance.within.mean:.4f} within them, where a choice "
        "works."
    )
    yield f"A candidate taken blindly is a best one in {e.chance:.0%} of rows."
    best = e.best_selector
    if best is not None:
        if best.over_first.low > 0:
            verdict = f"{best.name} is better than the first answer: {best.over_first:+.4f}"
        else:
            verdict = (
                f"no selector is shown to be better than the first answer; {best.name} comes nearest: "
                f"{best.over_first:+.4f}"
            )
        share = best.headroom.mean  # not a number where the first answer is the best of all rows
        yield f"{verdict}; it captures {share:.0%} of the headroom." if share == share else f"{verdict}."
    for line in e.lines:
        if line.name == SEARCH:
            yield f"A search that goes on from there, in other words: {line.over_first:+.4f} over the first answer."
    for name, known in e.knowledge.items():
        if ((entry := entry_of(name)) and entry.needs) or name == CONSENSUS:
            sees = "knows" if known.rank_correlation.low > 0 else "does not know"
            yield f"{name} {sees} within rows which is better: rank correlation {known.rank_correlation}."
    for line in e.lines:
        if line.undecided:
            yield f"{line.name} said nothing of {line.undecided} rows; their first candidate was taken."


def _check_heads(selectors: Sequence[str], rows: Sequence[CandidateRow], truth: Truth) -> None:
    """Refuse a head that was learned from these rows."""
    if files := head_files(selectors):
        ours = fitting.marks_of(rows, truth)
        for path in files:
            check_unseen(path, read_head(path).seen, ours)


def _in_order(candidates: Path, truth: Truth) -> list[CandidateRow]:
    """The rows of a file in the truth's order."""
    found = {row.pair.id: row for row in read_candidates(candidates)}
    check_same_ids(candidates, found, truth)
    return [found[row_id] for row_id in truth.ids]


def _by_source(rows: Sequence[CandidateRow], truths: Sequence[Sequence[float]]) -> dict[str, list[list[float]]]:
    names = list(
        dict.fromkeys(answer.source for row in rows for answer, _ in row.answers if answer.source != "fallback")
    )
    return {
        name: [[scores[place] for answer, place in row.answers if answer.source == name]
               for row, scores in zip(rows, truths, strict=True)]
        for name in names
    } or {"fallback": [list(scores) for scores in truths]}  # fmt: skip


def _searched(found: Searched, truth: Truth, encoder: Encoder) -> dict[str, NDArray[np.float64]]:
    """Scores of the answers of a search, and of the best candidate of each row."""
    import numpy as np

    best = [max(scores) for scores in true_scores(found.rows, truth.prompts, encoder)]
    return {SEARCH: score_texts(found.answers, truth.prompts, encoder), SEARCH_ORACLE: np.array(best)}


def _joined(
    config: ExperimentConfig,
    rows: Sequence[CandidateRow],
    truth: Truth,
    encoder: Encoder,
    scores: Mapping[str, SelectorScores],
) -> dict[str, NDArray[np.float64]]:
    """Scores of answers that join several candidates, or put the constant behind one, by name."""
    by = config.concat_by or (CONSENSUS if CONSENSUS in scores else FIRST)
    found = {}
    for count in (1, *config.concat):
        for suffix in ("", config.constant):
            if count == 1 and not suffix:
                continue
            name = f"concat {count} of {by}{' + constant' if suffix else ''}"
            texts = [answer_of(row, said, count, suffix) for row, said in zip(rows, scores[by].values, strict=True)]
            found[name] = score_texts(texts, truth.prompts, encoder)
    return found
