"""The stages that make a data set, each a function of a configuration that skips what is finished.

    prompts.csv + texts.csv -> triplets.csv -> train.parquet, validation.parquet, test.parquet

A stage is finished when its output is there, unchanged, and its manifest tells the same configuration and inputs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.encoders import Encoder
from eval.words import NEAR_TEXTS
from submission.backends import ModelSpec, require
from submission.calls.models import encode
from submission.calls.session import answer, session
from submission.data.files import on_store
from submission.data.hashing import content_hash
from submission.data.outputs import check_output, claim, up_to_date, write_manifest
from submission.data.tables import has_text, read_table, some, write_table
from submission.errors import UserError
from submission.prompts.grammar import GRAMMAR, read_grammar
from submission.types import Sampling
from train import prompts, rewrites, texts

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompts:
    """See `python -m train prompts --help`; `near` of 0 keeps near-duplicates, "" decides by size."""

    size: int = 1000
    grammar: str = ""
    kinds: tuple[str, ...] = ()
    near: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Texts:
    """See `python -m train texts --help`."""

    sources: tuple[str, ...] = ()
    write: int = 0
    topics: str = ""
    min_words: int = 20
    max_words: int = 300
    temperature: float = 0.8
    max_new_tokens: int = 220
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Rewrites:
    """See `python -m train rewrites --help`."""

    size: int = 0
    temperature: float = 0.7
    top_p: float = 0.95
    min_p: float = 0.0
    length_factor: float = 2.0
    max_new_tokens: int = 512
    keep_cut: bool = False
    seed: int = 0


def make_prompts(config: Prompts, output: Path, find_encoder: Callable[[], Encoder], *, fresh: bool) -> None:
    """Write rewrite prompts."""
    grammar = Path(config.grammar) if config.grammar else GRAMMAR
    try:
        near = float(config.near) if config.near else None
    except ValueError:
        raise UserError(f"option near={config.near!r} of [prompts] must be a number from 0 to 1") from None
    if near is None and config.size > prompts.MOST_COMPARED:
        LOG.info(
            f"near-duplicates are kept: more than {prompts.MOST_COMPARED} prompts are compared only when near is given"
        )
        near = 0.0
    encoder = None if near == 0 else find_encoder()
    stage = _Stage("prompts", output, config, {"grammar": grammar}, {"encoder": encoder.name if encoder else "none"})
    if stage.is_finished(fresh=fresh):
        return
    known = read_grammar(grammar, config.kinds)
    if encoder is None:
        stage.write(prompts.COLUMNS, prompts.rows(prompts.take(known, config.size, config.seed)))
    else:
        found = prompts.take_distinct(known, config.size, encoder, prompts.NEAR if near is None else near, config.seed)
        stage.write(prompts.COLUMNS, prompts.rows(found))
    stage.finish({"rows": config.size})
    LOG.info(f"written to {output}: {config.size} prompts")


def make_texts(config: Texts, output: Path, spec: ModelSpec | None, *, fresh: bool) -> None:
    """Write original texts, read from files or written by a model."""
    require("datasketch", "eval", "train texts")
    if bool(config.sources) == bool(config.write):
        raise UserError("name files of texts, or say how many the model is to write (write)")
    if config.min_words > config.max_words:
        raise UserError(f"min_words={config.min_words} is more than max_words={config.max_words}")
    topics = Path(config.topics) if config.topics else texts.TOPICS
    inputs = {path: Path(path) for path in config.sources} or {"topics": topics}
    marks = {"near": f"{NEAR_TEXTS:g} of the words", **_model_marks(spec if config.write else None)}
    stage = _Stage("texts", output, config, inputs, marks)
    if stage.is_finished(fresh=fresh):
        return
    told: dict[str, Any] = {}
    if config.write:
        assert spec is not None
        sampling = Sampling(
            temperature=config.temperature, top_p=0.95, max_new_tokens=config.max_new_tokens, seed=config.seed
        )
        asked = texts.requests(config.write, topics, sampling)
        with session(output, {"writer": spec}, fresh=fresh) as models:
            answers = answer(models["writer"], asked)
        found = [texts.tidy(text) for text in answers.texts.values()]
        told = {"failed": answers.failed}
    else:
        found = list(texts.read_texts([Path(path) for path in config.sources]))
    kept = texts.select(found, texts.WordLimits(config.min_words, config.max_words))
    if not kept.texts:
        reasons = some([f"{count} x {reason}" for reason, count in kept.dropped.most_common() if count])
        raise UserError(f"no text is left of {len(found)}: {reasons or 'the sources have no row'}")
    stage.write(texts.COLUMNS, ((f"t{number:06}", text) for number, text in enumerate(kept.texts, start=1)))
    stage.finish({**told, "rows": len(kept.texts), "dropped": dict(kept.dropped)})
    for reason, count in kept.dropped.most_common():
        if count:
            LOG.info(f"{count:>7} {reason}")
    LOG.info(f"written to {output}: {len(kept.texts)} texts of {len(found)}")


def make_rewrites(
    config: Rewrites, prompts_file: Path, texts_file: Path, output: Path, spec: ModelSpec, *, fresh: bool
) -> None:
    """Write triplets: texts as the target model rewrote them under prompts."""
    stage = _Stage("rewrites", output, config, {"prompts": prompts_file, "texts": texts_file}, _model_marks(spec))
    if stage.is_finished(fresh=fresh):
        return
    known = [row.cells[0] for row in read_table(texts_file, ("original_text",)) if has_text(row.cells[0])]
    tasks = rewrites.pair_up(rewrites.read_prompts(prompts_file), known, size=config.size, seed=config.seed)
    length = rewrites.Length(config.length_factor, at_most=config.max_new_tokens)
    sampling = Sampling(
        temperature=config.temperature, top_p=config.top_p, min_p=config.min_p, seed=config.seed
    )  # fmt: skip
    seen = dict(encode(spec, ((task.id, task.text, 0) for task in tasks)))
    with session(output, {"target": spec}, fresh=fresh) as models:
        answers = answer(models["target"], rewrites.requests(tasks, seen, sampling, length))
    left_out = set() if config.keep_cut else answers.cut
    done = [task for task in tasks if task.id in answers.texts and task.id not in left_out]
    stage.write(
        rewrites.COLUMNS,
        ((task.id, task.text, answers.texts[task.id], task.prompt.text, task.prompt.kind, task.prompt.style)
         for task in done),
    )  # fmt: skip
    stage.finish(
        {"template": "{prompt}:\\n{text}", "rows": len(done), "cut": len(answers.cut), "failed": answers.failed}
    )
    LOG.info(
        f"written to {output}: {len(done)} triplets of {len(tasks)}; {len(answers.cut)} were cut at their length limit"
        f"{' and kept' if config.keep_cut else ''}, {len(answers.failed)} failed"
    )


class _Stage:
    """What makes an output, and whether it is there already."""

    def __init__(
        self, name: str, output: Path, config: Any, inputs: Mapping[str, Path], marks: Mapping[str, Any]
    ) -> None:
        check_output(output, inputs.items())
        self._name, self._output = name, output
        self._told: dict[str, Any] = {
            "stage": name,
            "config": json.loads(json.dumps(asdict(config))),
            "inputs": {key: _hash_of(path) for key, path in inputs.items()},
            **marks,
        }

    def is_finished(self, *, fresh: bool) -> bool:
        """Whether there is nothing to do; says so."""
        if fresh or not up_to_date(self._output, self._told):
            return False
        LOG.info(f"{self._output} is there, made of the same: nothing to do (--fresh makes it anew)")
        return True

    def write(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Write the table."""
        claim(self._output, [self._output])
        write_table(self._output, columns, rows)

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Write the manifest."""
        write_manifest(self._output, {"made_from": self._told, **figures})


def _model_marks(spec: ModelSpec | None) -> dict[str, Any]:
    return {"model": spec.fingerprint(), "model_as_asked": spec.describe()["model"]} if spec else {}


def _hash_of(path: Path) -> str:
    if not path.is_file() and not on_store(path):
        raise UserError(f"{path} does not exist")
    return content_hash(path)
