"""Who holds which block of a KV cache. Blocks that begin a prompt are found again by what they hold, and shared."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Blocks:
    """Counts the holders of each block.

    A block that nobody holds keeps what it has until it is needed; the one that was given back first goes first.

    Args:
        count: of blocks.
        size: tokens of one.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._holders = [0] * count
        self._free = OrderedDict.fromkeys(range(count))
        self._known: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        """Hold free blocks; there must be as many."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            if (name := self._names.pop(block, None)) is not None:
                del self._known[name]
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold blocks that others hold, or that are known."""
        for block in blocks:
            self._free.pop(block, None)
            self._holders[block] += 1

    def give(self, blocks: Sequence[int]) -> None:
        """Hold blocks no longer. The last of a sequence is the first to be needed by others."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def names(self, ids: NDArray[np.int32]) -> list[bytes]:
        """What each full block of a sequence is called: by its tokens and all before them."""
        found: list[bytes] = []
        name = b""
        for start in range(0, len(ids) - self.size + 1, self.size):
            name = hashlib.blake2b(name + ids[start : start + self.size].tobytes(), digest_size=16).digest()
            found.append(name)
        return found

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks that are known by the first of these names."""
        found: list[int] = []
        for name in names:
            if (block := self._known.get(name)) is None:
                break
            found.append(block)
        return found

    def free_of(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds."""
        return sum(block in self._free for block in blocks)

    def tell(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """What blocks hold, or will before anybody looks."""
        for name, block in zip(names, blocks, strict=False):
            if name not in self._known and block not in self._names:
                self._known[name] = block
                self._names[block] = name

    def forget(self) -> None:
        """Whatever blocks hold, it is not known any more."""
        self._known.clear()
        self._names.clear()
