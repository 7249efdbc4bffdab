"""Original texts: read from files, or written by the model itself from topics and genres.

python -m train texts -o texts.csv articles.parquet stories.jsonl notes.txt
python -m train texts -o texts.csv --write 200

id,original_text
t000001,"Bees have lived beside people for some nine thousand years ..."
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from eval.grouping import first_of_each
from eval.words import NEAR_TEXTS, near_groups
from submission.config import read_toml
from submission.data.tables import has_text
from submission.errors import UserError
from submission.types import Chat, Message, Part, Request, Sampling
from train.sources import read_records

TOPICS = Path(__file__).with_name("topics.toml")
COLUMNS = ("id", "original_text")
_NAMES = ("original_text", "text", "content", "document", "body", "article")
_LOOP_WORDS = 3  # a stretch of so many words that comes again and again is a loop
_LOOP_SHARE = 0.18  # of the stretches; prose has 0.02 to 0.1
_COMPRESSED = 0.25  # of its length: prose is squeezed to about a half


@dataclass(frozen=True, slots=True)
class WordLimits:
    """Which texts are kept, in words."""

    min_words: int = 20
    max_words: int = 300


@dataclass(frozen=True, slots=True)
class Kept:
    """Texts that passed, and how many went for which reason."""

    texts: list[str]
    dropped: Counter[str]


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of CSV, Parquet and JSONL files (column original_text, text, content ...), and paragraphs of text files.

    Raises:
        UserError: a file is missing, or has no such column.
    """
    for path in paths:
        if path.suffix.lower() in (".txt", ".md"):
            try:
                content = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
            yield from (part for part in re.split(r"\n\s*\n", content) if has_text(part))
            continue
        there, records = read_records(path, _NAMES)
        name = next((name for name in _NAMES if name in there), None)
        if name is None:
            found = ", ".join(there) if there else "no row"
            raise UserError(f"{path}: no column of texts ({', '.join(_NAMES)})\nFound: {found}")
        yield from (record.get(name, "") for record in records)


def select(texts: Sequence[str], limits: WordLimits, near: float = NEAR_TEXTS) -> Kept:
    """Drop what is too short, too long, degenerate or there already.

    Args:
        texts: in order; the first of near-duplicates stays.
        limits: of length.
        near: see `eval.words.NEAR_TEXTS`.
    """
    dropped: Counter[str] = Counter()
    kept: dict[str, None] = {}
    for text in texts:
        plain = " ".join(text.split()) if "\n" not in text.strip() else text.strip()
        words = len(plain.split())
        if words < limits.min_words:
            dropped["too short"] += 1
        elif words > limits.max_words:
            dropped["too long"] += 1
        elif is_loop(plain):
            dropped["repeats itself"] += 1
        elif plain in kept:
            dropped["there already"] += 1
        else:
            kept[plain] = None
    texts = list(kept)
    unlike = [texts[place] for place in first_of_each(near_groups(texts, near))]
    dropped["near-duplicate"] += len(texts) - len(unlike)
    return Kept(unlike, dropped)


def is_loop(text: str) -> bool:
    """Whether a text says the same again and again, as small models do."""
    words = text.lower().split()
    stretches = [tuple(words[i : i + _LOOP_WORDS]) for i in range(len(words) - _LOOP_WORDS + 1)]
    if len(stretches) >= 2 * _LOOP_WORDS and 1 - len(set(stretches)) / len(stretches) > _LOOP_SHARE:
        return True
    content = text.encode("utf-8", "replace")
    return len(content) > 200 and len(zlib.compress(content)) < _COMPRESSED * len(content)


def requests(count: int, topics: Path, sampling: Sampling) -> list[Request]:
    """Chats that ask for texts: every topic before any comes again, each time with another genre.

    Args:
        count: texts.
        topics: a TOML file with lists of topics and genres, such as `TOPICS`.
        sampling: how they are sampled; its seed shuffles topics and genres too.

    Raises:
        UserError: the file lacks topics or genres, or there are fewer pairs of them than texts asked for.
    """
    content = read_toml(topics, "--topics")
    lists = [content.get(name) for name in ("topics", "genres")]
    for name, words in zip(("topics", "genres"), lists, strict=True):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise UserError(f"{topics}: {name} must be a list of texts")
    about, genres = (list(dict.fromkeys(words or [])) for words in lists)
    rng = random.Random(sampling.seed)
    rng.shuffle(about)
    rng.shuffle(genres)
    if count > len(about) * len(genres):
        raise UserError(
            f"{topics} has {len(about) * len(genres)} pairs of topic and genre, {count} texts were asked for"
        )
    # Round by round the genres move on by one, so topic and genre are not tied to each other.
    pairs = [(topic, genres[(shift + place) % len(genres)]) for shift, (place, topic) in
             product(range(len(genres)), enumerate(about))]  # fmt: skip
    return [Request(f"t{number:06}", _ask(topic, genre), sampling) for number, (topic, genre) in
            enumerate(pairs[:count], start=1)]  # fmt: skip


def tidy(text: str) -> str:
    """A written text without a title line or an unfinished last sentence."""
    lines = [line.strip().strip("*#").strip() for line in text.strip().splitlines()]
    lines = [line for line in lines if line]
    if len(lines) > 1 and len(lines[0].split()) < 12 and not lines[0].endswith((".", "!", "?", ",")):
        lines = lines[1:]
    whole = " ".join(" ".join(lines).split())
    ends = [match.end() for match in re.finditer(r"[.!?][\"”’']?(?=\s|$)", whole)]
    return whole[: ends[-1]] if ends else ""


def _ask(topic: str, genre: str) -> Chat:
    asked = f"Write {genre} about {topic}. Write four to eight sentences of plain prose, without a title."
    return Chat((Message("user", (Part(asked),)),))
