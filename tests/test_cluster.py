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
from pathlib import Path
from typing import Any

import pytest

from submission.backends import ModelSpec, model_spec
from submission.backends.hardware import Fleet
from submission.calls.ray import Cluster, Worker, connect
from submission.errors import MissingExtra, UserError
from submission.prompts.templates import get_template
from tests.conftest import ROOT, Cli, scored
from tests.fleet_kills import one_run
from tests.test_workers import PAIRS, requests

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


def scripted(*settings: str) -> ModelSpec:
    return model_spec("scripted", settings=list(settings))


def numbers(backend: Cluster, after: int = -1, harm: Any = None) -> list[int]:
    found = []
    for count, (key, _) in enumerate(backend.generate(requests(PAIRS))):
        found.append(int(key))
        if count == after:
            harm()
    return sorted(found)


def process_of(backend: Cluster, number: int) -> int:
    return int(ray.get(backend.members[number].handle.process.remote()))


def test_a_cluster_gives_the_answers_of_one_process(nodes: Any, cli: Cli, tmp_path: Path) -> None:
    plain = cli("predict", TABLE, "-o", "plain.csv", "--backend", "scripted")
    there = cli("predict", TABLE, "-o", "ray.csv", "--backend", "scripted", "--ray", nodes.address, "--workers", 2)
    assert (plain.code, there.code) == (0, 0), there.err
    assert (tmp_path / "plain.csv").read_text() == (tmp_path / "ray.csv").read_text()


def test_the_embedded_model_answers_on_a_cluster(nodes: Any, cli: Cli) -> None:
    done = cli("predict", TABLE, "-o", "out.csv", "--ray", nodes.address, "--workers", 2, "--limit", 4, "--json")
    assert done.code == 0, done.err
    assert done.summary["fallbacks"] == 0


def test_a_cluster_is_started_for_the_run(cli: Cli, tmp_path: Path) -> None:
    done = cli("predict", TABLE, "-o", "out.csv", "--backend", "scripted", "--ray", "local", "--workers", 2, "--json")
    assert done.code == 0, done.err
    assert done.summary["fallbacks"] == 0


@pytest.mark.parametrize("kill", ["worker", "node"])
def test_what_dies_on_the_cluster_loses_no_row_and_doubles_none(
    nodes: Any, kill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submission.calls.ray._PLACE_SECONDS", 5.0)
    ray.init(address=nodes.address, log_to_driver=False, ignore_reinit_error=True)
    more = nodes.add_node(num_cpus=2) if kill == "node" else None
    backend = Cluster(scripted("seconds_per_row=0.01"), Fleet(6 if more else 2, nodes.address, cpus=1))

    def harm() -> None:
        if more is None:
            os.kill(process_of(backend, 0), signal.SIGKILL)
        else:
            nodes.remove_node(more, allow_graceful=False)

    try:
        assert numbers(backend, 40, harm) == list(range(300))
        assert numbers(backend) == list(range(300))  # the next call, with those that are left
    finally:
        backend.close()


def test_the_deadline_holds_on_a_cluster(nodes: Any, cli: Cli) -> None:
    options = ("--backend", "scripted", "--set", "hang_ids=diary-snow", "--ray", nodes.address, "--workers", 2)
    done = cli("predict", TABLE, "-o", "out.csv", *options, "--deadline", "20s", "--json")
    assert done.code == 0, done.err
    assert set(done.summary["reasons"]) == {"deadline"}  # of one row, unless the cluster is slow to begin
    assert done.summary["seconds"] < 20


def test_workers_that_find_room_begin(nodes: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("submission.calls.ray._PLACE_SECONDS", 3.0)
    first = Cluster(scripted(), Fleet(3, nodes.address, cpus=1))
    second = Cluster(scripted(), Fleet(2, nodes.address, cpus=1))
    try:
        assert "has room for 1 of 2 workers" in capsys.readouterr().err
        assert numbers(second) == list(range(300))
    finally:
        first.close()
        second.close()


def test_kills_of_anything_lose_no_row(nodes: Any, tmp_path: Path) -> None:
    killed = one_run(nodes, tmp_path, "scripted", rows=200, kills=2, draw=random.Random(1))
    assert killed.total() == 2


def test_likelihoods_come_from_the_cluster(nodes: Any) -> None:
    backend = Cluster(scripted(), Fleet(2, nodes.address, cpus=1))
    template = get_template("short")
    items = ((pair.id, template.render(pair), "a b c") for pair in PAIRS)
    try:
        assert {found.tokens for found in scored(backend, items).values()} == {3}
    finally:
        backend.close()


def test_too_few_resources_are_said_at_once(nodes: Any) -> None:
    with pytest.raises(UserError, match="lower --workers"):
        Cluster(scripted(), Fleet(64, nodes.address, cpus=1))
    with pytest.raises(UserError, match="GPUs are too many"):
        Cluster(scripted(), Fleet(1, nodes.address, gpus=1.0))


def test_a_model_that_is_missing_on_a_node_names_the_node(tmp_path: Path) -> None:
    model = tmp_path / "gone.gguf"
    model.write_bytes(b"GGUF" + bytes(64))
    spec = model_spec("llama_cpp", str(model))
    model.unlink()
    assert f"on node {socket.gethostname()}" in Worker().load(spec)


@pytest.mark.parametrize("listens", [False, True])
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
        model_spec("scripted", fleet=Fleet(2, "local"))


def test_connecting_twice_is_connecting_once(nodes: Any) -> None:
    threads = [threading.Thread(target=connect, args=(Fleet(2, nodes.address),)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert ray.is_initialized()
