"""Rewrite prompts from a grammar: seeded, balanced, no two the same.

    python -m train prompts -o prompts.csv --size 1000

    id,rewrite_prompt,kind,style
    p0000001,Could you turn the passage into a sea shanty?,form,a sea shanty

Every style of a kind walks through its patterns, and every pattern through the combinations of its slots in an order of
its own, so a million prompts take no more memory than ten.
"""

from __future__ import annotations

import hashlib
import math
import random
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from eval.encoders import Encoder
from eval.grouping import first_of_each
from submission.config import read_toml
from submission.errors import UserError

GRAMMAR = Path(__file__).with_name("grammar.toml")
COLUMNS = ("id", "rewrite_prompt", "kind", "style")
NEAR = 0.95
"""How near prompts must be for one of them to go (see `eval.grouping.NEAR`): only what says the same goes."""
MOST_COMPARED = 50_000
_QUESTIONS = ("could you", "what", "how", "can you", "would you", "why")
_FILTER_BITS = 1 << 27  # 16 MB, whatever the number of prompts
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class MadePrompt:
    """A rewrite prompt, with the kind of instruction that it is and the style that it asks for."""

    text: str
    kind: str
    style: str


@dataclass(frozen=True, slots=True)
class PromptKind:
    """A kind of instruction."""

    name: str
    patterns: tuple[str, ...]
    styles: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Grammar:
    """What prompts are made from."""

    kinds: tuple[PromptKind, ...]

    @property
    def capacity(self) -> int:
        """Combinations in all; a few of them may read the same."""
        return sum(
            len(kind.styles) * math.prod(len(kind.slots[slot]) for slot in _slots(pattern))
            for kind in self.kinds
            for pattern in kind.patterns
        )


def read_grammar(path: Path = GRAMMAR, only: Sequence[str] = ()) -> Grammar:
    """Read a grammar; see grammar.toml for what it holds.

    Args:
        path: TOML.
        only: names of the kinds that are wanted; none means all.

    Raises:
        UserError: something is missing or of the wrong type; names the kind, the pattern or the slot.
    """
    content = read_toml(path, "--grammar")
    shared = _words(content.get("slots", {}), f"{path}: [slots]")
    kinds = tuple(_kind(entry, shared, f"{path}: kind {number}") for number, entry in
                  enumerate(content.get("kind", []), start=1))  # fmt: skip
    if not kinds:
        raise UserError(f"{path} has no [[kind]]: see {GRAMMAR} for an example")
    unknown = [name for name in only if name not in {kind.name for kind in kinds}]
    if unknown:
        known = ", ".join(dict.fromkeys(kind.name for kind in kinds))
        raise UserError(f"{path} has no kind {unknown[0]!r}; there are: {known}")
    return Grammar(tuple(kind for kind in kinds if kind.name in only) if only else kinds)


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
    return [prompts[place] for place in first_of_each([prompt.text for prompt in prompts], encoder, near)]


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
    draw = random.Random(f"{seed} {kind.name}")
    styles = list(kind.styles)
    draw.shuffle(styles)
    turns = [_of_style(kind, style, random.Random(draw.getrandbits(64))) for style in styles]
    while turns:
        left = []
        for turn in turns:
            prompt = next(turn, None)
            if prompt is not None:
                yield prompt
                left.append(turn)
        turns = left


def _of_style(kind: PromptKind, style: str, draw: random.Random) -> Iterator[MadePrompt]:
    patterns = list(kind.patterns)
    draw.shuffle(patterns)
    turns = [_of_pattern(pattern, kind, style, draw) for pattern in patterns]
    while turns:
        left = []
        for turn in turns:
            text = next(turn, None)
            if text is not None:
                yield MadePrompt(text, kind.name, style)
                left.append(turn)
        turns = left


def _of_pattern(pattern: str, kind: PromptKind, style: str, draw: random.Random) -> Iterator[str]:
    """Every combination of the slots once, in the order of a linear congruence."""
    names = _slots(pattern)
    words = [kind.slots[name] for name in names]
    count = math.prod(len(choice) for choice in words)
    step, number = draw.randrange(count) | 1, draw.randrange(count)
    while math.gcd(step, count) != 1:
        step += 2
    for _ in range(count):
        number = (number + step) % count
        rest = number
        values = {"style": style}
        for name, choice in zip(names, words, strict=True):
            rest, index = divmod(rest, len(choice))
            values[name] = choice[index]
        text = pattern.format_map(values)
        text = text[:1].upper() + text[1:]
        if text.endswith(("?", ".", "!")):
            yield text
        elif text.lower().startswith(_QUESTIONS):
            yield text + "?"
        else:
            yield text + "." if number % 2 else text


def _slots(pattern: str) -> list[str]:
    named = (name for _, name, _, _ in string.Formatter().parse(pattern) if name)
    return [name for name in dict.fromkeys(named) if name != "style"]


def _kind(entry: Any, shared: Mapping[str, tuple[str, ...]], where: str) -> PromptKind:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{where} has no name")
    where = f"{where} ({entry['name']})"
    own = {key: value for key, value in entry.items() if key not in ("name", "patterns", "styles", "weight")}
    lists = _words({key: entry.get(key) for key in ("patterns", "styles")}, where)
    weight = entry.get("weight", 1)
    if not isinstance(weight, int) or weight < 1:
        raise UserError(f"{where}: weight={weight!r} must be a whole number from 1")
    slots = {**shared, **_words(own, where)}
    for pattern in lists["patterns"]:
        try:
            unknown = [name for name in _slots(pattern) if name not in slots]
        except ValueError as error:
            raise UserError(f"{where}: pattern {pattern!r}: {error}") from None
        if unknown:
            raise UserError(f"{where}: pattern {pattern!r} uses {{{unknown[0]}}}; there are: style, {', '.join(slots)}")
    return PromptKind(entry["name"], lists["patterns"], tuple(dict.fromkeys(lists["styles"])), slots, weight)


def _words(content: Any, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a table")
    for name, words in content.items():
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: {name} must be a list of texts with at least one entry")
    return {name: tuple(dict.fromkeys(words)) for name, words in content.items()}
