"""Triplets of one's own: cross-validation, the page, and what a run will take."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from eval.encoders import find_encoder
from submission.data.outputs import write_manifest
from submission.data.tables import PAIR_COLUMNS, read_triplets, write_predictions, write_table
from submission.errors import UserError
from tests.conftest import ROOT, runner
from tests.tiny_models import tiny_model
from train import forecast
from train.run import OWN, check, how_to_predict, read_run
from train.score import Score, best_of_file, score_folds
from train.splits import Splitting, split

_RECIPE = """
[split]
validation = 0.1
[screens]
unchanged = 0
unrelated = 0
[sft]
base = {base}
template = "brief"
max_tokens = 512
max_steps = 2
evaluate_every = 2
samples = 0
optimizer = "adamw_torch"
gradient_checkpointing = false
[score]
backend = "transformers"
baselines = ["constant"]
max_new_tokens = 4
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), "mistral")


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    with (ROOT / "examples" / "triplets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:24]
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "r.toml").write_text(_RECIPE.format(base=json.dumps(str(tiny))))
    return tmp_path / "r.toml"


def test_folds_are_disjoint_and_cover_all_rows() -> None:
    groups = [number // 3 for number in range(90)]
    places = [split(groups, Splitting(validation=0.1, folds=5, fold=fold)) for fold in range(5)]
    for row in range(90):
        assert Counter(place[row] for place in places)["test"] == 1
    for place in places:
        by_group = {group: {p for g, p in zip(groups, place, strict=True) if g == group} for group in groups}
        assert all(len(parts) == 1 for parts in by_group.values())
        assert 0 < place.count("validation") < place.count("test") <= 21
    for wrong in (Splitting(folds=1), Splitting(folds=3, fold=3), Splitting(folds=-2)):
        with pytest.raises(UserError, match="folds must be 2 or more"):
            split(groups, wrong)


def test_every_row_is_scored_once_and_all_are_learned(recipe: Path, tmp_path: Path) -> None:
    train = runner("train", tmp_path)
    arguments = ("run", "r.toml", "--triplets", "mine.csv", "-o", "made", "--folds", "2")
    done = train(*arguments)
    assert done.code == 0, done.err
    assert "in all, about" in done.err
    made = tmp_path / "made"
    score = json.loads((made / "score.json").read_text())
    kept = {triplet.pair.id for triplet in read_triplets(made / "folds" / "truth.parquet")}
    assert (score["folds"], score["n"], set(score["systems"])) == (2, len(kept), {"constant", "tuned"})
    whole = [len(read_triplets(made / "sets" / f"{name}.parquet")) for name in ("train", "validation")]
    assert sum(whole) == len(kept) > 12
    for part in ("1", "2"):
        sets = made / "folds" / part / "sets"
        seen = {triplet.pair.id for triplet in read_triplets(sets / "train.parquet")}
        assert not seen & {triplet.pair.id for triplet in read_triplets(sets / "test.parquet")}
    assert "made: tuned beside others" in (made / "report.html").read_text()
    assert (made / "merged" / "config.json").is_file()
    again = train(*arguments)
    assert again.code == 0, again.err
    assert again.err.count("nothing to do") == 7  # sets and adapter of two folds; sets, adapter and weights of all rows
    assert json.loads((made / "score.json").read_text()) == score
    assert isinstance(score["systems"]["tuned"]["fallbacks"], int)
    before = (made / "folds" / "1" / "sets" / "train.parquet").read_bytes()
    for other in (("--folds", "3"), ()):
        refused = train(*arguments[:6], *other)
        assert refused.code == 2, refused.err
        assert "holds a run with 2 folds" in refused.err
    assert (made / "folds" / "1" / "sets" / "train.parquet").read_bytes() == before


def test_a_score_without_a_constant_is_put_beside_one(tmp_path: Path) -> None:
    triplets = read_triplets(ROOT / "examples" / "triplets.csv")[:8]
    parts = [tmp_path / "folds" / number for number in ("1", "2")]
    for part, rows in zip(parts, (triplets[:4], triplets[4:]), strict=True):
        answers = part / "score" / "test" / "tuned" / "submission.csv"
        for folder in (part / "sets", answers.parent):
            folder.mkdir(parents=True)
        cells = [(t.pair.id, t.pair.original_text, t.pair.rewritten_text, t.rewrite_prompt) for t in rows]
        write_table(part / "sets" / "test.parquet", (*PAIR_COLUMNS, "rewrite_prompt"), cells)
        write_predictions(answers, [(t.pair.id, t.rewrite_prompt) for t in rows[:3]])
        write_manifest(answers, {"result": {"fallbacks": 1}})
    score_folds(Score(baselines=(), limit=3), parts, tmp_path, find_encoder("embedded"))
    told = json.loads((tmp_path / "score.json").read_text())
    assert (told["n"], set(told["systems"])) == (6, {"constant", "tuned"})
    assert told["systems"]["tuned"]["mean"] == pytest.approx(1.0, abs=1e-5)  # the metric adds 1e-6 to a length
    assert told["systems"]["tuned"]["fallbacks"] == 2
    assert (tmp_path / "report.html").is_file()


def test_folds_need_triplets_and_a_score(recipe: Path, tmp_path: Path) -> None:
    train = runner("train", tmp_path)
    (tmp_path / "names.csv").write_text("id,source,target,prompt\n1,a,b,c\n")
    for arguments, said in (
        (("run", "r.toml", "--triplets", "mine.csv", "--folds", "1"), "two are the least"),
        (("run", "r.toml", "--triplets", "names.csv"), "missing column original_text, rewritten_text"),
        (("run", "r.toml", "--triplets", "mine.csv", "--folds", "2", "--set", "score.backend=llama_cpp",
          "--set", "score.base=embedded", "--set", "gguf.quantizations=F16"), "is a transformers folder"),
    ):  # fmt: skip
        refused = train(*arguments, "-o", "made")
        assert refused.code == 2, refused.err
        assert said in refused.err
        assert not (tmp_path / "made").exists()
    (tmp_path / "no.toml").write_text(recipe.read_text().partition("[score]")[0])
    for arguments in (("run", "no.toml", "--triplets", "mine.csv"), ("run", "r.toml", "--set", "prompts.size=20")):
        refused = train(*arguments, "-o", "made", "--folds", "2")
        assert refused.code == 2, refused.err
        assert "--folds needs a recipe with [[source]], [sft] and [score]" in refused.err
        assert not (tmp_path / "made").exists()


def test_what_a_run_takes_is_told_before_it(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = runner("train", tmp_path)("run", "r.toml", "--triplets", "mine.csv", "-o", "made", "--dry-run")
    assert told.code == 0, told.err
    assert [line.split()[0] for line in told.out.splitlines()] == ["stage", "prepare", "sft", "merge", "score", "in"]
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(forecast, "measured_pace", lambda *_: 1e9)  # a busy machine has another one each time
    run = read_run(recipe, ["output=made"], [str(tmp_path / "mine.csv")])
    assert run.sft is not None
    longer = replace(run, sft=replace(run.sft, max_steps=200))
    seconds = [next(s.seconds for s in forecast.forecast(r) if s.name == "sft") for r in (run, longer)]
    assert seconds[1] > seconds[0]
    run = replace(run, sft=replace(run.sft, max_steps=0, epochs=3.0))
    folds = {count: {s.name: s.seconds for s in forecast.forecast(replace(run, folds=count))} for count in (2, 8)}
    assert folds[8]["sft x 8 folds"] > 4 * folds[2]["sft x 2 folds"], "each learns from more rows"


def test_sources_on_kaggle_are_downloaded_to_be_counted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "measured_pace", lambda *_: 1e9)
    here = read_run(recipe, ["output=made"], [str(tmp_path / "mine.csv")])
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "mine.csv").rename(tmp_path / "downloaded" / "mine.csv")
    monkeypatch.setattr("train.sources._download", lambda name: tmp_path / "downloaded" if name == "a/b" else None)
    there = read_run(recipe, ["output=made"], ["kaggle:a/b"])
    (tmp_path / "mine.csv").symlink_to(tmp_path / "downloaded" / "mine.csv")
    assert forecast.forecast(there) == forecast.forecast(here)


def test_a_base_that_nothing_can_be_merged_into_is_refused_before_training(
    recipe: Path, tiny: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny, tmp_path / "quantised")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is quantised[\s\S]*train sft"):
        check(read_run(recipe, [f"sft.base={base}", "output=made"], [str(tmp_path / "mine.csv")]))
    check(read_run(recipe, ["output=made"], [str(tmp_path / "mine.csv")]))


def test_triplets_on_the_command_line_are_what_is_learned() -> None:
    run = read_run(ROOT / "train" / "recipes" / "gemma-7b-it-qlora.toml", ["output=made"], ["mine.csv"])
    assert run.sft is not None
    assert run.sft.train == str(Path("made") / "sets" / "train.parquet")
    assert run.sft.validation == str(Path("made") / "sets" / "validation.parquet")


def test_ones_own_triplets_are_put_beside_the_default() -> None:
    run = read_run(OWN, ["output=made"], ["mine.csv"])
    assert run.score is not None
    assert "default" in run.score.baselines


def test_a_run_says_how_to_predict_as_it_was_scored(tmp_path: Path) -> None:
    run = read_run(OWN, [f"output={tmp_path / 'a b'}", "score.max_new_tokens=9"], ["mine.csv"])
    best = best_of_file(run.output, 0)
    best.parent.mkdir(parents=True)
    assert "best_of" not in how_to_predict(run)
    best.write_text("")
    words = shlex.split(how_to_predict(run))
    assert words[words.index("--model") + 1] == str(run.output / "merged-q8_0.gguf")
    assert words[words.index("--recover-config") + 1] == str(best)
    assert words[words.index("--max-new-tokens") + 1] == "9"
    assert run.sft is not None
    assert run.score is not None
    assert "best_of" not in how_to_predict(replace(run, score=replace(run.score, baselines=("constant",))))
    assert how_to_predict(replace(run, sft=replace(run.sft, task="judge"))) == ""
