"""Rewrite prompts from a grammar: seeded, balanced, no two the same.

    python -m train prompts -o prompts.csv --size 1000

    id,rewrite_prompt,kind,style
    p0000001,Could you turn the passage into a sea shanty?,form,a sea shanty

Every style of a kind walks through its patterns, and every pattern through the combinations of its slots in an order of
its own, so a million prompts take no more memory than ten.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from eval.encoders import Encoder
from eval.grouping import first_of_each, near_duplicate_groups
from submission.errors import UserError
from submission.prompts.grammar import Grammar, MadePrompt, PromptKind, renderings

COLUMNS = ("id", "rewrite_prompt", "kind", "style")
NEAR = 0.95
"""How near prompts must be for one of them to go (see `eval.grouping.NEAR`): only what says the same goes."""
MOST_COMPARED = 50_000
_FILTER_BITS = 1 << 27  # 16 MB, whatever the number of prompts
_ROUNDS = 8


def generate(grammar: Grammar, seed: int = 0) -> Iterator[MadePrompt]:
    """All prompts of a grammar, balanced from the first to the last, no two alike but for case and punctuation."""
    seen = _Filter()
    turns = [_of_kind(kind, seed) for kind in grammar.kinds]
    weights = [kind.weight for kind in grammar.kinds]
    alive = list(range(len(turns)))
    while alive:
        for number in list(alive):
            for _ in range(weights[number]):
                prompt = next((p for p in turns[number] if seen.add(p.text.rstrip(".?!").casefold())), None)
                if prompt is None:
                    alive.remove(number)
                    break
                yield prompt


def take(grammar: Grammar, size: int, seed: int = 0) -> Iterator[MadePrompt]:
    """The first `size` prompts.

    Raises:
        UserError: the grammar makes fewer; says how many.
    """
    made = 0
    for prompt in islice(generate(grammar, seed), size):
        made += 1
        yield prompt
    if made < size:
        raise UserError(f"the grammar makes {made} different prompts, {size} were asked for: add styles or words to it")


def take_distinct(grammar: Grammar, size: int, encoder: Encoder, near: float = NEAR, seed: int = 0) -> list[MadePrompt]:
    """`size` prompts of which no two are near-duplicates; of each component of near-duplicates the first stays.

    Raises:
        UserError: the grammar makes fewer; says how many.
    """
    source = generate(grammar, seed)
    pool = list(islice(source, size))
    kept: list[MadePrompt] = []
    for _ in range(_ROUNDS):
        kept = without_near_duplicates(pool, encoder, near)
        if len(kept) >= size:
            return kept[:size]
        more = list(islice(source, 2 * (size - len(kept)) + 16))
        if not more:
            break
        pool += more
    raise UserError(
        f"the grammar makes {len(kept)} prompts that are no near-duplicates at {near:g}, {size} were asked for: "
        "add styles to it, or raise --near"
    )


def without_near_duplicates(prompts: Sequence[MadePrompt], encoder: Encoder, near: float) -> list[MadePrompt]:
    """The first prompt of each component of near-duplicates, in order."""
    groups = near_duplicate_groups([prompt.text for prompt in prompts], encoder, near)
    return [prompts[place] for place in first_of_each(groups)]


def rows(prompts: Iterable[MadePrompt]) -> Iterator[tuple[str, str, str, str]]:
    """Rows of the table; see `COLUMNS`."""
    for number, prompt in enumerate(prompts, start=1):
        yield f"p{number:07}", prompt.text, prompt.kind, prompt.style


class _Filter:
    """Remembers texts in constant memory (a Bloom filter): a text that was added is never new again.

    With a million texts one new text in some 10,000 is taken for an old one and left out, which harms nobody.
    """

    def __init__(self) -> None:
        self._bits = bytearray(_FILTER_BITS // 8)

    def add(self, text: str) -> bool:
        """Remember a text; whether it was new."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        new = False
        for start in range(0, 16, 4):
            byte, bit = divmod(int.from_bytes(digest[start : start + 4], "little") % _FILTER_BITS, 8)
            if not self._bits[byte] >> bit & 1:
                self._bits[byte] |= 1 << bit
                new = True
        return new


def _of_kind(kind: PromptKind, seed: int) -> Iterator[MadePrompt]:
    rng = random.Random(f"{seed} {kind.name}")
    styles = list(kind.styles)
    rng.shuffle(styles)
    turns = [renderings(kind, style, random.Random(rng.getrandbits(64))) for style in styles]
    while turns:
        left = []
        for turn in turns:
            prompt = next(turn, None)
            if prompt is not None:
                yield prompt
                left.append(turn)
        turns = left
