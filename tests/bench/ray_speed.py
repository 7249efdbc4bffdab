"""What several copies of a model cost and bring, on this machine. A study, not a test.

    python -m tests.bench.ray_speed PAIRS.csv --rows 400

Rows per second of computing, as `predict` sums them up, of one process with all threads, of `--ray local` with one
worker, of two processes with half the threads each, and of the same on Ray; each as a ratio to the first, in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.conftest import environment

_WAYS: dict[str, Sequence[str]] = {
    "one process": (),
    "Ray, one worker": ("--ray", "local", "--workers", "1"),
    "two processes": ("--workers", "2"),
    "Ray, two workers": ("--ray", "local", "--workers", "2"),
}


def rows_per_second(pairs: Path, rows: int, more: Sequence[str]) -> float:
    """Of one run of `predict`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "submission", "predict", str(pairs), "-o", f"{folder}/out.csv", "--json",
                   "--limit", str(rows), *more]  # fmt: skip
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["rows_per_second"])


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the backend")
    parser.add_argument("--backend", default="llama_cpp")
    asked = parser.parse_args()
    options = ["--backend", asked.backend, *(part for setting in asked.set for part in ("--set", setting))]
    speeds: dict[str, list[float]] = {way: [] for way in _WAYS}
    for _ in range(asked.turns):
        for way, more in _WAYS.items():
            speeds[way].append(rows_per_second(asked.pairs, asked.rows, [*options, *more]))
    first = median(speeds["one process"])
    for way, found in speeds.items():
        print(f"{way:<18} {median(found):8.2f} rows/s  {median(found) / first:.3f} of one process")


if __name__ == "__main__":
    main()
