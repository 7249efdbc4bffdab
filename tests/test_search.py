"""The search: a grammar read in both directions, and a strategy that rewords what was answered."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import ensemble.best_of
import ensemble.search
from ensemble.best_of import UNCHOSEN, ScoredRow
from ensemble.search import UNSEARCHED
from submission import UserError
from submission.calls.supervisor import DeadlineReached, LostError
from submission.predict.estimate import estimate
from submission.predict.plan import RunConfig
from submission.predict.run import predict
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
        ("rounds = 0", "from 1 to 6"),
        ("turns = 3", "turns"),
        ("near = 7", "from 0 to 1"),
    ],
)
def test_what_cannot_be_searched_is_said(more: str, said: str, cli: Cli, tmp_path: Path) -> None:
    configure(tmp_path, {"0": "Make it rhyme"}, more)
    done = cli("predict", PAIRS, "-o", "s.csv", *WAY)
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert said in done.err


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("Rewrite this as {style!x}", "write each slot"),
        ("Rewrite this as {style:>9999999}", "write each slot"),
        ("Rewrite this {} as {style}", "write each slot"),
        ("Rewrite this as {style", "expected '}'"),
        ("Rewrite {what} as {style}", "uses {what}"),
        ("{style} " * 40, "at most 12"),
    ],
)
def test_a_bad_pattern_is_refused_before_a_model_is_asked(pattern: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(f'[[kind]]\nname = "a"\nstyles = ["x"]\npatterns = [{json.dumps(pattern)}]\n')
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        read_grammar(tmp_path / "g.toml")
    assert "g.toml" in str(raised.value)


@pytest.mark.parametrize("content", ["kind = 5", "kind = []", "kind = [5]", "[[kind]]\nname = 3"])
def test_a_grammar_of_another_shape_is_refused_by_its_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(content)
    with pytest.raises(UserError, match=r"g\.toml"):
        read_grammar(tmp_path / "g.toml")


def config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A search of three rows, each with three answers of two intents."""
    monkeypatch.chdir(folder)
    ids = [row[0] for row in read_csv(PAIRS)[1:4]]
    texts = ("Rewrite this text as a haiku.", "Rewrite this text as a limerick.", "Rewrite this text as a limerick")
    answers = {f"{row_id}/{number}": text for row_id in ids for number, text in enumerate(texts)}
    configure(folder, answers, "proposals = 12")
    return RunConfig(PAIRS, folder / "s.csv", recover="search", recover_config=folder / "s.toml", limit=3)


def in_rounds(folder: Path) -> None:
    settings = (folder / "s.toml").read_text()
    (folder / "s.toml").write_text(f"rounds = 3\n{settings}")


@pytest.mark.parametrize("trouble", [DeadlineReached(), LostError("no worker is left"), ValueError("a fault")])
def test_the_choice_among_the_answers_stands_if_the_search_ends_there(
    trouble: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise trouble

    monkeypatch.setattr(ensemble.search, "said_otherwise", fail)
    summary = predict(config(tmp_path, monkeypatch))
    assert (summary.rows, summary.fallbacks, summary.short) == (3, 0, {UNSEARCHED: 3})
    assert f"3 x {UNSEARCHED}" in summary.as_text()
    (tmp_path / "b.toml").write_text(
        (tmp_path / "s.toml").read_text().replace("proposals = 12", "selector = 'posterior'")
    )
    chosen = replace(
        config(tmp_path, monkeypatch), output=tmp_path / "b.csv", recover="best_of", recover_config=tmp_path / "b.toml"
    )
    assert predict(chosen).short == {}
    assert read_csv(tmp_path / "s.csv") == read_csv(tmp_path / "b.csv")


@pytest.mark.parametrize("deadline", [None, 100.0])
def test_a_search_goes_on_in_rounds(
    deadline: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given = config(tmp_path, monkeypatch)
    once = predict(given)
    assert "round" not in caplog.text
    in_rounds(tmp_path)
    often = predict(replace(given, output=tmp_path / "d.csv", deadline=deadline))
    assert re.findall(r"round (\d) of 3 took .* changed \d of 3 answers", caplog.text) == ["1", "2", "3"]
    assert (often.fallbacks, often.short) == (0, {})
    assert often.calls > once.calls * 3  # 12, 24 and 48 proposals, each asked about once
    asked = [json.loads(line) for line in (tmp_path / "d.csv.calls.jsonl").read_text().splitlines()]
    assert len(asked) == len({json.dumps(one) for one in asked})


def test_a_lost_second_round_leaves_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path, monkeypatch)
    predict(given)
    in_rounds(tmp_path)
    first, search = read_csv(tmp_path / "s.csv"), ensemble.search.said_otherwise

    def once(scored: list[ScoredRow], *more: Any) -> list[ScoredRow]:
        if more[2].proposals > 12:
            raise LostError("no worker is left")
        return search(scored, *more)

    monkeypatch.setattr(ensemble.search, "said_otherwise", once)
    summary = predict(replace(given, output=tmp_path / "d.csv"))
    assert summary.short == {}
    assert read_csv(tmp_path / "d.csv") == first


@pytest.mark.parametrize("trouble", [DeadlineReached(), LostError("no worker is left"), UserError("a broken target")])
def test_rows_that_nothing_was_chosen_for_are_counted(
    trouble: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr(ensemble.best_of, "score_rows", fail)
        summary = predict(config(tmp_path, monkeypatch))
    assert (summary.fallbacks, summary.short) == (0, {UNCHOSEN: 3})
    done = predict(config(tmp_path, monkeypatch))  # goes on from there
    assert (done.computed, done.short) == (0, {})
    assert done.calls > 0
    assert f"{done.calls} further calls" in done.as_text()


def test_a_dry_run_needs_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate(config(tmp_path, monkeypatch))["rows_left"] == 3
    predict(config(tmp_path, monkeypatch))
    log = tmp_path / "s.csv.calls.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert estimate(config(tmp_path, monkeypatch))["rows_left"] == 3


def test_a_row_without_an_answer_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path, monkeypatch)
    row = read_csv(PAIRS)[1][0]
    content = (tmp_path / "s.toml").read_text()
    (tmp_path / "s.toml").write_text(content.replace("json']", f"json', 'fail_ids={row}/0,{row}/1']", 1))
    assert predict(given).reasons == {"BackendError: scripted failure": 1}
