"""Odd cases: links, files that come while a command runs, folders that cannot be replaced, code that forks."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from submission.data import files
from submission.data.files import atomic_folder, note_use, tidy_cache
from submission.data.outputs import check_free, check_output, claim, made_by, made_folder, manifest_path
from submission.errors import UserError
from tests.conftest import Cli, read_csv, runner, write_csv
from tests.test_nothing_lost import SCRIPTED, triplets
from train.sft import _checkpoints, _last_checkpoint


def test_only_the_output_itself_is_written_through_a_link(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("mine")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "README.md").symlink_to(tmp_path / "mine.md")
    done = runner("train", tmp_path)("prepare", triplets(tmp_path / "t.csv"), "-o", "s")
    assert done.code == 2
    assert "README.md: in the way" in done.err
    (tmp_path / "mine.json").write_text('{"my": "notes"}')
    (tmp_path / "o.csv.run.json").symlink_to(tmp_path / "mine.json")
    done = cli("predict", pairs_csv, "-o", tmp_path / "o.csv", *SCRIPTED)
    assert done.code == 2
    assert (tmp_path / "mine.md").read_text() == "mine"
    assert (tmp_path / "mine.json").read_text() == '{"my": "notes"}'


def test_a_file_that_comes_while_a_folder_is_made_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for _ in range(2):
        with made_folder(folder) as part:
            (part / "ours.txt").write_text("ours")

    def again() -> None:
        with made_folder(folder) as part:
            (part / "ours.txt").write_text("new")
            (folder / "thesis.txt").write_text("mine")

    with pytest.raises(UserError, match=r"thesis\.txt: in the way"):
        again()
    assert (folder / "thesis.txt").read_text() == "mine"
    assert (folder / "ours.txt").read_text() == "ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run.json"]


def test_a_folder_that_cannot_be_placed_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("before")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target == folder and (Path(source) / "b").exists():
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("submission.data.files.os.replace", fail)
    with pytest.raises(OSError, match="Input"), atomic_folder(folder) as part:
        (part / "b").write_text("after")
    assert (folder / "a").read_text() == "before"


def test_what_is_gone_and_comes_again_is_not_ours(tmp_path: Path) -> None:
    output, extra = tmp_path / "o.csv", tmp_path / "extra.csv"
    claim(output, [output, extra])
    output.write_text("ours")
    claim(output, [output])
    extra.write_text("mine")
    with pytest.raises(UserError, match="extra"):
        check_free(output, [extra])


def test_a_manifest_gives_no_right_to_what_a_link_leads_to_nor_to_folders(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "in"
    outside.mkdir()
    (folder / "keep").mkdir(parents=True)
    (outside / "k.txt").write_text("mine")
    (folder / "link").symlink_to(outside)
    made = {"written": "2026", "version": "1", "made": ["link/k.txt", "keep", "own.txt"]}
    (folder / "data.run.json").write_text(json.dumps(made))
    assert made_by(folder / "data") == {folder / "own.txt"}


def test_an_input_is_found_through_links_of_its_folder(tmp_path: Path, cli: Cli, pairs_csv: Path) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    (tmp_path / "parts").mkdir()
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(pairs_csv), tmp_path / "real.parquet")
    before = (tmp_path / "real.parquet").read_bytes()
    (tmp_path / "parts" / "part-0.parquet").symlink_to(tmp_path / "real.parquet")
    (tmp_path / "out.parquet").symlink_to(tmp_path / "real.parquet")
    assert cli("predict", tmp_path / "parts", "-o", tmp_path / "out.parquet", *SCRIPTED).code == 2
    assert (tmp_path / "real.parquet").read_bytes() == before


@pytest.mark.parametrize("name", [".", "..", "", "/"])
def test_a_folder_that_one_is_in_is_no_output(name: str, tmp_path: Path) -> None:
    here = tmp_path / "a" / "here"
    here.mkdir(parents=True)
    (here / "trip.csv").write_bytes(triplets(tmp_path / "t.csv").read_bytes())
    for room, command in (("train", "merge"), ("ensemble", "sample")):
        done = runner(room, here)(command, "trip.csv", "-o", name)
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
    assert (here / "trip.csv").exists()


def test_files_with_names_like_our_temporary_ones_are_kept(cli: Cli, tmp_path: Path, pairs_csv: Path) -> None:
    source = tmp_path / ".y.csv.run.json.prompt-recovery-abcdefgh.tmp"
    shutil.copy(pairs_csv, source)
    assert cli("predict", source, "-o", tmp_path / "y.csv", *SCRIPTED).code == 2
    assert source.read_bytes() == pairs_csv.read_bytes()
    (tmp_path / ".x.csv.prompt-recovery-abcdefgh.tmp").mkdir()
    assert cli("predict", pairs_csv, "-o", tmp_path / "x.csv", *SCRIPTED).code == 0


def test_an_output_must_have_a_name() -> None:
    with pytest.raises(UserError, match="is a folder"):
        check_output(Path("/"))
    with pytest.raises(UserError, match="is no name"):
        manifest_path(Path())


def test_checkpoints_are_what_the_trainer_calls_so(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 30}')
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    assert sorted(step for step, _ in _checkpoints(tmp_path)) == [2, 10]
    assert _last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_training_that_was_killed_before_its_last_word_is_ended(recipe: Path, tuned_run: Path, tmp_path: Path) -> None:
    train = runner("train", tmp_path)
    shutil.copytree(tuned_run, tmp_path / "a")
    told = tmp_path / "a" / "adapter.run.json"
    content = json.loads(told.read_text())
    told.write_text(json.dumps({key: content[key] for key in ("written", "version", "made")} | {"state": "writing"}))
    done = train("sft", recipe, "-o", "a", "--set", "template=brief")
    assert done.code == 0, done.err
    assert json.loads(told.read_text())["history"]


_ODD = """
import asyncio, os
from submission import Prediction

def cancelled(pairs, models, budget):
    for pair in pairs:
        if pair.id == "03":
            raise asyncio.CancelledError("gone")
        yield Prediction(pair.id, "Make it so.")

def forked(pairs, models, budget):
    for pair in pairs:
        if pair.id == "03" and os.fork() == 0:
            return
        yield Prediction(pair.id, "Make it so.")

def elsewhere(pairs, models, budget):
    for pair in pairs:
        os.chdir("/")
        yield Prediction(pair.id, "Make it so.")

class Meta(type):
    def __getattr__(cls, name):
        raise RuntimeError("odd")

class Odd(metaclass=Meta):
    pass

for one in (cancelled, forked, elsewhere):
    one.roles = ()
"""


@pytest.mark.parametrize(("name", "code", "failed"), [
    ("cancelled", 0, 1), ("forked", 0, 0), ("elsewhere", 0, 0), ("Odd", 2, 0),
])  # fmt: skip
def test_odd_code_of_users(name: str, code: int, failed: int, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(_ODD)
    write_csv(tmp_path / "t.csv", [(f"{n:02}", "An original text.", "Another text.") for n in range(20)])
    done = runner("submission", tmp_path)("predict", "t.csv", "-o", "o.csv", "--recover", f"odd:{name}", "--json")
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    if code == 0:
        assert json.loads(done.out.splitlines()[-1])["fallbacks"] == failed
        answers = [text for _, text in read_csv(tmp_path / "o.csv")[1:]]
        assert answers.count("Make it so.") == 20 - failed


def test_a_slip_of_the_hand_starts_no_million_workers(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    done = cli("predict", pairs_csv, "-o", tmp_path / "o.csv", *SCRIPTED, "--workers", 1_000_000)
    assert done.code == 2
    assert "workers=1000000 is too many" in done.err


def test_what_was_not_used_for_longest_leaves_the_cache_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = tmp_path / "cache" / "models"
    days = {"today": 0.5, "recent": 2.0, "old": 5.0, "locked": 7.0, "oldest": 9.0, "my-own": 99.0}
    for name, age in days.items():
        (kind / name).mkdir(parents=True)
        (kind / name / ("mine" if name == "my-own" else "made.json")).write_bytes(bytes(100))
        os.utime(kind / name, (time.time() - age * 86_400,) * 2)
    (kind / ".killed.77.gone" / "half").mkdir(parents=True)
    (kind / "nowhere").symlink_to(tmp_path / "nothing")
    (kind / "link").symlink_to(kind / "oldest")
    tidy_cache(kind, "made.json")
    assert not (kind / ".killed.77.gone").exists()
    assert all((kind / name).is_dir() for name in days)  # there is room
    monkeypatch.setattr(files, "_CACHE_BYTES", 250)
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name == "locked":
            raise PermissionError("locked")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    note_use(kind / "old")
    note_use(kind / "nothing")
    tidy_cache(kind, "made.json")
    # That of today stays, though there is room for two; one that cannot be removed keeps no other.
    assert {path.name for path in kind.iterdir() if path.is_dir()} == {"today", "old", "locked", "my-own"}
