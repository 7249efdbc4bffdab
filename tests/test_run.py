"""Runs of the command line with the scripted backend: whole, resumed, failing, stopped, late."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from submission.backends.hardware import ALONE
from submission.predict.inspect import _config as recorded_config
from submission.predict.plan import RunConfig
from submission.predict.run import BestAnswers
from submission.predict.strategies import DEFAULT_PROMPT
from submission.types import Prediction
from tests.conftest import Cli, command, environment, read_csv, write_csv

SCRIPTED = ("--backend", "scripted")


def prompts(path: Path) -> dict[str, str]:
    return {row[0]: row[1] for row in read_csv(path)[1:]}


def finished_rows(log: Path) -> list[bytes]:
    """The whole lines of a log."""
    content = log.read_bytes() if log.exists() else b""
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def test_the_best_answer_of_a_row_is_kept_however_many_there_are() -> None:
    answers = BestAnswers()
    ids = [f"row {number}" for number in range(2_500)]
    assert all(answers.put(Prediction(one, "early", "failed" if number % 2 else "ok", truncated=not number % 3))
               for number, one in enumerate(ids))  # fmt: skip
    assert (len(answers), set(answers)) == (2_500, set(ids))
    assert ids[7] in answers
    assert "another" not in answers
    assert not any(answers.put(Prediction(one, "", "failed", "later")) for one in ids)
    assert (answers[ids[6]].text, answers[ids[6]].status, answers[ids[6]].truncated) == ("early", "ok", True)
    assert (answers[ids[7]].status, answers[ids[7]].reason) == ("failed", "later")
    assert not answers.put(Prediction(ids[7], "better"))
    assert answers.get(ids[7]) == Prediction(ids[7], "better")
    assert answers.put(Prediction("\udcff", "odd"))
    assert len(answers) == 2_501


def test_a_run_writes_every_row_in_the_order_of_the_input(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    done = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", "batch=3", "--json")
    assert done.code == 0, done.err
    rows = read_csv(tmp_path / "s.csv")
    assert rows[0] == ["id", "rewrite_prompt"]
    assert [row[0] for row in rows[1:]] == [f"{number:02}" for number in range(20)]
    assert rows[8][1] == "Rewrite the text as row 07 asks."
    assert {"rows": 20, "fallbacks": 0, "truncated": 0, "computed": 20}.items() <= done.summary.items()
    assert done.summary["output"] == "s.csv"
    assert (tmp_path / done.summary["log"]).exists()
    manifest = json.loads((tmp_path / "s.csv.run.json").read_text())
    assert manifest["state"] == "complete"
    assert manifest["result"] == done.summary
    assert cli("validate", "s.csv", pairs_csv).code == 0


def test_the_same_command_again_computes_nothing_and_changes_nothing(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED)
    before = (tmp_path / "s.csv").read_bytes(), (tmp_path / "s.csv.calls.jsonl").read_bytes()
    (tmp_path / "s.csv").unlink()
    done = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--json")
    assert done.summary["computed"] == 0
    assert done.summary["rows_per_second"] == 0
    assert ((tmp_path / "s.csv").read_bytes(), (tmp_path / "s.csv.calls.jsonl").read_bytes()) == before


def test_other_options_and_texts_are_other_calls(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    run = ("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--json")
    assert cli(*run).summary["computed"] == 20
    assert cli(*run, "--template", "detailed").summary["computed"] == 20
    assert cli(*run).summary["computed"] == 0
    pairs_csv.write_text(pairs_csv.read_text().replace("text, 3", "text, three"))
    assert cli(*run).summary["computed"] == 1
    assert cli(*run, "--fresh").summary["computed"] == 20
    assert len(finished_rows(tmp_path / "s.csv.calls.jsonl")) == 20


def test_speed_limit_and_deadline_may_change_between_runs(cli: Cli, pairs_csv: Path) -> None:
    first = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--limit", 5, "--json")
    assert first.summary["rows"] == 5
    assert cli("validate", "s.csv", pairs_csv, "--limit", 5).code == 0
    assert cli("validate", "s.csv", pairs_csv).code == 1
    second = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", "batch=4", "--deadline", "60s", "--json")
    assert {"rows": 20, "computed": 15}.items() <= second.summary.items()


def test_scripted_answers_come_from_a_file(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps([" a pirate song.\n\nBecause it says arr."]))
    cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", "answers=answers.json", "--template", "short")
    assert set(prompts(tmp_path / "s.csv").values()) == {"Rewrite this text as a pirate song."}


def test_failing_and_empty_rows_take_the_fallback_and_are_counted(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    options = ("--set", "fail_ids=03,17", "--set", "empty_ids=05", "--set", "batch=8", "--template", "detailed")
    done = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, *options, "--fallback", "Make it new.", "--json")
    assert done.code == 0
    assert done.summary["fallbacks"] == 3
    assert done.summary["reasons"] == {"BackendError: scripted failure": 2, "empty answer": 1}
    assert {key for key, value in prompts(tmp_path / "s.csv").items() if value == "Make it new."} == {"03", "05", "17"}
    assert "2 x BackendError: scripted failure" in done.err


def test_too_many_failures_give_exit_code_3_and_a_valid_file(cli: Cli, pairs_csv: Path) -> None:
    fail = ("--set", "fail_ids=00,01,02,03,04")
    done = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, *fail, "--json")
    assert done.code == 3
    assert done.summary["exit_code"] == 3
    assert cli("validate", "s.csv", pairs_csv).code == 0
    assert cli("predict", pairs_csv, "-o", "t.csv", *SCRIPTED, *fail, "--max-failures", "0.25").code == 0


def test_blank_and_equal_texts_are_handled(cli: Cli, tmp_path: Path) -> None:
    rows = [("1", "a", ""), ("2", "", "b"), ("3", "same", "same"), ("4", " ", "\0 "), ("5", "\0a", "b\0")]
    path = write_csv(tmp_path / "t.csv", rows)
    done = cli("predict", path, "-o", "s.csv", *SCRIPTED, "--json")
    assert done.code == 0
    assert done.summary["reasons"] == {"blank rewritten_text": 2}
    assert prompts(tmp_path / "s.csv")["1"] == DEFAULT_PROMPT
    assert prompts(tmp_path / "s.csv")["3"] != DEFAULT_PROMPT


def test_header_only_input_gives_a_header_only_submission(cli: Cli, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [])
    for options in ((), SCRIPTED, ("--deadline", "30s")):
        done = cli("predict", path, "-o", "s.csv", *options, "--fresh", "--json")
        assert done.code == 0, done.err
        assert done.summary["rows"] == 0
        assert (tmp_path / "s.csv").read_text() == "id,rewrite_prompt\n"


def test_a_constant_needs_no_model(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    done = cli("predict", pairs_csv, "-o", "s.csv", "--recover", "constant", "--model", "none.gguf", "--json")
    assert done.code == 0
    assert set(prompts(tmp_path / "s.csv").values()) == {DEFAULT_PROMPT}
    (tmp_path / "c.toml").write_text('prompt = "Make it rhyme."')
    cli("predict", pairs_csv, "-o", "s.csv", "--recover", "constant", "--recover-config", "c.toml", "--fresh")
    assert set(prompts(tmp_path / "s.csv").values()) == {"Make it rhyme."}


OWN = """
from submission import Prediction, Request

def shout(pairs, models, budget):
    for pair in pairs:
        assert budget.remaining() > 0
        yield Prediction(pair.id, pair.rewritten_text.upper())
shout.roles = ()

class Ask:
    def __init__(self, setup):
        self.setup = setup
    def __call__(self, pairs, models, budget):
        for pair in pairs:
            request = Request(pair.id, self.setup.template.render(pair), self.setup.sampling)
            for key, completions in models["generator"].generate([request]):
                yield Prediction(key, self.setup.config["start"] + completions[0].text)
"""


def test_a_way_of_ones_own_is_a_function_or_a_class(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.toml").write_text('start = "Own: "')
    assert cli("predict", pairs_csv, "-o", "s.csv", "--recover", "own:shout").code == 0
    assert prompts(tmp_path / "s.csv")["07"] == "A REWRITTEN TEXT: 7!"
    done = cli("predict", pairs_csv, "-o", "t.csv", *SCRIPTED, "--recover", "own:Ask", "--recover-config", "own.toml")
    assert done.code == 0, done.err
    assert prompts(tmp_path / "t.csv")["07"] == "Own: Rewrite the text as row 07 asks."


def test_few_shot_shows_the_examples(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    header = ("id", "original_text", "rewritten_text", "rewrite_prompt")
    write_csv(tmp_path / "shots.csv", [(str(n), f"before {n}", f"after {n}", f"Do {n}") for n in range(5)], header)
    cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--shots", "shots.csv", "--n-shots", 2, "--recover", "few-shot")
    page = cli("inspect", "03", "--run", "s.csv").out
    assert "after 1\n\nInstruction:\n\nassistant: Do 1\n\nuser: Original text:\nAn original text, 3." in page
    assert "before 2" not in page


def test_inspect_shows_one_row_whole(cli: Cli, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("-1", "One original text.", "Another.")])
    cli("predict", path, "-o", "s.csv", *SCRIPTED)
    page = cli("inspect", "-1", "--run", "s.csv")
    assert page.code == 0, page.err
    assert "== original text\nOne original text." in page.out
    assert "tokens)" in page.out
    assert "== raw answer\nRewrite the text as row -1 asks." in page.out
    assert "== parsed answer\nRewrite the text as row -1 asks." in page.out
    assert "== status\nok\n\n== in the output\nRewrite the text as row -1 asks." in page.out
    assert cli("inspect", "2", "--run", "s.csv").code == 2
    assert cli("inspect", "2", "--run", "none.csv").code == 2


def test_long_texts_are_cut_and_counted(cli: Cli, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("1", "word " * 300_000, "end"), ("2", "a", "b")])
    done = cli("predict", path, "-o", "s.csv", *SCRIPTED, "--json")
    assert done.summary["truncated"] == 1
    page = cli("inspect", "1", "--run", "s.csv").out
    assert "texts cut to fit" in page
    assert "Which instruction turned" in page


def test_a_dry_run_tells_and_writes_nothing(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    done = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", "seconds_per_row=0.05", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.summary["rows"] == 20
    assert done.summary["tokens"] > 20
    assert done.summary["seconds"] > 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.csv"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_and_the_next_run_goes_on(
    cli: Cli, pairs_csv: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = ("predict", pairs_csv, "-o", "s.csv", *SCRIPTED)
    slow = command(*arguments, "--set", "seconds_per_row=0.2")
    process = subprocess.Popen(slow, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    log = tmp_path / "s.csv.calls.jsonl"
    while len(finished_rows(log)) < 3:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Run the same command again" in said
    assert "Traceback" not in said
    assert not (tmp_path / "s.csv").exists()
    before = finished_rows(log)
    done = cli(*arguments, "--json")
    assert done.summary["computed"] == 20 - len(before)
    assert finished_rows(log)[: len(before)] == before


@pytest.mark.parametrize("holding", ["hang_holds_gil=false", "hang_holds_gil=true"])
def test_a_signal_stops_a_run_whose_worker_hangs(holding: str, pairs_csv: Path, tmp_path: Path) -> None:
    more = ("--set", "hang_ids=04", "--set", "seconds_per_row=0.02", "--set", holding)
    hanging = command("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, *more)
    process = subprocess.Popen(hanging, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    while len(finished_rows(tmp_path / "s.csv.calls.jsonl")) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    # the third is in the log before it is counted, and the fourth may be on its way
    assert re.search("[234] of 20 rows were answered", said)


@pytest.mark.parametrize(
    "trouble",
    [("seconds_per_row=0.3",), ("seconds_per_row=0.05", "stall_every=10", "stall_seconds=60"),
     ("seconds_per_row=0.05", "hang_ids=12")],
    ids=["slow", "stalling", "hanging"],
)  # fmt: skip
def test_a_deadline_gives_a_whole_file(cli: Cli, tmp_path: Path, trouble: tuple[str, ...]) -> None:
    rows = [(str(number), "a", "b") for number in range(300)]
    path = write_csv(tmp_path / "t.csv", rows)
    options = [part for setting in trouble for part in ("--set", setting)]
    done = cli("predict", path, "-o", "s.csv", *SCRIPTED, *options, "--deadline", "6s", "--json")
    assert done.code == 0, done.err
    late = done.summary["reasons"]["deadline"]
    assert late > 200
    assert done.summary["fallbacks"] == late
    assert cli("validate", "s.csv", path).code == 0
    assert len(finished_rows(tmp_path / "s.csv.calls.jsonl")) == 300 - late
    again = cli("predict", path, "-o", "s.csv", *SCRIPTED, "--json")
    assert {"computed": late, "fallbacks": 0}.items() <= again.summary.items()


def test_a_deadline_holds_when_a_worker_holds_its_interpreter(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    hang = ("--set", "hang_ids=12", "--set", "hang_holds_gil=true", "--set", "seconds_per_row=0.02")
    done = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, *hang, "--deadline", "6s", "--json")
    assert done.code == 0, done.err
    assert done.summary["computed"] in (11, 12)  # what it had just answered may be on its way
    assert done.summary["fallbacks"] == 20 - done.summary["computed"]
    assert cli("validate", "s.csv", pairs_csv).code == 0
    assert json.loads((tmp_path / "s.csv.run.json").read_text())["state"] == "complete"


def test_a_late_failure_share_does_not_count_rows_that_the_deadline_filled(cli: Cli, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [(str(number), "a", "b") for number in range(300)])
    done = cli("predict", path, "-o", "s.csv", *SCRIPTED, "--set", "seconds_per_row=0.2", "--deadline", "4s", "--json")
    assert done.summary["fallbacks"] > 250
    assert done.code == 0


def test_kills_lose_no_row_and_repeat_none(tmp_path: Path) -> None:
    from tests.bench.kill_loop import kill_loop

    report = kill_loop(tmp_path, backend="scripted", rows=60, kills=6, seed=0, victim="parent")
    assert report["rows"] == 60
    assert report["kills"] == 6


def test_nothing_but_the_files_of_the_run_is_left(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--deadline", "60s")
    assert sorted(os.listdir(tmp_path)) == ["s.csv", "s.csv.calls.jsonl", "s.csv.run.json", "test.csv"]


def test_inspect_works_from_anywhere_and_notices_a_changed_input(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert cli("predict", "test.csv", "-o", "runs/s.csv", *SCRIPTED).code == 0
    elsewhere = subprocess.run(
        command("inspect", "03", "--run", "s.csv"), cwd=tmp_path / "runs", env=environment(), check=False
    )
    assert elsewhere.returncode == 0
    pairs_csv.write_text(pairs_csv.read_text().replace("text, 3", "text, three"))
    changed = cli("inspect", "03", "--run", "runs/s.csv")
    assert changed.code == 2
    assert "was changed after the run" in changed.err


def test_a_disk_that_is_full_is_said_and_the_next_run_goes_on(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    import resource

    arguments = ("predict", pairs_csv, "-o", "s.csv", *SCRIPTED)
    full = subprocess.run(
        command(*arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2200, 2200)),
    )  # fmt: skip
    assert full.returncode == 1
    assert "cannot be written: File too large" in full.stderr
    assert "make room and run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    kept = len(finished_rows(tmp_path / "s.csv.calls.jsonl"))
    assert kept > 3
    assert cli(*arguments, "--json").summary["computed"] == 20 - kept


def test_what_a_killed_run_left_half_written_goes(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    mine = [".s.csv.mine.tmp", ".s.csv.abcdefgh.tmp", ".other.csv.prompt-recovery-abcdefgh.tmp"]
    for name in (".s.csv.prompt-recovery-abcdefgh.tmp", ".s.csv.run.json.prompt-recovery-1234567_.tmp", *mine):
        (tmp_path / name).write_text("half")
    cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED)
    assert sorted(path.name for path in tmp_path.glob(".*tmp")) == sorted(mine)


@pytest.mark.parametrize("redirection", ["2>&-", "2> >(true)", "> >(true)"])
def test_a_reader_that_has_gone_ends_no_run(redirection: str, pairs_csv: Path, tmp_path: Path) -> None:
    line = " ".join(command("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", "seconds_per_row=0.05", "--json"))
    done = subprocess.run(["bash", "-c", f"{line} {redirection}"], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0
    assert len(read_csv(tmp_path / "s.csv")) == 21


def test_blank_rows_do_not_hide_that_all_others_failed(cli: Cli, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [(str(n), "a", "" if n else "b") for n in range(20)])
    assert cli("predict", path, "-o", "s.csv", *SCRIPTED, "--set", "fail_ids=0").code == 3


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.4])
def test_a_signal_while_the_model_loads_stops_cleanly(delay: float, pairs_csv: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("predict", pairs_csv, "-o", "s.csv"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not psutil.Process(process.pid).children():  # until a worker begins
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Exception ignored" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("where", ["__init__", "__call__"])
def test_a_deadline_holds_when_a_strategy_does_not_come_back(
    where: str, cli: Cli, pairs_csv: Path, tmp_path: Path
) -> None:
    wait = {"__init__": "time.sleep(3600)", "__call__": "pass"}[where]
    (tmp_path / "own.py").write_text(
        f"""import time
from submission import Prediction
class Slow:
    roles = ()
    def __init__(self, setup):
        {wait}
    def __call__(self, pairs, models, budget):
        for number, pair in enumerate(pairs):
            if number == 5:
                time.sleep(3600)
            yield Prediction(pair.id, "Make it so.")
"""
    )
    done = cli("predict", pairs_csv, "-o", "s.csv", "--recover", "own:Slow", "--deadline", "4s", "--json")
    answered = 5 if where == "__call__" else 0
    assert {"rows": 20, "fallbacks": 20 - answered, "computed": answered}.items() <= done.summary.items(), done.err
    assert done.summary["seconds"] < 4
    assert "Traceback" not in done.err
    assert cli("validate", "s.csv", pairs_csv).code == 0


def test_what_is_known_is_written_when_no_worker_is_left(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        """import os, time
from submission import UserError
from submission.backends.scripted import Options, Scripted
from submission.predict.strategies import Ask

class Mortal(Scripted):
    def generate(self, requests):
        for key, answer in super().generate(requests):
            if key == "10":
                time.sleep(0.3)
                os._exit(7)
            yield key, answer

class Once:
    def fingerprint(self):
        return {"model": "once"}
    def load(self):
        if os.path.exists("mark"):
            raise UserError("there is no second time")
        open("mark", "w").close()
        return Mortal(None, Options(seconds_per_row=0.02))

class OnceOnly(Ask):
    roles = {"generator": Once()}
"""
    )
    done = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--recover", "own:OnceOnly", "--json")
    assert done.code == 3, done.err
    assert "there is no second time" in done.err
    assert "Traceback" not in done.err
    assert done.summary["computed"] == 10
    assert "there is no second time" in "".join(done.summary["reasons"])
    assert cli("validate", "s.csv", pairs_csv).code == 0


def test_a_run_of_an_earlier_version_is_looked_at_with_the_strategy_that_it_took(tmp_path: Path) -> None:
    config = {**asdict(RunConfig(tmp_path / "p.csv", tmp_path / "s.csv")), "placement": asdict(ALONE)}
    told = json.loads(json.dumps({"recover": "zero_shot", "config": config}, default=str))
    assert told["config"]["recover"] == ""
    assert recorded_config(told, tmp_path / "s.csv").recover == "zero_shot"
