"""Kills one run again and again with SIGKILL at random moments; no row may be lost, repeated or changed.

python -m tests.kill_loop --backend scripted --kills 50
python -m tests.kill_loop --backend llama_cpp --kills 50
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

from submission.calls.journal import journal_path
from submission.data.validation import validate
from tests.conftest import command, environment, write_examples


def kill_loop(folder: Path, *, backend: str, rows: int, kills: int, seed: int) -> dict[str, int]:
    """Run, kill, check, until the run ends by itself.

    Returns:
        kills, rows, and how many kills left a torn line.
    """
    draw = random.Random(seed)
    pairs = folder / "test.csv"
    ids = [f"{number:03}" for number in range(rows)]
    write_examples(pairs, ids)
    output = folder / "submission.csv"
    options = {
        "scripted": ["--set", "seconds_per_row=0.05"],
        # Two rows at a time: with the usual 32 the run would be over after a few kills.
        "llama_cpp": ["--max-new-tokens", "16", "--set", "streams=2"],
    }[backend]
    arguments = command("predict", pairs, "-o", output, "--backend", backend, *options, "--json")
    journal = journal_path(output)
    before = b""
    killed = torn = 0
    while True:
        with (folder / "out").open("w") as out:
            process = subprocess.Popen(arguments, env=environment(), stdout=out, stderr=subprocess.DEVNULL)
            if killed < kills:
                # Beginnings, single rows and the end of the run are all to be hit.
                _wait_for_rows(process, journal, len(before.splitlines()), draw)
                process.kill()
            process.wait()
        content = journal.read_bytes() if journal.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        assert whole.startswith(before), "a finished row was changed or lost"
        torn += whole != content
        counts = Counter(json.loads(line)["id"] for line in whole.splitlines()[1:])
        assert all(count == 1 for count in counts.values()), "a row was computed twice"
        before = whole
        if process.returncode == 0:
            break
        killed += 1
    summary = json.loads((folder / "out").read_text().splitlines()[-1])
    assert set(counts) == set(ids), "a row was lost"
    assert summary["rows"] == rows
    assert validate(output, ids) == []
    assert not list(folder.glob(".*.tmp")), "a killed run left a temporary file"
    return {"kills": killed, "rows": rows, "torn": torn}


def _wait_for_rows(process: subprocess.Popen[bytes], journal: Path, lines: int, draw: random.Random) -> None:
    wanted = lines + draw.choice([0, 0, 1, 1, 2])
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if len(journal.read_bytes().splitlines() if journal.exists() else b"") >= wanted:
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05) if draw.random() < 0.8 else draw.uniform(0, 0.4))


def main() -> None:
    """Run the loop in a temporary folder and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backend", default="scripted")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_loop(
            Path(folder), backend=arguments.backend, rows=arguments.rows, kills=arguments.kills, seed=arguments.seed
        )
    print(f"{report['kills']} kills over {report['rows']} rows: none lost, none repeated, none changed; "
          f"{report['torn']} torn lines dropped; the final file is valid")  # fmt: skip


if __name__ == "__main__":
    main()
