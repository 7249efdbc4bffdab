"""Tables: CSV and Parquet as `predict`, `validate`, `eval score` and `train prepare` read them."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import mutate

_ENCODINGS = (
    "utf-8",
    "utf-8",
    "utf-8",
    "utf-16",
    "latin-1",
    "cp1252",
    "utf-7",
    "utf-8-sig",
    "ascii",
    "big5",
    "idna",
    "x",
    "",
    "\0",
)
_HEADER = ["id", "original_text", "rewritten_text", "rewrite_prompt"]


def csv_case(draw: random.Random, folder: Path) -> Callable[[], object]:
    """A CSV, damaged, as the input of a command."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=draw.choice(("\n", "\r\n", "\r")))
    writer.writerow(_header(draw))
    for number in range(draw.choice((0, 1, 3, 30))):
        writer.writerow([draw.choice((str(number), str(number), draw.choice(mutate.TEXTS))), *_texts(draw, 3)])
    content = file.getvalue().encode(draw.choice(("utf-8", "utf-8", "utf-16", "latin-1")), "replace")
    (folder / "in.csv").write_bytes(mutate.damage(draw, content) if draw.random() < 0.8 else content)
    return _command(draw, folder, "in.csv")


def parquet_case(draw: random.Random, folder: Path) -> Callable[[], object]:
    """A Parquet file of any schema, damaged or not, or a folder of them."""
    import pyarrow.parquet as pq

    name = "in.parquet"
    if draw.random() < 0.15:
        name = "in"
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    for part in range(1 if name == "in.parquet" else draw.choice((0, 1, 3))):
        path = folder / name / f"{part}.parquet" if name == "in" else folder / name
        pq.write_table(_table(draw), path, compression=draw.choice(("none", "snappy", "zstd")))
        if draw.random() < 0.6:
            path.write_bytes(mutate.damage(draw, path.read_bytes()))
    return _command(draw, folder, name)


def _header(draw: random.Random) -> list[str]:
    header = list(_HEADER)
    if draw.random() < 0.3:
        header[draw.randrange(4)] = draw.choice((*mutate.TEXTS, *_HEADER))
    return header


def _texts(draw: random.Random, count: int) -> list[str]:
    return [
        draw.choice(("A plain text of some words.", "Another text.", draw.choice(mutate.TEXTS))) for _ in range(count)
    ]


def _table(draw: random.Random) -> Any:
    import pyarrow as pa

    rows = draw.choice((0, 1, 5, 40))
    columns = {}
    for name in _header(draw):
        columns[name] = _column(draw, name, rows)
    return pa.table(columns)


def _column(draw: random.Random, name: str, rows: int) -> Any:
    import pyarrow as pa

    if draw.random() < 0.75:
        texts = [str(number) if name == "id" else _texts(draw, 1)[0] for number in range(rows)]
        return pa.array(
            [None if draw.random() < 0.02 else text for text in texts], draw.choice((pa.string(), pa.large_string()))
        )
    kinds: list[tuple[Any, Any]] = [
        (pa.int64(), lambda n: n),
        (pa.float64(), lambda n: float("nan") if n % 3 else n / 2),
        (pa.bool_(), lambda n: n % 2 == 0),
        (pa.list_(pa.string()), lambda n: ["a"] * (n % 3)),
        (pa.struct([("a", pa.int32())]), lambda n: {"a": n}),
        (pa.map_(pa.string(), pa.int32()), lambda n: [("a", n)]),
        (pa.binary(), lambda n: bytes([n % 256, 255])),
        (pa.timestamp("ns"), lambda n: n * 10**15),
        (pa.date32(), lambda n: n),
        (pa.decimal128(5), lambda n: n),
        (pa.null(), lambda n: None),
        (pa.dictionary(pa.int32(), pa.string()), lambda n: "same"),
        (pa.duration("s"), lambda n: n),
        (pa.list_(pa.list_(pa.int8())), lambda n: [[1]]),
        (pa.time64("us"), lambda n: n),
        (pa.uint64(), lambda n: 2**63 + n),
    ]
    kind, make = draw.choice(kinds)
    return pa.array([make(number) for number in range(rows)], kind)


def _command(draw: random.Random, folder: Path, name: str) -> Callable[[], object]:
    mutate.user_files(draw, folder)
    encoding = draw.choice(_ENCODINGS) if draw.random() < 0.3 else "utf-8"
    way = draw.choices(("predict", "validate", "shots", "texts", "prepare", "score"), (75, 10, 8, 6, 0.5, 0.5))[0]
    if way == "predict":
        output = draw.choice(("out.csv", "out.csv", "out.parquet", "in.csv", "in/out.parquet", name))
        recover = draw.choice((["--backend", "scripted"], ["--recover", "constant"]))
        fresh = ["--fresh"] if draw.random() < 0.2 else []
        return invoke(
            "submission",
            "predict",
            name,
            "-o",
            output,
            *recover,
            "--encoding",
            encoding,
            *fresh,
            "--limit",
            str(draw.choice((0, 0, 3))),
        )
    if way == "validate":
        (folder / "s.csv").write_bytes(mutate.damage(draw, b"id,rewrite_prompt\n0,a\n1,b\n"))
        return invoke("submission", "validate", draw.choice(("s.csv", name)), name, "--encoding", encoding)
    if way == "shots":
        (folder / "pairs.csv").write_text("id,original_text,rewritten_text\n1,a,b\n")
        return invoke(
            "submission",
            "predict",
            "pairs.csv",
            "-o",
            "out.csv",
            "--backend",
            "scripted",
            "--shots",
            name,
            "--encoding",
            encoding,
        )
    if way == "texts":
        return invoke("train", "texts", name, "-o", draw.choice(("texts.csv", name, "thesis.txt")), "--min-words", "1")
    if way == "prepare":
        return invoke("train", "prepare", name, "-o", draw.choice(("sets", ".", "in")))
    (folder / "s.csv").write_text("id,rewrite_prompt\n0,a\n1,b\n")
    return invoke("eval", "score", "s.csv", name)


def invoke(room: str, *arguments: str) -> Callable[[], object]:
    """A command of a room, as its module runs it; a NUL ends an argument, as it does for any process."""
    import importlib
    import sys

    def command() -> object:
        sys.argv = [room, *(argument.split("\0")[0] for argument in arguments)]
        return importlib.import_module(f"{room}.__main__").app()

    return command
