"""Kills workers, raylets and drivers of runs on a Ray cluster at random; no row may be lost, repeated or changed.

python -m tests.bench.ray_kills --runs 10
python -m tests.bench.ray_kills --runs 10 --backend llama_cpp --rows 40
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from submission.calls.log import log_path
from submission.data.validation import validate
from tests.conftest import command, environment, write_examples

VICTIMS = ("worker", "raylet", "driver")
_SETTINGS = {"scripted": ["--set", "seconds_per_row=0.05"], "llama_cpp": ["--max-new-tokens", "12"]}


def workers() -> list[psutil.Process]:
    """The actors that hold a model, on the nodes that this process started."""
    return [process for process in psutil.Process().children(recursive=True) if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.startswith("ray::ActorBody") for part in process.cmdline())
    except psutil.Error:
        return False


def one_run(nodes: Any, folder: Path, backend: str, rows: int, kills: int, draw: random.Random) -> Counter[str]:
    """Predict with four workers on two nodes of two CPUs; kill so often, whoever; go on until the run ends.

    Returns:
        what was killed.
    """
    pairs, output = folder / "test.csv", folder / "submission.csv"
    ids = [f"{number:04}" for number in range(rows)]
    write_examples(pairs, ids)
    arguments = command("predict", pairs, "-o", output, "--backend", backend, *_SETTINGS[backend], "--json",
                        "--ray", nodes.address, "--workers", 4, "--ray-cpus", 1)  # fmt: skip
    killed: Counter[str] = Counter()
    node = nodes.add_node(num_cpus=2)
    while True:
        with (folder / "out").open("w") as out, (folder / "log").open("a") as log:
            driver = subprocess.Popen(arguments, env=environment(), stdout=out, stderr=log)
            while driver.poll() is None and killed.total() < kills:
                _wait_for_rows(driver, log_path(output), draw.randint(1, max(2, rows // 4)))
                victim = draw.choice(VICTIMS)
                if victim == "driver":
                    driver.kill()
                elif victim == "raylet":
                    nodes.remove_node(node, allow_graceful=False)
                    time.sleep(draw.uniform(0, 2))
                    node = nodes.add_node(num_cpus=2)
                elif alive := workers():
                    draw.choice(alive).kill()
                killed[victim] += 1
            driver.wait()
        if driver.returncode == 0:
            break
        assert driver.returncode == -9, f"exit code {driver.returncode}: {(folder / 'log').read_text()[-2000:]}"
    nodes.remove_node(node, allow_graceful=False)
    lines = log_path(output).read_text(encoding="utf-8").splitlines()
    digests = Counter(json.loads(line)[1] for line in lines if line.startswith("[") and line.endswith("]"))
    assert len(digests) == rows, "a row was lost"
    assert set(digests.values()) == {1}, "a row was computed twice"
    assert validate(output, ids) == []
    told = (folder / "out").read_text()
    assert told.startswith("{"), told
    summary = json.loads(told.splitlines()[-1])
    assert (summary["rows"], summary["fallbacks"]) == (rows, 0), summary
    return killed


def _wait_for_rows(driver: subprocess.Popen[bytes], log: Path, more: int) -> None:
    """Until so many rows more are in the log."""

    def lines() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    wanted = lines() + more
    while driver.poll() is None and lines() < wanted:
        time.sleep(0.01)


def main() -> None:
    """Run again and again, and print what was killed."""
    from ray.cluster_utils import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--kills", type=int, default=3, help="in each run")
    parser.add_argument("--backend", default="scripted", choices=_SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    killed: Counter[str] = Counter()
    try:
        for number in range(asked.runs):
            with tempfile.TemporaryDirectory() as folder:
                draw = random.Random(asked.seed + number)
                found = one_run(nodes, Path(folder), asked.backend, asked.rows, asked.kills, draw)
            print(f"run {number + 1}: {', '.join(f'{count} x {what}' for what, count in found.items())}", flush=True)
            killed += found
    finally:
        nodes.shutdown()
    told = ", ".join(f"{count} {what}s" for what, count in killed.items())
    print(f"{asked.runs} runs of {asked.rows} rows, killed {told}: no row lost, none twice, all files valid")


if __name__ == "__main__":
    main()
