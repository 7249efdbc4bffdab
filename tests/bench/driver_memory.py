"""What a row costs the driver in memory and time, with a model that costs nothing or a real one. A study, not a test.

    python -m tests.bench.driver_memory --rows 10000,100000,1000000
    python -m tests.bench.driver_memory --rows 10000,100000 -- --workers 2
    python -m tests.bench.driver_memory --rows 50,5000 -- --model embedded-tuned --recover zero_shot

What comes behind `--` goes to `predict`. Peak memory is that of the largest process of the run, a model's if it has
one of its own; what a row adds is told beside the run with the fewest rows. No two rows have the same texts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import command, environment, write_examples


def measure(pairs: Path, output: Path, more: Sequence[str]) -> tuple[float, float, float]:
    """Rows per second of computing, seconds from start to end, and peak bytes of one run of `predict`."""
    free = [] if "--model" in more else ["--backend", "scripted", "--set", "batch=32"]
    arguments = command("predict", pairs, "-o", output, *free, "--json", *more)
    with (output.parent / "told").open("w+") as told, (output.parent / "log").open("w") as log:
        process = subprocess.Popen(arguments, env=environment(), stdout=told, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, (output.parent / "log").read_text()[-2000:]
        told.seek(0)
        summary = json.loads(told.read().splitlines()[-1])
    return summary["rows_per_second"], summary["seconds"], usage.ru_maxrss * 1024


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("more", nargs="*")
    asked = parser.parse_args()
    first: tuple[int, float] | None = None
    for rows in map(int, asked.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            pairs = Path(folder) / "pairs.csv"
            write_examples(pairs, map(str, range(rows)), numbered=True)
            speed, seconds, peak = measure(pairs, Path(folder) / "submission.csv", asked.more)
        first = first or (rows, peak)
        more = (peak - first[1]) / (rows - first[0]) if rows > first[0] else 0.0
        print(f"{rows:>9} rows  {seconds:7.1f} s  {rows / seconds:7.0f} rows/s in all, {speed:7.0f} while computing  "
              f"{peak / 1e6:6.0f} MB at the peak  {more:6.1f} bytes a row more", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
