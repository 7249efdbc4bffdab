"""Several processes behind one backend: same answers, nothing lost or doubled, whatever happens to a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from submission.backends import ModelSpec, model_spec
from submission.errors import BackendError, UserError
from submission.calls.fleet import shares
from submission.backends.hardware import Fleet, visible_gpus
from submission.calls.likelihoods import Likelihoods
from submission.data.tables import read_pairs
from submission.prompts.templates import get_template
from submission.types import Pair, Request, Sampling
from submission.calls.processes import Process, Workers
from tests.conftest import ROOT, Cli, command, environment

PAIRS = [Pair(str(number), f"text {number}", f"rewrite {number}") for number in range(300)]


def requests(pairs: list[Pair]) -> list[Request]:
    template = get_template("short")
    return [Request(pair.id, template.render(pair), Sampling()) for pair in pairs]


def scripted(*settings: str, workers: int = 2) -> ModelSpec:
    return model_spec("scripted", settings=list(settings), fleet=Fleet(workers))


def answered(backend: Workers, pairs: list[Pair]) -> list[tuple[str, str]]:
    return sorted((key, completions[0].text) for key, completions in backend.generate(requests(pairs)))


Opened = Callable[[ModelSpec], Workers]


@pytest.fixture
def opened() -> Iterator[Opened]:
    made: list[Workers] = []

    def open_(spec: ModelSpec) -> Workers:
        backend = spec.load()
        assert isinstance(backend, Workers)
        made.append(backend)
        return backend

    yield open_
    for backend in made:
        backend.close()


def test_two_processes_answer_like_one(opened: Opened) -> None:
    alone = model_spec("scripted").load()
    expected = sorted((key, completions[0].text) for key, completions in alone.generate(requests(PAIRS)))
    backend = opened(scripted())
    assert answered(backend, PAIRS) == expected
    assert answered(backend, PAIRS[:3]) == [one for one in expected if int(one[0]) < 3]


def test_likelihoods_come_from_processes_too(opened: Opened) -> None:
    backend = opened(scripted(workers=3))
    template = get_template("short")
    asked = [(template.render(pair), "a b c"[: 1 + 2 * (number % 3)]) for number, pair in enumerate(PAIRS)]
    found = Likelihoods(lambda: backend).of(asked)
    assert [known.tokens for known in found] == [1 + number % 3 for number in range(len(PAIRS))]


def kill(worker: Process) -> None:
    if worker.process is not None and worker.process.pid:
        os.kill(worker.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("victims", [1, 2])
def test_a_killed_process_is_replaced_and_its_rows_are_asked_again(opened: Opened, victims: int) -> None:
    backend = opened(scripted("seconds_per_row=0.01"))
    keys = []
    for number, (key, _) in enumerate(backend.generate(requests(PAIRS))):
        keys.append(key)
        if number == 40:
            for worker in backend.members[:victims]:
                kill(worker)
    assert sorted(keys, key=int) == [pair.id for pair in PAIRS]


def test_processes_that_die_again_and_again_make_the_call_fail(opened: Opened) -> None:
    backend = opened(scripted("seconds_per_row=0.05"))
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.4):
            for worker in backend.members:
                kill(worker)

    thread = threading.Thread(target=kill_all)
    thread.start()
    try:
        with pytest.raises((BackendError, UserError), match="killed by signal 9"):
            list(backend.generate(requests(PAIRS)))
    finally:
        over.set()
        thread.join()


def test_an_error_in_a_process_is_the_call_s_error_and_the_next_call_works(opened: Opened) -> None:
    backend = opened(scripted("fail_ids=7", "seconds_per_row=0.002"))
    with pytest.raises(BackendError, match="scripted failure"):
        list(backend.generate(requests(PAIRS)))
    rest = [pair for pair in PAIRS if pair.id != "7"]
    assert sorted(int(key) for key, _ in answered(backend, rest)) == [int(pair.id) for pair in rest]


def test_a_call_that_is_left_does_not_disturb_the_next(opened: Opened) -> None:
    backend = opened(scripted("seconds_per_row=0.002"))
    for key, _ in backend.generate(requests(PAIRS)):
        if key == "5":
            break
    assert sorted(int(key) for key, _ in answered(backend, PAIRS[200:])) == list(range(200, 300))


def test_an_error_of_who_asks_comes_after_the_answers_to_what_was_asked(opened: Opened) -> None:
    def failing() -> Iterator[Request]:
        yield from requests(PAIRS[:20])
        raise RuntimeError("the table ends in the middle")

    keys: list[str] = []

    def read() -> None:
        keys.extend(key for key, _ in opened(scripted()).generate(failing()))

    with pytest.raises(RuntimeError, match="in the middle"):
        read()
    assert len(keys) == 20


def test_a_model_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"broken\.gguf"):
        model_spec("llama_cpp", str(broken), fleet=Fleet(2)).load()


def test_cores_and_memory_are_divided_and_every_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_gpus() == ["2", "3"]
    spec = model_spec("llama_cpp", settings=["threads=0"], fleet=Fleet(2))
    (first, gpu), (_, other) = shares(spec, 2)
    assert (gpu["CUDA_VISIBLE_DEVICES"], other["CUDA_VISIBLE_DEVICES"]) == ("2", "3")
    assert first.fleet.alone
    assert first.options.threads == max(1, len(os.sched_getaffinity(0)) // 2)
    assert first.options.memory > 0
    assert Fleet(0).count == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Fleet(0).alone
    assert shares(spec, 2)[0][1] == {}


def test_the_number_of_processes_is_no_part_of_what_decides_the_answers() -> None:
    assert scripted(workers=2).fingerprint() == scripted(workers=1).fingerprint()


def test_the_embedded_model_in_two_processes_predicts_as_in_one(cli: Cli, tmp_path: Path) -> None:
    table = ROOT / "examples" / "test.csv"
    one = cli("predict", table, "-o", "one.csv", "--limit", 6, "--json")
    two = cli("predict", table, "-o", "two.csv", "--limit", 6, "--json", "--workers", 2)
    assert (one.code, two.code) == (0, 0), two.err
    assert two.summary["fallbacks"] == 0
    lines = [(tmp_path / name).read_text().splitlines() for name in ("one.csv", "two.csv")]
    same = sum(a == b for a, b in zip(*lines, strict=True))
    assert same >= 6  # header included: near-ties may fall either way


def test_a_killed_driver_leaves_no_process_behind_and_resumes(tmp_path: Path) -> None:
    table = ROOT / "examples" / "test.csv"
    run = command("predict", table, "-o", "out.csv", "--backend", "scripted", "--set", "seconds_per_row=0.2",
                  "--workers", 2)  # fmt: skip
    process = subprocess.Popen(run, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.csv.journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    process.wait()
    for _ in range(100):
        left = [pid for pid in children if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]
        if not left:
            break
        time.sleep(0.1)
    assert left == []
    done = subprocess.run([*run, "--json"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == len(read_pairs(table))


def state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_the_deadline_holds_with_processes_that_hang(cli: Cli, tmp_path: Path) -> None:
    table = ROOT / "examples" / "test.csv"
    done = cli(
        "predict", table, "-o", "out.csv", "--backend", "scripted", "--workers", 2, "--json",
        "--set", "hang_ids=story-robot", "--set", "hang_holds_gil=true", "--deadline", "6s",
    )  # fmt: skip
    assert done.summary["reasons"].get("deadline", 0) >= 1
    assert done.summary["rows"] == len(read_pairs(ROOT / "examples" / "test.csv"))
