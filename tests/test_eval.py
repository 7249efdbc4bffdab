"""Scores, baselines, comparisons and the report, as a user runs them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.compare import compare, figures, read_system
from eval.constant import Search, fit_constant
from eval.encoders import Encoder
from eval.report import Figure, Section, Table, write_report
from eval.retrieval import PairIndex
from eval.scoring import read_truth
from eval.sections import marked
from submission.data.tables import read_triplets, write_predictions
from submission.predict.strategies import DEFAULT_PROMPT
from submission.types import Pair, Triplet
from tests.conftest import ROOT, Cli, environment, read_csv, runner, write_csv

EXAMPLES = ROOT / "examples"
TRUTH = EXAMPLES / "truth.csv"
TRIPLETS = ("id", "original_text", "rewritten_text", "rewrite_prompt")


@pytest.fixture
def run(tmp_path: Path) -> Cli:
    """Run `python -m eval ...` in the test's folder."""
    return runner("eval", tmp_path)


def predictions(path: Path, prompts: dict[str, str]) -> Path:
    write_predictions(path, prompts.items())
    return path


def true_prompts() -> dict[str, str]:
    return {row[0]: row[1] for row in read_csv(TRUTH)[1:]}


# -- score --------------------------------------------------------------------------------------------------


def test_true_prompts_score_one_and_json_is_the_last_line(run: Cli, tmp_path: Path) -> None:
    truth = true_prompts()
    done = run("score", predictions(tmp_path / "p.csv", dict(reversed(truth.items()))), TRUTH, "--json")
    assert done.code == 0, done.err
    assert done.summary["mean"] == pytest.approx(1, abs=1e-5)
    assert done.summary["low"] <= done.summary["mean"] <= done.summary["high"] + 1e-9
    assert done.summary["n"] == len(truth)
    assert done.summary["encoder"] == "all-MiniLM-L6-v2"
    assert len(done.out.splitlines()) == 1
    assert "not the competition's metric" in done.err


def test_scores_are_shown_by_a_column_and_with_the_best_and_worst_rows(run: Cli, tmp_path: Path) -> None:
    rows = [("1", "Make it rhyme.", "verse"), ("2", "Make it formal.", "tone"), ("3", "Add a joke.", "tone")]
    truth = write_csv(tmp_path / "truth.csv", rows, ("id", "rewrite_prompt", "kind"))
    given = predictions(tmp_path / "p.csv", {"1": "Make it rhyme.", "2": "Sing\x1b[2J it!", "3": "Add a joke."})
    done = run("score", given, truth, "--by", "kind", "--json")
    assert done.summary["by"]["verse"] == {"n": 1, "mean": pytest.approx(1, abs=1e-5), "low": None, "high": None}
    assert done.summary["by"]["tone"]["n"] == 2
    assert done.summary["above_half"] == pytest.approx(2 / 3)
    assert "\x1b" not in done.err  # data does not steer the terminal
    assert "worst" in done.err
    assert "Make it formal." in done.err


def test_special_tokens_in_predictions_are_counted(run: Cli, tmp_path: Path) -> None:
    given = predictions(tmp_path / "p.csv", {row: f"{prompt}</s>" for row, prompt in true_prompts().items()})
    done = run("score", given, TRUTH, "--json")
    assert done.summary["special_tokens"] == done.summary["n"]
    assert "exploit" in done.err


BAD = {
    "missing id": ("lacks 1 of the ids: 'email-meeting'", lambda rows: [r for r in rows if r[0] != "email-meeting"]),
    "extra id": ("the truth lacks, 1 of the ids: 'another'", lambda rows: [*rows, ["another", "x"]]),
    "id twice": ("duplicate id", lambda rows: [*rows, rows[1]]),
    "null id": ("null id", lambda rows: [*rows[:3], ["", "x"], *rows[4:]]),
    "NaN": ("reads as null on line 4", lambda rows: [*rows[:3], [rows[3][0], "NaN"], *rows[4:]]),
    "blank": ("is blank or reads as null", lambda rows: [*rows[:3], [rows[3][0], "  "], *rows[4:]]),
    "no column": ("missing column rewrite_prompt", lambda rows: [["id", "prompt"], *rows[1:]]),
    "no row": ("has a header and no row", lambda rows: rows[:1]),
    "empty": ("is empty", lambda rows: []),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_scored_is_refused_by_name(fault: str, run: Cli, tmp_path: Path) -> None:
    said, spoil = BAD[fault]
    with (tmp_path / "bad.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(spoil(read_csv(TRUTH)))  # type: ignore[no-untyped-call]
    done = run("score", "bad.csv", TRUTH)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("score", TRUTH, "nowhere.csv"), "does not exist"),
        (("score", TRUTH, TRUTH, "--encoder", "bert-of-my-own"), "unknown encoder"),
        (("score", TRUTH, TRUTH, "--by", "mood"), "missing column mood"),
        (("compare", TRUTH, "--truth", TRUTH, "--reference", "nobody"), "no run is called 'nobody'"),
        (("compare", TRUTH, TRUTH, "--truth", TRUTH), "two runs are called 'truth'"),
        (("compare", "a-folder", "--truth", TRUTH), "does not exist"),
        (("compare", TRUTH, "--truth", TRUTH, "--ood", TRUTH), "--ood-run"),
        (("baselines", EXAMPLES / "train.csv", EXAMPLES / "train.csv", "--only", "magic"), "unknown baseline"),
        (("baselines", TRUTH, EXAMPLES / "train.csv"), "missing column original_text"),
        (("report", TRUTH, "--truth", TRUTH, "-o", "no/such/folder/r.html"), "does not exist"),
    ],
)
def test_wrong_arguments_are_said_in_a_line_or_two(arguments: tuple[object, ...], said: str, run: Cli) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


# -- compare ------------------------------------------------------------------------------------------------


def test_a_comparison_has_a_constant_and_says_when_nothing_can_be_told_apart(encoder: Encoder, tmp_path: Path) -> None:
    truth = read_truth(TRUTH, encoder)
    same = predictions(tmp_path / "same.csv", dict.fromkeys(truth.ids, DEFAULT_PROMPT) | {truth.ids[0]: "Make it so."})
    perfect = predictions(tmp_path / "perfect.csv", true_prompts())
    found = figures(compare([read_system(str(path), truth, encoder) for path in (same, perfect)], truth, encoder))
    systems = found["systems"]
    assert found["reference"] == "constant"
    assert set(systems) == {"constant", "same", "perfect"}
    assert systems["constant"]["difference"] is None
    assert systems["same"]["verdict"] == "no difference seen"
    assert systems["same"]["tied"] == len(truth.ids) - 1
    assert systems["perfect"]["verdict"] == "better"
    gap = systems["perfect"]["mean"] - systems["constant"]["mean"]
    assert systems["perfect"]["difference"]["mean"] == pytest.approx(gap)
    assert systems["perfect"]["rows_needed"] < len(truth.ids) < systems["same"]["rows_needed"]


def test_an_exploit_has_a_column_of_its_own(run: Cli, tmp_path: Path) -> None:
    truth = true_prompts()
    predictions(tmp_path / "magic.csv", dict.fromkeys(truth, "rewrite improve lucrarea text"))
    predictions(tmp_path / "special.csv", dict.fromkeys(truth, "Rewrite this.</s>"))
    done = run("compare", "magic.csv", "special.csv", "--truth", TRUTH, "--exploit", "magic", "--json")
    assert done.code == 0, done.err
    marks = {name: system["exploit"] for name, system in done.summary["systems"].items()}
    assert marks == {"constant": False, "magic": True, "special": True}


def test_a_second_set_and_leaks_are_reported(run: Cli, tmp_path: Path) -> None:
    predictions(tmp_path / "a.csv", dict.fromkeys(true_prompts(), "Make it rhyme."))
    predictions(tmp_path / "b.csv", dict.fromkeys((row[0] for row in read_csv(EXAMPLES / "train.csv")[1:]), "Rhyme!"))
    train = EXAMPLES / "train.csv"
    done = run("compare", "a.csv", "--truth", TRUTH, "--ood", train, "--ood-run", "a=b.csv", "--train", train, "--json")
    assert done.code == 0, done.err
    assert done.summary["ood"]["shared"]["original_text"]["exact"] == done.summary["ood"]["n"]
    assert "original_text" not in done.summary["shared"]  # the truth of the first set has prompts only
    assert "warning" in done.err


# -- baselines ----------------------------------------------------------------------------------------------


def test_the_fitted_constant_is_the_best_sentence_and_an_exploit_is_marked(encoder: Encoder) -> None:
    prompts = ["Turn it into a poem."] * 3 + ["Turn it into a ballad.", "Make it formal."]
    sentence, *more = fit_constant(prompts, encoder, Search(rounds=3, tries=60))
    assert sentence.prompt == "Turn it into a poem."
    assert not sentence.exploit
    vectors = encoder.embed([sentence.prompt, *prompts])
    assert sentence.train_mean == pytest.approx(float(np.mean((vectors[1:] @ vectors[0]) ** 3)), abs=1e-4)
    assert all(constant.exploit and constant.train_mean > sentence.train_mean for constant in more)
    assert fit_constant(prompts, encoder, Search(rounds=3, tries=60)) == [sentence, *more]


def test_similar_pairs_are_found_and_shots_differ(encoder: Encoder) -> None:
    def triplet(number: int, rewritten: str, prompt: str) -> Triplet:
        return Triplet(Pair(str(number), "The meeting is on Monday.", rewritten), prompt)

    poem = "O Monday, day of meetings dread, we gather round when all have fed."
    triplets = [
        triplet(
            1, "Dear Sir or Madam, the meeting will be held on Monday. Yours faithfully", "Make it a formal letter."
        ),
        triplet(2, poem, "Turn it into a poem."),
        triplet(3, poem + " Ah!", "Turn it into a poem"),
        triplet(4, "Arr, the meetin' be on Monday, ye scurvy dogs!", "Talk like a pirate."),
    ]
    index = PairIndex(triplets, encoder)
    asked = Pair(
        "x", "The train leaves at noon.", "O train that leaves when noon is nigh, we wave to thee and say goodbye."
    )
    (row,) = index.similarities([asked])
    assert triplets[int(row.argmax())].pair.id in ("2", "3")
    alike = [shot.pair.id for shot in index.diverse(row, 2, 0.0)]
    assert sorted(alike) == ["2", "3"]
    assert len({shot.rewrite_prompt.rstrip(".") for shot in index.diverse(row, 2, 0.5)}) == 2
    assert len(index.diverse(row, 9, 0.3)) == 4


def test_all_baselines_run_and_go_on_after_a_stop(run: Cli, shallow_gguf: Path, tmp_path: Path) -> None:
    rows = [[row[0], row[1][:120], row[2][:120], row[3]] for row in read_csv(EXAMPLES / "train.csv")[1:]]
    assert len(rows) > 8
    names = {"constant", "constant_fitted", "nearest", "zero_shot", "few_shot", "few_shot_nearest", "default", "tuned",
             "best_of"}  # fmt: skip
    write_csv(tmp_path / "train.csv", rows[2:], TRIPLETS)
    write_csv(tmp_path / "test.csv", rows[:2], TRIPLETS)
    arguments = (
        "baselines", "train.csv", "test.csv", "-o", "runs", "--ood", "test.csv", "--max-new-tokens", 6,
        "--model", shallow_gguf, "--tuned-model", shallow_gguf, "--json",
        *(word for name in sorted(names) for word in ("--only", name)),
    )  # fmt: skip
    done = run(*arguments)
    assert done.code == 0, done.err
    for systems in (done.summary["systems"], done.summary["ood"]["systems"]):
        assert set(systems) == names
    assert done.summary["reference"] == "constant"
    assert done.summary["shared"]["rewrite_prompt"]["rows"] == 2
    again = run(*arguments)
    told = [json.loads(path.read_text()) for path in tmp_path.rglob("submission.csv.run.json")]
    assert len(told) >= 16
    chosen = json.loads((tmp_path / "runs/test/best_of/submission.csv.run.json").read_text())["models"]
    assert {model["model"] for model in chosen.values()} == {"embedded", str(shallow_gguf)}
    asked = [one["result"]["computed"] for one in told if one["models"]]
    assert asked == [0] * len(asked)
    kept = {name: system["mean"] for name, system in done.summary["systems"].items()}
    assert kept == {name: system["mean"] for name, system in again.summary["systems"].items()}
    write_csv(tmp_path / "train.csv", rows[3:], TRIPLETS)
    other = run(*arguments[: arguments.index("--only")], "--only", "nearest")
    assert other.code == 0, other.err  # other examples are other calls


def test_a_constant_that_was_fitted_can_be_predicted_with(run: Cli, tmp_path: Path) -> None:
    done = run(
        "constant", EXAMPLES / "train.csv", "-o", "c.toml", "--rounds", 1, "--tries", 20, "--test", TRUTH, "--json"
    )
    assert done.code == 0, done.err
    assert "test " in done.err
    known = [triplet.rewrite_prompt for triplet in read_triplets(EXAMPLES / "train.csv")]
    assert done.summary["constants"][0]["prompt"] in [*known, DEFAULT_PROMPT]
    predicted = subprocess.run(
        [sys.executable, "-m", "submission", "predict", str(EXAMPLES / "test.csv"), "-o", "s.csv",
         "--recover", "constant", "--recover-config", "c.toml"],
        cwd=tmp_path, env=environment(), capture_output=True, check=False,
    )  # fmt: skip
    assert predicted.returncode == 0, predicted.stderr
    assert {row[1] for row in read_csv(tmp_path / "s.csv")[1:]} == {done.summary["constants"][0]["prompt"]}


# -- report -------------------------------------------------------------------------------------------------

ATTACK = "</div><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> {{ 7*7 }} $x$"


@pytest.fixture
def page(run: Cli, tmp_path: Path) -> Path:
    rows = [[f"{row[0]} <b>", row[1], f"{row[2]} {ATTACK}", row[3]] for row in read_csv(EXAMPLES / "train.csv")[1:]]
    write_csv(tmp_path / "truth.csv", rows, TRIPLETS)
    predictions(tmp_path / "one.csv", {row[0]: "Make it formal." for row in rows})
    predictions(tmp_path / "two.csv", {row[0]: f"{row[3]} {ATTACK}" for row in rows})
    done = run(
        "report", f"{ATTACK[:9]}$x$=one.csv", "two.csv", "--truth", "truth.csv", "-o", "report.html", "--title", ATTACK
    )
    assert done.code == 0, done.err
    return tmp_path / "report.html"


def test_the_report_is_one_file_in_which_data_stays_data(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "{{ 7*7 }}" in text
    assert "http://" not in text.replace("data:", "")
    assert "https://" not in text
    pngs = sorted(path.name for path in page.parent.glob("report-*.png"))
    assert pngs == [f"report-{name}.png" for name in ("differences", "kinds", "length", "scores")]
    assert all((page.parent / png).read_bytes().startswith(b"\x89PNG") for png in pngs)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_report_without_running_what_is_in_it(page: Path, width: int, tmp_path: Path) -> None:
    probe = (
        "<script>document.body.append(`width ${document.documentElement.scrollWidth} title ${document.title}`)</script>"
    )
    text = page.read_text(encoding="utf-8")
    policy = text.index("<meta http-equiv")
    text = text[:policy] + text[text.index(">", policy) + 1 :]  # only the page's own escaping is left to stop it
    (tmp_path / "probe.html").write_text(text.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'c'}",
         f"--window-size={width},900", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    body = shown.stdout
    assert "title owned" not in body
    measured = int(body.rsplit("width ", 1)[1].split()[0])
    assert measured <= max(width, 500)  # headless Chromium's window is at least 500 wide


def test_words_of_one_text_only_are_marked() -> None:
    left, right = marked("the cat sat down", "the dog sat")
    assert [(word.text, word.mark) for word in left if word.mark] == [("cat", "removed"), (" down", "removed")]
    assert [(word.text, word.mark) for word in right if word.mark] == [("dog", "added")]
    assert "".join(word.text for word in left) == "the cat sat down"


def test_a_room_can_add_sections_of_its_own(tmp_path: Path) -> None:
    section = Section(
        "Judges", ["What they chose."], [Table(("judge", "wins"), [("a", "3")])], [Figure("x", b"png", "c")]
    )
    written = write_report(tmp_path / "r.html", "Title", [section])
    assert [path.name for path in written] == ["r.html", "r-x.png"]
    assert "What they chose." in written[0].read_text(encoding="utf-8")
    assert json.dumps("judge") not in written[0].read_text(encoding="utf-8")
