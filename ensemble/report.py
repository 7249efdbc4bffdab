"""What an experiment says on a page: a section of tables, then one for each question of the diagnosis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ensemble import charts
from ensemble.choose import best
from ensemble.experiment import REPORT, SEARCH, SEARCH_ORACLE, Experiment, ExperimentConfig, run_experiment, sentences
from ensemble.measure import FIRST, ORACLE, WORST, SelectorResult
from eval.charts import intervals
from eval.encoders import Encoder
from eval.intervals import Interval, bootstrap
from eval.report import Figure, ReportExample, Section, Table, Words, write_report
from eval.sections import marked

_KINDS = 6
_EXAMPLES = 3
_GAIN = "mean score minus that of the first answer, 95 % interval"
_RANKS = "rank correlation with the true score within rows"
_CURVES = 5  # selectors beside the oracle
_HEAD = (
    "selector", "mean [95 %]", "over first", "over constant", "headroom", "regret", "best one", "tokens/row", "s/row",
)  # fmt: skip
_SHORT_HEAD = ("way", "mean [95 %]", "over first", "headroom", "s/row")


def experiment_with_page(config: ExperimentConfig, encoder: Encoder) -> Experiment:
    """Run an experiment and write its page beside its figures; errors as of `run_experiment`."""
    experiment = run_experiment(config, encoder)
    title = "Ensemble: can a choice beat the first answer?"
    write_report(config.output / REPORT, title, list(sections(experiment)))
    return experiment


def sections(experiment: Experiment) -> Iterator[Section]:
    """All sections of the page."""
    e = experiment
    gained = [line for line in e.lines if line.name != FIRST]
    told = [line for line in e.lines if line.name not in (WORST, SEARCH_ORACLE)]
    yield Section(
        "What each way scores",
        list(_opening(e)),
        [Table(_SHORT_HEAD, [_short(line) for line in told])],
        [
            Figure(
                "ways",
                intervals(
                    {f"{line.name}{f' ({line.seconds:.1f} s)' if line.seconds else ''}": line.mean for line in told},
                    "mean score, 95 % interval",
                    beside=e.line(FIRST).mean.mean,
                    from_zero=True,
                ),
                "Mean score of each way; in brackets the seconds a row that models were asked; the line: first answer.",
            )
        ],
    )
    yield Section(
        "In full",
        [
            f"Metric: {e.encoder.metric}. {len(e.rows)} rows with {e.truth.number_of_clusters} prompts (near-duplicates"
            " are one); 95 % intervals are from a bootstrap that draws near-duplicate prompts as a whole; differences "
            "are paired by row. Headroom is the share of what the oracle gains over the first answer; tokens count "
            "shared beginnings each time.",
            *sentences(e),
        ],
        [Table(_HEAD, [_cells(line) for line in e.lines])],
        [
            Figure(
                "gains",
                intervals({line.name: line.over_first for line in gained}, _GAIN),
                "What each way of choosing gains over the first answer.",
            )
        ],
    )
    yield Section(
        "Joined answers",
        ["Several candidates joined into one answer are no choice, and play with the metric: they are shown apart."],
        [Table(_HEAD, [_cells(line) for line in e.joined])],
    )
    figures = []
    if any(value.mean == value.mean for value in e.correlations.values()):
        figures.append(Figure("correlations", charts.correlations(e.correlations),
                              "Correlation over rows of the true scores of two answers, by source."))  # fmt: skip
    shown = [line.name for line in e.lines if line.name in e.curve.chosen and line.name != "oracle"][:_CURVES]
    figures.append(Figure("headroom", charts.headroom(e.curve, shown),
                          "Mean score of the choice among so many answers; the dotted line is the oracle's if answers "
                          "of a row were independent."))  # fmt: skip
    rows = [(f"{a} - {b}", value.shown()) for (a, b), value in e.correlations.items()]
    yield Section(
        "Are errors correlated?",
        [f"Variance of scores between rows: {e.variance.between}; within rows: "
         f"{e.variance.within}; correlation of two answers of a row: {e.variance.correlation}."],
        [Table(("sources", "correlation [95 %]"), rows)] if rows else [],
        figures,
    )  # fmt: skip
    if e.knowledge:
        table = Table(
            ("selector", "rank correlation [95 %]", "rows"),
            [(name, k.rank_correlation.shown(), str(k.rows)) for name, k in e.knowledge.items()],
        )
        figures = [
            Figure(
                "knowledge",
                intervals({name: one.rank_correlation for name, one in e.knowledge.items()}, _RANKS),
                "Rank correlation with the true score, in rows.",
            )
        ]
        yield Section(
            "Does anybody know?", ["Rows with at least three candidates that can be ordered."], [table], figures
        )
    if e.best_selector is not None:
        yield _by_kind(e, e.best_selector.name)
        yield Section("Rows", examples=list(_examples(e, e.best_selector.name)))


def _opening(e: Experiment) -> Iterator[str]:
    """What was done and what came out, in three sentences."""
    answers = sum(len(row.answers) for row in e.rows) / len(e.rows)
    oracle, first, best_one = e.line(ORACLE), e.line(FIRST), e.best_selector
    yield (
        f'{len(e.rows)} pairs were answered {answers:.0f} times each. "first" is the answer that a model gives on its '
        'own; the others choose among all answers. The "oracle" knows the truth: no choice among them can be better.'
    )
    yield f"The first answer scores {first.mean.mean:.3f}, the best possible choice {oracle.mean.mean:.3f}."
    if best_one is not None:
        gain = best_one.over_first
        verdict = "is better than the first answer" if gain.low > 0 else "is not shown to be better"
        yield f"The best way of choosing, {best_one.name}, {verdict}: {gain.shown('+.3f')}."
    for line in e.lines:
        if line.name == SEARCH:
            yield (
                f'"search" says the likeliest answers in other words of a grammar, and chooses among those too: '
                f"{line.over_first.shown('+.3f')}. So it can pass the oracle: the best of these scores "
                f"{e.line(SEARCH_ORACLE).mean.mean:.3f}. "
                "Where the prompts were made from that grammar, as in the trial, this favours it."
            )


def _short(line: SelectorResult) -> tuple[str, ...]:
    gain = "" if line.name == FIRST else line.over_first.shown("+.3f")
    share = f"{line.headroom.mean:.0%}" if line.headroom.mean == line.headroom.mean and line.name != FIRST else ""
    return line.name, line.mean.shown(".3f"), gain, share, f"{line.seconds:.1f}" if line.seconds else ""


def _by_kind(e: Experiment, name: str) -> Section:
    import numpy as np

    gain = _gain(e, name)
    kinds = np.array(e.kinds)
    names = [kind for kind, _ in Counter(e.kinds).most_common(_KINDS)]
    found = [bootstrap(np.array(gain)[kinds == kind][:, None], e.truth.clusters[kinds == kind])[0] for kind in names]
    rows = [(kind, str(int((kinds == kind).sum())), one.shown()) for kind, one in zip(names, found, strict=True)]
    return Section(
        "Who gains, who loses",
        [f"{name} beside the first answer, by the most frequent kinds of prompt."],
        [Table(("kind", "rows", "difference [95 %]"), rows)],
        [
            Figure(
                "kinds",
                intervals(dict(zip(names, found, strict=True)), f"{name} minus the first answer"),
                f"What {name} gains over the first answer.",
            )
        ],
    )


def _gain(e: Experiment, name: str) -> list[float]:
    return [row[best(said)] - row[0] for row, said in zip(e.truths, e.scores[name].values, strict=True)]


def _examples(e: Experiment, name: str) -> Iterator[ReportExample]:
    """Rows where the selector lost most against the first answer, and where it gained most."""
    gain = _gain(e, name)
    order = sorted(range(len(gain)), key=lambda row: gain[row])
    for title, rows in ((f"{name} loses most", order[:_EXAMPLES]), (f"{name} gains most", order[::-1][:_EXAMPLES])):
        for row in rows:
            pair = e.rows[row].pair
            original, rewritten = marked(pair.original_text, pair.rewritten_text)
            texts: list[tuple[str, list[Words]]] = [("original text", original), ("rewritten text", rewritten)]
            answers = [("true prompt", e.truth.prompts[row], "", "", "")]
            said = e.scores[name].values[row]
            for place in sorted(range(len(said)), key=lambda place: -e.truths[row][place])[:8]:
                candidate = e.rows[row].candidates[place]
                mark = "chosen" if place == best(said) else "first" if place == 0 else ""
                answers.append((mark, candidate.text, f"{e.truths[row][place]:.3f}", f"{said[place]:.3f}",
                                str(len(candidate.answers))))  # fmt: skip
            head = ("", "prompt", "true score", f"by {name}", "answers")
            yield ReportExample(f"{title}: id {e.truth.ids[row]}", texts, Table(head, answers))


def _cells(line: SelectorResult) -> tuple[str, ...]:
    cost = (f"{line.tokens:.0f}", f"{line.seconds:.2f}") if line.tokens else ("", "")
    return (
        line.name, line.mean.shown(".3f"), "" if line.name == FIRST else line.over_first.shown("+.3f"),
        line.over_constant.shown("+.3f"), _share(line.headroom), f"{line.regret.mean:.3f}",
        _share(line.top) if line.top else "", *cost,
    )  # fmt: skip


def _share(value: Interval) -> str:
    return value.shown(".0%") if value.mean == value.mean else ""
