"""Candidates, selectors and the experiment: what is known goes in, and comes out."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from ensemble import diagnosis
from ensemble.candidates import Answer, Candidate, CandidateRow, merge, read_candidates, write_candidates
from ensemble.choose import SelectorScores, answer_of, best, score_rows
from ensemble.experiment import ALL
from ensemble.measure import measure
from ensemble.models import asked_for, likelihoods, parse_models
from ensemble.selectors import Tools, make_selectors
from ensemble.selectors.consensus import Consensus
from ensemble.selectors.judges import MOST, Pick, Rate, YesNo
from ensemble.sources import parse_sources
from eval.encoders import Encoder
from submission.backends.scripted import Scripted
from submission.calls.likelihoods import Likelihoods, Question
from submission.errors import UserError
from submission.prompts.templates import LETTERS
from submission.types import Chat, Failure, LogLikelihood, Model, Pair
from tests.conftest import ROOT, Cli, command, environment, read_csv, runner, write_csv

EXAMPLES = ROOT / "examples"
PAIR = Pair("1", "The cat sat.", "Upon the mat, a cat!")


@pytest.fixture
def run(tmp_path: Path) -> Cli:
    """Run `python -m ensemble ...` in the test's folder."""
    return runner("ensemble", tmp_path)


def candidates(*texts: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(text, (Answer("s", n, -float(n + 1), 2),)) for n, text in enumerate(texts))


class Knows(Scripted):
    """A judge with a taste: what it says is a function of the whole question and the answer."""

    def __init__(self, probability: dict[str, float], taste: Sequence[float] = ()) -> None:
        super().__init__()
        self.probability, self.taste = probability, taste

    def loglikelihood(self, items):  # type: ignore[no-untyped-def]
        for key, chat, answer in items:
            yield key, LogLikelihood(math.log(self._say(chat, answer)), 1, 10)

    def _say(self, chat: Chat, answer: str) -> float:
        text = "".join(part.text for part in chat.messages[0].parts)
        if answer in ("Yes", "No"):
            (known,) = (p for said, p in self.probability.items() if f"Instruction: {said}\n" in text)
            return known if answer == "Yes" else 1 - known
        place = LETTERS.index(answer)
        (line,) = (line for line in text.splitlines() if line.startswith(f"{answer}) "))
        return self.probability[line[3:]] * (self.taste[place] if self.taste else 1.0)


# -- candidates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["min_p=2.0", "top_p=0", "max_new_tokens=0", "temperature=inf", "temperature=-1"])
def test_a_source_with_a_sampling_that_means_nothing_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="must be") as refused:
        parse_sources([{}], "s.toml", [wrong])
    assert "source 1" in str(refused.value)
    assert wrong.split("=")[0] in str(refused.value)


def test_candidates_are_merged_with_their_answers_and_come_back(tmp_path: Path, encoder: Encoder) -> None:
    drawn = [("Make it rhyme", Answer("a", 0, -1.0, 3)), ("make it rhyme.", Answer("a", 1, -2.0, 3)),
             ("  ", Answer("a", 2, -2.0, 1)), ("Write a poem", Answer("b", 1, -3.5, 4))]  # fmt: skip
    merged = merge(drawn)
    assert [(c.text, [d.number for d in c.answers]) for c in merged] == [
        ("Make it rhyme", [0, 1]),
        ("Write a poem", [1]),
    ]
    assert len(merge(drawn, encoder, near=0.95)) == 2
    rows = [CandidateRow(PAIR, tuple(merged)), CandidateRow(Pair("2", "", ""), ())]
    write_candidates(tmp_path / "c.parquet", rows)
    assert read_candidates(tmp_path / "c.parquet") == rows


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("1", "a", "b", "c", "[]")], "a candidate without an answer"),
        *(
            ([("1", "a", "b", "c", cell)], "answers must be a JSON list")
            for cell in ("nonsense", '["a123"]', '[["m", -5.9, 3, 7]]', '[["m", 0, -1, -7]]', '[["m", 0, Infinity, 7]]')
        ),
        ([("1", "a", "b", "c", '[["s",1,-1,1]]'), ("1", "x", "b", "d", '[["s",1,-1,1]]')], "other texts"),
        ([("1", "a", "b", "c", '[["s",1,-1,1]]'), ("1", "a", "b", "c", '[["s",1,-1,1]]')], "repeats a candidate"),
        ([("", "a", "b", "c", '[["s",1,-1,1]]')], "null id"),
        ([], "a header and no row"),
    ],
)
def test_candidates_that_cannot_be_meant_are_refused(rows: list[Sequence[str]], said: str, tmp_path: Path) -> None:
    header = ("id", "original_text", "rewritten_text", "candidate", "answers")
    with pytest.raises(UserError, match=said):
        read_candidates(write_csv(tmp_path / "c.csv", rows, header))


# -- selectors ----------------------------------------------------------------------------------------------


def test_every_selector_scores_one_two_and_equal_candidates(encoder: Encoder) -> None:
    scripted = Likelihoods(Scripted())
    made = make_selectors(list(ALL), Tools(encoder, scripted, scripted))
    for name, selector in made.items():
        for some in (candidates("Make it rhyme"), candidates("Make it rhyme", "Make it formal")):
            scores = selector(PAIR, some)
            assert len(scores) == len(some), name
            assert all(math.isfinite(score) for score in scores), name


def test_rotations_cancel_the_taste_for_letters() -> None:
    some = candidates("one", "two", "three", "four")
    truth = {"one": 0.1, "two": 0.2, "three": 0.4, "four": 0.3}
    taste = [8.0, 1.0, 1.0, 1.0]
    single = Pick(Likelihoods(Knows(truth, taste)), rotations=1)(PAIR, some)
    assert best(single) == 0  # the judge likes A
    rotated = Pick(Likelihoods(Knows(truth, taste)))(PAIR, some)
    assert best(rotated) == 2
    assert sum(rotated) == pytest.approx(1)
    model = Likelihoods(Knows(truth, taste))
    questions = Pick(model).ask(PAIR, some)
    letters = Pick.letters(model.of(questions), 4)
    assert letters.shape == (4, 4)
    assert letters.mean(axis=0)[0] > 1.5 / 4


def test_only_so_many_candidates_stand_beside_each_other() -> None:
    some = candidates(*(f"candidate {n}" for n in range(MOST + 5)))
    scores = Pick(Likelihoods(Knows({c.text: 0.5 for c in some})), rotations=1)(PAIR, some)
    assert sum(score == score for score in scores) == MOST
    assert best(scores) == 0


def test_yes_or_no_is_read_as_odds_and_a_judge_of_nonsense_has_no_opinion() -> None:
    some = candidates("one", "two")
    yes = YesNo(Likelihoods(Knows({"one": 0.2, "two": 0.9})))(PAIR, some)
    assert yes == pytest.approx([math.log(0.2 / 0.8), math.log(0.9 / 0.1)])
    assert Rate(Likelihoods(Scripted()))(PAIR, some) == pytest.approx([3.0, 3.0])  # every rating alike
    never = Likelihoods(Never())
    assert Pick(never)(PAIR, some) == pytest.approx([0.5, 0.5])


class Says(Scripted):
    """A target that finds each text as likely as it is told; what it is not told fails."""

    def __init__(self, sums: dict[str, float]) -> None:
        super().__init__()
        self.sums = sums

    def loglikelihood(self, items):  # type: ignore[no-untyped-def]
        for key, _, text in items:
            found = self.sums.get(text)
            yield key, Failure("too long") if found is None else LogLikelihood(found, 4, 10, 0.5)


def test_several_targets_say_their_mean_log_likelihood_and_what_all_of_them_took() -> None:
    models = parse_models({"target": [{"model": "a.gguf"}, {"model": "b.gguf"}], "judge": {"model": "c.gguf"}})
    assert list(models) == ["target", "judge", "target 2"]
    assert asked_for(models, {"target"}) == ["target", "target 2"]
    assert parse_models({"target": [{}, {}]}, {"target": "x"})["target"].model == "x"
    assert "target 2" not in parse_models({"target": [{}, {}]}, {"target": "x"})
    for wrong in ([], [1], "x"):
        with pytest.raises(UserError, match=r"must be a table, or several \[\[target\]\]"):
            parse_models({"target": wrong})
    with pytest.raises(UserError, match=r"\[target 2\]"):
        parse_models({"target": [{}, {"modle": "x"}]})
    with pytest.raises(UserError, match="modle"):  # that another model is named instead does not make it right
        parse_models({"target": {"modle": "x"}}, {"target": "x"})
    with pytest.raises(UserError, match=r"must be a table$"):
        parse_models({"judge": [{}]})
    asked: list[Question] = [(Chat(()), text) for text in ("one", "two", "three")]
    opened = {"target": Says({"one": -8.0, "two": -4.0}), "target 2": Says({"one": -4.0, "two": -2.0, "three": -1.0})}
    both = likelihoods(cast("dict[str, Model]", opened), opened)
    assert list(both) == ["target"]
    told: list[None] = []
    one, two, three = both["target"].of(asked, lambda: told.append(None))
    assert (one.sum, one.tokens, one.prompt_tokens, one.seconds) == (-6.0, 4, 24, 1.0)
    assert two.sum == -3.0
    assert (three.failure, math.isnan(three.sum)) == ("too long", True)  # no mean of one: candidates are compared
    assert len(told) == len(asked) * both["target"].calls


class Never(Scripted):
    """A judge that says no letter, ever."""

    def loglikelihood(self, items):  # type: ignore[no-untyped-def]
        for key, _, _ in items:
            yield key, LogLikelihood(-math.inf, 1, 10)


def test_consensus_is_the_medoid_and_counts_answers(encoder: Encoder) -> None:
    some = candidates("Write it as a sea shanty", "Turn this into a sea shanty", "List the main points as bullets")
    assert best(Consensus(encoder)(PAIR, some)) in (0, 1)
    often = (*some[:2], Candidate(some[2].text, tuple(Answer("s", n, -1.0, 2) for n in range(9))))
    assert best(Consensus(encoder)(PAIR, often)) == 2


def test_sums_take_ranks_or_weights_and_nan_is_never_chosen() -> None:
    some = candidates("a b c", "d", "e f")
    made = make_selectors(["longest+first", "w"], Tools(None, weights={"w": {"longest": 1.0, "first": 0.0}}))
    assert made["longest+first"](PAIR, some) == [2.0, 0.5, 0.5]
    assert best(made["w"](PAIR, some)) == 0
    assert best([math.nan, 0.1, math.nan]) == 1
    assert best([math.nan, math.nan]) == 0
    with pytest.raises(UserError, match="unknown selector 'frist'"):
        make_selectors(["frist"], Tools(None))
    with pytest.raises(UserError, match="--target"):
        make_selectors(["likelihood"], Tools(None))


def test_answers_are_joined_as_sentences() -> None:
    row = CandidateRow(PAIR, candidates("make it rhyme", "add humour."))
    assert answer_of(row, [0.0, 1.0]) == "add humour."
    assert answer_of(row, [0.0, 1.0], 2) == "add humour. make it rhyme."
    assert answer_of(row, [0.0, 1.0], 1, "Improve it.") == "add humour. Improve it."
    assert answer_of(CandidateRow(PAIR, ()), [], 2, "Improve it.") == "Improve it."


def test_a_selector_of_the_wrong_length_is_named() -> None:
    with pytest.raises(UserError, match="selector bad gave 1 scores to 2"):
        score_rows([CandidateRow(PAIR, candidates("a", "b"))], {"bad": lambda _, __: [1.0]})


# -- the experiment recovers what is known ------------------------------------------------------------------


def simulated(rows: int, draws: int, correlation: float, seed: int = 0) -> list[list[float]]:
    random = np.random.default_rng(seed)
    shared = random.normal(size=(rows, 1)) * math.sqrt(correlation)
    scores: list[list[float]] = (shared + random.normal(size=(rows, draws)) * math.sqrt(1 - correlation)).tolist()
    return scores


@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.8])
def test_a_known_correlation_of_errors_is_recovered(correlation: float) -> None:
    draws = simulated(400, 6, correlation)
    found = diagnosis.variance(draws)
    assert found.correlation.low <= correlation <= found.correlation.high
    assert found.between.low <= correlation <= found.between.high
    assert found.within.low <= 1 - correlation <= found.within.high
    sources = {"a": [row[:3] for row in draws], "b": [row[3:] for row in draws]}
    for pair, value in diagnosis.correlations(sources).items():
        assert value.low <= correlation <= value.high, pair
        assert value.high - value.low < 0.3


def test_sources_that_err_apart_are_told_from_those_that_err_together() -> None:
    a, b = simulated(300, 3, 0.7, seed=1), simulated(300, 3, 0.7, seed=2)
    found = diagnosis.correlations({"a": a, "b": b})
    assert found["a", "a"].low < 0.7 < found["a", "a"].high
    assert found["a", "b"].low < 0 < found["a", "b"].high
    single = diagnosis.correlations({"a": [row[:1] for row in a], "b": b})
    assert math.isnan(single["a", "a"].mean)


@pytest.mark.parametrize("accuracy", [0.25, 0.6, 0.95])
def test_a_known_accuracy_of_a_judge_is_recovered(accuracy: float) -> None:
    random = np.random.default_rng(1)
    truths = simulated(500, 4, 0.3, seed=3)
    said = []
    for row in truths:
        wanted = int(np.argmax(row))
        if random.random() >= accuracy:
            wanted = int(random.choice([place for place in range(4) if place != wanted]))
        said.append([float(place == wanted) for place in range(4)])
    lines = {line.name: line for line in measure(truths, {"judge": SelectorScores(said)}, np.zeros(500))}
    judge = lines["judge"]
    assert judge.top is not None
    assert judge.top.low <= accuracy <= judge.top.high
    assert lines["oracle"].headroom.mean == pytest.approx(1)
    assert lines["oracle"].mean.mean >= judge.mean.mean >= lines["worst"].mean.mean
    if accuracy == 0.25:  # no better than chance: nothing is gained over the first answer
        assert judge.over_first.holds_zero


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_known_rank_correlation_is_recovered(strength: float) -> None:
    random = np.random.default_rng(2)
    truths = np.array(simulated(400, 12, 0.5, seed=4))
    inside = truths - truths.mean(axis=1, keepdims=True)
    said = strength * inside / inside.std() + math.sqrt(1 - strength**2) * random.normal(size=inside.shape)
    known = diagnosis.knowledge(truths.tolist(), SelectorScores(said.tolist()))
    assert known is not None
    assert known.rows == 400
    # Spearman's coefficient of normal variables with that of Pearson.
    expected = 6 / math.pi * math.asin(strength / 2)
    assert known.rank_correlation.mean == pytest.approx(expected, abs=0.05)


def test_the_curve_is_the_mean_over_all_subsets() -> None:
    from itertools import combinations

    truth = [[0.1, 0.5, 0.3, 0.9], [0.2, 0.2, 0.4, 0.1]]
    said = [[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 1.0, 1.0]]
    found = diagnosis.curve(truth, {"s": said})
    for k in (1, 2, 3, 4):
        subsets = [list(combinations(range(4), k))] * 2
        oracle = np.mean(
            [np.mean([max(row[i] for i in s) for s in sets]) for row, sets in zip(truth, subsets, strict=True)]
        )
        assert found.chosen["oracle"][k - 1] == pytest.approx(oracle)
    assert found.chosen["s"][3] == pytest.approx((0.1 + 0.2) / 2)
    assert found.independent[0] == pytest.approx(np.mean(truth))


def test_equal_candidates_and_single_ones_are_defined() -> None:
    truths = [[0.3], [0.3, 0.3]]
    lines = {
        line.name: line for line in measure(truths, {"x": SelectorScores([[1.0], [math.nan, math.nan]])}, np.zeros(2))
    }
    assert math.isnan(lines["x"].headroom.mean)
    assert lines["x"].undecided == 1
    assert lines["x"].regret.mean == 0
    assert diagnosis.knowledge(truths, SelectorScores([[1.0], [1.0, 2.0]])) is None


# -- commands -----------------------------------------------------------------------------------------------


def test_candidates_of_a_model_become_a_submission_and_a_report(run: Cli, shallow_gguf: Path, tmp_path: Path) -> None:
    model = f"model = {json.dumps(str(shallow_gguf))}\n"
    (tmp_path / "s.toml").write_text(
        f'[[source]]\nname = "short"\ntemplate = "short"\n{model}[[source]]\nname = "warm"\ntemplate = "detailed"\n'
        f"{model}greedy = false\ntemperature = 1.0\n"
    )
    (tmp_path / "m.toml").write_text(f"[[target]]\n{model}[[target]]\nmodel = 'embedded'\n[judge]\n{model}")
    drawn = ("sample", EXAMPLES / "test.csv", "-o", "c.parquet", "--sources", "s.toml", "--set", "n=2", "--set",
             "max_new_tokens=16", "--limit", 5)  # fmt: skip
    done = run(*drawn)
    assert done.code == 0, done.err
    rows = read_candidates(tmp_path / "c.parquet")
    assert len(rows) == 5
    assert {answer.source for row in rows for answer, _ in row.answers} == {"short", "warm"}
    assert rows[0].candidates[0].answers[0].number == 0  # the greedy answer is first
    content = (tmp_path / "c.parquet").read_bytes()
    assert run(*drawn).code == 0
    assert (tmp_path / "c.parquet").read_bytes() == content
    assert run(*drawn, "--set", "n=3").code == 0
    assert len(read_candidates(tmp_path / "c.parquet")) == 5
    assert run(*drawn).code == 0
    chosen = run("select", "c.parquet", "--selector", "consensus+most_frequent", "-o", "submission.csv")
    assert chosen.code == 0, chosen.err
    assert [row[0] for row in read_csv(tmp_path / "submission.csv")[1:]] == [row.pair.id for row in rows]
    truth = [row for row in read_csv(EXAMPLES / "truth.csv") if row[0] in {"id", *(r.pair.id for r in rows)}]
    write_csv(tmp_path / "truth.csv", truth[1:], truth[0])
    names = "first,consensus,likelihood,judge_yes_no,judge_pick"
    made = run("experiment", "c.parquet", "--truth", "truth.csv", "-o", "e", "--selectors", names, "--rotations", 2,
               "--models", "m.toml", "--proposals", 12)  # fmt: skip
    assert made.code == 0, made.err
    assert "Headroom" in made.out
    figures = json.loads((tmp_path / "e" / "experiment.json").read_text())
    assert {*names.split(","), "search", "search_oracle"} <= set(figures["selectors"])
    means = {name: line["mean"]["mean"] for name, line in figures["selectors"].items()}
    assert means["search"] <= means["search_oracle"] + 1e-9
    assert means["oracle"] <= means["search_oracle"] + 1e-9  # the answers are among what the search chose from
    assert figures["selectors"]["oracle"]["headroom"]["mean"] == pytest.approx(1)
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Are errors correlated?" in page
    assert "Does anybody know?" in page


def test_sampling_goes_on_after_kills_as_if_there_had_been_none(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[[source]]\nname = "a"\nbackend = "scripted"\nsettings = ["seconds_per_row=0.02"]\nn = 2\n'
        '[[source]]\nname = "b"\nbackend = "scripted"\nsettings = ["seconds_per_row=0.02"]\ntemplate = "detailed"\n'
    )
    drawn = ("sample", EXAMPLES / "test.csv", "--sources", "s.toml", "--near", "1", "-o")
    assert run(*drawn, "whole.parquet").code == 0
    for tries in range(4):
        again = command(*drawn, "killed.parquet", room="ensemble")
        process = subprocess.Popen(again, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
        lines = 1 + 25 * tries  # of the journals: the second source is reached by the third try
        while sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("killed.parquet.*.jsonl")) < lines:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (tmp_path / "killed.parquet").exists()
    assert run(*drawn, "killed.parquet").code == 0
    assert read_candidates(tmp_path / "killed.parquet") == read_candidates(tmp_path / "whole.parquet")


def test_weights_are_refused_for_the_rows_that_they_were_fitted_on(run: Cli, tmp_path: Path) -> None:
    pairs = read_csv(EXAMPLES / "test.csv")[1:9]
    truth = {row[0]: row[1] for row in read_csv(EXAMPLES / "truth.csv")[1:]}
    rows = [
        CandidateRow(Pair(*pair), candidates("Rewrite it as a poem", "Make it formal", truth[pair[0]]))
        for pair in pairs
    ]
    for name, part in {"v": rows[:4], "t": rows[4:]}.items():
        write_candidates(tmp_path / f"{name}.parquet", part)
        write_csv(tmp_path / f"{name}.csv", [(r.pair.id, truth[r.pair.id]) for r in part], ("id", "rewrite_prompt"))
    fitted = run("fit", "v.parquet", "--truth", "v.csv", "--selectors", "longest,first,logprob", "-o", "w.json")
    assert fitted.code == 0, fitted.err
    assert sum(json.loads((tmp_path / "w.json").read_text())["weights"].values()) == pytest.approx(1)
    common = ("-o", "e", "--selectors", "first", "--weights", "w.json")
    assert run("experiment", "t.parquet", "--truth", "t.csv", *common).code == 0
    assert "weighted" in json.loads((tmp_path / "e" / "experiment.json").read_text())["selectors"]
    refused = run("experiment", "v.parquet", "--truth", "v.csv", *common)
    assert refused.code == 2
    assert "was fitted on" in refused.err
    used = run("select", "t.parquet", "--selector", "weighted", "--weights", "w.json", "-o", "s.csv")
    assert used.code == 0, used.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sample", "nowhere.csv", "-o", "c.parquet"), "nowhere.csv does not exist"),
        (("sample", "PAIRS", "-o", "c.parquet", "--set", "m=2"), "unknown option 'm'"),
        (("sample", "PAIRS", "-o", "c.parquet", "--set", "temperature=0"), "which are all alike"),
        (("sample", "PAIRS", "-o", "c.parquet", "--sources", "nowhere.toml"), "nowhere.toml does not exist"),
        (("select", "nowhere.parquet", "--selector", "first", "-o", "s.csv"), "nowhere.parquet does not exist"),
        (("select", "c.csv", "--selector", "frist", "-o", "s.csv"), "unknown selector 'frist'"),
        (("select", "c.csv", "--selector", "likelihood", "--target", "no.gguf", "-o", "s.csv"), "does not exist"),
        (("experiment", "c.csv", "--truth", "other.csv", "-o", "e"), "lacks 1 of the ids"),
        (("experiment", "c.csv", "--truth", "t.csv", "-o", "e", "--weights", "w.json"), "w.json does not exist"),
        (("fit", "c.csv", "--truth", "t.csv", "--selectors", "first", "-o", "w.json"), "two selectors or more"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments: tuple[str, ...], said: str, run: Cli, tmp_path: Path) -> None:
    header = ("id", "original_text", "rewritten_text", "candidate", "answers")
    write_csv(tmp_path / "c.csv", [("1", "a", "b", "Make it rhyme", '[["s", 1, -1.0, 3]]')], header)
    write_csv(tmp_path / "t.csv", [("1", "Make it rhyme")], ("id", "rewrite_prompt"))
    write_csv(tmp_path / "other.csv", [("2", "Make it rhyme")], ("id", "rewrite_prompt"))
    done = run(*(str(EXAMPLES / "test.csv") if argument == "PAIRS" else argument for argument in arguments))
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err


def test_the_best_of_several_is_predicted_and_time_that_is_short_is_said(tmp_path: Path) -> None:
    answers = {f"{row[0]}/{n}": "Make it rhyme" for row in read_csv(EXAMPLES / "test.csv")[1:] for n in (0, 1)}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    (tmp_path / "b.toml").write_text(
        'selector = "consensus"\n[[source]]\nbackend = "scripted"\nn = 4\n'
        'settings = ["answers=answers.json", "seconds_per_row=0.12"]\n'
    )
    predict = runner("submission", tmp_path)
    common = ("--recover", "best_of", "--recover-config", "b.toml")
    done = predict("predict", EXAMPLES / "test.csv", "-o", "s.csv", *common)
    assert done.code == 0, done.err
    assert {row[1] for row in read_csv(tmp_path / "s.csv")[1:]} == {"Make it rhyme"}
    late = predict("predict", EXAMPLES / "test.csv", "-o", "late.csv", "--deadline", "9s", *common)
    assert late.code == 0, late.err
    assert {row[1] for row in read_csv(tmp_path / "late.csv")[1:]} == {"Make it rhyme"}  # an answer before samples
    assert "greedy answers only" in late.err or "of the samples from here on" in late.err


def test_likelihoods_that_fail_are_said(run: Cli, tmp_path: Path) -> None:
    failing = '[target]\nbackend = "scripted"\nsettings = ["fail_every=1"]\n'
    scripted = '[[source]]\nbackend = "scripted"\nn = 2\n'
    (tmp_path / "b.toml").write_text(f'{scripted}name = "a"\n{scripted}name = "b"\n{failing}')
    (tmp_path / "m.toml").write_text(failing)
    predict = runner("submission", tmp_path)
    way = ("--recover", "best_of", "--recover-config", "b.toml", "--limit", 2)
    done = predict("predict", EXAMPLES / "test.csv", "-o", "s.csv", *way)
    assert done.code == 0, done.err
    assert "questions to a model failed" in done.err
    header = ("id", "original_text", "rewritten_text", "candidate", "answers")
    rows = [("1", "a", "b", text, f'[["s", {n}, -1.0, 3]]') for n, text in enumerate(("As a poem", "Make it formal"))]
    write_csv(tmp_path / "c.csv", rows, header)
    write_csv(tmp_path / "t.csv", [("1", "As a poem")], ("id", "rewrite_prompt"))
    asked = ("--selectors", "noisy_channel", "--models", "m.toml", "--proposals", 8)
    told = run("experiment", "c.csv", "--truth", "t.csv", "-o", "e", *asked)
    assert told.code == 0, told.err
    assert "questions to a model failed" in told.err
    assert "the search is left out" in told.err
    assert "search" not in json.loads((tmp_path / "e" / "experiment.json").read_text())["selectors"]


def test_best_of_needs_no_configuration_and_no_encoder(
    shallow_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble import best_of as strategy
    from submission import recover

    def none(name: str) -> Encoder:
        raise AssertionError("no encoder is needed")

    monkeypatch.setattr(strategy, "find_encoder", none)
    pairs = [Pair(row[0], row[1][:120], row[2][:120]) for row in read_csv(EXAMPLES / "test.csv")[1:3]]
    target = {"target": {"model": str(shallow_gguf)}}
    log = tmp_path / "calls.jsonl"
    found = recover(pairs, model=str(shallow_gguf), strategy="best_of", config=target, log=log)
    assert [(one.id, one.status) for one in found] == [(pair.id, "ok") for pair in pairs]
    assert all("of 9 answers" in one.raw for one in found)
    before = log.read_bytes()
    assert recover(pairs, model=str(shallow_gguf), strategy="best-of", config=target, log=log) == found
    assert log.read_bytes() == before
    with pytest.raises(UserError, match="best_of, search"):
        recover(pairs, strategy="best")
