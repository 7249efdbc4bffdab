"""Run the commands of the pages as they stand there, in a copy with small tables; a command, not a test.

    make docs-check                                  # README.md and docs/QUICKSTART.md, about a quarter of an hour
    python -m tests.bench.docs_check docs/TRAIN.md --list

Commands are those of ```sh blocks that begin with `.venv/bin/python -m`, each once. Long ones are run at a small size
(`_SMALL`); what needs what is not at hand (`_NOT_HERE`) is left out, and said so. Exits with 1 if a command failed.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.conftest import ROOT

_PAGES = ("docs/QUICKSTART.md", "README.md")  # the first makes the bundle that the second rehearses
_NOT_HERE = {
    "submission push": "sends to Kaggle",
    "--attach gemma": "the model is Kaggle's, and my-lora an adapter of it",
    "--model models/gemma-7b-it": "the model is Kaggle's",
}
_SMALL = {
    "train/recipes/": ["--dry-run"],
    "train run --triplets": ["--set", "sft.max_steps=2", "--set", "score.limit=2", "--set", "sft.samples=0"],
    "ensemble trial": ["--rows", "3"],
    "predict pairs.csv": ["--limit", "3"],
}
_TUNED = "runs/embedded/merged-q8_0.gguf"  # of a recipe that is not run to its end here


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page, each as its words."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == [".venv/bin/python", "-m"]:
                yield words


def prepare(folder: Path) -> None:
    """Put what the pages' names stand for into a folder: tables, and models that load in moments."""
    from submission.backends.models import embedded_gguf, tuned_adapter
    from tests.tiny_models import tiny_adapter, tiny_model

    for name in ("examples", "docs", "train", "submission", "eval", "ensemble", "pyproject.toml", "README.md",
                 "kernel-metadata.json", "LICENSE", ".venv"):  # fmt: skip
        (folder / name).symlink_to(ROOT / name)
    with (ROOT / "examples" / "triplets.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:40]
    for name, count in {"triplets.csv": 40, "pairs.csv": 40, "TRIPLETS.csv": 4}.items():
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows[:count])
    gguf = embedded_gguf()
    assert gguf is not None
    (folder / "model.gguf").symlink_to(gguf)
    (folder / "lora.gguf").symlink_to(tuned_adapter())
    tiny_adapter(folder / "ADAPTER_DIR", tiny_model(folder / "DIR", "mistral"), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them, and tell of each how it ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=_PAGES)
    parser.add_argument("--list", action="store_true", help="print the commands, and run none")
    asked = parser.parse_args(arguments)
    found = list({shlex.join(words): words for page in asked.pages for words in commands(ROOT / page)}.values())
    if asked.list:
        print("\n".join(map(shlex.join, found)))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory(prefix="docs-check-") as name:
        folder = Path(name)
        prepare(folder)
        for words in found:
            line = shlex.join(words[2:])
            reason = next((why for part, why in _NOT_HERE.items() if part in line), "")
            if reason:
                print(f"left out       {line}  ({reason})", flush=True)
                continue
            more = next((more for part, more in _SMALL.items() if part in line), [])
            if _TUNED in words and not (folder / _TUNED).exists():
                (folder / _TUNED).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / "model.gguf", folder / _TUNED)
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, *words[1:], *(word for word in more if "--dry-run" not in words)], cwd=folder,
                capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(folder)},
            )  # fmt: skip
            state = "ran" if done.returncode == 0 else f"FAILED ({done.returncode})"
            print(f"{state:<11}{time.monotonic() - began:4.0f} s {line} {shlex.join(more)}", flush=True)
            if done.returncode:
                failed += 1
                print(done.stderr[-2000:], flush=True)
    print(f"{failed} of {len(found)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
