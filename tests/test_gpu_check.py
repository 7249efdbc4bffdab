"""The GPU check: what it lists and needs, its table and limits, parts that crash, hang, or cannot run here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment
from tests.gpu import __main__ as gpu
from tests.gpu.floor import Done, Pace, read_bytes
from tests.gpu.report import Figure, PartResult, as_json, table
from tests.gpu.runner import Part, run_part
from tests.test_calls import gone


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_it_lists_its_parts_and_what_has_to_travel() -> None:
    listed = check("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [part.name for part in gpu.PARTS]
    needs = check("--needs", "--parts", "training").stdout.splitlines()
    names = {line.partition("==")[0] for line in needs}
    assert {"transformers", "tokenizers", "safetensors", "accelerate", "peft", "bitsandbytes", "trl", "typer"} <= names
    assert not [name for name in names if name.startswith(("torch", "nvidia", "triton", "cuda"))]
    assert all("==" in line for line in needs), "in the versions that are tested"
    refused = check("--parts", "sped")
    assert refused.returncode == 2
    assert "'sped'" in refused.stderr


def test_parts_are_chosen_by_name_and_by_group() -> None:
    assert [part.name for part in gpu.chosen("training, parity")] == ["parity", "training-bfloat16", "training-float16"]
    assert gpu.chosen("") == list(gpu.PARTS)


def test_what_cannot_run_here_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without, parts = {"gpu": None}, {part.name: part for part in gpu.PARTS}
    for name, part in parts.items():
        assert ("no GPU" in gpu.reason_to_leave_out(part, without, device="cpu", small=False)) == (name != "parity")
        assert "no GPU" in gpu.reason_to_leave_out(part, without, device="cuda", small=True)
    monkeypatch.setattr(gpu, "missing", lambda names: [name for name in names if name == "trl"])
    assert gpu.reason_to_leave_out(parts["training-float16"], without, device="cpu", small=True) == "not installed: trl"
    assert gpu.reason_to_leave_out(parts["speed-gemma"], without, device="cpu", small=True) == ""


def test_folders_of_the_user_stay_where_models_are_to_lie(tmp_path: Path) -> None:
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "mine.txt").write_text("mine")
    done = check("--parts", "parity", "--small", "--device", "cpu", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "parity" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-check", "parity"]


def test_limits_decide_what_is_well() -> None:
    assert Figure("a", 0.5, high=0.5).ok is True
    assert Figure("a", 0.51, high=0.5).ok is False
    assert Figure("a", 0.89, low=0.9, high=1.1).ok is False
    assert Figure("a", float("nan"), high=1.0).ok is False
    assert Figure("a", 0.5).ok is None
    assert Figure("a", None, high=0.5).ok is None
    results = {
        "one": PartResult(
            "done", "", 3.0, [Figure("gap", 2.0, "nats", high=1, note="why"), Figure("b", None, note="c")]
        ),
        "two": PartResult("left out", "no GPU"),
    }
    assert [result.ok for result in results.values()] == [False, True]
    lines = [" ".join(line.split()) for line in table(results)]
    assert lines == ["one: done, 3 s", "BAD gap 2 nats at most 1; why", "b: left out: c", "two: left out (no GPU)"]
    told = json.loads(as_json({"gpu": None}, results, small=True))
    assert told["small"] is True
    assert told["parts"]["one"]["figures"][0]["ok"] is False


FAKES = """
import os, subprocess, time
from pathlib import Path

def hang(check, path):
    Path(path).write_text(str(subprocess.Popen(["sleep", "3600"]).pid))
    check.put("before", 1.0)
    time.sleep(3600)

def crash(check):
    check.put("before", 2.0)
    os.abort()

def fail(check):
    raise ValueError("of this reason")
"""


def test_a_part_that_hangs_or_crashes_loses_nothing_that_it_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(name: str, limit: float, **options: str) -> PartResult:
        return run_part(Part(name, "", f"fakes:{name}", options), device="cpu", small=True, work=tmp_path, limit=limit)

    for seconds in (2.0, 10.0, 60.0):  # on a busy machine it takes its time to tell anything
        hung = run("hang", seconds, path=str(tmp_path / "pid"))
        if hung.figures:
            break
    crashed, failed = run("crash", 60), run("fail", 60)
    assert (hung.state, [figure.value for figure in hung.figures]) == ("ended", [1.0])
    assert f"{seconds:.0f} s" in hung.why
    assert gone(int((tmp_path / "pid").read_text())), "what it had started ends with it"
    assert (crashed.state, [figure.value for figure in crashed.figures]) == ("failed", [2.0])
    assert "signal 6" in crashed.why
    assert "of this reason" in failed.why
    assert not any(result.ok for result in (hung, crashed, failed))


def test_the_floor_is_the_longer_of_bytes_and_arithmetic() -> None:
    """Worked out by hand: 100 weights in layers, 10 x 5 in a tied head, no cache to speak of."""
    from submission.predict.capacity import ModelShape, Precision

    shape = ModelShape("gemma", 1, 5, 4, 1, 1, 2, 10, tied=True)
    layers = 2 * 5 * 2 * 2 + 3 * 5 * 4
    assert shape.layer_parameters == layers == 100
    assert read_bytes(shape, Precision(16)) == 2 * (100 + 50)
    untied = ModelShape("mistral", 1, 5, 4, 1, 1, 2, 10, tied=False)
    assert read_bytes(untied, Precision(16)) == 2 * (100 + 50)
    cache = 4 * (6 + 3 / 2) * shape.kv_bytes
    slow_memory = Pace(1e30, 10.0).answers(shape, Precision(16), Done(8, 8, 6, 3, 4))
    assert slow_memory == pytest.approx(2 * 3 * (300 + cache) / 10)
    slow_products = Pace(10.0, 1e30).answers(shape, Precision(16), Done(8, 8, 6, 3, 4))
    prefill = 8 * (2 * 100 * 6 + 2 * 1 * 1 * 2 * 6**2 + 2 * 50)
    assert slow_products == pytest.approx((prefill + 2 * 3 * 2 * 4 * 150) / 10)
