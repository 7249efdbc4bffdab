"""The log of model calls: every call that was computed is a line, found again by what was asked.

    ["<checksum>","<digest of the call>",{"completions":[...],"seconds":0.41}]

A call is the same if model, adapter, the options that decide the answer and the request are the same, so nothing in a
log can be stale: a changed row, template or option is another call. Lines are checked when the log is opened and once
more when they are read. A line that is damaged, torn by a kill or no line of a log at all is counted and left alone;
its call is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from submission.data.files import sidecar_path
from submission.data.scratch import MaybeThere, scratch
from submission.errors import PromptRecoveryError, UserError

T = TypeVar("T")
LOG = logging.getLogger(__name__)

_CHECKSUM, _DIGEST = 16, 32  # hexadecimal digits
_HEAD = len('["') + _CHECKSUM + len('","') + _DIGEST + len('",')  # bytes before the content
_LONGEST = 64 << 20  # bytes of a line; longer ones are none of ours
_UNINDEXED = 10_000  # places that are kept in memory before they are written to the index together
_SYNC_SECONDS = 2.0
_LOCK_SECONDS = 3.0  # a process that was just killed may hold its lock a moment longer


def log_path(output: Path) -> Path:
    """Where the log of an output lies."""
    return sidecar_path(output, ".calls.jsonl")


class Log:
    """An open log. The file is made when the first call is added.

    Args:
        path: the file.
        fresh: forget what it holds.
        shared: other processes may add to it at the same time.
        read_only: calls are looked up only; the file may be missing.
        before_writing: is called before the file is made or changed for the first time.

    Attributes:
        damaged: lines that were left alone.

    Raises:
        UserError: another process has it open, or it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        fresh: bool = False,
        shared: bool = False,
        read_only: bool = False,
        before_writing: Callable[[], object] | None = None,
    ) -> None:
        self.path = path
        self._before_writing = before_writing
        self.damaged = 0
        self._shared, self._read_only = shared, read_only
        self._file = -1
        self._unsynced = False
        self._synced_at = time.monotonic()
        self._torn = self._given_up = False
        self._index = scratch("CREATE TABLE calls (digest BLOB PRIMARY KEY, start INT, length INT) WITHOUT ROWID")
        self._latest: dict[bytes, tuple[int, int]] = {}  # places that the index does not know yet
        self._maybe = MaybeThere()  # by the first bits of a digest
        self._fresh = fresh and path.exists()
        if path.exists():
            self._open()
            if not fresh:
                self._read()

    def __len__(self) -> int:
        self._index_latest()
        (count,) = self._index.execute("SELECT count(*) FROM calls").fetchone()
        return int(count)

    def __contains__(self, digest: str) -> bool:
        return self._place(digest) is not None

    def get(self, digest: str, parse: Callable[[Any], T]) -> T | None:
        """The answer of a call; None if it is not known, or what the line says is no such answer.

        Args:
            digest: of the call.
            parse: makes the answer of a line's content; it may raise anything.
        """
        place = self._place(digest)
        if place is None:
            return None
        line = os.pread(self._file, place[1], place[0])
        try:
            if _digest_of(line) == digest:
                return parse(json.loads(line[_HEAD:-2]))
        except Exception:  # it has the right checksum: somebody wrote it so
            pass
        self.damaged += 1
        self._index_latest()
        self._index.execute("DELETE FROM calls WHERE digest = ?", (bytes.fromhex(digest),))
        return None

    def add(self, digest: str, content: Any) -> None:
        """Keep the answer of a call; see `add_all`."""
        self.add_all([(digest, content)])

    def add_all(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers with the digests of their calls, written together.

        A shared log, which only saves time, goes without if it cannot be written.

        Raises:
            PromptRecoveryError: the disk is full, or fails, and the log is not shared.
        """
        if self._given_up:
            return
        try:
            if self._shared:
                for digest, content in answers:
                    self._add_shared(digest, content)
            else:
                self._add(answers)
        except (PromptRecoveryError, OSError) as error:
            if not self._shared:
                raise
            self._given_up = True
            LOG.warning("%s\nNothing more is kept there; this run goes on.", str(error).splitlines()[0])

    def _add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """With one write: each call of the system gives up the interpreter's lock, for which the threads compete."""
        lines = [(digest, _line(digest, content)) for digest, content in answers]
        if not lines:
            return
        self._get_ready()
        self._write(self._ended(b"".join(line for _, line in lines)))
        start = os.lseek(self._file, 0, os.SEEK_CUR) - sum(len(line) for _, line in lines)
        for digest, line in lines:
            self._note(digest, start, len(line))
            start += len(line)
        self.sync_if_due()

    def _add_shared(self, digest: str, content: Any) -> None:
        self._get_ready()
        line = _line(digest, content)
        written = self._ended(line)
        self._write(written)
        end = os.lseek(self._file, 0, os.SEEK_END)
        if os.pread(self._file, len(written), end - len(written)) != written:
            return  # another process wrote behind it: a later run finds it
        self._note(digest, end - len(line), len(line))
        self.sync_if_due()

    def _ended(self, lines: bytes) -> bytes:
        """The lines, behind an end of what a kill left of another one, so that they stand alone."""
        torn, self._torn = self._torn, False
        return b"\n" + lines if torn else lines

    def tell_damaged(self, told: int = 0) -> int:
        """Tell people of lines that were left alone, beyond those they were told of; returns how many there are."""
        if self.damaged > told:
            more = self.damaged - told
            LOG.warning("%d damaged lines of %s are left alone; their calls are computed again", more, self.path)
        return self.damaged

    def sync_if_due(self) -> None:
        """Bring lines to the disk if the last time is seconds ago."""
        if self._unsynced and time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        if self._unsynced:
            os.fsync(self._file)
        self._unsynced = False
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync, and let others have it."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def _get_ready(self) -> None:
        """Before the first line is added: until then a run that cannot start has changed nothing."""
        if self._file < 0:
            self._open()  # and lock it: nothing is claimed that another process is making
        before, self._before_writing = self._before_writing, None
        if before is not None:
            before()
        if self._fresh:
            os.ftruncate(self._file, 0)
            self._fresh = False

    def _place(self, digest: str) -> tuple[int, int] | None:
        if _first_bits(digest) not in self._maybe:
            return None
        asked = bytes.fromhex(digest)
        found: tuple[int, int] | None = self._latest.get(asked)
        if found is None:
            found = self._index.execute("SELECT start, length FROM calls WHERE digest = ?", (asked,)).fetchone()
        return found

    def _note(self, digest: str, start: int, length: int) -> None:
        self._maybe.add(_first_bits(digest))
        self._latest[bytes.fromhex(digest)] = (start, length)
        if len(self._latest) >= _UNINDEXED:
            self._index_latest()

    def _index_latest(self) -> None:
        rows = sorted((digest, *place) for digest, place in self._latest.items())  # in order, which is faster
        self._index.executemany("REPLACE INTO calls VALUES (?, ?, ?)", rows)
        self._latest.clear()

    def _open(self) -> None:
        flags = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT | os.O_APPEND
        try:
            self._file = os.open(self.path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise UserError(f"log {self.path} cannot be opened: {error.strerror}") from error
        try:
            if not (self._shared or self._read_only):
                _lock(self._file, self.path)
        except BaseException:
            os.close(self._file)
            self._file = -1
            raise

    def _read(self) -> None:
        """Find all lines; what they say is parsed when it is asked for."""
        start = 0
        with open(self._file, "rb", closefd=False) as file:
            while line := file.readline(_LONGEST):
                digest = _digest_of(line)
                if digest is None:
                    self.damaged += line != b"\n"
                else:
                    self._note(digest, start, len(line))
                start += len(line)
                self._torn = not line.endswith(b"\n")

    def _write(self, line: bytes) -> None:
        """Append with one call where the system allows it: a kill leaves the line whole or absent."""
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            self._torn = True
            raise PromptRecoveryError(
                f"log {self.path} cannot be written: {error.strerror}\n"
                "What was computed before is safe; make room and run the same command again."
            ) from error
        self._unsynced = True


def _line(digest: str, content: Any) -> bytes:
    text = _json(content)
    return b'["%s","%s",%s]\n' % (_checksum(digest.encode(), text), digest.encode(), text)


def _first_bits(digest: str) -> int:
    return int(digest[:8], 16)


def is_log(path: Path) -> bool:
    """Whether a file is a log of model calls, or empty: a line of its beginning is one."""
    try:
        with path.open("rb") as file:
            lines = [file.readline(_LONGEST) for _ in range(100)]
    except OSError:
        return False
    return not lines[0] or any(_digest_of(line) is not None for line in lines)


def _digest_of(line: bytes) -> str | None:
    """The digest of the call in a line; None if it is no sound line of a log."""
    if not (line.startswith(b'["') and line.endswith(b"]\n") and len(line) > _HEAD + 2):
        return None
    digest = line[_HEAD - 2 - _DIGEST : _HEAD - 2]
    if line != b'["%s","%s",%s]\n' % (_checksum(digest, text := line[_HEAD:-2]), digest, text):
        return None
    try:
        return bytes.fromhex(digest.decode("ascii")).hex()
    except ValueError:
        return None


def _checksum(digest: bytes, text: bytes) -> bytes:
    return hashlib.sha256(digest + text).hexdigest()[:_CHECKSUM].encode()


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _json(content: Any) -> bytes:
    try:
        return _COMPACT.encode(content).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(content, separators=(",", ":")).encode()


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
