"""Embeddings on disk, by the hash of the encoder and of each text, in `$XDG_CACHE_HOME/prompt-recovery/embeddings`.

A file holds the hashes and vectors of many texts; it appears whole or not at all, so several processes may use the
cache at once. A file that is damaged is put aside and its texts are computed again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from submission.data.files import atomic_path, cache_folder
from submission.progress import tell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HASH_BYTES = 16
_HEADER_BYTES = 1024  # of a file at most
_MOST_BYTES = 1 << 30  # of one encoder's files; beyond that the oldest go


class EmbeddingCache:
    """Vectors that were computed before.

    Args:
        folder: where the files lie; None for the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder("embeddings")

    def read(self, encoder: str, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The vectors of those texts that are there.

        Args:
            encoder: its fingerprint.
            texts: to look for.
        """
        wanted = {_digest(text): text for text in texts}
        found: dict[str, NDArray[np.float32]] = {}
        for path in self._files(encoder):
            if not wanted:
                break
            content = _load(path)
            if content is None:
                continue
            hashes, vectors = content
            for row, digest in enumerate(hashes):
                text = wanted.pop(digest, None)
                if text is not None:
                    found[text] = vectors[row]
        return found

    def write(self, encoder: str, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Keep vectors, shape (texts, dim); a disk that takes no more loses nothing but time."""
        content = ([_digest(text) for text in texts], vectors)
        # No larger files are merged into the new one: their number grows with the logarithm of the texts only.
        merged: list[Path] = []
        for path in sorted(self._files(encoder), key=_size):
            if _size(path) > _HEADER_BYTES + content[1].nbytes + _HASH_BYTES * len(content[0]):
                break
            other = _load(path)
            if other is not None and other[1].shape[1:] == vectors.shape[1:]:
                merged.append(path)
                content = _joined(content, other)
        try:
            _save(self._folder / encoder / f"{uuid.uuid4().hex}.safetensors", *content)
        except OSError as error:
            tell(f"embeddings are not kept: {error}", sys.stderr)
            return
        for path in merged:
            path.unlink(missing_ok=True)
        self._shrink(encoder)

    def _files(self, encoder: str) -> list[Path]:
        """The newest first."""
        try:
            return sorted((self._folder / encoder).glob("*.safetensors"), key=_age)
        except OSError:
            return []

    def _shrink(self, encoder: str) -> None:
        total = 0
        for path in self._files(encoder):
            total += _size(path)
            if total > _MOST_BYTES:
                path.unlink(missing_ok=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_HASH_BYTES]


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:  # another process has merged it
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _joined(
    a: tuple[list[bytes], NDArray[np.float32]], b: tuple[list[bytes], NDArray[np.float32]]
) -> tuple[list[bytes], NDArray[np.float32]]:
    import numpy as np

    there = set(a[0])
    new = [row for row, digest in enumerate(b[0]) if digest not in there]
    return [*a[0], *(b[0][row] for row in new)], np.concatenate([a[1], b[1][new]])


def _save(path: Path, hashes: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _HASH_BYTES)
    with atomic_path(path) as temporary:
        save_file({"hashes": table, "vectors": np.ascontiguousarray(vectors)}, temporary)


def _load(path: Path) -> tuple[list[bytes], NDArray[np.float32]] | None:
    """Hashes and vectors of a file; None if it is gone or damaged."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        content = load_file(path)
        table, vectors = content["hashes"], content["vectors"]
        if table.shape != (len(vectors), _HASH_BYTES) or not np.isfinite(vectors).all():
            raise ValueError("what it holds does not go together")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        tell(f"{path} is damaged and left out, its texts are computed again: {error}", sys.stderr)
        os.replace(path, path.with_suffix(".damaged"))
        return None
    return [row.tobytes() for row in table], vectors
