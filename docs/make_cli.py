"""Write docs/CLI.md, the reference of all commands, from the commands themselves.

python docs/make_cli.py            # writes it
python docs/make_cli.py --check    # exits with 1 if it is out of date
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer._click as click
from typer.cli import get_docs_for_click
from typer.main import get_command

FILE = Path(__file__).with_name("CLI.md")
ROOMS = ("submission", "eval", "train", "ensemble")


def page() -> str:
    """The content of the page."""
    return "\n".join(_parts()).rstrip() + "\n"


def _parts() -> Iterator[str]:
    yield "# Commands\n\nEvery command with all its options, as `--help` prints them. Made by `make docs`.\n"
    for room in ROOMS:
        name = f"python -m {room}"
        command = get_command(importlib.import_module(f"{room}.__main__").app)
        context: Any = click.Context(command, info_name=name)
        told = get_docs_for_click(obj=command, ctx=context, name=name)
        told = re.sub(r"^\* `--help`: .*\n", "", told, flags=re.MULTILINE)
        told = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", told)  # cut off in mid-sentence
        told = re.sub(r"\*\*Options\*\*:\n+(?=\*\*|#|$)", "", told)
        yield re.sub(r"\n{3,}", "\n\n", told).replace("\n#", "\n##").replace("# `", "## `", 1)


def main() -> int:
    """Write the page, or check it."""
    made = page()
    if "--check" in sys.argv[1:]:
        if FILE.is_file() and FILE.read_text(encoding="utf-8") == made:
            return 0
        print(f"{FILE.name} is not what the commands say: make docs", file=sys.stderr)
        return 1
    FILE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
