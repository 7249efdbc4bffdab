"""What a report says of runs: scores, differences, kinds of prompt, lengths, speed and rows to look at."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eval import charts
from eval.compare import Comparison, cells, compare, headings, read_system, sentence
from eval.encoders import Encoder
from eval.grouping import unit_vectors
from eval.report import Figure, ReportExample, Section, Table, Words
from eval.scoring import read_truth
from submission.data.tables import PAIR_COLUMNS, has_columns, read_pairs
from submission.types import Pair

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KINDS = 7  # that are told apart
_KINDS_SHOWN = 6
_EXAMPLES = 3  # of each sort
_MOST_WORDS = 600  # of a text that is shown; marking differences takes quadratic time


@dataclass(frozen=True, slots=True)
class Subject:
    """What a report is about.

    Attributes:
        comparison: the systems.
        kinds: kind of prompt of each row, and how kinds were told apart.
        pairs: the texts of the rows; None where the truth has none.
    """

    comparison: Comparison
    kinds: list[str]
    kinds_by: str
    pairs: list[Pair] | None

    @classmethod
    def read(
        cls, runs: Sequence[str], truth: Path, encoder: Encoder, *, by: str = "", reference: str = "",
        exploits: Sequence[str] = (),
    ) -> Subject:  # fmt: skip
        """Read runs and truth; see `eval.compare`.

        Raises:
            UserError: a file or a column is missing, or ids do not go together.
        """
        known = read_truth(truth, encoder, by)
        systems = [read_system(run, known, encoder, exploits) for run in runs]
        return cls.of(compare(systems, known, encoder, reference), by)

    @classmethod
    def of(cls, comparison: Comparison, by: str = "") -> Subject:
        """What is compared, with the texts of its truth's first rows.

        Args:
            comparison: its truth may have been cut to the first rows of its file.
            by: the column that told kinds of prompt; "" for none.

        Raises:
            UserError: the truth's file cannot be read.
        """
        truth = comparison.truth
        pairs = read_pairs(truth.path)[: len(truth.ids)] if has_columns(truth.path, PAIR_COLUMNS) else None
        kinds = truth.kinds or kinds_of_prompt(truth.prompts, comparison.encoder)
        told_by = f"the column {by}" if by else "likeness: a group is called by its most central prompt"
        return cls(comparison, kinds, told_by, pairs)


def sections(subject: Subject) -> Iterator[Section]:
    """All sections of the page."""
    import numpy as np

    comparison = subject.comparison
    truth, encoder = comparison.truth, comparison.encoder
    lines = comparison.lines
    others = [line for line in lines if line.difference is not None]
    figures = [Figure("scores", charts.score_distribution(comparison), f"Distribution of scores by {encoder.name}.")]
    if others:
        caption = f"Paired differences to {comparison.reference} by {encoder.name}; across the line: not told apart."
        figures.append(Figure("differences", charts.differences(comparison), caption))
    yield Section(
        "Scores",
        [
            f"Metric: {encoder.metric}.",
            f"{len(truth.ids)} rows with {truth.number_of_clusters} prompts (near-duplicates are one). 95 % intervals "
            "are from a bootstrap that draws near-duplicate prompts as a whole; differences are paired by row.",
            *(f"{line.system.name}: {sentence(line, comparison)}." for line in others),
        ],
        [Table(headings(comparison), [cells(line) for line in lines])],
        figures,
    )
    names = [name for name, _ in Counter(subject.kinds).most_common(_KINDS_SHOWN)]
    caption = f"Mean scores by {encoder.name} for the most frequent kinds of prompt, with their numbers of rows."
    figures = [Figure("kinds", charts.by_kind(comparison, subject.kinds, names), caption)]
    if subject.pairs is not None:
        lengths = np.array([len(pair.rewritten_text.split()) for pair in subject.pairs])
        caption = f"Mean scores by {encoder.name} against the length of the rewritten text."
        figures.append(Figure("length", charts.by_length(comparison, lengths), caption))
    yield Section("Where they work", [f"Kinds of prompt are told apart by {subject.kinds_by}."], figures=figures)
    speeds = {
        line.system.name: line.system.rows_per_second
        for line in lines
        if line.system.rows_per_second and not line.system.constant
    }
    if speeds:
        caption = "Speed as the runs' manifests tell it, model loading left out; different machines are not told apart."
        yield Section("Speed", figures=[Figure("speed", charts.speed(speeds), caption)])
    yield Section(
        "Rows",
        ["Words that only one of the two texts has are marked."] if subject.pairs is not None else [],
        examples=list(_examples(subject)),
    )


def kinds_of_prompt(prompts: Sequence[str], encoder: Encoder) -> list[str]:
    """A kind for each prompt: k-means over embeddings, each group called by its most central prompt."""
    from sklearn.cluster import KMeans

    vectors = unit_vectors(encoder.embed(prompts))
    groups = min(_KINDS, len(set(prompts)))
    model = KMeans(groups, random_state=0, n_init=4).fit(vectors)
    central = (vectors @ model.cluster_centers_.T).argmax(axis=0)
    return [prompts[central[label]] for label in model.labels_]


def marked(original: str, rewritten: str) -> tuple[list[Words], list[Words]]:
    """Both texts with the words marked that only one of them has."""
    a, b = (re.findall(r"\S+|\s+", text)[: 2 * _MOST_WORDS] for text in (original, rewritten))
    words = difflib.SequenceMatcher(None, a, b, autojunk=False)
    left: list[Words] = []
    right: list[Words] = []
    for kind, a_from, a_to, b_from, b_to in words.get_opcodes():
        left.append(Words("".join(a[a_from:a_to]), "" if kind == "equal" else "removed"))
        right.append(Words("".join(b[b_from:b_to]), "" if kind == "equal" else "added"))
    return [w for w in left if w.text], [w for w in right if w.text]


def _examples(subject: Subject) -> Iterator[ReportExample]:
    """Rows that the best system does best and worst, and those where it differs most from the reference."""
    lines = subject.comparison.lines
    plain = [line for line in lines if not line.system.exploit and line.difference is not None] or lines
    best = max(plain, key=lambda line: line.mean.mean)
    base = next(line for line in lines if line.difference is None)
    scores = best.system.scored.scores
    gains = scores - base.system.scored.scores
    name, reference = best.system.name, subject.comparison.reference
    shown: set[int] = set()
    for title, order in (
        (f"Best of {name}", -scores), (f"Worst of {name}", scores),
        (f"{name} far above {reference}", -gains), (f"{name} far below {reference}", gains),
    ):  # fmt: skip
        for row in _first_new(order, shown):
            yield _example(subject, title, row)


def _first_new(order: NDArray[np.float64], shown: set[int]) -> Iterator[int]:
    rows = [row for row in order.argsort(kind="stable").tolist() if row not in shown][:_EXAMPLES]
    shown.update(rows)
    yield from rows


def _example(subject: Subject, title: str, row: int) -> ReportExample:
    truth = subject.comparison.truth
    systems = [line.system for line in subject.comparison.lines]
    answers = [("true prompt", truth.prompts[row], "")]
    answers += [(s.name, s.scored.predictions[row], f"{s.scored.scores[row]:.3f}") for s in systems]
    texts: list[tuple[str, Sequence[Words]]] = []
    if subject.pairs is not None:
        original, rewritten = marked(subject.pairs[row].original_text, subject.pairs[row].rewritten_text)
        texts = [("original text", original), ("rewritten text", rewritten)]
    return ReportExample(f"{title}: id {truth.ids[row]}", texts, Table(("who", "prompt", "score"), answers))
