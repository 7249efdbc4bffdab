"""Many candidates for each pair, from any number of sources, with a log of all calls.

python -m ensemble sample pairs.csv -o candidates.parquet --sources sources.toml
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ensemble.candidates import Answer, CandidateRow, merge, write_candidates
from ensemble.sources import CandidateSource
from eval.encoders import Encoder
from submission.backends.hardware import ALONE, Placement
from submission.calls.session import answer, session
from submission.data.outputs import check_output, made_files
from submission.data.tables import has_text
from submission.prompts.answers import is_blank, strip_invalid_utf8
from submission.prompts.templates import Template
from submission.types import Completion, Pair, Request, Triplet

LOG = logging.getLogger(__name__)

ByPair = dict[str, list[tuple[str, Answer]]]
"""Texts of answers with what is known of each, by id of the pair."""


def sample(
    pairs: Sequence[Pair],
    sources: Sequence[CandidateSource],
    output: Path,
    encoder: Encoder | None,
    near: float,
    *,
    placement: Placement = ALONE,
    fresh: bool = False,
) -> list[CandidateRow]:
    """Ask all sources and write the candidates; what the log knows is not asked again.

    Args:
        pairs: to be answered.
        sources: one after the other, so that one model is in memory at a time.
        output: Parquet file; the log lies beside it.
        encoder: puts near-duplicates together; None leaves it at case and punctuation.
        near: see `ensemble.candidates.NEAR`.
        placement: copies of each source's model.
        fresh: forget what the log holds.

    Raises:
        UserError: something is missing or wrong; said before any model is asked.
    """
    check_output(output)
    prepared = [(source, source.spec().held_by(placement), source.layout()) for source in sources]
    found: ByPair = {pair.id: [] for pair in pairs}
    # A rewrite of blanks tells nothing of its prompt: such a pair has no candidate.
    asked = [pair for pair in pairs if has_text(pair.rewritten_text)]
    with session(output, {source.name: spec for source, spec, _ in prepared}, fresh=fresh) as models:
        for source, _, (template, shots) in prepared:
            LOG.info(
                f"{source.name}: {source.n} samples{' and a greedy answer' if source.greedy else ''}, {template.name}"
            )
            answers = answer(models[source.name], list(requests(asked, source, template, shots)))
            for key, completions in answers.completions.items():
                row_id, answers_read = read(key, completions, source, template)
                found[row_id] += answers_read
            if answers.failed:
                LOG.info(f"{source.name}: {len(answers.failed)} requests failed: {next(iter(answers.failed.values()))}")
    rows = [CandidateRow(pair, tuple(merge(found[pair.id], encoder, near))) for pair in pairs]
    with made_files(output, [output], {"sources": [source.name for source in sources], "rows": len(rows)}):
        write_candidates(output, rows)
    total = sum(len(row.answers) for row in rows)
    none = sum(not row.candidates for row in rows)
    LOG.info(
        f"written to {output}: {total} answers to {len(rows)} pairs, {sum(len(r.candidates) for r in rows)} distinct"
        f"{f'; pairs without an answer: {none}' if none else ''}"
    )
    return rows


def requests(
    pairs: Iterable[Pair], source: CandidateSource, template: Template, shots: Sequence[Triplet]
) -> Iterator[Request]:
    """A greedy request and one for all samples of each pair, side by side: the second takes over the first's prompt."""
    for pair in pairs:
        chat = template.render(pair, shots)
        for first, sampling in source.samplings().items():
            yield Request(f"{pair.id}/{first}", chat, sampling)


def read(
    key: str, completions: Sequence[Completion], source: CandidateSource, template: Template
) -> tuple[str, list[tuple[str, Answer]]]:
    """The id of the pair that a request of `requests` was about, and its answers with what is known of each.

    Those that are blank or read as null are left out.
    """
    row_id, _, first = key.rpartition("/")
    found = []
    for number, completion in enumerate(completions, start=int(first)):
        text = strip_invalid_utf8(template.parse(completion.text))
        if not is_blank(text):
            found.append((text, Answer(source.name, number, completion.logprob, completion.tokens)))
    return row_id, found
