"""From raw answers to prompts."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.prompts.answers import clean_answer, is_blank
from submission.prompts.templates import TEMPLATES

CASES = {
    'Sure, here is the prompt:\n\n**"Rewrite this as a sea shanty."**\n\nI hope this helps!': (
        "Rewrite this as a sea shanty."
    ),
    "Sure! Here's the prompt that was likely used:\nRewrite this as a poem.": "Rewrite this as a poem.",
    "Prompt: Rewrite it": "Rewrite it",
    "> **Prompt:** Make it sing": "Make it sing",
    '**Rewrite Prompt:** "Convert this into a haiku"': "Convert this into a haiku",
    "The original prompt was: 'Translate to French'.": "Translate to French",
    'The prompt was "Make it formal".': "Make it formal",
    "The instruction was to rewrite it as a poem.": "rewrite it as a poem.",
    "Instruction: Instruction: be brief": "be brief",
    "1. Rewrite it as a list": "Rewrite it as a list",
    "```\nRewrite it\n```": "Rewrite it",
    "“Rewrite it”": "Rewrite it",
    '"Rewrite the text as a rap.': "Rewrite the text as a rap.",
    "<start_of_turn>model\nRewrite it<end_of_turn>": "Rewrite it",
    "<|im_start|>assistant\nRewrite it<|im_end|>\n<|im_start|>user\nand": "Rewrite it",
    "Rewrite this as a poem.</s>junk": "Rewrite this as a poem.",
    "Rewrite this as a poem:\nroses are red": "Rewrite this as a poem",
    "Rewrite with these rules:\n- be brief\n- be kind": "Rewrite with these rules: - be brief - be kind",
    "Rewrite this\nas a poem.\n\nExplanation: it rhymes.": "Rewrite this as a poem.",
    "Sure": "",
    "...": "",
    " \n\t": "",
    "NULL": "",
    # What only looks like a lead-in or a wrapper stays.
    "Answer the following questions: who, what?": "Answer the following questions: who, what?",
    '"Rewrite" the text': '"Rewrite" the text',
    "'Tis the season: rewrite": "'Tis the season: rewrite",
    'Rewrite it as a "rap song"': 'Rewrite it as a "rap song"',
    "<think>They want\n\na poem.</think>Rewrite it as a poem.": "Rewrite it as a poem.",
    "<think>They want a poem, or": "",
    "Surely rewrite it": "Surely rewrite it",
    "Rewrite this for people over 65.": "Rewrite this for people over 65.",
    "Écris ce texte en français": "Écris ce texte en français",
    "把这段文字改写成诗": "把这段文字改写成诗",
}


@pytest.mark.parametrize(("raw", "prompt"), CASES.items())
def test_an_answer_is_cleaned(raw: str, prompt: str) -> None:
    assert clean_answer(raw) == prompt


CONTINUED = {
    " a ballad.": "Rewrite this text as a ballad.",
    " A Ballad.\n\nIt rhymes.": "Rewrite this text as A Ballad.",
    "'if by a pirate.": "Rewrite this text as'if by a pirate.",
    "\n\na ballad.": "Rewrite this text as a ballad.",
    "\n\nMake it rhyme.": "Make it rhyme.",
    "Make it rhyme.": "Make it rhyme.",
    "**Make it rhyme.**": "Make it rhyme.",
    '"Make it rhyme."': "Make it rhyme.",
    "": "",
    "<|im_end|>": "",
    " \n": "",
    ":\n\n": "",
    " ...": "",
}


@pytest.mark.parametrize(("completion", "prompt"), CONTINUED.items())
def test_a_forced_beginning_is_joined_to_what_goes_on_from_it(completion: str, prompt: str) -> None:
    assert TEMPLATES["short"].prefix == "Rewrite this text as"
    assert TEMPLATES["short"].parse(completion) == prompt


pieces = st.sampled_from(
    ["Sure, ", "Here is the prompt: ", "Prompt:", "\n", "\n\n", '"', "“", "”", "'", "**", "*", "`", "```", "# ", "> ",
     "1. ", "<|im_end|>", "</s>", "<start_of_turn>model\n", "[INST]", ":", "Rewrite this", "\r\n", "\0", "\u2028"]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=12).map("".join)))
def test_a_clean_answer_is_one_line_and_stays_as_it_is(raw: str) -> None:
    prompt = clean_answer(raw)
    assert clean_answer(prompt) == prompt
    assert prompt == prompt.strip()
    assert len(prompt.splitlines()) <= 1
    assert prompt == "" or not is_blank(prompt)
    assert not any(token in prompt for token in ("<|im_end|>", "</s>", "<start_of_turn>", "[INST]", "\0"))
    prompt.encode("utf-8")


@given(st.text(alphabet=st.characters(categories=["Ll", "Lu"]), min_size=3, max_size=12), st.sampled_from('"*`'))
def test_wrapping_marks_go(word: str, mark: str) -> None:
    sentence = f"Rewrite the text as a {word} story."
    assert clean_answer(f"{mark}{sentence}{mark}") == sentence


@given(st.text(max_size=6))
def test_an_answer_that_is_kept_is_not_null_for_the_grader(raw: str) -> None:
    prompt = clean_answer(raw)
    if prompt:
        table = pd.read_csv(io.StringIO(pd.DataFrame({"id": ["1"], "rewrite_prompt": [prompt]}).to_csv(index=False)))
        assert table["rewrite_prompt"].notna().all()


def test_every_word_that_pandas_reads_as_null_is_blank() -> None:
    words = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
             "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]  # fmt: skip
    assert all(is_blank(word) for word in words)
