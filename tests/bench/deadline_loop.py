"""Deadlines in a row: 1,000 rows at 0.2 s each must give a complete valid file in under 20 s, stalls or not.

python -m tests.bench.deadline_loop --tries 10
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from submission.data.tables import write_table
from submission.data.validation import validate
from tests.conftest import PAIR_HEADER, command, environment

TROUBLES = (
    (),
    ("stall_every=20", "stall_seconds=2"),
    ("stall_every=70", "stall_seconds=100"),
    ("hang_ids=50",),
    ("batch=64",),
)


def main() -> None:
    """Run the tries and print each; ends with an error at the first that is late or not valid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--deadline", type=float, default=20)
    arguments = parser.parse_args()
    for number in range(arguments.tries):
        trouble = TROUBLES[number % len(TROUBLES)]
        with tempfile.TemporaryDirectory() as folder:
            pairs, output = Path(folder) / "test.csv", Path(folder) / "submission.csv"
            write_table(pairs, PAIR_HEADER, [(str(row), "a text", "a rewritten text") for row in range(1000)])
            settings = [part for setting in ("seconds_per_row=0.2", *trouble) for part in ("--set", setting)]
            options = ["--backend", "scripted", *settings, "--deadline", f"{arguments.deadline}s", "--json"]
            start = time.monotonic()
            done = subprocess.run(
                command("predict", pairs, "-o", output, *options),
                env=environment(), capture_output=True, text=True, check=False,
            )  # fmt: skip
            seconds = time.monotonic() - start
            problems = validate(output, [str(row) for row in range(1000)])
        summary = json.loads(done.stdout.splitlines()[-1])
        rows = f"{summary['computed']} rows computed, {summary['fallbacks']} filled"
        verdict = problems[0] if problems else "valid"
        print(f"try {number + 1}: {seconds:.2f} s, exit {done.returncode}, {rows}, {verdict}  {' '.join(trouble)}")
        if problems or done.returncode != 0 or seconds >= arguments.deadline:
            raise SystemExit("the deadline was missed")


if __name__ == "__main__":
    main()
