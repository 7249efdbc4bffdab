"""`python -m ensemble`: this room is still empty; says what it will hold."""

from __future__ import annotations

import sys

PLAN = """\
ensemble tries to beat one answer: many candidates, judges, selectors.
Nothing of it is built yet. It will hold these commands:

    sample      candidates from several models, prompts and temperatures
    select      choose, score and explain the choice
    experiment  the study of when a judge helps
    trial       one row, looked at closely

What works today: python -m submission --help
"""


def main() -> int:
    """Print the plan; exit 2 when a command was asked for, since there is none yet."""
    print(PLAN, end="")
    return 2 if any(not argument.startswith("-") for argument in sys.argv[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
