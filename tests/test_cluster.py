"""A real Ray cluster of two nodes on this machine: the same rows as one process, whatever dies."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from submission.backends import ModelSpec, model_spec
from submission.backends.hardware import Placement
from submission.calls.log import Log
from submission.calls.models import Models, open_models
from submission.calls.ray import ActorBody, Actors, connect
from submission.errors import MissingExtra, UserError
from submission.prompts.templates import get_template
from submission.types import Failure
from tests.bench.ray_kills import one_run
from tests.conftest import ROOT, Cli
from tests.test_calls import PAIRS, requests

ray = pytest.importorskip("ray")
utils = pytest.importorskip("ray.cluster_utils")

TABLE = ROOT / "examples" / "test.csv"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes of two CPUs."""
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def scripted(placement: Placement, *settings: str) -> ModelSpec:
    return model_spec("scripted", settings=list(settings), placement=placement)


@contextmanager
def opened(spec: ModelSpec, log: Path) -> Iterator[Models]:
    with open_models({"m": spec}, Log(log)) as models:
        yield models


def numbers(models: Models, after: int = -1, harm: Any = None) -> list[int]:
    found = []
    for count, (key, answer) in enumerate(models["m"].generate(requests(PAIRS))):
        assert not isinstance(answer, Failure)
        found.append(int(key))
        if count == after:
            harm()
    return sorted(found)


def process_of(models: Models, number: int) -> int:
    pool = models["m"]._pool
    assert pool is not None
    return int(ray.get(pool.workers[number].handle.actor.process.remote()))


def test_a_cluster_gives_the_answers_of_one_process(nodes: Any, cli: Cli, tmp_path: Path) -> None:
    plain = cli("predict", TABLE, "-o", "plain.csv", "--backend", "scripted")
    there = cli("predict", TABLE, "-o", "ray.csv", "--backend", "scripted", "--ray", nodes.address, "--workers", 2)
    assert (plain.code, there.code) == (0, 0), there.err
    assert (tmp_path / "plain.csv").read_text() == (tmp_path / "ray.csv").read_text()


def test_a_model_answers_on_a_cluster(nodes: Any, cli: Cli, shallow_gguf: Path) -> None:
    cluster = ("--ray", nodes.address, "--workers", 2)
    done = cli("predict", TABLE, "-o", "out.csv", "--model", shallow_gguf, *cluster, "--limit", 4, "--json")
    assert done.code == 0, done.err
    assert done.summary["fallbacks"] == 0


def test_a_cluster_is_started_for_the_run(cli: Cli, tmp_path: Path) -> None:
    done = cli("predict", TABLE, "-o", "out.csv", "--backend", "scripted", "--ray", "local", "--workers", 2, "--json")
    assert done.code == 0, done.err
    assert done.summary["fallbacks"] == 0


@pytest.mark.parametrize("kill", ["worker", "node"])
def test_what_dies_on_the_cluster_loses_no_row_and_doubles_none(
    nodes: Any, kill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submission.calls.ray._PLACE_SECONDS", 60.0)  # six actors begin late on a busy machine
    ray.init(address=nodes.address, log_to_driver=False, ignore_reinit_error=True)
    more = nodes.add_node(num_cpus=2) if kill == "node" else None
    spec = scripted(Placement(6 if more else 2, nodes.address, cpus=1), "seconds_per_row=0.01")
    try:
        with opened(spec, tmp_path / "l") as models:

            def harm() -> None:
                if more is None:
                    os.kill(process_of(models, 0), signal.SIGKILL)
                else:
                    nodes.remove_node(more, allow_graceful=False)

            assert numbers(models, 40, harm) == list(range(300))
            assert models.computed == 300
    finally:
        if more is not None and more in nodes.worker_nodes:  # the next tests count on four CPUs
            nodes.remove_node(more, allow_graceful=False)


@pytest.mark.slow
def test_the_deadline_holds_on_a_cluster(nodes: Any, cli: Cli) -> None:
    options = ("--backend", "scripted", "--set", "hang_ids=diary-snow", "--ray", nodes.address, "--workers", 2)
    done = cli("predict", TABLE, "-o", "out.csv", *options, "--deadline", "20s", "--json")
    assert done.code == 0, done.err
    assert set(done.summary["reasons"]) == {"deadline"}  # of one row, unless the cluster is slow to begin
    assert done.summary["seconds"] < 20


@pytest.mark.slow
def test_workers_that_find_room_begin(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(scripted(Placement(3, nodes.address, cpus=1)), tmp_path / "a") as first:
        assert numbers(first) == list(range(300))
        monkeypatch.setattr("submission.calls.ray._PLACE_SECONDS", 5.0)  # they never find room: waited for in vain
        slow = scripted(Placement(2, nodes.address, cpus=1), "seconds_per_row=0.02")
        with opened(slow, tmp_path / "b") as second:
            assert numbers(second) == list(range(300))
    assert "has no room for worker" in caplog.text


@pytest.mark.slow
def test_kills_of_anything_lose_no_row(nodes: Any, tmp_path: Path) -> None:
    killed = one_run(nodes, tmp_path, "scripted", rows=200, kills=2, draw=random.Random(1))
    assert killed.total() == 2


def test_likelihoods_come_from_the_cluster(nodes: Any, tmp_path: Path) -> None:
    template = get_template("short")
    items = ((pair.id, template.render(pair), "a b c") for pair in PAIRS)
    with opened(scripted(Placement(2, nodes.address, cpus=1)), tmp_path / "l") as models:
        found = dict(models["m"].loglikelihood(items))
    assert {getattr(one, "tokens", None) for one in found.values()} == {3}


def test_too_few_resources_are_said_at_once(nodes: Any) -> None:
    for placement, said in ((Placement(64, nodes.address, cpus=1), "lower --workers"),
                        (Placement(1, nodes.address, gpus=1.0), "GPUs are too many")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            Actors(scripted(placement), placement)


def test_a_model_that_is_missing_on_a_node_names_the_node(tmp_path: Path) -> None:
    model = tmp_path / "gone.gguf"
    model.write_bytes(b"GGUF" + bytes(64))
    spec = model_spec("llama_cpp", str(model))
    model.unlink()
    ((kind, words),) = next(ActorBody().serve(spec))
    assert kind == "refused"
    assert f"on node {socket.gethostname()}" in words


@pytest.mark.parametrize("listens", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cluster_that_is_not_there_is_said_within_seconds(cli: Cli, listens: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if listens:  # and never answers
            server.listen()
        began = time.monotonic()
        done = cli("predict", TABLE, "-o", "out.csv", "--backend", "scripted", "--ray", address)
        seconds = time.monotonic() - began
    assert done.code == 2, done.err
    assert f"--ray {address}" in done.err
    assert "Traceback" not in done.err
    assert seconds < 25  # 15 for the cluster, the rest for Python and Ray to start


@pytest.mark.parametrize(("name", "version"), [("ray_version", "1.13.0"), ("python_version", "3.8.20")])
def test_another_version_on_the_cluster_is_said(nodes: Any, cli: Cli, name: str, version: str) -> None:
    """The cluster says that it is another one: what it tells to those that connect is changed."""
    stored: Any = ray._raylet.GcsClient(address=nodes.address)
    key, space = b"CLUSTER_METADATA", b"cluster"
    before = stored.internal_kv_get(key, space)
    stored.internal_kv_put(key, json.dumps({**json.loads(before), name: version}).encode(), True, space)
    try:
        began = time.monotonic()
        done = cli("predict", TABLE, "-o", "out.csv", "--backend", "scripted", "--ray", nodes.address)
        seconds = time.monotonic() - began
    finally:
        stored.internal_kv_put(key, before, True, space)
    assert (done.code, "another version of Ray or Python" in done.err, version in done.err) == (2, True, True), done.err
    assert seconds < 25


def test_without_ray_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[ray\]'"):
        model_spec("scripted", placement=Placement(2, "local"))


def test_connecting_twice_is_connecting_once(nodes: Any) -> None:
    threads = [threading.Thread(target=connect, args=(Placement(2, nodes.address),)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert ray.is_initialized()
