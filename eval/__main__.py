"""`python -m eval`: this room is still empty; says what it will hold."""

from __future__ import annotations

import sys

PLAN = """\
eval measures predictions: the metric, baselines, comparisons, reports.
Nothing of it is built yet. It will hold these commands:

    score       the metric with its interval, for one submission
    baselines   constant, retrieval, zero-shot and few-shot on one table
    constant    the best constant prompt for a training set
    compare     paired differences between runs
    throughput  speed beside what you would use instead
    report      a self-contained HTML report

What works today: python -m submission --help
"""


def main() -> int:
    """Print the plan; exit 2 when a command was asked for, since there is none yet."""
    print(PLAN, end="")
    return 2 if any(not argument.startswith("-") for argument in sys.argv[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
