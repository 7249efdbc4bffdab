"""Which triplets teach something: screens that look at what the target model made of a prompt.

Each screen can be switched off. Those by likelihood need a model (`[model]` of the recipe), and are off by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.encoders import Encoder
from eval.grouping import plain_text
from eval.metric import sharpened_cosine
from eval.words import stretches
from submission.calls.likelihoods import Likelihoods
from submission.prompts.templates import render_rewrite
from submission.types import Chat, Message, Part
from train.cleaning import DataRow

# How an assistant begins when it declines.
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am) (?:sorry|unable|not able)|sorry,|i can(?:'t|not) |as an? (?:ai|artificial|large)"
    r"|i (?:do not|don't) have (?:the |any |enough )?(?:ability|information|access|context)"
    r"|(?:the|this) (?:text|passage|prompt) (?:you (?:have )?provided )?does not (?:contain|provide|include|mention)"
    r"|unfortunately, i|i apologi[sz]e|(?:please|could you) (?:please )?provide (?:me with )?(?:the|a|more))",
    re.IGNORECASE,
)
# Stretches of three words (`eval.words`) that related texts share, in number and as a share of the text that has fewer;
# long words that they share; and how alike unchanged texts are. Of 941 rewrites, 400 of them by a larger model, three
# are unchanged by the default thresholds and 27 unrelated: one of these passes here. Of random pairs of the larger
# model's texts, 65 to 800 words long, none shares so many stretches, and 0.1 % so many words; of the embedded model's,
# which repeat themselves, 0.02 % and 0.2 %, from 250 words on 0.5 % and up to 5 %.
_STRETCHES, _STRETCH_SHARE = 4, 0.1
_LONG_WORD, _WORDS, _WORD_SHARE = re.compile(r"\w{4,}"), 4, 0.25
_ALIKE = 0.3
_LEAK_CHARS = 12  # a prompt shorter than this may stand in a text by chance
_NO_LIKELIHOOD = "too long for the context of the model that screens"
_SAYS_PROMPT = "Write one instruction that tells a writer how to rewrite a text."


@dataclass(frozen=True, slots=True)
class Screens:
    """Thresholds; see each.

    Attributes:
        refusals: drop rewrites in which the model declines.
        single_line: drop prompts of more than one line.
        unchanged: drop rows whose texts score at least this against each other (the seed: 0.97); 0 is off.
        unrelated: drop rows whose texts score less than this; 0 is off.
        leaked: drop rewrites that hold the prompt itself.
        naturalness: drop prompts whose tokens have a mean probability below this (the seed: 0.01); 0 is off.
        matters: drop rows where log P(rewrite | prompt, text) is not so many nats above log P(rewrite | generic, text);
            0 is off.
        generic: the generic prompt.
    """

    refusals: bool = True
    single_line: bool = True
    unchanged: float = 0.97
    unrelated: float = 0.001
    leaked: bool = True
    naturalness: float = 0.0
    matters: float = 0.0
    generic: str = "Rewrite the text"

    @property
    def needs_model(self) -> bool:
        """Whether a screen by likelihood is on."""
        return self.naturalness > 0 or self.matters > 0


def by_text(row: DataRow, screens: Screens) -> str:
    """Why a row is dropped by looking at its words; "" if it stays."""
    if screens.single_line and len(row.rewrite_prompt.strip().splitlines()) > 1:
        return "prompt of more than one line"
    if screens.refusals and is_refusal(row.rewritten_text):
        return "the model declined"
    if screens.leaked and leaks_prompt(row.rewrite_prompt, row.rewritten_text, row.original_text):
        return "the rewrite holds the prompt"
    return ""


def is_refusal(text: str) -> bool:
    """Whether a rewrite is an assistant's excuse."""
    return bool(_REFUSAL.search(text.replace("’", "'")))


def leaks_prompt(prompt: str, rewritten: str, original: str = "") -> bool:
    """Whether a rewrite says its prompt, which the original text does not."""
    wanted = plain_text(prompt)
    return len(wanted) >= _LEAK_CHARS and wanted in plain_text(rewritten) and wanted not in plain_text(original)


def by_likeness(rows: Sequence[DataRow], screens: Screens, encoder: Encoder) -> list[str]:
    """Why each row is dropped by the likeness of its texts; "" if it stays.

    By the default thresholds and stricter ones, texts that share some of their words or stretches of them, but not
    most, are neither unrelated nor unchanged: they are not embedded.
    """
    if not (screens.unchanged or screens.unrelated):
        return [""] * len(rows)
    reasons = [""] * len(rows)
    usual = Screens()
    strict = not 0 < screens.unchanged < usual.unchanged and screens.unrelated <= usual.unrelated
    unsure = [number for number, row in enumerate(rows) if not (strict and _plainly_rewritten(row))]
    if not unsure:
        return reasons
    texts = [text for number in unsure for text in (rows[number].original_text, rows[number].rewritten_text)]
    vectors = encoder.embed(texts)
    for number, score in zip(unsure, sharpened_cosine(vectors[::2], vectors[1::2]).tolist(), strict=True):
        row = rows[number]
        if screens.unchanged and (score >= screens.unchanged or row.original_text == row.rewritten_text):
            reasons[number] = f"text unchanged (score of at least {screens.unchanged:g})"
        elif screens.unrelated and score < screens.unrelated:
            reasons[number] = f"rewrite unrelated to the text (score below {screens.unrelated:g})"
    return reasons


def _plainly_rewritten(row: DataRow) -> bool:
    one, other = stretches(row.original_text), stretches(row.rewritten_text)
    shared = len(one & other)
    if shared >= _ALIKE * len(one | other):
        return False
    if shared >= max(_STRETCHES, _STRETCH_SHARE * min(len(one), len(other))):
        return True
    words, others = (set(_LONG_WORD.findall(text.casefold())) for text in (row.original_text, row.rewritten_text))
    return len(words & others) >= max(_WORDS, _WORD_SHARE * min(len(words), len(others)))


def by_likelihood(
    rows: Sequence[DataRow], screens: Screens, likelihoods: Likelihoods, done: Callable[[], None] = lambda: None
) -> list[str]:
    """Why each row is dropped by what a model finds likely; "" if it stays.

    Args:
        rows: to judge.
        screens: which, and how strict.
        likelihoods: of the target model.
        done: is called for each likelihood.
    """
    reasons = [""] * len(rows)
    if screens.naturalness:
        chat = Chat((Message("user", (Part(_SAYS_PROMPT),)),))
        for number, known in enumerate(likelihoods.of([(chat, row.rewrite_prompt) for row in rows], done)):
            if known.failure:
                reasons[number] = _NO_LIKELIHOOD
            elif known.tokens and math.exp(known.per_token) < screens.naturalness:
                reasons[number] = f"unnatural prompt (mean probability below {screens.naturalness:g})"
    if screens.matters:
        left = [number for number, reason in enumerate(reasons) if not reason]
        asked = [
            (render_rewrite(prompt, rows[number].original_text), rows[number].rewritten_text)
            for number in left
            for prompt in (rows[number].rewrite_prompt, screens.generic)
        ]
        found = likelihoods.of(asked, done)
        for number, ours, generic in zip(left, found[::2], found[1::2], strict=True):
            if ours.failure or generic.failure:
                reasons[number] = _NO_LIKELIHOOD
            elif ours.sum - generic.sum < screens.matters:
                reasons[number] = f"the prompt does not matter (gain below {screens.matters:g} nats)"
    return reasons
