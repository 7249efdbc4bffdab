"""From a model's raw answer to a bare rewrite prompt.

>>> clean_answer('Sure, here is the prompt:\\n\\n**"Rewrite this as a sea shanty."**\\n\\nI hope this helps!')
'Rewrite this as a sea shanty.'
"""

from __future__ import annotations

import re

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
_MARKDOWN_START = re.compile(r"^(?:#{1,6}\s+|>\s*|[-*+•]\s+|\d{1,2}[.)]\s+|`{3,}[\w-]*\s*|-{3,}\s*|={3,}\s*)")
_FENCE_END = re.compile(r"\s*`{3,}$")
_QUOTE_THEN_STOP = re.compile(r"([\"”'’»`])[.!]$")
_WRAPPERS = (("__", "__"), ("*", "*"), ("_", "_"), ("```", "```"), ("`", "`"), ('"', '"'), ("'", "'"),
             ("“", "”"), ("‘", "’"), ("«", "»"), ("„", "“"))  # fmt: skip
_LONE_OPENERS = ('"', "“", "«", "„", "`")


def clean_answer(raw: str) -> str:
    """Strip lead-ins, wrapping quotes and markdown, special tokens and all after the first paragraph.

    Returns:
        One line without a line break or control character; blank when nothing of use is left. Cleaning a
        clean answer changes nothing.
    """
    raw = _THINKING.sub("\n\n", raw)
    text = _INVISIBLE.sub("", raw.replace("\r\n", "\n").replace("\r", "\n"))
    text = _SPECIAL_TOKEN.sub("\n\n", _TURN_HEADER.sub("\n\n", text))
    for paragraph in _PARAGRAPH_BREAK.split(text):
        cleaned = _clean_paragraph(paragraph)
        if not is_blank(cleaned):
            return cleaned
    return ""


def is_blank(text: str) -> bool:
    """True for a text that is no answer: no letter or digit, or a word that a grader reads as null."""
    return not any(character.isalnum() for character in text) or text.strip().lower() in _READ_AS_NULL


def storable(text: str) -> str:
    """The text without what a UTF-8 CSV cannot hold for every reader: NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")


def _clean_paragraph(paragraph: str) -> str:
    # A line that ends in a colon keeps its break until the end: what follows may be the answer or an echo.
    text = ":\n".join(" ".join(line.split()) for line in _COLON_LINE.split(paragraph.replace("**", ""))).strip()
    while text:  # each round shortens the text, so this ends
        before = text
        text = _FENCE_END.sub("", text)
        text = _unwrap(_drop_lead_in(_MARKDOWN_START.sub("", text, count=1)))
        if text == before:
            break
    if _ECHO.search(text):
        # "Rewrite this as a poem:" and the text below, the layout that the rewriting model was given.
        return _clean_paragraph(_ECHO.split(text)[0])
    return text.replace("\n", " ")


def _drop_lead_in(text: str) -> str:
    for pattern in _LEAD_INS:
        match = pattern.match(text)
        if match:
            return text[match.end() :].strip()
    return text


def _unwrap(text: str) -> str:
    """Take off one pair of marks around the whole text, or an opening mark that is never closed."""
    closed = _QUOTE_THEN_STOP.sub(r"\1", text)  # "Make it formal".
    for opening, closing in _WRAPPERS:
        inside = closed[len(opening) : -len(closing)]
        if (
            len(closed) > len(opening) + len(closing)
            and closed.startswith(opening)
            and closed.endswith(closing)
            and opening not in inside
            and closing not in inside
        ):
            return inside.strip()
    for opening in _LONE_OPENERS:
        if text.startswith(opening) and text.count(opening) == 1 and not any(c in text for c in "”»"):
            return text[len(opening) :].strip()
    return text
