"""Models in processes of their own: same answers, nothing lost or doubled, whatever happens to a process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from submission.backends import ModelSpec, model_spec
from submission.backends.hardware import Placement, visible_gpus
from submission.calls.log import Log
from submission.calls.models import Limits, Models, encode, open_models
from submission.calls.supervisor import DeadlineReached
from submission.calls.ways import Tokenizing, Way, ways
from submission.data.tables import read_pairs
from submission.errors import UserError
from submission.prompts.templates import get_template
from submission.types import Encoded, Failure, Pair, Request, Sampling
from tests.conftest import ROOT, Cli, command, environment

PAIRS = [Pair(str(number), f"text {number}", f"rewrite {number}") for number in range(300)]
ALL = [pair.id for pair in PAIRS]


def requests(pairs: Iterable[Pair]) -> list[Request]:
    template = get_template("short")
    return [Request(pair.id, template.render(pair), Sampling()) for pair in pairs]


def scripted(*settings: str, workers: int = 1) -> ModelSpec:
    return model_spec("scripted", settings=list(settings), placement=Placement(workers))


@contextmanager
def opened(path: Path, spec: ModelSpec, limits: Limits | None = None) -> Iterator[Models]:
    with open_models({"m": spec}, Log(path / "calls.jsonl"), limits or Limits()) as models:
        yield models


def ask(models: Models, pairs: Iterable[Pair] = PAIRS, harm: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Answers by key, or reasons of failures; no key comes twice."""
    found: dict[str, Any] = {}
    for number, (key, answer) in enumerate(models["m"].generate(requests(pairs))):
        assert key not in found
        found[key] = answer.reason if isinstance(answer, Failure) else answer[0].text
        harm(number)
    return found


EXPECTED = {key: f"Rewrite the text as row {key} asks." for key in ALL}


def processes(models: Models) -> list[int]:
    pool = models["m"]._pool
    return [] if pool is None else [worker.handle.process.pid for worker in pool.workers]


def gone(process: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_computed_is_never_computed_again(workers: int, tmp_path: Path) -> None:
    with opened(tmp_path, scripted(workers=workers)) as models:
        assert ask(models, PAIRS[:100]) == {key: EXPECTED[key] for key in ALL[:100]}
        assert (models.found, models.computed) == (0, 100)
        pids = processes(models)
        assert len(pids) == workers
    assert all(map(gone, pids))
    with opened(tmp_path, scripted(workers=3 - workers)) as models:
        assert ask(models) == EXPECTED
        assert (models.found, models.computed) == (100, 200)
    with opened(tmp_path, scripted()) as models:
        assert ask(models) == EXPECTED
        assert (models.found, models.computed, processes(models)) == (300, 0, [])


def test_what_is_asked_twice_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [Request(key, requests(PAIRS[:1])[0].chat, Sampling()) for key in ("a", "b", "c")]
    for keyed, computed in ((False, 1), (True, 3)):
        monkeypatch.setattr("submission.backends.scripted.KEYED", keyed)
        with open_models({"m": scripted()}, Log(tmp_path / str(keyed))) as models:
            found = dict(models["m"].generate(same))
            assert set(found) == {"a", "b", "c"}
            assert models.computed == computed


def test_likelihoods_and_prompts_come_from_workers_too(tmp_path: Path) -> None:
    template = get_template("short")
    asked = [(pair.id, template.render(pair), "a b c"[: 1 + 2 * (n % 3)]) for n, pair in enumerate(PAIRS)]
    with opened(tmp_path, scripted(workers=3)) as models:
        found = dict(models["m"].loglikelihood(asked))
    assert [getattr(found[pair.id], "tokens", None) for pair in PAIRS] == [1 + n % 3 for n in range(len(PAIRS))]
    seen = dict(encode(scripted(), [("1", template.render(PAIRS[1]), 40), ("2", "three plain words", 0)]))
    first, second = seen["1"], seen["2"]
    assert isinstance(first, Encoded)
    assert "rewrite 1" in first.text
    assert second == Encoded(3, False, "three plain words", 2048)
    mine: Any = Tokenizing(scripted()).load()
    chat = template.render(PAIRS[1])
    found = dict(mine.encode(iter([("1", chat, 40), ("2", "three plain words", 0), ("no room", chat, 4000)])))
    assert isinstance(found.pop("no room"), Failure)
    assert found == seen


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
@pytest.mark.parametrize("victims", [1, 2])
def test_a_lost_worker_is_replaced_and_its_items_are_asked_again(
    number: signal.Signals, victims: int, tmp_path: Path
) -> None:
    with opened(tmp_path, scripted("seconds_per_row=0.003", workers=2)) as models:

        def harm(count: int) -> None:
            if count == 40:
                for process in processes(models)[:victims]:
                    os.kill(process, number)

        assert ask(models, harm=harm) == EXPECTED
        assert (models.computed, models.failed) == (300, 0)


@pytest.mark.parametrize("trouble", [("fail_ids=7,8,100",), ("fail_ids=7,8,100", "batch=16"), ("fail_every=5",)])
def test_a_batch_that_fails_is_divided_until_the_culprit_stands_alone(trouble: tuple[str, ...], tmp_path: Path) -> None:
    with opened(tmp_path, scripted(*trouble)) as models:
        found = ask(models)
    bad = {"7", "8", "100"} if "fail_ids=7,8,100" in trouble else set()
    assert found == {key: "BackendError: scripted failure" if key in bad else EXPECTED[key] for key in ALL}


DEADLY = """
import os, time
from submission.backends.scripted import Scripted
from submission.errors import DeviceLostError

class Deadly(Scripted):
    def generate(self, requests):
        for key, answer in super().generate(requests):
            if key in os.environ["DEADLY"].split(","):
                if os.environ["HOW"] == "lost":
                    raise DeviceLostError("CUDA error: device-side assert triggered")
                os.abort() if os.environ["HOW"] == "abort" else time.sleep(3600)
            yield key, answer
"""


class DeadlySpec:
    """A model whose worker ends, or hangs, at some rows."""

    def fingerprint(self) -> dict[str, str]:
        return {"model": "deadly"}

    def load(self) -> object:
        space: dict[str, Any] = {}
        exec(DEADLY, space)
        return space["Deadly"]()


@pytest.mark.parametrize("how", ["abort", "hang", "lost"])
def test_an_item_that_kills_its_worker_fails_alone(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADLY", "33,200")
    monkeypatch.setenv("HOW", how)
    pairs = PAIRS[30:36] if how == "hang" else PAIRS
    limits = Limits(stall=0.5) if how == "hang" else Limits()
    with open_models({"m": DeadlySpec()}, Log(tmp_path / "l"), limits) as models:
        found = ask(models, pairs)
    said = {"abort": "signal 6", "hang": "gave no answer", "lost": "device-side assert"}[how]
    for pair in pairs:
        assert (said in found[pair.id]) if pair.id in ("33", "200") else found[pair.id] == EXPECTED[pair.id]


def test_a_worker_that_lost_its_gpu_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Every later call would fail in it, and look like an answer that went wrong."""
    monkeypatch.setenv("DEADLY", "33")
    monkeypatch.setenv("HOW", "lost")
    with open_models({"m": DeadlySpec()}, Log(tmp_path / "l")) as models:
        list(models["m"].generate(requests(PAIRS[:1])))
        (first,) = processes(models)
        found = ask(models, PAIRS[:60])
        assert first not in processes(models)
        assert gone(first)
    assert "device-side assert" in found.pop("33")
    assert found == {key: EXPECTED[key] for key in ALL[:60] if key != "33"}
    assert any("lost its GPU: CUDA error: device-side assert triggered" in line for line in said)


def test_a_model_that_always_dies_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADLY", ",".join(ALL))
    monkeypatch.setenv("HOW", "abort")
    with open_models({"m": DeadlySpec()}, Log(tmp_path / "l")) as models:
        found = ask(models)
    assert all("signal 6" in found[key] for key in ALL)


def test_failures_are_tried_again_by_the_next_run(tmp_path: Path) -> None:
    with opened(tmp_path, scripted("fail_ids=7")) as models:
        assert ask(models)["7"] == "BackendError: scripted failure"
    with opened(tmp_path, scripted()) as models:
        assert ask(models) == EXPECTED
        assert (models.found, models.computed) == (299, 1)


def test_a_call_within_a_call_and_one_that_is_left(tmp_path: Path) -> None:
    with opened(tmp_path, scripted("seconds_per_row=0.001")) as models:
        outer = []
        for key, _ in models["m"].generate(requests(PAIRS[:20])):
            outer.append(key)
            ((inner, _),) = models["m"].generate(requests([PAIRS[100 + int(key)]]))
            assert inner == str(100 + int(key))
        assert sorted(outer, key=int) == ALL[:20]
        for key, _ in models["m"].generate(requests(PAIRS[20:100])):
            if key == "25":
                break
        assert ask(models, PAIRS[200:]) == {key: EXPECTED[key] for key in ALL[200:]}


def test_an_error_of_who_asks_comes_after_the_answers_to_what_was_asked(tmp_path: Path) -> None:
    def failing() -> Iterator[Request]:
        yield from requests(PAIRS[:20])
        raise RuntimeError("the table ends in the middle")

    keys: list[str] = []

    def read() -> None:
        with opened(tmp_path, scripted()) as models:
            keys.extend(key for key, _ in models["m"].generate(failing()))

    with pytest.raises(RuntimeError, match="in the middle"):
        read()
    assert len(keys) == 20


@pytest.mark.parametrize("trouble", ["seconds_per_row=0.1", "hang_ids=12", "hang_holds_gil=true", "loading"])
def test_the_deadline_ends_all_workers(trouble: str, tmp_path: Path) -> None:
    settings = ["hang_ids=12", trouble] if trouble.startswith("hang") else [trouble]
    limits = Limits(end=time.monotonic() + (1.0 if trouble != "loading" else 0.01))
    spec = model_spec("llama_cpp") if trouble == "loading" else scripted(*settings, workers=2)
    found: list[str] = []
    pids: list[int] = []

    def run() -> None:
        with opened(tmp_path, spec, limits) as models:
            for key, _ in models["m"].generate(requests(PAIRS)):
                found.append(key)
                pids[:] = processes(models)

    with pytest.raises(DeadlineReached):
        run()
    assert len(found) < 300
    assert all(map(gone, pids))
    assert len(Log(tmp_path / "calls.jsonl", read_only=True)) >= len(found)


def test_a_model_that_cannot_be_loaded_says_so_and_writes_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with (
        pytest.raises(UserError, match=r"broken\.gguf"),
        opened(tmp_path, model_spec("llama_cpp", str(broken))) as models,
    ):
        ask(models)
    assert list(tmp_path.iterdir()) == [broken]


def test_a_log_alone_computes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, scripted()) as models:
        ask(models, PAIRS[:3])
    with open_models({"m": scripted()}, Log(tmp_path / "calls.jsonl", read_only=True), compute=False) as models:
        assert len(ask(models, PAIRS[:3])) == 3
        assert ask(models, PAIRS[:4])["3"] == "not in the log"
        assert (models.found, models.missing) == (6, 1)


def test_roles_of_one_model_share_it(tmp_path: Path) -> None:
    with open_models({"a": scripted(), "b": scripted(), "c": scripted("batch=2")}, Log(tmp_path / "l")) as models:
        assert models["a"] is models["b"]
        assert models["a"] is not models["c"]


def test_on_gpus_one_model_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {"a": scripted(), "b": scripted("batch=2")}
    for gpus, left in (("", 1), ("0", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        with open_models(specs, Log(tmp_path / f"l{gpus}")) as models:
            list(models["a"].generate(requests(PAIRS[:1])))
            list(models["b"].generate(requests(PAIRS[1:2])))
            pool = models["a"]._pool
            assert (0 if pool is None else len(pool.workers)) == left


# -- ways of holding a model -----------------------------------------------------------------------------------


def test_cores_and_memory_are_divided_and_every_worker_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_gpus() == ["2", "3"]
    spec = model_spec("llama_cpp", settings=["threads=0"], placement=Placement(2))
    carrier: Any = Way(spec).carrier()
    (first, gpu), (_, other) = carrier._shares
    assert (gpu["CUDA_VISIBLE_DEVICES"], other["CUDA_VISIBLE_DEVICES"]) == ("2", "3")
    assert first.placement == Placement()
    assert first.options.threads == max(1, len(os.sched_getaffinity(0)) // 2)
    assert first.options.memory > 0
    assert Placement(0).count == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone: Any = Way(spec).carrier()
    assert alone._shares[0][1] == {}


def test_a_model_in_trouble_is_held_smaller_and_then_on_the_cpu(
    hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    spec = model_spec("transformers", str(hf_folder), settings=["load_in_4bit=true"], placement=Placement(2))
    asked, small, cpu = ways(spec)
    assert (asked.what, asked.words) == (spec, "")
    assert (small.what.options.batch, small.what.placement.count) == (4, 1)  # type: ignore[attr-defined]
    assert small.what.options.load_in_4bit  # type: ignore[attr-defined]
    assert not cpu.what.options.load_in_4bit  # type: ignore[attr-defined]
    assert cpu.environment == {"CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [way.words for way in ways(scripted())] == [""]


class GpuOnly:
    """A model that fails wherever it sees a GPU."""

    def __init__(self, name: str = "asked") -> None:
        self.name = name

    def fingerprint(self) -> dict[str, str]:
        return {"model": "gpu"}

    def load(self) -> object:
        from submission.backends.scripted import Scripted

        def answer(request: Request) -> str:
            if self.name != "cpu":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return EXPECTED[request.key]

        return Scripted(answer)


@pytest.mark.parametrize(("most", "answered"), [(0.2, 300), (1.0, 0)])
def test_if_too_many_fail_they_are_asked_in_a_safer_way(
    most: float, answered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Way(GpuOnly()), Way(GpuOnly("small"), "smaller"), Way(GpuOnly("cpu"), "on the CPU")]
    monkeypatch.setattr("submission.calls.models.ways", lambda _: iter(steps))
    with open_models({"m": GpuOnly()}, Log(tmp_path / "l"), Limits(max_failures=most)) as models:
        found = ask(models)
        assert models.degraded == (["smaller", "on the CPU"] if answered else [])
    assert sum(found[key] == EXPECTED[key] for key in ALL) == answered


def test_the_number_of_workers_is_no_part_of_what_decides_the_answers() -> None:
    assert scripted(workers=2).fingerprint() == scripted(workers=1).fingerprint()


# -- runs ------------------------------------------------------------------------------------------------------


def test_a_model_in_two_workers_predicts_as_in_one(cli: Cli, shallow_gguf: Path, tmp_path: Path) -> None:
    table = ROOT / "examples" / "test.csv"
    common = ("--model", shallow_gguf, "--temperature", 1)
    one = cli("predict", table, "-o", "one.csv", *common, "--limit", 4, "--max-new-tokens", 8, "--json")
    two = cli("predict", table, "-o", "two.csv", *common, "--limit", 4, "--max-new-tokens", 8, "--json", "--workers", 2)
    assert (one.code, two.code) == (0, 0), two.err
    assert two.summary["fallbacks"] == 0
    lines = [(tmp_path / name).read_text().splitlines() for name in ("one.csv", "two.csv")]
    same = sum(a == b for a, b in zip(*lines, strict=True))
    assert same >= 4  # header included: near-ties may fall either way
    assert len({line.partition(",")[2] for line in lines[0]}) > 3, "answers differ, so that swapped ones would be seen"


def test_a_killed_run_leaves_no_process_behind_and_resumes(cli: Cli, tmp_path: Path) -> None:
    table = ROOT / "examples" / "test.csv"
    run = ("predict", table, "-o", "out.csv", "--backend", "scripted", "--set", "seconds_per_row=0.2", "--workers", 2)
    process = subprocess.Popen(command(*run), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    log = tmp_path / "out.csv.calls.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 5:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    process.kill()
    process.wait()
    for _ in range(100):
        if all(gone(int(child)) for child in children):
            break
        time.sleep(0.1)
    assert all(gone(int(child)) for child in children)
    known = log.read_bytes().count(b"\n")
    done = cli(*run, "--json")
    assert done.code == 0, done.err
    assert done.summary["computed"] == len(read_pairs(table)) - known


def test_the_deadline_holds_with_workers_that_hang(cli: Cli) -> None:
    table = ROOT / "examples" / "test.csv"
    done = cli(
        "predict", table, "-o", "out.csv", "--backend", "scripted", "--workers", 2, "--json",
        "--set", "hang_ids=story-robot", "--set", "hang_holds_gil=true", "--deadline", "6s",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.summary["reasons"].get("deadline", 0) >= 1
    assert done.summary["seconds"] < 6
    assert done.summary["rows"] == len(read_pairs(table))


def test_workers_come_and_go_without_a_trace(tmp_path: Path) -> None:
    before = threading.active_count()
    for number in range(3):
        with open_models({"m": scripted()}, Log(tmp_path / str(number))) as models:
            ask(models, PAIRS[:2])
    time.sleep(0.2)
    assert threading.active_count() <= before + 1


def test_neighbours_that_kill_their_worker_cost_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADLY", "0,1,2,3")
    monkeypatch.setenv("HOW", "abort")
    with open_models({"m": DeadlySpec()}, Log(tmp_path / "l")) as models:
        list(models["m"].generate(requests(PAIRS[200:202])))  # it has answered before
        found = ask(models, PAIRS[:100])
    assert {key for key, text in found.items() if text != EXPECTED[key]} == {"0", "1", "2", "3"}


def test_many_rows_that_fail_cost_no_other_row(tmp_path: Path) -> None:
    bad = ",".join(map(str, range(100)))
    with opened(tmp_path, scripted(f"fail_ids={bad}")) as models:
        list(models["m"].generate(requests(PAIRS[200:202])))
        found = ask(models, PAIRS[:200])
    assert {key for key, text in found.items() if text != EXPECTED[key]} == set(ALL[:100])


def test_a_call_goes_on_where_another_gave_its_workers_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Way(scripted("fail_ids=200,201,202")), Way(scripted(), "smaller")]
    monkeypatch.setattr("submission.calls.models.ways", lambda _: iter(steps))
    with opened(tmp_path, scripted()) as models:
        outer: list[str] = []
        for key, answer in models["m"].generate(requests(PAIRS[:200])):
            assert not isinstance(answer, Failure)
            if not outer:
                inner = dict(models["m"].generate(requests(PAIRS[200:203])))
                assert not [one for one in inner.values() if isinstance(one, Failure)]
            outer.append(key)
        assert sorted(outer, key=int) == ALL[:200]
        assert models.degraded == ["smaller"]


def test_what_was_computed_is_logged_though_nobody_asks_for_it(tmp_path: Path) -> None:
    with opened(tmp_path, scripted()) as models:
        answers = models["m"].generate(requests(PAIRS[:100]))
        next(answers)
        time.sleep(0.5)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        assert len(models.log) > 20


class Unsendable(DeadlySpec):
    """A model that cannot travel to a worker."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_workers_outlive_the_thread_that_asked_first(tmp_path: Path) -> None:
    with opened(tmp_path, scripted(workers=2)) as models:
        thread = threading.Thread(target=ask, args=(models, PAIRS[:10]))
        thread.start()
        thread.join()
        before = processes(models)
        time.sleep(0.3)
        assert ask(models) == EXPECTED
        assert processes(models) == before


@pytest.mark.slow
def test_a_hang_costs_a_part_of_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submission.calls.supervisor._KNOWN", 5)
    monkeypatch.setattr("submission.calls.supervisor._SLOWER", 0.0)
    with opened(tmp_path, scripted("hang_ids=40", "batch=4", workers=2), Limits(time.monotonic() + 30)) as models:
        found = ask(models, PAIRS[:80])
    assert {key for key, answer in found.items() if answer != EXPECTED[key]} == {"40"}
    assert "gave no answer" in found["40"]


def test_a_slow_consumer_makes_nobody_look_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submission.calls.supervisor._ATTENTIVE", -1.0)
    with opened(tmp_path, scripted()) as models:
        ask(models, PAIRS[:10])
        pool = models["m"]._pool
        assert pool is not None
        assert (pool._answers, pool._slowest) == (10, 0.0)


def test_a_model_that_cannot_travel_is_said(tmp_path: Path) -> None:
    with (
        open_models({"m": Unsendable()}, Log(tmp_path / "l")) as models,
        pytest.raises(UserError, match="cannot be sent"),
    ):
        ask(models, PAIRS[:2])
