"""From a grammar and texts to sets that share nothing: prompts, texts, rewrites, cleaning, screens, splits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.encoders import Encoder
from eval.grouping import connected
from submission.calls.likelihoods import Likelihoods
from submission.calls.log import Log
from submission.calls.models import open_models
from submission.data.tables import read_triplets
from submission.errors import UserError
from submission.prompts.grammar import MadePrompt, read_grammar
from submission.types import Backend, Pair, Sampling
from tests.conftest import ROOT, Cli, command, environment, read_csv, runner, write_csv
from train.cleaning import Cleaner, Cleaning, DataRow, clean_prompt
from train.prompts import generate, take, take_distinct, without_near_duplicates
from train.rewrites import pair_up
from train.screens import Screens, by_likelihood, by_likeness, by_text, is_refusal, leaks_prompt
from train.splits import Splitting, group_rows, shared, split
from train.texts import TOPICS, WordLimits, is_loop, requests, select, tidy

TRIPLETS = ("id", "original_text", "rewritten_text", "rewrite_prompt")


@pytest.fixture
def run(tmp_path: Path) -> Cli:
    """Run `python -m train ...` in the test's folder."""
    return runner("train", tmp_path)


# -- prompts ------------------------------------------------------------------------------------------------


def test_prompts_are_balanced_seeded_and_never_the_same() -> None:
    grammar = read_grammar()
    found = list(take(grammar, 20_000, seed=3))
    texts = [prompt.text.rstrip(".?!").casefold() for prompt in found]
    assert len(set(texts)) == len(texts)
    assert found == list(take(grammar, 20_000, seed=3))
    assert found[:50] != list(take(grammar, 50, seed=4))
    weights = {kind.name: kind.weight for kind in grammar.kinds}
    counts = Counter(prompt.kind for prompt in found[:6000])
    assert all(counts[name] == pytest.approx(6000 * w / sum(weights.values()), abs=12) for name, w in weights.items())
    styles = Counter(prompt.style for prompt in found[:6000] if prompt.kind == "voice")
    assert max(styles.values()) - min(styles.values()) <= 1
    assert sum(len(kind.styles) for kind in grammar.kinds) >= 300
    assert not any("{" in prompt.text or "  " in prompt.text for prompt in found)


def test_a_grammar_that_is_used_up_ends_with_every_prompt_made_once(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_text(
        '[slots]\nverb = ["write", "say"]\n[[kind]]\nname = "k"\n'
        'patterns = ["{verb} it as {style}", "{verb} it as {style}!"]\n'
        'styles = ["a poem", "a song"]\n'
    )
    grammar = read_grammar(path)
    assert sorted(prompt.text.rstrip(".!") for prompt in generate(grammar)) == [
        "Say it as a poem", "Say it as a song", "Write it as a poem", "Write it as a song",
    ]  # fmt: skip
    with pytest.raises(UserError, match="makes 4 different prompts, 5 were asked for"):
        list(take(grammar, 5))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no"),
        ('[[kind]]\nname = "k"\npatterns = ["{verb} {style}"]\nstyles = ["x"]', r"uses \{verb\}"),
        ('[[kind]]\nname = "k"\npatterns = ["{style"]\nstyles = ["x"]', "pattern"),
        ('[[kind]]\nname = "k"\npatterns = []\nstyles = ["x"]', "patterns must be a list"),
        ('[[kind]]\nname = "k"\npatterns = ["a"]\nstyles = [1]', "styles must be a list"),
        ("[[kind]]\npatterns = ['a']", "has no name"),
        ("[slots]\nx = 1\n[[kind]]\nname='k'", "x must be a list"),
    ],
)
def test_a_wrong_grammar_is_refused_by_name(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(content)
    with pytest.raises(UserError, match=said):
        read_grammar(tmp_path / "g.toml")


def test_of_a_chain_of_near_duplicates_one_stays(encoder: Encoder) -> None:
    texts = ["Rewrite the essay as a poem", "Please rewrite the essay as a poem",
             "Please rewrite the whole essay as a poem", "Make it sound like a pirate"]  # fmt: skip
    kept = without_near_duplicates([MadePrompt(text, "", "") for text in texts], encoder, 0.7)
    assert [prompt.text for prompt in kept] == [texts[0], texts[3]]


def test_distinct_prompts_are_as_many_as_asked_for(encoder: Encoder) -> None:
    found = take_distinct(read_grammar(), 60, encoder, near=0.9)
    assert len(found) == 60
    assert without_near_duplicates(found, encoder, 0.9) == found
    with pytest.raises(UserError, match="no near-duplicates"):
        take_distinct(read_grammar(), 8, encoder, near=0.05)


# -- texts --------------------------------------------------------------------------------------------------


def test_texts_of_any_table_and_of_text_files_are_read_and_screened(run: Cli, tmp_path: Path) -> None:
    first = "The ferry left the harbour at dawn with nine passengers, two goats and a piano that nobody had asked for."
    second = "Bees find their way by the sun. On cloudy days they use the light that the clouds let through."
    write_csv(tmp_path / "a.csv", [("1", first), ("2", "too short")], ("id", "text"))
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"content": second}) + "\n\n" + json.dumps({"content": first + " "}) + "\n"
    )
    (tmp_path / "c.txt").write_text(f"{'never again ' * 20}\n\nLighthouses were lit by oil. {second[::-1]}\n")
    done = run("texts", "a.csv", "b.jsonl", "c.txt", "-o", "t.csv", "--min-words", 12)
    assert done.code == 0, done.err
    texts = [row[1] for row in read_csv(tmp_path / "t.csv")[1:]]
    assert texts[:2] == [first, second]
    assert len(texts) == 3
    for reason in ("too short", "there already", "repeats itself"):
        assert reason in done.err
    assert "nothing to do" in run("texts", "a.csv", "b.jsonl", "c.txt", "-o", "t.csv", "--min-words", 12).err


def test_loops_are_told_from_prose(example_pairs: list[Pair]) -> None:
    assert not any(is_loop(pair.original_text) for pair in example_pairs)
    assert is_loop("She loved her family. " * 12)
    assert is_loop(
        "It was a moth. I am sure it was a moth. It was a moth. I am sure it was a moth. Yes, it was a moth."
    )
    assert tidy("**A Title**\n\nIt rained. It po") == "It rained."
    assert tidy("no sentence at all") == ""


def test_near_copies_of_texts_go() -> None:
    text = "The council met on Monday to talk about the leaking roof of the library and the price of slate in winter."
    kept = select([text, text + " It rained.", "Whales sing. Nobody knows why, but many have tried to find out " * 2],
                  WordLimits(5, 100))  # fmt: skip
    assert kept.texts[0] == text
    assert kept.dropped["near-duplicate"] == 1


def test_every_topic_comes_before_any_comes_again() -> None:
    jobs = requests(300, TOPICS, Sampling(seed=1))
    assert len({str(job.chat) for job in jobs}) == 300
    first = {str(job.chat).split(" about ")[1] for job in jobs[:100]}
    assert len(first) == 100
    with pytest.raises(UserError, match="asked for"):
        requests(10**6, TOPICS, Sampling())


# -- rewrites -----------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_pairs_can_always_be_split(prompts: int, texts: int, styles: int, seed: int) -> None:
    asked = [MadePrompt(f"prompt {number}", "k", f"style {number % styles}") for number in range(prompts)]
    tasks = pair_up(asked, [f"text {number}" for number in range(texts)], seed=seed)
    assert sorted(task.prompt.text for task in tasks) == sorted(prompt.text for prompt in asked)
    assert len({task.id for task in tasks}) == prompts
    block: dict[str, int] = {}
    parent = list(range(len(tasks)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for number, task in enumerate(tasks):
        for mark in (task.text, task.prompt.style):
            parent[root(number)] = root(block.setdefault(mark, number))
    used = {prompt.style for prompt in asked}
    assert len({root(number) for number in range(len(tasks))}) >= min(len(used), texts, 50)


def test_more_triplets_than_prompts_use_other_texts() -> None:
    asked = [MadePrompt(f"prompt {number}", "k", f"style {number}") for number in range(4)]
    tasks = pair_up(asked, [f"text {number}" for number in range(12)], size=10)
    assert len({(task.prompt.text, task.text) for task in tasks}) == 10
    with pytest.raises(UserError, match="make 12 pairs"):
        pair_up(asked, [f"text {number}" for number in range(12)], size=13)


def test_rewrites_survive_a_kill_and_are_the_same_as_without(run: Cli, tmp_path: Path, shallow_gguf: Path) -> None:
    write_csv(tmp_path / "p.csv", [(f"{n}", f"Rewrite this as number {n}", "k", f"s{n}") for n in range(12)],
              ("id", "rewrite_prompt", "kind", "style"))  # fmt: skip
    write_csv(tmp_path / "t.csv", [(f"{n}", f"A text about the number {n} and nothing else.") for n in range(12)],
              ("id", "original_text"))  # fmt: skip
    arguments = ("rewrites", "p.csv", "t.csv", "--max-new-tokens", 40, "--set", "streams=2", "--keep-cut",
                 "--model", shallow_gguf)  # fmt: skip
    whole = run(*arguments, "-o", "whole.csv")
    assert whole.code == 0, whole.err
    killed = subprocess.Popen(
        command(*arguments, "-o", "killed.csv", room="train"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE
    )
    log = tmp_path / "killed.csv.calls.jsonl"
    while killed.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 3):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed.csv").exists()
    before = log.read_bytes()
    again = run(*arguments, "-o", "killed.csv")
    assert again.code == 0, again.err
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert log.read_bytes().count(b"\n") in (12, 13)  # a torn line is ended, and stays
    assert read_csv(tmp_path / "killed.csv") == read_csv(tmp_path / "whole.csv")
    assert len(read_csv(tmp_path / "whole.csv")) == 13
    header, *made = read_csv(tmp_path / "whole.csv")
    assert len({row[header.index("rewritten_text")] for row in made}) > 8, "rewrites that were swapped would be seen"
    assert "nothing to do" in run(*arguments, "-o", "killed.csv").err
    assert run(*arguments, "-o", "killed.csv", "--seed", 5).code == 0  # other calls of the same log
    assert len(read_csv(tmp_path / "killed.csv")) == 13


def test_sigterm_ends_rewriting_with_a_word(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "p.csv", [(f"{n}", f"Rewrite this as number {n}") for n in range(60)], ("id", "rewrite_prompt")
    )
    write_csv(
        tmp_path / "t.csv",
        [(f"{n}", f"A text about {n} and nothing else.") for n in range(60)],
        ("id", "original_text"),
    )
    stopped = subprocess.Popen(
        command("rewrites", "p.csv", "t.csv", "-o", "o.csv", "--set", "streams=1", room="train"),
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "o.csv.calls.jsonl"
    while stopped.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 1):
        time.sleep(0.05)
    os.kill(stopped.pid, signal.SIGTERM)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "is safe in" in said
    assert "Traceback" not in said


# -- cleaning and screens -----------------------------------------------------------------------------------

RULES = st.builds(
    Cleaning, collapse_whitespace=st.booleans(), no_space_before_marks=st.booleans(), strip_end=st.booleans()
)


@given(st.text(alphabet=st.sampled_from(list("ab .?!,':;\n\t\u00a0é")), max_size=30), RULES)
@settings(max_examples=300)
def test_cleaning_is_idempotent_and_never_lengthens(prompt: str, rules: Cleaning) -> None:
    clean = clean_prompt(prompt, rules)
    assert clean_prompt(clean, rules) == clean
    assert len(clean) <= len(prompt)


def test_prompts_are_cleaned_as_the_seed_did() -> None:
    assert clean_prompt("Rewrite  this ,\nas a poem ! ", Cleaning()) == "Rewrite this, as a poem"
    nothing = Cleaning(collapse_whitespace=False, no_space_before_marks=False, strip_end=False)
    assert clean_prompt("as  it is . ", nothing) == "as  it is . "


def row(number: int, original: str = "", rewritten: str = "", prompt: str = "", style: str = "") -> DataRow:
    return DataRow(
        str(number), original or f"original {number}", rewritten or f"rewritten {number}", prompt or f"prompt {number}",
        style=style,
    )  # fmt: skip


def test_each_rule_drops_its_rows_and_can_be_switched_off() -> None:
    rows = [
        row(1),
        row(1),
        row(2, prompt="é"),
        row(3, rewritten=" "),
        row(4, prompt="p" * 81),
        row(5, "o" * 4001),
        row(6),
    ]
    cleaner = Cleaner(Cleaning(max_prompt_chars=80, max_rows=1), set())
    assert [cleaner(one)[1] for one in rows] == [
        "", "duplicate of an earlier row", "prompt has characters beyond ASCII", "blank rewritten_text",
        "rewrite_prompt longer than 80 characters", "original_text longer than 4000 characters",
        "beyond the 1 rows of a source",
    ]  # fmt: skip
    off = Cleaner(Cleaning(ascii_prompts=False, blanks=False, duplicates=False, max_original_chars=0), set())
    assert [off(one)[1] for one in rows] == [""] * 7


@pytest.mark.parametrize(
    "text",
    ["I am unable to provide the text.", "I'm sorry, but I can't help.", "Sorry, no.", "As an AI language model, I",
     "The text you provided does not contain a recipe.", "I cannot rewrite this.", "I don’t have enough information",
     "Please provide me with the text"],
)  # fmt: skip
def test_refusals_are_known(text: str) -> None:
    assert is_refusal(text)
    assert by_text(row(1, rewritten=text), Screens()) == "the model declined"
    assert by_text(row(1, rewritten=text), Screens(refusals=False)) == ""


@pytest.mark.parametrize(
    "text", ["I am sorry to say that the king is dead.\n", "Sir, I cannot"[:3], "The text of the law"]
)
def test_texts_that_begin_like_a_refusal_are_rare(text: str) -> None:
    assert is_refusal(text) == text.startswith("I am sorry")  # a known limit: such a text is lost


def test_rewrites_that_say_their_prompt_go_unless_the_text_said_it() -> None:
    prompt = "Rewrite this as a poem"
    assert leaks_prompt(prompt, "Sure! REWRITE this, as a poem: roses")
    assert not leaks_prompt(prompt, "rewrite this as a poem, she said", "He asked her to rewrite this as a poem.")
    assert not leaks_prompt("Shorten", "We shorten things")
    assert by_text(row(1, prompt="two\nlines"), Screens()) == "prompt of more than one line"


def test_unchanged_and_unrelated_texts_go(encoder: Encoder) -> None:
    text = "The ferry left the harbour at dawn with nine passengers, two goats and a piano."
    rows = [row(1, text, text), row(2, text, "At dawn a ferry with goats and a piano aboard put out to sea."),
            row(3, text, "def f(x): return x ** 2")]  # fmt: skip
    assert [reason[:9] for reason in by_likeness(rows, Screens(), encoder)] == ["text unch", "", "rewrite u"]
    assert by_likeness(rows, Screens(unchanged=0, unrelated=0), encoder) == [""] * 3
    encoder = Encoder("none", Path("none"))  # what shares words and is written anew needs none
    assert by_likeness(rows[1:2], Screens(), encoder) == [""]
    song = row(4, f"So he sat on the old red bus. {text}", "So he sat on the old red bus, and he was sad as can be.")
    assert by_likeness([song], Screens(), encoder) == [""]


def test_a_stock_phrase_makes_no_texts_related(encoder: Encoder) -> None:
    plants = "Photosynthesis turns light into sugar in the leaves of plants. Chlorophyll does it, as a matter of fact."
    rows = [row(1, plants, "As a matter of fact, the jury acquitted the banker.")]
    assert by_likeness(rows, Screens(), encoder) == ["rewrite unrelated to the text (score below 0.001)"]


def never() -> Backend:
    raise AssertionError("every likelihood is known")


def test_likelihood_screens_keep_what_the_prompt_explains(tmp_path: Path) -> None:
    from submission.backends import model_spec

    text = "The shop opens at nine. It sells bread, cheese and apples."
    rows = [
        row(1, text, "Das Geschäft öffnet um neun. Es verkauft Brot, Käse und Äpfel.", "Translate this into German"),
        row(2, text, "The shop opens at nine. It sells bread and cheese.", "Translate this into German"),
        row(3, text, "- opens at nine\n- bread\n- cheese", "text the poem as rewrite purple of"),
    ]
    screens = Screens(naturalness=0.001, matters=1.0)
    spec = model_spec("llama_cpp")
    with open_models({"target": spec}, Log(tmp_path / "l.jsonl")) as models:
        reasons = by_likelihood(rows, screens, Likelihoods(models["target"]))
    assert reasons[0] == ""
    assert reasons[1].startswith("the prompt does not matter")
    assert reasons[2].startswith("unnatural prompt")
    with open_models({"target": spec}, Log(tmp_path / "l.jsonl"), compute=False) as models:  # as after a kill
        assert by_likelihood(rows, screens, Likelihoods(models["target"])) == reasons


# -- splits -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-1, 8), st.integers(-1, 8)), min_size=1, max_size=40))
def test_rows_with_a_mark_in_common_are_one_group(marks: list[tuple[int, int]]) -> None:
    import numpy as np

    labels = connected(np.array(marks)).tolist()
    for a, first in enumerate(marks):
        for b, second in enumerate(marks):
            if any(x == y >= 0 for x, y in zip(first, second, strict=True)):
                assert labels[a] == labels[b]
    assert len(set(labels)) == len(set(connected(np.array(marks[::-1])).tolist()))


@given(st.lists(st.integers(0, 30), min_size=3, max_size=200), st.integers(0, 3))
def test_groups_are_never_divided_and_no_split_is_empty(groups: list[int], seed: int) -> None:
    if len(set(groups)) < 3:
        with pytest.raises(UserError, match="too few for 3 splits"):
            split(groups, Splitting(seed=seed))
        return
    places = split(groups, Splitting(seed=seed))
    assert all(len({place for g, place in zip(groups, places, strict=True) if g == group}) == 1 for group in groups)
    assert set(places) == {"train", "validation", "test"}
    assert places == split(groups, Splitting(seed=seed))


def test_sizes_are_met_where_groups_allow() -> None:
    counts = Counter(split(list(range(1000)), Splitting(seed=1)))
    assert counts == {"train": 800, "validation": 100, "test": 100}
    counts = Counter(split([0] * 700 + list(range(1, 301)), Splitting()))
    assert counts == {"train": 800, "validation": 100, "test": 100}
    assert set(split([1, 1, 1], Splitting(validation=0, test=0))) == {"train"}
    assert len(set(split([1, 1, 1], Splitting(by="row")))) == 3


def test_adversarial_rows_share_nothing_across_splits(encoder: Encoder) -> None:
    # Each is near the next one (0.68 to 0.81), the first and the last are not (0.33).
    links = ("poem", "long poem", "long sad poem", "long sad love poem", "long sad love song")
    chain = [row(n, prompt=f"Rewrite the essay as a {link}") for n, link in enumerate(links)]
    styles = [row(10 + n, prompt=f"Say {n} like a pirate {'!' * n}", style="a pirate") for n in range(4)]
    texts = [
        row(20 + n, original="One text for all of these rows, word by word.", style=f"style {n}") for n in range(4)
    ]
    bridge = [row(30, original=texts[0].original_text, prompt="Sing it to the moon", style="A Pirate")]
    others = [row(40 + n, f"{word} of every size were found here.", f"Here we found large {word}, and small ones too.",
                  f"Make it about {word}")
              for n, word in enumerate(("whales", "volcanoes", "pianos", "engines", "mushrooms", "taxes"))]  # fmt: skip
    rows = [*chain, *styles, *texts, *bridge, *others]
    groups = group_rows(rows, encoder, Splitting(near_prompts=0.67)).tolist()
    assert len(set(groups[:5])) == 1
    assert len(set(groups[5:14])) == 1  # the bridge joins one style and one text
    places = split(groups, Splitting())
    by_split = {name: [r for r, place in zip(rows, places, strict=True) if place == name] for name in set(places)}
    assert shared(by_split) == []
    assert shared({"a": rows[5:7], "b": rows[7:9]}) == ["a and b share 1 values of style"]


# -- prepare ------------------------------------------------------------------------------------------------


def parquet(path: Path) -> list[dict[str, str]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, str]] = pq.read_table(path).to_pylist()
    return rows


def test_prepare_explains_every_row_and_splits_share_nothing(run: Cli, tmp_path: Path) -> None:
    good = [[f"{r.pair.id}", r.pair.original_text, r.pair.rewritten_text, r.rewrite_prompt]
            for r in read_triplets(ROOT / "examples" / "train.csv")]  # fmt: skip
    bad = [["x1", "a", "I'm sorry, I can't do that.", "Do it"], ["x2", "", "b", "c"], ["x3", *good[0][1:]],
           ["x4", good[1][1], good[1][1], "Leave it as it is"]]  # fmt: skip
    write_csv(tmp_path / "a.csv", [*good, *bad], TRIPLETS)
    done = run("prepare", "a.csv", "-o", "sets")
    assert done.code == 0, done.err
    names = sorted(path.name for path in (tmp_path / "sets").glob("*.parquet"))
    assert names == ["test.parquet", "train.parquet", "validation.parquet"]
    rows = {name: parquet(tmp_path / "sets" / name) for name in names}
    dropped = read_csv(tmp_path / "sets" / "dropped.csv")[1:]
    assert sum(map(len, rows.values())) + len(dropped) == len(good) + len(bad)
    reasons = {line[0]: line[3] for line in dropped}
    assert reasons["x1"] == "the model declined"
    assert reasons["x2"] == "blank original_text"
    assert reasons["x3"] == "duplicate of an earlier row"
    assert reasons["x4"].startswith("text unchanged")
    for column in ("rewrite_prompt", "original_text", "rewritten_text"):
        values = [{record[column] for record in part} for part in rows.values()]
        assert not values[0] & values[1]
        assert not values[0] & values[2]
        assert not values[1] & values[2]
    card = (tmp_path / "sets" / "README.md").read_text()
    assert "| screen | the model declined | 1 |" in card
    before = (tmp_path / "sets" / "train.parquet").read_bytes()
    assert "nothing to do" in run("prepare", "a.csv", "-o", "sets").err
    assert run("prepare", "a.csv", "-o", "sets", "--fresh").code == 0
    assert (tmp_path / "sets" / "train.parquet").read_bytes() == before


def test_sources_are_mapped_mixed_and_nested_and_another_set_stays_apart(run: Cli, tmp_path: Path) -> None:
    def table(name: str, start: int, count: int) -> list[dict[str, str]]:
        words = [
            f"{a} {b}"
            for a in ("red", "old", "loud", "tiny", "lost", "wet")
            for b in ("bus", "king", "tax", "whale", "lamp", "song")
        ]
        return [{"id": str(n), "text": f"The {words[n]} {name} was seen in the year {1000 + 7 * n}, they say.",
                 "out": f"{name}! In {1000 + 7 * n} there was, they say, the {words[n]}.",
                 "prompt": f"Tell of the {words[n]} to the {name}"} for n in range(start, start + count)]  # fmt: skip

    (tmp_path / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table("miner", 0, 24)))
    write_csv(
        tmp_path / "two.csv", [tuple(r.values()) for r in table("sailor", 8, 24)], ("id", "text", "out", "prompt")
    )
    ood = [*table("judge", 0, 6), {**table("miner", 3, 1)[0], "id": "leak"}]
    (tmp_path / "ood.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ood))
    columns = 'columns = { original_text = "text", rewritten_text = "out", rewrite_prompt = "prompt" }'
    (tmp_path / "r.toml").write_text(
        f'[[source]]\npath = "one.jsonl"\nshare = 3\nlicence = "CC0"\n{columns}\n'
        f'[[source]]\npath = "two.csv"\nshare = 1\n{columns}\n[[source]]\npath = "ood.jsonl"\nood = true\n{columns}\n'
        "[mix]\nsize = 24\nsubsets = [4, 8]\n[split]\nnear_prompts = 0.99\nnear_texts = 0.999\n"
        "[screens]\nunrelated = 0\nunchanged = 0\n"
    )
    done = run("prepare", "--recipe", "r.toml", "-o", "sets")
    assert done.code == 0, done.err
    sets = {path.stem: parquet(path) for path in (tmp_path / "sets").glob("*.parquet")}
    assert set(sets) == {"train", "validation", "test", "ood"}
    mixed = Counter(record["source"] for name in ("train", "validation", "test") for record in sets[name])
    assert mixed == {"one": 18, "two": 6}
    assert "leak" not in {record["id"] for record in sets["ood"]} or len(sets["ood"]) == 7
    subsets = [parquet(tmp_path / "sets" / "subsets" / f"train-{size}.parquet") for size in (4, 8)]
    assert subsets[1][:4] == subsets[0]
    assert sets["train"][:8] == subsets[1]
    assert "CC0" in (tmp_path / "sets" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prepare", "-o", "s"), "no source to train on"),
        (("prepare", "nowhere.csv", "-o", "s"), "does not exist"),
        (("prepare", "two.csv", "-o", "s"), "missing column rewritten_text, rewrite_prompt"),
        (("prepare", "few.csv", "-o", "s"), "too few for 3 splits"),
        (("prepare", "few.csv", "-o", "s", "--set", "split.trian=1"), "unknown option 'trian'"),
        (("prepare", "few.csv", "-o", "s", "--set", "splits.train=1"), "unknown section 'splits'"),
        (("prepare", "few.csv", "-o", "s", "--set", "mix.size=9"), "sources give 2 rows"),
        (("prepare", "few.csv", "-o", "s", "--set", "split.by=luck"), "must be group or row"),
        (("prepare", "few.csv", "-o", "s", "--set", "split.near_texts=1.01"), "above 0, and 1 at most"),
        (("prepare", "few.csv", "-o", "few.csv"), "is a file"),
        (("prepare", "bad.jsonl", "-o", "s"), "line 2 is not JSON"),
        (("prepare", "kaggle:nobody", "-o", "s"), "kaggle:owner/name"),
        (("prompts", "-o", "no/such/p.csv"), "does not exist"),
        (("prompts", "-o", "p.csv", "--grammar", "none.toml"), "none.toml does not exist"),
        (("texts", "-o", "t.csv"), "name files of texts"),
        (("texts", "few.jsonl", "-o", "t.csv"), "does not exist"),
        (("rewrites", "few.csv", "nothing.csv", "-o", "r.csv"), "nothing.csv does not exist"),
        (("run", "empty.toml"), "has no output"),
    ],
)
def test_what_cannot_be_prepared_is_said_in_a_line_or_two(
    arguments: tuple[object, ...], said: str, run: Cli, tmp_path: Path
) -> None:
    write_csv(
        tmp_path / "few.csv",
        [("1", "One text of some length.", "Text one!", "Shout"), ("2", "A dog.", "Dogs.", "Plural")],
        TRIPLETS,
    )
    write_csv(tmp_path / "two.csv", [("1", "One text")], ("id", "original_text"))
    (tmp_path / "bad.jsonl").write_text(json.dumps(dict.fromkeys(TRIPLETS, "a")) + '\n{"a": \n')
    (tmp_path / "empty.toml").write_text("")
    done = run(*arguments)
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "s" / "train.parquet").exists()


def test_a_dataset_without_credentials_is_an_error_that_says_what_to_do(run: Cli, tmp_path: Path) -> None:
    done = subprocess.run(
        command("prepare", "kaggle:owner/name", "-o", "s", room="train"),
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment(), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "KAGGLE_API_TOKEN": "",
             "KAGGLE_CONFIG_DIR": str(tmp_path), "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "credentials" in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_triplets_in_the_repository_are_whole() -> None:
    found = read_triplets(ROOT / "examples" / "triplets.csv")
    assert len(found) >= 200
    assert len({triplet.rewrite_prompt for triplet in found}) == len(found)


def test_a_recipe_runs_the_stages_that_it_names(recipe: Path, tmp_path: Path) -> None:
    from train.run import OWN, read_run

    def run(text: str, *settings: str) -> Any:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return read_run(path, ["output=out", *settings])

    own = f"[[source]]\npath = {json.dumps(str(ROOT / 'examples/triplets.csv'))}\n"
    found = run(own)
    assert found.making is None
    assert [source.path for source in found.recipe.sources] == [str(ROOT / "examples/triplets.csv")]
    both = run(own + "[prompts]\nsize = 7\n")
    assert both.making.prompts.size == 7
    assert [Path(source.path).name for source in both.recipe.sources] == ["triplets.csv", "triplets.csv"]
    assert run("").making is not None, "from nothing"
    mine: Any = read_run(OWN, ["output=out"], ["mine.csv"])
    assert (mine.making, [source.path for source in mine.recipe.sources]) == (None, ["mine.csv"])
    assert mine.sft.train == "out/sets/train.parquet"
    tuned = run(recipe.read_text())
    assert (tuned.making, tuned.recipe) == (None, None), "it names its sets"
    for wrong in ("[score]\n[gguf]\n", "[split]\ntrain = 0.5\n"):
        with pytest.raises(UserError, match=r"\[\[source\]\]"):
            run(f"{recipe.read_text()}{wrong}")


def test_every_recipe_in_the_repository_can_be_read() -> None:
    from submission.config import read_toml
    from train.recipe import read_recipe
    from train.run import read_run
    from train.sft_config import read_sft

    for path in sorted((ROOT / "train" / "recipes").glob("*.toml")):
        content = read_toml(path, "RECIPE")
        if path.name == "own.toml":  # its triplets are named on the command line
            continue
        if "sft" in content:
            assert read_sft(path).train
        if "prompts" in content:
            assert read_run(path).output
        elif "sft" not in content:
            assert read_recipe([], path).sources
