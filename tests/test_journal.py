"""The journal: what was finished stays, what was torn is dropped, what differs is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from submission.calls import journal as module
from submission.errors import PromptRecoveryError, UserError
from submission.calls.journal import Journal, read_finished
from submission.types import Prediction

FINGERPRINT = {"input": "1", "model": "m"}
FIRST, SECOND = Prediction("-1", "Rewrite é", raw="“x”\n"), Prediction("2", "", "failed", "empty answer")


def written(path: Path, *predictions: Prediction) -> Path:
    journal = Journal(path, FINGERPRINT)
    journal.begin()
    for prediction in predictions:
        journal.append(prediction)
    journal.close()
    return path


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path / "j", FIRST, SECOND)
    assert read_finished(path) == {"-1": FIRST, "2": SECOND}
    assert json.loads(path.read_text().splitlines()[0]) == {"journal": 1, "fingerprint": FINGERPRINT}


def test_any_torn_end_is_dropped_and_the_rest_kept_to_the_byte(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", FIRST, SECOND).read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole)):
        path = tmp_path / "torn"
        path.write_bytes(whole[:length])
        kept = b"".join(lines[: whole[:length].count(b"\n")])
        journal = Journal(path, FINGERPRINT)
        journal.begin()
        assert path.read_bytes() == (kept or lines[0])
        journal.append(Prediction("3", "third"))
        journal.close()
        assert read_finished(path).keys() >= {"3"}
        assert path.read_bytes().startswith(kept)


def test_a_different_run_is_refused_with_the_difference_named(tmp_path: Path) -> None:
    path = written(tmp_path / "j", FIRST)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"(?s)different run.*model: the journal has m, this run has n.*--fresh"):
        Journal(path, {**FINGERPRINT, "model": "n"})
    assert path.read_bytes() == before


def test_fresh_forgets_but_only_once_the_run_begins(tmp_path: Path) -> None:
    path = written(tmp_path / "j", FIRST)
    before = path.read_bytes()
    Journal(path, {"model": "n"}, fresh=True).close()
    assert path.read_bytes() == before
    journal = Journal(path, {"model": "n"}, fresh=True)
    journal.begin()
    journal.close()
    assert read_finished(path) == {}


def test_a_run_that_never_begins_leaves_no_journal(tmp_path: Path) -> None:
    Journal(tmp_path / "j", FINGERPRINT).close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_line_is_counted_and_its_row_computed_again(tmp_path: Path) -> None:
    path = written(tmp_path / "j", FIRST, SECOND)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    journal = Journal(path, FINGERPRINT)
    assert journal.damaged == 1
    assert set(journal.finished) == {"2"}
    journal.close()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("something else\n")
    for fresh in (False, True):
        with pytest.raises(UserError, match="it is no journal"):
            Journal(tmp_path / "j", FINGERPRINT, fresh=fresh)
    assert (tmp_path / "j").read_text() == "something else\n"


def test_two_runs_cannot_write_the_same_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    journal = Journal(tmp_path / "j", FINGERPRINT)
    with pytest.raises(UserError, match="another process is writing"):
        Journal(tmp_path / "j", FINGERPRINT)
    journal.close()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "j", FIRST)
    journal = Journal(path, FINGERPRINT)
    journal.begin()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file)
    with pytest.raises(PromptRecoveryError, match="cannot be written: No space left"):
        journal.append(SECOND)
    assert read_finished(path) == {"-1": FIRST}


def test_a_run_that_gives_up_takes_no_journal_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "j"
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as the second run saw it, a moment too early
    first = Journal(path, FINGERPRINT)
    first.begin()
    with pytest.raises(UserError, match="another process"):
        Journal(path, FINGERPRINT)
    first.append(FIRST)
    assert set(read_finished(path)) == {"-1"}
