"""Kills one run again and again with SIGKILL at random moments; nothing computed may be lost, repeated or changed.

python -m tests.bench.kill_loop --victim parent --kills 50
python -m tests.bench.kill_loop --victim worker --kills 50
python -m tests.bench.kill_loop --victim group --kills 50 --backend embedded
python -m tests.bench.kill_loop --backend ensemble --kills 20
python -m tests.bench.kill_loop --backend search --kills 10 --rows 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from submission.backends.models import EMBEDDED, resolve_gguf
from submission.calls.log import log_path
from submission.data.validation import validate
from tests.conftest import command, environment, read_csv, write_examples
from tests.tiny_models import cut_gguf

# Three sources, a target and a judge.
_ENSEMBLE = """
selector = "likelihood+judge_yes_no"
[[source]]
name = "a"
backend = "scripted"
settings = ["seconds_per_row=0.02"]
n = 2
[[source]]
name = "b"
backend = "scripted"
settings = ["seconds_per_row=0.02", "batch=2"]
n = 2
[[source]]
name = "c"
backend = "scripted"
settings = ["seconds_per_row=0.02", "batch=3"]
greedy = false
n = 2
[target]
model = "embedded"
backend = "scripted"
settings = ["seconds_per_row=0.01"]
[judge]
model = "embedded"
backend = "scripted"
settings = ["seconds_per_row=0.01", "batch=2"]
"""
# The default model answers; two layers of the embedded model are the target.
_SEARCH = """
proposals = 12
[[source]]
n = 3
max_new_tokens = 14
[target]
model = "{target}"
"""
VICTIMS = ("parent", "worker", "group", "stopped worker", "stopped parent")


def kill_loop(folder: Path, *, backend: str, rows: int, kills: int, seed: int, victim: str) -> dict[str, int]:
    """Run, kill, check, until the run ends by itself.

    Args:
        folder: to work in.
        backend: of the run.
        rows: of the table.
        kills: how many.
        seed: of their moments.
        victim: one of `VICTIMS`; a worker is killed while its run goes on, what is stopped goes on after a second.

    Returns:
        kills, rows, and how many kills left a torn line.
    """
    draw = random.Random(seed)
    pairs, output = folder / "test.csv", folder / "submission.csv"
    ids = [f"{number:03}" for number in range(rows)]
    write_examples(pairs, ids)
    (folder / "best_of.toml").write_text(_ENSEMBLE)
    if backend == "search":
        target = folder / "target.gguf"
        cut_gguf(resolve_gguf(EMBEDDED), target, 2)
        (folder / "search.toml").write_text(_SEARCH.format(target=target))
    options = {
        "scripted": ["--backend", "scripted", "--set", "seconds_per_row=0.05"],
        # Two rows at a time: with the usual number the run would be over after a few kills.
        "embedded": ["--recover", "zero_shot", "--max-new-tokens", "16", "--set", "streams=2"],
        "ensemble": ["--recover", "best_of", "--recover-config", str(folder / "best_of.toml")],
        "search": ["--recover", "search", "--recover-config", str(folder / "search.toml")],
    }[backend]
    arguments = command("predict", pairs, "-o", output, *options, "--json")
    log = log_path(output)
    expected = _unkilled(folder, arguments)
    before = b""
    killed = torn = 0
    while True:
        with (folder / "out").open("w") as out, (folder / "err").open("a") as err:
            process = subprocess.Popen(arguments, env=environment(), stdout=out, stderr=err, start_new_session=True)
            while killed < kills and process.poll() is None:
                # Beginnings, single rows and the end of the run are all to be hit.
                # A worker that dies three times while it loads is given up: each gets to answer something.
                least = len(before.splitlines()) + ("worker" in victim)
                _wait_for_rows(process, log, least, draw)
                if process.poll() is not None or not _harm(process, victim):
                    continue
                killed += 1
                before = _whole(log)
                if victim in ("parent", "group"):
                    break
            process.wait()
        content = log.read_bytes() if log.exists() else b""
        whole = _whole(log)
        assert content.startswith(before), "a finished call was changed or lost"
        torn += whole != content
        before = whole
        _check_gone(process.pid)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (folder / "err").read_text()
    again = subprocess.run(arguments, env=environment(), check=True, capture_output=True, text=True)
    assert json.loads(again.stdout.splitlines()[-1])["computed"] == 0, "a second run computes something"
    assert log.read_bytes() == content, "a second run writes to the log"
    digests = Counter(json.loads(line)[1] for line in whole.splitlines() if line.startswith(b"["))
    assert all(count == 1 for count in digests.values()), "a call was computed twice"
    summary = json.loads((folder / "out").read_text().splitlines()[-1])
    assert summary["rows"] == rows
    assert summary["fallbacks"] == 0
    assert validate(output, ids) == []
    assert read_csv(output) == expected, "an answer was changed"
    assert not list(folder.glob(".*.tmp")), "a killed run left a temporary file"
    return {"kills": killed, "rows": rows, "torn": torn}


def _unkilled(folder: Path, arguments: list[str]) -> list[list[str]]:
    place = arguments.index("-o") + 1
    other = folder / "unkilled.csv"
    fast = [part for part in arguments if part != "seconds_per_row=0.05"]
    if len(fast) < len(arguments):
        del fast[fast.index("--set")]
    subprocess.run([*fast[:place], str(other), *fast[place + 1 :]], env=environment(), check=True, capture_output=True)
    return read_csv(other)


def _whole(log: Path) -> bytes:
    content = log.read_bytes() if log.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _children(process: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in listed.split()]


def _harm(process: subprocess.Popen[bytes], victim: str) -> bool:
    """Kill or stop; False if there is nothing to be harmed now."""
    if victim == "parent":
        process.kill()
    elif victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "stopped parent":
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)
    else:
        workers = _children(process.pid)
        for worker in workers:
            try:
                os.kill(worker, signal.SIGKILL if victim == "worker" else signal.SIGSTOP)
            except ProcessLookupError:
                return False
        return bool(workers)
    return True


def _check_gone(session: int) -> None:
    """Nothing of the run is left a moment after its end."""
    end = time.monotonic() + 5
    while (left := _alive(session)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left, f"processes are left: {left}"


def _alive(session: int) -> list[str]:
    listed = subprocess.run(
        ["ps", "-s", str(session), "-o", "pid=,stat=,args="], capture_output=True, text=True, check=False
    )
    return [line for line in listed.stdout.splitlines() if line.split()[1][0] != "Z"]


def _wait_for_rows(process: subprocess.Popen[bytes], log: Path, lines: int, draw: random.Random) -> None:
    wanted = lines + draw.choice([0, 0, 1, 1, 2])
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if len(_whole(log).splitlines()) >= wanted:
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05) if draw.random() < 0.8 else draw.uniform(0, 0.4))


def main() -> None:
    """Run the loop in a temporary folder and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backend", default="scripted", choices=("scripted", "embedded", "ensemble", "search"))
    parser.add_argument("--victim", default="parent", choices=VICTIMS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_loop(
            Path(folder), backend=given.backend, rows=given.rows, kills=given.kills, seed=given.seed,
            victim=given.victim,
        )  # fmt: skip
    print(
        f"{report['kills']} kills ({given.victim}) over {report['rows']} rows: none lost, none repeated, none changed, "
        f"nothing left running; {report['torn']} torn lines; the final file is that of a run without kills"
    )


if __name__ == "__main__":
    main()
