"""Which texts are near-duplicates, by the words that they share.

Two texts are as alike as the share of three-word stretches that they have in common (Jaccard's index). MinHash and
locality-sensitive hashing (Broder 1997; Indyk and Motwani 1998) find it without comparing each text with each other.
Prompts are too short for that: two of one meaning may share no word. They are compared by embedding (`eval.grouping`).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from eval.grouping import connected
from submission.backends import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR_TEXTS = 0.5
"""How alike two texts must be to be near-duplicates: of a hundred words about ten may differ."""
_STRETCH = 3
_HASHES, _BAND = 128, 4  # pairs with the same hashes in one of the 32 bands are looked at
# Each character of a script without blanks is a word (Thai, Lao, Burmese, Khmer, kana, Chinese). Others are what stands
# between blanks and marks, with their vowel signs, which are no letters to the re module.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKS = (
    r"!\"$%&'()*,\-./:;<=>?@\[\\\]^_`{|}~\u00a1-\u00bf\u0964\u0965\u2000-\u206f\u3000-\u303f"
    r"\uff00-\uff0f\uff1a-\uff20"
)
_WORD = re.compile(f"[{_ALONE}]|[^\\s{_MARKS}{_ALONE}]+")


def stretches(text: str) -> set[bytes]:
    """All three words that follow each other, in lower case; of a text without words itself."""
    units = _WORD.findall(unicodedata.normalize("NFC", text.casefold())) or [text]
    parts = (" ".join(units[start : start + _STRETCH]) for start in range(max(1, len(units) - _STRETCH + 1)))
    return {part.encode("utf-8", "surrogatepass") for part in parts}


def near_groups(texts: Iterable[str], near: float = NEAR_TEXTS) -> NDArray[np.int64]:
    """A label for each text, shape (texts,): connected components of near-duplicates; takes 600 bytes a text.

    Args:
        texts: to group; they are read once.
        near: how alike near-duplicates are; see `NEAR_TEXTS`.

    Raises:
        MissingExtra: datasketch is not installed.
    """
    require("datasketch", "eval", "comparing texts by their words")
    import numpy as np
    from datasketch import MinHash

    hashed = MinHash.generator(map(stretches, texts), num_perm=_HASHES, hashfunc=zlib.crc32)
    found: Any = np.fromiter((one.hashvalues for one in hashed), np.dtype((np.uint32, _HASHES)))
    marks = [_runs(found, found[:, start : start + _BAND], near) for start in range(0, _HASHES, _BAND)]
    return connected(np.stack(marks, axis=1))


def near_to(texts: Sequence[str], known: Sequence[str], near: float = NEAR_TEXTS) -> list[int]:
    """Places of the texts that are near-duplicates of a known one, directly or through other texts."""
    groups = near_groups([*known, *texts], near).tolist()
    taken = set(groups[: len(known)])
    return [place for place, group in enumerate(groups[len(known) :]) if group in taken]


def _runs(hashes: NDArray[np.uint32], band: NDArray[np.uint32], near: float) -> NDArray[np.int64]:
    """A mark for each text: texts with the same band follow each other, and share a mark while they are alike."""
    import numpy as np

    order = np.lexsort(band.T)
    together = (band[order[1:]] == band[order[:-1]]).all(axis=1)
    places = together.nonzero()[0]
    together[places] = (hashes[order[places + 1]] == hashes[order[places]]).mean(axis=1) >= near
    marks = np.zeros(len(order), np.int64)
    marks[order[1:]] = np.cumsum(~together)
    return marks
