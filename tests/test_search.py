"""The search: a grammar read in both directions, and a strategy that rewords what was answered."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from submission.prompts.grammar import read_grammar, renderings
from tests.conftest import ROOT, Cli, read_csv

PAIRS = ROOT / "examples" / "test.csv"
WAY = ("--recover", "ensemble.search:search", "--recover-config", "s.toml")


@pytest.mark.parametrize(
    ("prompt", "kind", "style"),
    [
        ("Rewrite this text as a sea shanty.", "form", "a sea shanty"),
        ("What would this look like as a nursery rhyme?", "form", "a nursery rhyme"),
        ("rewrite this text in the voice of a pirate", "voice", "a pirate"),
        ("Rewrite this text in a casual tone.", "tone", "casual"),
        ("Rewrite this text in the voice of a nursery rhyme.", "form", "a nursery rhyme"),  # as the grammar lists it
        ("Rewrite this text as a opinion column", "form", "an opinion column"),
        ("Rewrite this text as a opinion piece by a cat", "form", "a opinion piece by a cat"),
    ],
)
def test_an_intent_is_found_however_it_is_worded(prompt: str, kind: str, style: str) -> None:
    found = read_grammar().intent_of(prompt)
    assert found is not None
    assert (found[0].name, found[1]) == (kind, style)


@pytest.mark.parametrize("prompt", ["", "?", "Hello", "{style}", "as a", "Rewrite", "\udcff (.+) [", "x" * 10_000])
def test_what_is_no_prompt_of_the_grammar_has_no_intent(prompt: str) -> None:
    assert read_grammar().intent_of(prompt) is None


def test_what_the_grammar_says_it_reads_again() -> None:
    grammar = read_grammar()
    wrong = []
    for kind in grammar.kinds:
        for style in kind.styles:
            for prompt in islice(renderings(kind, style, random.Random(style)), 6):
                found = grammar.intent_of(prompt.text)
                if found is None or found[1] != style:
                    wrong.append((prompt.text, found and found[1]))
    assert not wrong


def test_patterns_without_a_style_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(
        '[[kind]]\nname = "a"\npatterns = ["Do it", "Make it {style} and {style}", "Make it {style}"]\nstyles = ["x"]\n'
    )
    grammar = read_grammar(tmp_path / "g.toml")
    assert grammar.intent_of("Do it") is None
    found = grammar.intent_of("Make it formal.")
    assert found is not None
    assert found[1] == "formal"


def configure(folder: Path, answers: dict[str, str], more: str = "") -> None:
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "s.toml").write_text(
        f"{more}\n[[source]]\nbackend = \"scripted\"\nn = 2\nsettings = ['answers=answers.json']\n"
        '[target]\nbackend = "scripted"\n'
    )


def test_likely_intents_are_said_in_other_words_and_a_second_run_asks_nothing(cli: Cli, tmp_path: Path) -> None:
    ids = [row[0] for row in read_csv(PAIRS)[1:4]]
    draws = {f"{row_id}/{number}": "Rewrite this text as a sea shanty." for row_id in ids for number in range(3)}
    configure(tmp_path, {**draws, **{f"{ids[2]}/{number}": "Nothing like it" for number in range(3)}}, "proposals = 12")
    done = cli("predict", PAIRS, "-o", "s.csv", *WAY, "--limit", 3, "--json")
    assert done.code == 0, done.err
    first, second, other = (row[1] for row in read_csv(tmp_path / "s.csv")[1:])
    assert "a sea shanty" in first
    assert "a sea shanty" in second
    assert other == "Nothing like it"  # it has no intent: the answers are what there is
    lines = (tmp_path / "s.csv.calls.jsonl").read_bytes()
    content = (tmp_path / "s.csv").read_bytes()
    again = cli("predict", PAIRS, "-o", "s.csv", *WAY, "--limit", 3, "--json")
    assert again.code == 0, again.err
    assert (tmp_path / "s.csv.calls.jsonl").read_bytes() == lines
    assert (tmp_path / "s.csv").read_bytes() == content


@pytest.mark.parametrize("proposals", [1, 2])
def test_few_proposals_leave_the_answers(proposals: int, cli: Cli, tmp_path: Path) -> None:
    ids = [row[0] for row in read_csv(PAIRS)[1:3]]
    answers = {f"{row_id}/{n}": f"Rewrite this text as a {word}." for row_id in ids
               for n, word in enumerate(("haiku", "limerick", "sonnet"))}  # fmt: skip
    configure(tmp_path, answers, f"proposals = {proposals}")
    done = cli("predict", PAIRS, "-o", "s.csv", *WAY, "--limit", 2, "--json")
    assert done.code == 0, done.err
    assert "the strategy failed" not in done.err
    assert {row[1] for row in read_csv(tmp_path / "s.csv")[1:]} <= set(answers.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("concat = 2", "chooses one by the posterior"),
        ("proposals = 0", "whole numbers from 1"),
        ("intents = 0", "whole numbers from 1"),
        ("likelihood = -1", "from 0"),
        ("likelihood = 101", "from 0 to 100"),
        ('selector = "first"', "chooses one by the posterior"),
        ('grammar = "nowhere.toml"', "nowhere.toml does not exist"),
        ("rounds = 3", "rounds"),
    ],
)
def test_what_cannot_be_searched_is_said(more: str, said: str, cli: Cli, tmp_path: Path) -> None:
    configure(tmp_path, {"0": "Make it rhyme"}, more)
    done = cli("predict", PAIRS, "-o", "s.csv", *WAY)
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert said in done.err
