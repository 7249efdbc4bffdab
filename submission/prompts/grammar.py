"""A grammar of rewrite prompts: kinds of instruction, their patterns and styles; see grammar.toml.

It is read in both directions: `renderings` says one style in all the words that the grammar has, `intent_of` finds
kind and style of a prompt that somebody worded.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from submission.config import read_toml
from submission.errors import UserError

GRAMMAR = Path(__file__).with_name("grammar.toml")
_ENDS = "?.!"
_MOST_SLOTS = 12  # of a pattern: reading one takes longer with each, and endlessly with forty
_QUESTIONS = ("could you", "what", "how", "can you", "would you", "why")


@dataclass(frozen=True, slots=True)
class MadePrompt:
    """A rewrite prompt, with the kind of instruction that it is and the style that it asks for."""

    text: str
    kind: str
    style: str


@dataclass(frozen=True, slots=True, eq=False)
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

    def intent_of(self, prompt: str) -> tuple[PromptKind, str] | None:
        """The kind and the style of a prompt; None if no pattern reads it.

        A style that the grammar lists is of the kind that lists it, and spelt as there, whatever its article and
        however it was asked for. Of several readings without such a style the one counts that leaves least to it.
        """
        text = prompt.strip().rstrip(_ENDS)
        found = [
            (len(match["style"]), number, match["style"])
            for number, kind in enumerate(self.kinds)
            for expression in _expressions(kind)
            if (match := expression.fullmatch(text))
        ]
        if not found:
            return None
        read = {_bare(style): number for _, number, style in found}
        listed = [
            (read[_bare(style)] != number, number, style)
            for number, kind in enumerate(self.kinds)
            for style in kind.styles
            if _bare(style) in read
        ]
        _, number, style = min(listed) if listed else min(found)
        return self.kinds[number], style

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
    content = read_toml(path, "grammar")
    shared = _words(content.get("slots", {}), f"{path}: [slots]")
    entries = content.get("kind", [])
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no [[kind]]: see {GRAMMAR} for an example")
    kinds = tuple(_kind(entry, shared, f"{path}: kind {number}") for number, entry in enumerate(entries, start=1))
    unknown = [name for name in only if name not in {kind.name for kind in kinds}]
    if unknown:
        known = ", ".join(dict.fromkeys(kind.name for kind in kinds))
        raise UserError(f"{path} has no kind {unknown[0]!r}; there are: {known}")
    return Grammar(tuple(kind for kind in kinds if kind.name in only) if only else kinds)


def renderings(kind: PromptKind, style: str, rng: random.Random) -> Iterator[MadePrompt]:
    """Prompts that ask for a style in the words of a kind; each pattern has its turn."""
    patterns = list(kind.patterns)
    rng.shuffle(patterns)
    turns = [_of_pattern(pattern, kind, style, rng) for pattern in patterns]
    while turns:
        left = []
        for turn in turns:
            text = next(turn, None)
            if text is not None:
                yield MadePrompt(text, kind.name, style)
                left.append(turn)
        turns = left


def _of_pattern(pattern: str, kind: PromptKind, style: str, rng: random.Random) -> Iterator[str]:
    """Every combination of the slots once, in the order of a linear congruence."""
    names = _slots(pattern)
    words = [kind.slots[name] for name in names]
    count = math.prod(len(choice) for choice in words)
    step, number = rng.randrange(count) | 1, rng.randrange(count)
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
        if text.endswith(tuple(_ENDS)):
            yield text
        elif text.lower().startswith(_QUESTIONS):
            yield text + "?"
        else:
            yield text + "." if number % 2 else text


def _bare(style: str) -> str:
    return style.casefold().removeprefix("a ").removeprefix("an ").removeprefix("the ")


@cache
def _expressions(kind: PromptKind) -> list[re.Pattern[str]]:
    """How the patterns of a kind are read; one without a style, or with two, asks for nothing that can be told."""
    expressions = []
    for pattern in kind.patterns:
        parts = []
        for literal, name, _, _ in string.Formatter().parse(pattern.rstrip(_ENDS)):
            parts.append(re.escape(literal))
            if name == "style":
                parts.append("(?P<style>.+)")
            elif name:
                longest_first = sorted(kind.slots[name], key=len, reverse=True)
                parts.append(f"(?:{'|'.join(map(re.escape, longest_first))})")
        if parts.count("(?P<style>.+)") == 1:
            expressions.append(re.compile("".join(parts), re.IGNORECASE))
    return expressions


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
        _check_pattern(pattern, slots, where)
    return PromptKind(entry["name"], lists["patterns"], tuple(dict.fromkeys(lists["styles"])), slots, weight)


def _check_pattern(pattern: str, slots: Mapping[str, Sequence[str]], where: str) -> None:
    where = f"{where}: pattern {pattern[:80]!r}"
    try:
        fields = [part[1:] for part in string.Formatter().parse(pattern) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    for name, form, conversion in fields:
        if not name or form or conversion:
            raise UserError(f"{where}: write each slot as {{name}} alone, and a brace as {{{{ or }}}}")
        if name != "style" and name not in slots:
            raise UserError(f"{where} uses {{{name}}}; there are: style, {', '.join(slots)}")
    if len(fields) > _MOST_SLOTS:
        raise UserError(f"{where} has {len(fields)} slots; at most {_MOST_SLOTS}")


def _words(content: Any, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a table")
    for name, words in content.items():
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: {name} must be a list of texts with at least one entry")
    return {name: tuple(dict.fromkeys(words)) for name, words in content.items()}
