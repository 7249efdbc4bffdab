"""The journal of a run: each finished row as a JSON line beside the output, so that no row is computed twice.

    {"journal": 1, "fingerprint": {"input": "9f2c...", "model": "61d0...", "template": "short:51c0..."}}
    {"id": "-1", "status": "ok", "text": "Rewrite this as a shanty.", "raw": " as a shanty.", ...}

Lines reach the system at once and the disk within seconds. A line torn by a kill is dropped on resuming.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from submission.errors import PromptRecoveryError, UserError
from submission.data.files import beside
from submission.data.scratch import key_of, scratch, text_of
from submission.types import Prediction

_VERSION = 1
_BEGINS = b'{"journal": '  # every journal
_SYNC_SECONDS = 2.0
_LOCK_SECONDS = 3.0  # a process that was just killed may hold its lock a moment longer


def journal_path(output: Path) -> Path:
    """Where the journal of an output lies."""
    return beside(output, ".journal.jsonl")


class Finished(Mapping[str, Prediction]):
    """The finished rows of a journal by id. Only where they stand in it is kept: they are read when asked for."""

    def __init__(self, path: Path) -> None:
        """None yet, of the journal at `path`."""
        self._file = path.open("rb", buffering=0)
        self._mutex = threading.Lock()
        self._places = scratch("CREATE TABLE places (id BLOB PRIMARY KEY, start INT, length INT) WITHOUT ROWID")

    def note(self, row_id: str, start: int, length: int) -> None:
        """A row's line is so many bytes from `start`; an earlier line of it counts no more."""
        self._places.execute("REPLACE INTO places VALUES (?, ?, ?)", (key_of(row_id), start, length))

    def __getitem__(self, row_id: str) -> Prediction:
        place = self._places.execute("SELECT start, length FROM places WHERE id = ?", (key_of(row_id),)).fetchone()
        if place is None:
            raise KeyError(row_id)
        with self._mutex:
            self._file.seek(place[0])
            return Prediction(**json.loads(self._file.read(place[1])))

    def __contains__(self, row_id: object) -> bool:
        asked = (key_of(str(row_id)),)
        return self._places.execute("SELECT 1 FROM places WHERE id = ?", asked).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        for (key,) in self._places.execute("SELECT id FROM places"):
            yield text_of(key)

    def __len__(self) -> int:
        (count,) = self._places.execute("SELECT count(*) FROM places").fetchone()
        return int(count)


class Journal:
    """An open, locked journal.

    Attributes:
        finished: the rows it knows.
        damaged: lines that could not be read.

    Nothing is written before `begin`: a run that cannot start leaves an older journal as it is.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], *, fresh: bool = False) -> None:
        """Open, lock and read a journal.

        Args:
            path: the file; made if it does not exist.
            fingerprint: what decides the run's answers.
            fresh: forget what the journal holds.

        Raises:
            UserError: it belongs to a different run (the difference is named), is locked by another
                process, or cannot be opened.
        """
        self.path = path
        self.damaged = 0
        self._fingerprint = dict(fingerprint)
        self._mutex = threading.RLock()
        self._unsynced = False
        self._synced_at = time.monotonic()
        self._existed = path.exists()
        self._file = _open_locked(path)
        try:
            _check_ours(path)
            header, self.finished, self.damaged, self._keep = _parse(path)
            if fresh or header is None:
                self.finished, self.damaged, self._keep = Finished(path), 0, 0
            else:
                _compare(path, header, self._fingerprint)
        except BaseException:
            self._abandon()
            raise
        self._torn = self._keep < path.stat().st_size

    def begin(self) -> None:
        """Get ready to append: drop a torn last line, or everything on a fresh start; write the header."""
        with self._mutex:
            if self._torn:
                os.ftruncate(self._file, self._keep)
            if self._keep == 0:
                self._write({"journal": _VERSION, "fingerprint": self._fingerprint})
            self.sync()
            _sync_folder(self.path.parent)

    def append(self, prediction: Prediction) -> None:
        """Add a finished row."""
        with self._mutex:
            start, length = self._write(asdict(prediction))
            self.finished.note(prediction.id, start, length)
            self.sync_if_due()

    def sync_if_due(self) -> None:
        """Bring lines to the disk if the last time is seconds ago."""
        if self._unsynced and time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        with self._mutex:
            os.fsync(self._file)
            self._unsynced = False
            self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync and release the lock; a journal that was never begun and is new disappears."""
        with self._mutex:
            if self._file < 0:
                return
            if self.path.exists() and self.path.stat().st_size == 0:
                self._abandon()
                return
            self.sync()
            os.close(self._file)
            self._file = -1

    def _abandon(self) -> None:
        if not self._existed:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1

    def _write(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """Add a line; where it begins, and its length in bytes."""
        # One write call a line: a kill leaves it whole or absent, a full disk leaves a torn end.
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        place = os.lseek(self._file, 0, os.SEEK_END), len(line)
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise PromptRecoveryError(
                f"journal {self.path} cannot be written: {error.strerror}\n"
                "The rows before are safe; make room and run the same command again."
            ) from error
        self._unsynced = True
        return place


def read_finished(path: Path, fingerprint: Mapping[str, str] | None = None) -> Mapping[str, Prediction]:
    """The finished rows of a journal, without locking it; none if there is no journal.

    Args:
        path: the journal.
        fingerprint: if given, the journal of a run with another one counts as none.
    """
    try:
        header, finished, _, _ = _parse(path)
    except FileNotFoundError:
        return {}
    return finished if fingerprint is None or header == dict(fingerprint) else {}


def _parse(path: Path) -> tuple[dict[str, str] | None, Finished, int, int]:
    """Header's fingerprint, finished rows, number of damaged lines, and how many bytes are whole lines."""
    header: dict[str, str] | None = None
    finished = Finished(path)
    damaged = end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # torn by a kill
                break
            start, end = end, end + len(line)
            try:
                record = json.loads(line)
                if start == 0:
                    header = dict(record["fingerprint"]) if record["journal"] == _VERSION else {}
                else:
                    finished.note(Prediction(**record).id, start, len(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                damaged += 1
                if start == 0:
                    header = {}
    return header, finished, damaged, end


def _check_ours(path: Path) -> None:
    with path.open("rb") as file:
        begins = file.read(len(_BEGINS))
    if begins != _BEGINS[: len(begins)]:
        raise UserError(
            f"{path} is in the way: it is no journal of this program\nMove it away, or choose another output."
        )


def _compare(path: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    different = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if different:
        lines = [
            f"  {key}: the journal has {_short(theirs.get(key))}, this run has {_short(ours.get(key))}"
            for key in different
        ]
        raise UserError(
            f"{path} belongs to a different run:\n"
            + "\n".join(lines)
            + "\nUse the same options to resume it, another output, or --fresh to begin anew."
        )


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 60 else value[:57] + "..."


def _open_locked(path: Path) -> int:
    """Open and lock the file that `path` names once the lock is held: a run that gives up may remove its own."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"journal {path} cannot be opened: {error.strerror}") from error
        try:
            _lock(file, path)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    give_up = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > give_up:
                raise UserError(
                    f"another process is writing {path}\nWait for it or stop it, or choose another output."
                ) from None
            time.sleep(0.05)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
