"""Tables on an object store: pyarrow's real S3 client against a server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from submission.data.files import display_path, on_store, sidecar_path
from submission.data.tables import header_of, read_table, write_table
from submission.errors import UserError
from tests.conftest import ROOT, Cli, runner
from tests.s3_server import Objects, s3_server
from train.sources import read_records, resolve

TABLE = ROOT / "examples" / "test.csv"


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    with s3_server("bucket") as (address, objects):
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield objects


def test_a_path_is_told_from_a_store() -> None:
    assert display_path(Path("s3://bucket/folder/a.csv")) == "s3://bucket/folder/a.csv"
    assert [on_store(Path(name)) for name in ("gs://b/x", "s3/b/x", "/s3:/x", "x.csv")] == [True, False, False, False]
    assert sidecar_path(Path("s3://bucket/folder/a.csv"), ".run.json") == Path("a.csv.run.json")


@pytest.mark.parametrize("name", ["a.csv", "folder/a.parquet"])
def test_a_table_is_written_whole_and_read_back(stored: Objects, name: str) -> None:
    rows = [(str(number), "a\rb" if number == 7 else f"text {number}") for number in range(5000)]
    write_table(Path(f"s3://bucket/{name}"), ("id", "rewrite_prompt"), rows)
    assert set(stored) == {f"bucket/{name}"}
    path = Path(f"s3://bucket/{name}")
    assert [row.cells for row in read_table(path, ("id", "rewrite_prompt"))] == rows
    assert header_of(path) == ["id", "rewrite_prompt"]


def test_a_folder_of_parquet_is_read(stored: Objects) -> None:
    for part in ("b", "a"):
        write_table(Path(f"s3://bucket/set/{part}.parquet"), ("id",), [(part,)])
    stored["bucket/set/_SUCCESS"] = b""
    found = read_table(Path("s3://bucket/set"), ("id",))
    assert [(row.where, row.cells) for row in found] == [("a.parquet, row 1", ("a",)), ("b.parquet, row 1", ("b",))]


def test_predict_reads_and_writes_there_and_keeps_its_log_here(stored: Objects, cli: Cli, tmp_path: Path) -> None:
    stored["bucket/in/test.csv"] = TABLE.read_bytes()
    options = ("s3://bucket/in/test.csv", "-o", "s3://bucket/out/submission.csv", "--backend", "scripted")
    done = cli("predict", *options, "--deadline", "5m", "--json")
    assert done.code == 0, done.err
    assert set(stored) == {"bucket/in/test.csv", "bucket/out/submission.csv"}
    assert done.summary["output"] == "s3://bucket/out/submission.csv"
    here = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("submission"))
    assert here == ["submission.csv.calls.jsonl", "submission.csv.run.json"]
    again = cli("predict", *options, "--json")
    assert again.summary["computed"] == 0
    assert cli("validate", "s3://bucket/out/submission.csv", "s3://bucket/in/test.csv").code == 0
    assert "parsed answer" in cli("inspect", "diary-snow", "--run", "s3://bucket/out/submission.csv").out


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("s3://bucket/none.csv", "out.csv", "s3://bucket/none.csv does not exist"),
        (str(TABLE), "s3://nowhere/out.csv", "there is no bucket nowhere"),
    ],
)
def test_what_is_not_there_is_said(stored: Objects, cli: Cli, source: str, output: str, words: str) -> None:
    done = cli("predict", source, "-o", output, "--backend", "scripted")
    assert (done.code, words in done.err) == (2, True), done.err


def test_a_store_that_cannot_be_reached_is_said(stored: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"s3://bucket/a\.csv cannot be read"):
        read_table(Path("s3://bucket/a.csv"), ("id",))


def test_an_input_is_not_overwritten(stored: Objects, cli: Cli) -> None:
    stored["bucket/a.csv"] = TABLE.read_bytes()
    done = cli("predict", "s3://bucket/a.csv", "-o", "s3://bucket/a.csv", "--backend", "scripted")
    assert (done.code, "is the input" in done.err) == (2, True), done.err
    assert stored["bucket/a.csv"] == TABLE.read_bytes()


def test_sources_of_training_sets_may_lie_there(stored: Objects) -> None:
    write_table(Path("s3://bucket/sets/a.csv"), ("rewrite_prompt",), [("Make it rhyme.",)])
    stored["bucket/sets/b.jsonl"] = b'{"rewrite_prompt": "Make it short."}'
    files = resolve("s3://bucket/sets")
    assert [list(read_records(file, ["rewrite_prompt"])[1]) for file in files] == [
        [{"rewrite_prompt": "Make it rhyme."}], [{"rewrite_prompt": "Make it short."}],
    ]  # fmt: skip


def test_the_ensemble_and_training_use_stores_too(stored: Objects, tmp_path: Path) -> None:
    stored["bucket/test.csv"] = TABLE.read_bytes()
    sources = tmp_path / "sources.toml"
    sources.write_text('[[source]]\nname = "a"\nbackend = "scripted"\nn = 2\n')
    ensemble, train = runner("ensemble", tmp_path), runner("train", tmp_path)
    drawn = ensemble(
        "sample", "s3://bucket/test.csv", "-o", "s3://bucket/candidates.parquet", "--sources", sources, "--near", "1"
    )
    assert drawn.code == 0, drawn.err
    chosen = ensemble("select", "s3://bucket/candidates.parquet", "--selector", "first", "-o", "s3://bucket/out.csv")
    assert chosen.code == 0, chosen.err
    stored["bucket/prompts.csv"] = b"rewrite_prompt\nMake it rhyme.\n"
    stored["bucket/texts.csv"] = b"original_text\nA text of some words.\n"
    made = ("rewrites", "s3://bucket/prompts.csv", "s3://bucket/texts.csv", "-o", "s3://bucket/triplets.parquet",
            "--backend", "scripted")  # fmt: skip
    done = train(*made)
    assert done.code == 0, done.err
    assert "nothing to do" in train(*made).err
    assert {"bucket/candidates.parquet", "bucket/out.csv", "bucket/triplets.parquet"} <= set(stored)
