"""The predictor as a function."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from submission import Pair, Sampling, UserError, recover
from submission.backends import ModelSpec
from submission.backends.models import EMBEDDED, TUNED, embedded_gguf
from submission.data.tables import read_pairs
from submission.predict.plan import RunConfig, checked_model, choose_strategy
from submission.predict.strategies import Setup, find_recover, roles_of
from submission.prompts.templates import get_template
from tests.conftest import ROOT, runner

SCRIPTED: Any = {"backend": "scripted"}
PAIRS = [Pair(f"{number}", f"An original text {number}.", f"Another text {number}.") for number in range(6)]


def test_rows_come_back_in_order_with_what_predict_answers(tmp_path: Path) -> None:
    path = ROOT / "examples" / "test.csv"
    done = runner("submission", tmp_path)("predict", path, "-o", "s.csv", "--backend", "scripted")
    assert done.code == 0, done.err
    import pandas as pd

    frame = pd.read_csv(path)
    found = recover(frame, **SCRIPTED)
    assert [one.id for one in found] == [pair.id for pair in read_pairs(path)]
    assert [one.text for one in found] == pd.read_csv(tmp_path / "s.csv")["rewrite_prompt"].tolist()
    assert recover(read_pairs(path), **SCRIPTED) == found
    assert {one.status for one in found} == {"ok"}


def test_what_failed_has_the_fallback_and_says_why() -> None:
    pairs = [*PAIRS, Pair("blank", "An original text.", "  ")]
    found = recover(pairs, settings=["fail_ids=3"], fallback="Improve this.", **SCRIPTED)
    odd = {one.id: one for one in found if one.status != "ok"}
    assert set(odd) == {"3", "blank"}
    assert {one.text for one in odd.values()} == {"Improve this."}
    assert all(one.reason for one in odd.values())


def test_nulls_of_pandas_are_blanks() -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {"id": pd.array([1, 2], dtype="Int64"), "original_text": ["a", None],
         "rewritten_text": pd.array(["An original text.", None], dtype="string")}
    )  # fmt: skip
    found = recover(frame, **SCRIPTED)
    assert [(one.id, one.status) for one in found] == [("1", "ok"), ("2", "failed")]


def test_time_and_log(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    first = recover(PAIRS, log=log, **SCRIPTED)
    lines = log.read_bytes()
    assert len(lines.splitlines()) == len(PAIRS)
    assert recover(PAIRS, log=log, **SCRIPTED) == first
    assert log.read_bytes() == lines
    late = recover(PAIRS, settings=["hang_ids=4"], seconds=6, **SCRIPTED)
    assert [one.status for one in late if one.id == "4"] == ["unfinished"]
    assert all(one.text for one in late)
    (tmp_path / "mine.txt").write_text("mine\n")
    with pytest.raises(UserError, match="no log of model calls"):
        recover(PAIRS, log=tmp_path / "mine.txt", **SCRIPTED)
    assert (tmp_path / "mine.txt").read_text() == "mine\n"


def test_a_strategy_with_options_needs_no_model() -> None:
    found = recover(PAIRS, strategy="constant", config={"prompt": "Make it rhyme."})
    assert {one.text for one in found} == {"Make it rhyme."}


def test_wrong_pairs_are_refused_by_name() -> None:
    import pandas as pd

    odd: Any = Pair  # a user's program need not be typed
    for given, said in (
        ([PAIRS[0], PAIRS[0]], "id '0' is null, or is there twice"),
        ([Pair(" ", "a", "b")], "is null, or is there twice"),
        (pd.DataFrame({"id": ["1"], "original_text": ["a"]}), "rewritten_text is there 0 times"),
        (pd.DataFrame([["1", "1", "a", "b"]], columns=["id", "id", "original_text", "rewritten_text"]), "2 times"),
        ([odd(1, "a", "b")], "id must be a text, not int"),
        ([odd("1", "a", float("nan"))], "rewritten_text must be a text, not float"),
        (PAIRS[0], "not Pair"),
        (None, "not NoneType"),
        ([("1", "a", "b")], "not tuple"),
    ):
        with pytest.raises(UserError, match=said):
            recover(given, **SCRIPTED)  # type: ignore[arg-type]
    for options, said in (
        ({"workers": -1}, "workers"), ({"workers": 1.5}, "workers"), ({"sampling": None}, "Sampling"),
        ({"shots": [PAIRS[0]]}, "Triplet"), ({"seconds": float("nan")}, "seconds"), ({"seconds": "3"}, "seconds"),
        ({"fallback": " "}, "fallback"), ({"fallback": None}, "fallback"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            recover(PAIRS, **SCRIPTED, **options)
    with pytest.raises(UserError, match="leaves too little of the context"):
        recover(PAIRS, sampling=Sampling(max_new_tokens=100_000), **SCRIPTED)
    with pytest.raises(UserError, match="temperature"):
        recover(PAIRS, sampling=Sampling(temperature=-1), **SCRIPTED)
    assert recover([], **SCRIPTED) == []


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(Path("quickstart.ipynb").read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert set(names["frame"]["status"]) == {"ok"}
    assert names["truth"]["score"].between(-1, 1).all()
    assert names["rows"]["best of ten"].str.startswith("Rewrite this").all()


@pytest.mark.parametrize(
    ("named", "shots", "strategy"),
    [
        ({}, False, "best_of"),
        ({}, True, "few_shot"),
        ({"settings": ["threads=1"], "sampling": Sampling(max_new_tokens=20, seed=3)}, False, "best_of"),
        ({"sampling": Sampling(temperature=0.5)}, False, "zero_shot"),
        ({"sampling": Sampling(top_p=0.9)}, False, "zero_shot"),
        ({"backend": "transformers"}, False, "zero_shot"),
        ({"adapter": Path("a.gguf")}, False, "zero_shot"),
        ({"model": "embedded"}, False, "zero_shot"),
        ({"model": "gemma-7b-it"}, False, "zero_shot"),
    ],
)
def test_what_comes_along_gives_the_best_of_ten_and_other_models_one_answer(
    named: dict[str, Any], shots: bool, strategy: str
) -> None:
    assert choose_strategy(RunConfig(Path(), Path(), **named), shots=shots) == strategy


def test_the_best_of_ten_is_held_and_drawn_as_predict_says() -> None:
    sampling = Sampling(max_new_tokens=17, seed=5)
    config = RunConfig(Path(), Path(), settings=["threads=1", "context=512"], sampling=sampling)
    setup = Setup(lambda: checked_model(config), get_template("brief"), sampling=sampling)
    made: Any = find_recover("best_of").make(setup)
    specs = [spec for spec in roles_of(made, setup).values() if isinstance(spec, ModelSpec)]
    assert [(spec.model, spec.options.threads) for spec in specs] == [(TUNED, 1), (EMBEDDED, 1), (EMBEDDED, 1)]
    assert made.answers == {"source embedded-tuned": (9, 17), "source untuned": (1, 17)}
    assert made.prompted == "source embedded-tuned"
    alone: Any = find_recover("best_of").make(replace(setup, config={"untuned": False}))
    assert list(alone.answers) == ["source embedded-tuned"]
    other = Setup(setup.model, setup.template, sampling=sampling, config={"target": {}, "source": [{"seed": 7}]})
    roles = roles_of(find_recover("best_of").make(other), other)
    specs = [spec for spec in roles.values() if isinstance(spec, ModelSpec)]
    assert [spec.options.threads for spec in specs] == [1, 0]  # the target was described


@pytest.mark.parametrize("named", ["best_of", "ensemble.search:search"])
def test_the_untuned_model_is_asked_beside_any_model_that_is_told_so(named: str) -> None:
    config = RunConfig(Path(), Path(), model=str(embedded_gguf()))
    setup = Setup(lambda: checked_model(config), get_template("brief"))
    strategy = find_recover(named)
    assert len(roles(strategy, setup)) == 1
    asked = roles(strategy, replace(setup, config={"untuned": True}))
    assert [spec.model for spec in asked] == [str(embedded_gguf()), EMBEDDED]
    itself = Setup(lambda: checked_model(replace(config, model=EMBEDDED)), setup.template, config={"untuned": True})
    assert len(roles(strategy, itself)) == 1
    with pytest.raises(UserError, match="untuned"):
        strategy.make(replace(setup, config={"untuned": True, "source": [{}]}))


def test_a_source_has_the_name_of_its_model() -> None:
    config = RunConfig(Path(), Path(), model=str(embedded_gguf()))
    tables = [{"n": 2}, {"model": TUNED, "n": 0}]
    setup = Setup(lambda: checked_model(config), get_template("brief"), config={"source": tables})
    made: Any = find_recover("best_of").make(setup)
    assert embedded_gguf() is not None
    assert list(made.answers) == [f"source {Path(config.model).stem}", f"source {TUNED}"]


def roles(strategy: Any, setup: Setup) -> list[ModelSpec]:
    """The models of the sources."""
    specs = roles_of(strategy.make(setup), setup)
    return [spec for role, spec in specs.items() if role.startswith("source") and isinstance(spec, ModelSpec)]
