"""All prompt layouts in one place, used by training and inference alike.

    python -m submission inspect ID      shows the exact prompt of one row

A template's text is trusted, the texts of pairs and shots are not. Shared text comes first and the row
last, so that the prompts of a run have a long common beginning that is computed once. A template of one's own is a
TOML file with the keys of `TemplateFile`; `instruct.toml` beside this module is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submission.config import from_mapping, read_toml
from submission.errors import UserError
from submission.prompts.answers import clean_answer
from submission.prompts.encoding import cut_middle
from submission.types import Chat, Message, Pair, Part, Triplet

SHOT_CHARS = 800
"""Texts of shots are cut to this length, so that examples leave room for the row."""


_GOES_ON = " \t,;-–'’"
"""What a completion that goes on from a forced prefix begins with."""


@dataclass(frozen=True, slots=True)
class Template:
    """A named layout of the recovery task.

    Attributes:
        name: what `--template` takes.
        about: one line for help texts.
        instruction: what the model is told before the first pair.
        question: what it is asked after each pair.
        prefix: a forced beginning of the answer; part of the parsed answer.
    """

    name: str
    about: str
    instruction: str
    question: str
    prefix: str = ""

    def render(self, pair: Pair, shots: Sequence[Triplet] = ()) -> Chat:
        """The chat for one pair; each shot is a turn of its own, answered by its prompt."""
        messages: list[Message] = []
        instruction = self.instruction
        for shot in shots:
            messages.append(Message("user", self._ask(shot.pair, instruction, SHOT_CHARS)))
            messages.append(Message("assistant", (Part(" ".join(shot.rewrite_prompt.split()), trusted=False),)))
            instruction = ""
        messages.append(Message("user", self._ask(pair, instruction)))
        return Chat(tuple(messages), self.prefix)

    def parse(self, completion: str) -> str:
        """The rewrite prompt in a model's completion: one line, blank when there is none.

        A completion that does not go on from the prefix (a letter at once, a quotation mark, a new paragraph)
        is an answer of its own; one that says nothing is blank, whatever the prefix says.
        """
        alone = clean_answer(completion)
        if not alone or not self.prefix:
            return alone
        if completion.lstrip(" \t").startswith(("\n", "\r")):
            return clean_answer(f"{self.prefix} {alone}") if alone[0].islower() else alone
        return clean_answer(self.prefix + completion) if completion[0] in _GOES_ON else alone

    def fingerprint(self) -> str:
        """Changes whenever the layout does."""
        parts = (self.name, self.instruction, self.question, self.prefix, str(SHOT_CHARS))
        return f"{self.name}:{hashlib.sha256(chr(31).join(parts).encode()).hexdigest()[:16]}"

    def _ask(self, pair: Pair, instruction: str, max_chars: int | None = None) -> tuple[Part, ...]:
        def data(text: str) -> Part:
            text = text.replace("\0", "").strip()
            return Part(text if max_chars is None else cut_middle(text, max_chars), trusted=False)

        head = f"{instruction}\n\n" if instruction else ""
        return (
            Part(f"{head}Original text:\n"),
            data(pair.original_text),
            Part("\n\nRewritten text:\n"),
            data(pair.rewritten_text),
            Part(f"\n\n{self.question}"),
        )


@dataclass(frozen=True, slots=True)
class TemplateFile:
    """The keys of a template in TOML; only `question` is required. See `Template` for what each is."""

    about: str = ""
    instruction: str = ""
    question: str = ""
    prefix: str = ""


def read_template(path: Path) -> Template:
    """A template from a TOML file; its name is the file's, without the ending.

    Raises:
        UserError: the file is missing, has an unknown key, or asks no question.
    """
    file = from_mapping(TemplateFile, read_toml(path, "--template"), f"template {path}")
    if not file.question.strip():
        raise UserError(f'template {path} asks nothing: add question = "..."')
    return Template(path.stem, file.about, file.instruction.strip(), file.question.strip(), file.prefix.rstrip())


INSTRUCT = "instruct"
"""The default template of instruct models of 1B parameters and more."""

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="detailed",
            about="the task, what to attend to, answer with the prompt only",
            instruction=(
                "A language model was given an original text together with an instruction, and wrote the "
                "rewritten text. Work out the instruction.\n"
                "Compare the two texts and attend to what changed: the kind of text, its tone, style, audience, "
                "point of view, length, language or format. What both texts have in common, such as their "
                "topic, was probably not part of the instruction."
            ),
            question=(
                "Which instruction turned the original text into the rewritten text? Answer with the instruction "
                "only: one sentence, no explanation, no quotation marks."
            ),
        ),
        Template(
            name="short",
            about="one question, for small models; the answer is made to begin with 'Rewrite this text as'",
            instruction="Below are a text and a rewrite of it.",
            question=("How was the text changed? Name the new style, tone, form or audience in one short instruction."),
            prefix="Rewrite this text as",
        ),
        Template(
            name="brief",
            about="the two texts and one question, for tuned models",
            instruction="",
            question="Which instruction turned the original text into the rewritten text?",
        ),
        Template(
            name="few_shot",
            about="a short task and, with --shots, solved examples as turns of a chat",
            instruction=(
                "Each rewritten text below was made from its original text by following an instruction. Name "
                "the instruction in one sentence."
            ),
            question="Instruction:",
        ),
        read_template(Path(__file__).with_name(f"{INSTRUCT}.toml")),
    )
}


def get_template(name: str) -> Template:
    """The template of that name, or of a TOML file.

    Raises:
        UserError: lists what exists.
    """
    if name.endswith(".toml"):
        return read_template(Path(name).expanduser())
    try:
        return TEMPLATES[name]
    except KeyError:
        known = ", ".join(TEMPLATES)
        raise UserError(f"unknown template {name!r}; there are: {known}, or a TOML file of your own") from None


def render_rewrite(prompt: str, text: str) -> Chat:
    """What the target model was given: `{prompt}:\\n{text}` as one user turn (the competition's layout)."""
    return Chat((Message("user", (Part(prompt, trusted=False), Part(":\n"), Part(text, trusted=False))),))


YES, NO = "Yes", "No"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RATINGS = "12345"


def render_yes_no(pair: Pair, candidate: str) -> Chat:
    """The question that a judge is trained on and asked: was this rewrite made by this candidate prompt?

    The answer is the probability of `YES` beside that of `NO`, each a single token.
    """
    question = "Was the rewritten text made from the original text by this instruction? Answer Yes or No."
    return _about(pair, [Part("Instruction: "), _said(candidate), Part(f"\n\n{question}")])


def render_pick(pair: Pair, candidates: Sequence[str]) -> Chat:
    """Which of up to 26 candidates was it? The answer is one of the first `LETTERS`."""
    lines = [Part("Which of these instructions turned the original text into the rewritten text?\n")]
    for letter, candidate in zip(LETTERS, candidates, strict=False):
        lines += [Part(f"\n{letter}) "), _said(candidate)]
    return _about(pair, [*lines, Part("\n\nAnswer with the letter only.")])


def render_rate(pair: Pair, candidate: str) -> Chat:
    """How well does a candidate explain the rewrite? The answer is one of `RATINGS`, 5 is the best."""
    question = (
        "How well does this instruction explain how the original text became the rewritten text? Answer with a number "
        "from 1 (not at all) to 5 (exactly)."
    )
    return _about(pair, [Part("Instruction: "), _said(candidate), Part(f"\n\n{question}")])


def _about(pair: Pair, question: Sequence[Part]) -> Chat:
    """A question to a judge. The pair comes first, so that all questions about it share its computation."""
    texts = [
        Part("Original text:\n"), Part(pair.original_text, trusted=False),
        Part("\n\nRewritten text:\n"), Part(pair.rewritten_text, trusted=False), Part("\n\n"),
    ]  # fmt: skip
    return Chat((Message("user", (*texts, *question)),))


def _said(candidate: str) -> Part:
    return Part(" ".join(candidate.split()), trusted=False)
