"""From tables of triplets to training, validation and test sets that share nothing, with a card that tells all.

python -m train prepare triplets.csv -o data/mine
python -m train prepare --recipe train/recipes/seed-mixed.toml -o data/mixed

read sources -> clean -> screen -> mix -> group -> split -> Parquet, card, plots, list of dropped rows
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from eval.encoders import Encoder
from submission.backends import require
from submission.calls.likelihoods import Likelihoods
from submission.calls.session import session
from submission.data.hashing import content_hash
from submission.data.outputs import check_apart, check_free, claim, up_to_date, write_manifest
from submission.data.tables import some, write_table
from submission.errors import UserError
from submission.progress import show_progress
from train import card, screens
from train.card import PreparedData
from train.cleaning import Cleaner, DataRow
from train.recipe import DataSource, Recipe
from train.rows import Rows
from train.sources import read_records, resolve
from train.splits import SPLITS, group_rows, shared, split

LOG = logging.getLogger(__name__)

OOD = "ood"
_BESIDE = ("dropped.csv", card.NAME, card.PLOT)
_NEEDED = ("original_text", "rewritten_text", "rewrite_prompt")
_OPTIONAL = ("id", "kind", "style")
_TEXTS_BY = "words"  # how near-duplicate texts are found
_CHUNK = 2_000  # rows that are read at a time


def prepare(recipe: Recipe, output: Path, encoder: Encoder, *, fresh: bool = False) -> bool:
    """Make the sets; False if they are there already, made of the same by the same recipe.

    Raises:
        UserError: a source is missing or wrong, no row is left, or too few groups for the splits.
    """
    require("datasketch", "eval", "train prepare")
    recipe.split.check()
    made = PreparedData()
    numbered = [(number, source, path) for number, source in enumerate(recipe.sources) for path in resolve(source.path)]
    files = [(source, path) for _, source, path in numbered]
    made.files = {str(path): content_hash(path) for _, path in files}
    names = {(_name(source, path), number) for number, source, path in numbered}
    twice = [name for name, count in Counter(name for name, _ in names).items() if count > 1]
    if twice:
        raise UserError(f"two sources are called {twice[0]!r}: give each [[source]] a name in a recipe")
    mark = _fingerprint(recipe, made.files, encoder)
    wanted = _files_of(recipe, output)
    named = [Path(source.path).expanduser() for source in recipe.sources]
    check_apart(output / "data", wanted, (("source", path) for path in [*named, *(path for _, path in files)]))
    check_free(output / "data", wanted)
    if not fresh and up_to_date(output / "data", mark):
        LOG.info(f"{output} is made of the same sources by the same recipe: nothing to do (--fresh makes it anew)")
        return False
    rows = _screen(recipe, Rows(made.rows, _clean(recipe, files, made)), made, encoder, output, fresh=fresh)
    ood_names = {_name(source, path) for source, path in files if source.ood}
    known = _mix(recipe, [number for number in rows.numbers if made.rows.sources[number] not in ood_names], made)
    others = [number for number in rows.numbers if made.rows.sources[number] in ood_names]
    if not known:
        raise UserError(f"no row is left: {_reasons(made)}")
    LOG.info(f"grouping {len(known) + len(others)} rows by prompt, style and text")
    groups = group_rows(Rows(made.rows, [*known, *others]), encoder, recipe.split).tolist()
    places = split(groups[: len(known)], recipe.split)
    made.splits = {name: Rows(made.rows, [number for number, place in zip(known, places, strict=True) if place == name])
                   for name in SPLITS if recipe.split.shares[name] > 0}  # fmt: skip
    if ood_names:
        taken = set(groups[: len(known)])
        apart = []
        for number, group in zip(others, groups[len(known) :], strict=True):
            if group in taken and recipe.split.by == "group":
                made.dropped.append((number, "split", "shares a prompt, style or text with the training sources"))
            else:
                apart.append(number)
        made.splits[OOD] = Rows(made.rows, apart)
    if recipe.split.by == "group":
        leaks = shared(made.splits)
        assert not leaks, leaks  # the splitter's promise
    most = len(made.splits["train"])
    if any(size > most for size in recipe.mix.subsets):
        raise UserError(f"[mix] subsets: {max(recipe.mix.subsets)} rows were asked for, train has {most}")
    _write(recipe, output, made, mark, encoder, len(set(groups[: len(known)])))
    for name, part in made.splits.items():
        LOG.info(f"{name:<12} {len(part):>7} rows")
    LOG.info(f"{'dropped':<12} {len(made.dropped):>7} rows, one by one in {output / 'dropped.csv'}")
    return True


def _clean(recipe: Recipe, files: Sequence[tuple[DataSource, Path]], made: PreparedData) -> list[int]:
    """Numbers of the rows that pass the rules of cleaning and the screens by text."""
    kept: list[int] = []
    seen: set[bytes] = set()
    ids: set[str] = set()
    for source, path in files:
        cleaner = Cleaner(recipe.cleaning, seen)
        name = _name(source, path)
        before = len(kept)
        for row in _rows(source, path, name, ids):
            made.read[name] += 1
            row, reason = cleaner(row)
            number = made.rows.add(row)
            if reason:
                made.dropped.append((number, "cleaning", reason))
            elif reason := screens.by_text(row, recipe.screens):
                made.dropped.append((number, "screen", reason))
            else:
                kept.append(number)
        LOG.info(f"{name}: {made.read[name]} rows read, {len(kept) - before} left after cleaning and screens by text")
    return kept


def _rows(source: DataSource, path: Path, name: str, ids: set[str]) -> Iterator[DataRow]:
    columns = {column: source.columns.get(column, column) for column in (*_NEEDED, *_OPTIONAL)}
    there, records = read_records(path, set(columns.values()))
    missing = [columns[column] for column in _NEEDED if columns[column] not in there]
    if not there:
        raise UserError(f"{path} has no row")
    if missing:
        raise UserError(
            f"{path}: missing column {', '.join(missing)}\nFound: {', '.join(there)}. Map names in the recipe: "
            "columns = { rewrite_prompt = 'their name' }"
        )
    number = 0
    for number, record in enumerate(islice(records, source.limit or None), start=1):
        cells = {column: record.get(theirs, "") for column, theirs in columns.items()}
        row_id = cells.pop("id") or f"{number:06}"
        if row_id in ids:
            row_id = f"{name}/{row_id}"
        while row_id in ids:
            row_id += "'"
        ids.add(row_id)
        yield DataRow(row_id, source=name, **cells)
    if not number:
        raise UserError(f"{path} has no row")


def _screen(recipe: Recipe, rows: Rows, made: PreparedData, encoder: Encoder, output: Path, *, fresh: bool) -> Rows:
    asked = recipe.screens
    LOG.info(f"comparing the texts of {len(rows)} rows")
    reasons: list[str] = []
    with show_progress(len(rows), 0, doing="screening", unit="pairs") as progress:
        for start in range(0, len(rows), _CHUNK):
            found = screens.by_likeness(list(rows[start : start + _CHUNK]), asked, encoder)
            reasons += found
            for _ in found:
                progress.advance()
    left = _drop(rows, reasons, made)
    if asked.needs_model and left:
        output.mkdir(parents=True, exist_ok=True)
        total = len(left) * (bool(asked.naturalness) + 2 * bool(asked.matters))
        LOG.info(f"{len(left)} rows left; computing up to {total} likelihoods")
        with (
            session(output / "likelihoods", {"target": recipe.model.spec()}, fresh=fresh) as models,
            show_progress(total, 0, doing="screening", unit="likelihoods") as progress,
        ):
            reasons = screens.by_likelihood(list(left), asked, Likelihoods(models["target"]), progress.advance)
        left = _drop(left, reasons, made)
    return left


def _drop(rows: Rows, reasons: Sequence[str], made: PreparedData) -> Rows:
    judged = list(zip(rows.numbers, reasons, strict=True))
    made.dropped += [(number, "screen", reason) for number, reason in judged if reason]
    return Rows(made.rows, [number for number, reason in judged if not reason])


def _mix(recipe: Recipe, rows: Sequence[int], made: PreparedData) -> list[int]:
    """Rows in a seeded order in which every beginning has the sources in their shares, cut to size."""
    by_source: dict[str, list[int]] = {}
    for number in rows:
        by_source.setdefault(made.rows.sources[number], []).append(number)
    for name, part in by_source.items():
        random.Random(f"{recipe.mix.seed} {name}").shuffle(part)
    given = {_name(source, path): source.share for source in recipe.sources if not source.ood
             for path in resolve(source.path)}  # fmt: skip
    empty = [name for name, share in given.items() if share > 0 and name not in by_source]
    if empty:
        raise UserError(f"source {empty[0]} is to have a share, and no row of it is left: {_reasons(made)}")
    shares = {name: given[name] or len(part) for name, part in by_source.items()}
    total = sum(shares.values())
    most = min((len(part) * total / shares[name] for name, part in by_source.items()), default=0)
    size = min(recipe.mix.size or len(rows), len(rows), int(most + 1e-6))
    if recipe.mix.size > size:
        raise UserError(f"[mix] size={recipe.mix.size}: the sources give {size} rows in these shares")
    mixed: list[int] = []
    taken = dict.fromkeys(by_source, 0)
    while len(mixed) < size:
        behind = {name: (len(mixed) + 1) * shares[name] / total - taken[name] for name, part in by_source.items()
                  if taken[name] < len(part)}  # fmt: skip
        name = max(behind, key=lambda name: behind[name])
        mixed.append(by_source[name][taken[name]])
        taken[name] += 1
    for name, part in by_source.items():
        made.dropped += [(number, "mix", "beyond the share or size asked for") for number in part[taken[name] :]]
    return mixed


def _write(recipe: Recipe, output: Path, made: PreparedData, mark: str, encoder: Encoder, groups: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    wanted = _files_of(recipe, output)
    for old in claim(output / "data", wanted):  # of another recipe
        old.unlink(missing_ok=True)
    for name, rows in made.splits.items():
        _write_rows(output / f"{name}.parquet", rows)
    for size in recipe.mix.subsets:
        (output / "subsets").mkdir(exist_ok=True)
        _write_rows(output / "subsets" / f"train-{size}.parquet", made.splits["train"][:size])
    write_table(
        output / "dropped.csv", ("id", "source", "stage", "reason", "rewrite_prompt"),
        (
            (row.id, row.source, stage, reason, row.rewrite_prompt)
            for number, stage, reason in made.dropped
            for row in (made.rows.row(number),)
        ),
    )  # fmt: skip
    hashes = {str(path.relative_to(output)): content_hash(path) for path in wanted if path.suffix == ".parquet"}
    licences = {source.path: source.licence for source in recipe.sources}
    card.write(output, made, hashes, licences, groups=groups, encoder=encoder.name)
    write_manifest(
        output / "data",
        {
            "made_from": mark,
            "recipe": asdict(recipe),
            "sources": made.files,
            "encoder": encoder.name,
            "files": hashes,
            "rows": {name: len(rows) for name, rows in made.splits.items()},
            "dropped": dict(Counter(reason for _, _, reason in made.dropped).most_common()),
        },
        made=wanted,
    )


def _files_of(recipe: Recipe, output: Path) -> list[Path]:
    """All files of a set but its manifest, which is that of `output / "data"`."""
    names = [name for name in SPLITS if recipe.split.shares[name] > 0]
    names += [OOD] if any(source.ood for source in recipe.sources) else []
    names += [f"subsets/train-{size}" for size in recipe.mix.subsets]
    return sorted(output / name for name in (*(f"{name}.parquet" for name in names), *_BESIDE))


def _write_rows(path: Path, rows: Sequence[DataRow]) -> None:
    columns = list(DataRow.__dataclass_fields__)
    write_table(path, columns, ([getattr(row, column) for column in columns] for row in rows))


def _fingerprint(recipe: Recipe, files: Mapping[str, str], encoder: Encoder) -> str:
    plain = asdict(replace(recipe, sources=()))
    sources = [{**asdict(source), "path": ""} for source in recipe.sources]
    parts = [plain, sources, sorted(files.values()), encoder.fingerprint, _TEXTS_BY]
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _name(source: DataSource, path: Path) -> str:
    """The name of a source; the files of a folder or a dataset are one source."""
    asked = Path(source.path.rstrip("/"))
    return source.name or (path.stem if path.stem == asked.stem else asked.name)


def _reasons(made: PreparedData) -> str:
    counts = Counter(reason for _, _, reason in made.dropped).most_common()
    return some([f"{count} x {reason}" for reason, count in counts]) or "the sources are empty"
