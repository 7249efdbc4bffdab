"""From a model's raw answer to a bare rewrite prompt.

>>> clean_answer('Sure, here is the prompt:\\n\\n**"Rewrite this as a sea shanty."**\\n\\nI hope this helps!')
'Rewrite this as a sea shanty.'
"""

from __future__ import annotations

import re
from itertools import islice

# What pandas, and so the competition's grader, reads as null (pandas.read_csv, `na_values`).
_READ_AS_NULL = frozenset(
    {"#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan"}
    | {"<na>", "n/a", "na", "nan", "none", "null"}
)

# A turn header of a chat format: marker, role and line break. It goes as a whole, or the role would stay.
_TURN_HEADER = re.compile(
    r"(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>)\s*(?:assistant|model|user|system)?"
    r"(?:<\|end_header_id\|>)?[ \t]*\n*"
)
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # what a reasoning model says to itself
_SPECIAL_TOKEN = re.compile(r"<\|[\w-]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask|end_of_turn)>|\[/?INST\]|<</?SYS>>")
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ud800-\udfff]"
)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")

# Words that may stand between "the" and "prompt:" in a lead-in.
_OF_A_PROMPT = r"(?:(?:most|likely|possible|probable|original|actual|given|used|rewrite|rewriting|final|missing)\s+)*"
_PROMPT = rf"{_OF_A_PROMPT}(?:prompt|instructions?|request|task|answer|command)"
_LEAD_INS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure|certainly|of course|absolutely|okay|ok|yes|great|no problem)(?: thing)?\s*(?:[,!.:]+\s*|$)",
        r"(?:here(?:'s|’s| is| are)|this is|below is)\s+(?:an?|the|my|your|one)\b[^:.!?\n]{0,100}:\s*",
        # "The prompt that was used is: ...": with an article, any words may come before the colon.
        rf"(?:(?:i think|i believe|i would say)\s+(?:that\s+)?)?(?:the|my|your)\s+{_PROMPT}\b[^:.!?\n]{{0,80}}:\s*",
        # "Prompt used:", "Likely instruction:": without one, set words only, for "Answer this: ..." is a prompt.
        rf"{_PROMPT}(?:\s+(?:used|given|is|was|could be|might be|would be|may be|reads))*\s*:\s*",
        rf"(?:the|my)\s+{_PROMPT}\s+(?:is|was|could be|might be|would be|may be)\s+(?:to\s+|(?=[\"“'‘`]))",
    )
)
_COLON_LINE = re.compile(r":[^\S\n]*\n")
_ECHO = re.compile(r"\s*:(?:\n(?!\s*(?:[-*+•]|\d{1,2}[.)])\s)|$)")  # a list below belongs to the prompt
_MARKDOWN_START = re.compile(r"(?:#{1,6}\s+|>\s*|[-*+•]\s+|\d{1,2}[.)]\s+|`{3,}[\w-]*\s*|-{3,}\s*|={3,}\s*)*")
_WORD = re.compile(r"[^\W_]")
_CLOSING = "\"”'’»`"
_WRAPPERS = (("__", "__"), ("*", "*"), ("_", "_"), ("```", "```"), ("`", "`"), ('"', '"'), ("'", "'"),
             ("“", "”"), ("‘", "’"), ("«", "»"), ("„", "“"))  # fmt: skip
_LONE_OPENERS = ('"', "“", "«", "„", "`")
_OPENERS = frozenset(opening[0] for opening, _ in _WRAPPERS).union(_LONE_OPENERS)
_MOST_PARAGRAPHS = 1000  # that are looked at for an answer


def clean_answer(raw: str) -> str:
    """Strip lead-ins, wrapping quotes and markdown, special tokens and all after the first paragraph.

    Takes time in proportion to the length of the answer, whatever it holds.

    Returns:
        One line without a line break or control character; blank when nothing of use is left. Cleaning a
        clean answer changes nothing.
    """
    raw = _THINKING.sub("\n\n", raw)
    text = _INVISIBLE.sub("", raw.replace("\r\n", "\n").replace("\r", "\n"))
    text = _SPECIAL_TOKEN.sub("\n\n", _TURN_HEADER.sub("\n\n", text))
    with_words = (paragraph for paragraph in _PARAGRAPH_BREAK.split(text) if _WORD.search(paragraph))
    for paragraph in islice(with_words, _MOST_PARAGRAPHS):
        cleaned = _clean_paragraph(paragraph)
        if not is_blank(cleaned):
            return cleaned
    return ""


def is_blank(text: str) -> bool:
    """True for a text that is no answer: no letter or digit, or a word that a grader reads as null."""
    return _WORD.search(text) is None or text.strip().lower() in _READ_AS_NULL


def strip_invalid_utf8(text: str) -> str:
    """The text without what a UTF-8 CSV cannot hold for every reader: NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")


def _clean_paragraph(paragraph: str) -> str:
    # A line that ends in a colon keeps its break until the end: what follows may be the answer or an echo.
    text = ":\n".join(" ".join(line.split()) for line in _COLON_LINE.split(paragraph.replace("**", ""))).strip()
    window = _Window(text)
    while True:
        window.strip_layers()
        echo = _ECHO.search(text, window.start, window.end)
        if echo is None:
            return str(window).replace("\n", " ")
        # "Rewrite this as a poem:" and the text below, the layout that the rewriting model was given.
        window.end = echo.start()
        window.trim_colons()


class _Window:
    """A stretch of a text that is made smaller from both ends: nothing is copied, so many layers cost no more than one.

    `start` and `end` are indices into the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.start, self.end = 0, len(text)

    def __str__(self) -> str:
        return self.text[self.start : self.end]

    def strip_layers(self) -> None:
        """Take off fences, markdown, lead-ins and marks around the whole, as long as there are any."""
        while self.start < self.end:
            before = self.start, self.end
            self._strip_fence()
            self._skip(_MARKDOWN_START)
            while any(self._skip(pattern) for pattern in _LEAD_INS):
                self.trim()
            if self._unwrap():
                self.trim()
            if (self.start, self.end) == before:
                return

    def trim(self) -> None:
        """Leave out blanks at both ends."""
        while self.start < self.end and self.text[self.start].isspace():
            self.start += 1
        while self.start < self.end and self.text[self.end - 1].isspace():
            self.end -= 1

    def trim_colons(self) -> None:
        """Leave out blanks and colons at the end, but for the first of these colons: it may belong to a lead-in."""
        end = kept = self.end
        while end > self.start and (self.text[end - 1].isspace() or self.text[end - 1] == ":"):
            end -= 1
            if self.text[end] == ":":
                kept = end + 1
        self.end = kept if kept < self.end or self.text[kept - 1 : kept] == ":" else end

    def _skip(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self.text, self.start, self.end)
        if match is None:
            return False
        self.start = match.end()
        return True

    def _strip_fence(self) -> None:
        while self.text.endswith("```", self.start, self.end):
            while self.end > self.start and self.text[self.end - 1] == "`":
                self.end -= 1
            while self.end > self.start and self.text[self.end - 1].isspace():
                self.end -= 1

    def _starts(self, mark: str) -> bool:
        return self.text.startswith(mark, self.start, self.end)

    def _unwrap(self) -> bool:
        """Take off one pair of marks around the whole, or an opening mark that is never closed."""
        text, start, end = self.text, self.start, self.end
        if start == end or text[start] not in _OPENERS:
            return False
        if end - start > 1 and text[end - 1] in ".!" and text[end - 2] in _CLOSING:  # "Make it formal".
            end -= 1
        for opening, closing in _WRAPPERS:
            inside = start + len(opening), end - len(closing)
            if (
                inside[0] < inside[1]
                and self._starts(opening)
                and text.startswith(closing, inside[1])
                and text.find(opening, *inside) < 0
                and text.find(closing, *inside) < 0
            ):
                self.start, self.end = inside
                return True
        for opening in _LONE_OPENERS:
            if (
                self._starts(opening)
                and text.find(opening, self.start + 1, self.end) < 0
                and all(text.find(mark, self.start, self.end) < 0 for mark in "”»")
            ):
                self.start += len(opening)
                return True
        return False
