"""Hashes of whole files, each computed once: what decides an answer is known by its content.

Hashing 15 GB takes ten seconds, so the hash of a large file is remembered in `$XDG_CACHE_HOME/prompt-recovery/hashes`,
by path, size, inode and times. A file that was written to in the last seconds is not: its times may not tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from submission.data.files import cache_folder, on_store, open_binary, read_json, write_json
from submission.errors import UserError

_LARGE = 8 << 20  # bytes below which remembering costs more than hashing
_SETTLED = 3.0  # seconds after which a write shows in a file's times, on every file system


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content, or of the names and contents of a folder's files; folders in it do not count.

    Raises:
        OSError: a file cannot be read.
        UserError: likewise, on an object store.
    """
    if on_store(path) or not path.is_dir():
        return _file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(one for one in path.iterdir() if one.is_file()):
        digest.update(json.dumps([file.name, _file_hash(file)]).encode())
    return digest.hexdigest()


def recall(path: Path, kind: str) -> Any:
    """What `remember` noted about a file of this machine that has not changed since; None if there is nothing."""
    with suppress(UserError, OSError, TypeError, KeyError):
        known = read_json(_memory(path, kind))
        if known["of"] == _marks(path.stat()):
            return known["is"]
    return None


def remember(path: Path, kind: str, content: Any, since: os.stat_result) -> None:
    """Note something about a file, if it has not changed since it was looked at, nor just before."""
    after = path.stat()
    settled = time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED
    if settled and _marks(since) == _marks(after):
        memory = _memory(path, kind)
        with suppress(OSError):  # a cache that cannot be written costs time only
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"path": os.path.realpath(path), "of": _marks(after), "is": content})


def _file_hash(path: Path) -> str:
    if on_store(path):
        digest = hashlib.sha256()
        with open_binary(path) as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    before = path.stat()
    large = before.st_size >= _LARGE
    if large and isinstance(known := recall(path, "hashes"), str):
        return known
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if large:
        remember(path, "hashes", found, before)
    return found


def _memory(path: Path, kind: str) -> Path:
    return cache_folder(kind) / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]}.json"


def _marks(stat: os.stat_result) -> list[int]:
    """What changes when a file does; the time of the last change of its inode cannot be set back by its owner."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
