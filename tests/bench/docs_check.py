"""Run the commands of the pages as they stand there, each page in a folder of its own; a command, not a test.

    make docs-check                                  # README.md and all of docs/, about an hour
    python -m tests.bench.docs_check docs/TRAIN.md   # one page; --list prints the commands, and runs none

Every `python -m ...` of a code block is run. Names on the pages stand for small tables and models (`prepare`): Gemma is
a tiny one with random weights. Long commands are run at a small size (`_SMALL`), and machines that are not there are
replaced by this one (`_AT_HAND`). What cannot be run (`_NOT_HERE`), and commands within sentences, are asked for their
help: they must exist, and so must each of their options. So must targets of make and stages of the study. Exits with 1
if a command failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

_NOT_HERE = {
    "--resume": "goes on from a session on Kaggle",
    "--backend vllm": "vLLM has an environment of its own: make test-vllm",
    "s3://": "needs an object store; the tests have one",
    "-m pip": "for a machine without network",
    "--no-index": "for a machine without network",
    "train gguf runs/gemma-merged": "the tiny Gemma has no tokenizer.model, which the converter wants",
    "--folder /scratch": "50 GB of models for a GPU",
    "accelerate launch": "for two GPUs",
    "make ": "a target of the Makefile",
}
_SMALL = {
    "submission push": "--print",
    "submission submit": "--print",
    "train push": "--no-send",
    "train run train/recipes/": "--dry-run",
    "train run --triplets": "--set sft.max_steps=2 --set score.limit=2 --set sft.samples=0",
    "train sweep": "--set max_steps=1",
    "train sft train/recipes/gemma": "--set max_steps=2 --set optimizer=adamw_torch",
    "ensemble trial": "--rows 3",
    "ensemble sample": "--limit 4",
    "ensemble experiment": "--selectors first,consensus",
    "predict pairs.csv": "--limit 3",
    "eval throughput": "--rows 2 --repeats 1",
    "tests.gpu --": "--small --device cpu",
}
_AT_HAND = {
    "--ray 10.0.0.1:6379 --workers 16": "--ray local --workers 1",
    "--ray auto --workers 16": "--ray local --workers 1",
    " /models/": " models/",
    " ...": "",
}
_LINKED = (
    "examples", "docs", "train", "submission", "eval", "ensemble", "tests", "pyproject.toml", "README.md",
    "kernel-metadata.json", "LICENSE", ".venv",
)  # fmt: skip
_TUNED = "runs/embedded/merged-q8_0.gguf"
_PYTHON = re.compile(r"(?:\.venv/bin/)?python (?=-m |docs/)")
_COMMAND = re.compile(rf"{_PYTHON.pattern}|make [a-z]|(?:accelerate launch|torchrun) .*-m ")
_GROUPS = ("submission", "eval", "train", "ensemble")


@dataclass(frozen=True)
class Command:
    """A command of a page. `run`: it stands in a code block, not within a sentence."""

    line: str
    run: bool


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page, each once."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [*"\n".join(fenced).splitlines(), *re.findall(r"^ {4,}(.*)$", text, re.MULTILINE)]
    sentences = re.findall(r"`([^`]+)`", re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE))
    for found, run in ((lines, True), (sentences, False)):
        for line in dict.fromkeys(" ".join(line.split()) for line in found):
            if _COMMAND.match(line):
                yield Command(re.sub(r"\s+#.*", "", line), run)


def prepare(folder: Path, lines: str) -> None:
    """Put what a page's names stand for into a folder: tables, and models that load in moments.

    Args:
        folder: that the commands run in.
        lines: the page's commands. What one of them makes is not put there.
    """
    import pandas as pd

    from submission.backends.models import embedded_gguf, tuned_adapter
    from tests.tiny_models import tiny_adapter, tiny_model

    made = set(re.findall(r"(?:-o|--output) (\S+)", lines))
    frame = pd.read_csv(ROOT / "examples" / "triplets.csv", dtype=str, keep_default_na=False)[:80]
    guesses = frame[:4].assign(rewrite_prompt="Improve it.")
    tables = {
        **dict.fromkeys(("pairs.csv", "PAIRS.csv", "mine.csv", "triplets.csv"), frame[:40]),
        **dict.fromkeys(("TRIPLETS.csv", "test.csv"), frame[:4]),
        "other.csv": frame[40:44],
        "train.csv": frame[44:],
        "prompts.csv": frame[["id", "rewrite_prompt"]][:3],
        "texts.csv": frame[["id", "original_text"]][3:6],
        "truth.csv": frame[["id", "rewrite_prompt"]][:4],
        **dict.fromkeys(("tuned.csv", "submission.csv"), guesses[["id", "rewrite_prompt"]]),
    }
    for name in tables.keys() - made:
        tables[name].to_csv(folder / name, index=False)
    frame[:4].to_parquet(folder / "pairs.parquet")
    if "sets" not in made:
        (folder / "sets").mkdir()
        for name, part in {"train": frame[:40], "validation": frame[40:44], "test": frame[44:48]}.items():
            part.to_parquet(folder / "sets" / f"{name}.parquet")
    gguf = embedded_gguf()
    assert gguf is not None
    for name in ("model.gguf", "tuned.gguf"):
        (folder / name).symlink_to(gguf)
    (folder / "lora.gguf").symlink_to(tuned_adapter())
    if "sources.toml" in lines:  # which names it
        supply(folder)
    gemma = tiny_model(folder / "models" / "gemma-7b-it", "gemma")
    mistral = tiny_model(folder / "models" / "mistral-7b-it", "mistral")
    for name, base in {"my-lora": gemma, "runs/gemma-a": gemma, "runs/gemma-b": gemma, "runs/mistral-a": mistral,
                       "runs/mistral-b": mistral}.items():  # fmt: skip
        tiny_adapter(folder / name, base, 1)
    (folder / "tiny-gemma").symlink_to(gemma)
    (folder / "DIR").symlink_to(gemma)
    (folder / "ADAPTER_DIR").symlink_to(folder / "my-lora")
    (folder / "best_of.toml").write_text("[[source]]\nn = 2\n", encoding="utf-8")
    (folder / "search.toml").write_text("", encoding="utf-8")
    (folder / "nearest.toml").write_text('train = "train.csv"\n', encoding="utf-8")
    (folder / "recipe.toml").symlink_to(ROOT / "train" / "recipes" / "smoke.toml")
    sources = re.search(
        r"^```toml\n(\[\[source\]\].*?)^```", (ROOT / "docs" / "ENSEMBLE.md").read_text("utf-8"), re.M | re.S
    )
    assert sources is not None
    (folder / "sources.toml").write_text(sources[1], encoding="utf-8")


def supply(folder: Path) -> None:
    """Put a model in the place of the one that a recipe makes which is not run to its end here."""
    from submission.backends.models import resolve_folder

    if not (folder / _TUNED).exists():
        (folder / _TUNED).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(resolve_folder("embedded"), folder / _TUNED)


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a page with this Python."""
    line = _PYTHON.sub(f"{shlex.quote(sys.executable)} ", line)
    # A page is read in a wide terminal without colours, so that help has each option in one piece.
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def misses(line: str, folder: Path) -> str:
    """What the help of a command does not tell of: the command itself, or options; "" if it tells of all."""
    words = line.split()
    if words[0] == "make":
        return shell(f"make -n -C {shlex.quote(str(ROOT))} {words[1]}", folder).stderr
    if "-m" not in words:  # the study, which knows its stages
        return shell(line if "--list" in words else f"{line} --list", folder).stderr
    start = words.index("-m") + 1
    parts = words[start : start + 2] if words[start] in _GROUPS else words[start : start + 1]
    if len(parts) == 2 and not parts[1].isalpha():
        parts = parts[:1]
    if parts[0] == "pip":
        return ""
    done = shell(f"python -m {' '.join(parts)} --help", folder)
    if done.returncode:
        return done.stderr[-500:] or "no help"
    options = {word.split("=")[0] for word in words[start:] if re.match(r"--?[A-Za-z]", word)}
    return ", ".join(
        sorted(option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", done.stdout))
    )


def check(found: Sequence[Command], folder: Path) -> int:
    """Run what a page shows, and tell of each command how it ended. Returns how many failed."""
    failed = 0
    for command in found:
        line = command.line
        reason = next((why for part, why in _NOT_HERE.items() if part in line), "")
        if reason or not command.run:
            missing = misses(line, folder)
            failed += bool(missing)
            print(f"{'FAILED' if missing else 'help':<17}{line}  ({missing or reason or 'in a sentence'})", flush=True)
            continue
        if _TUNED in line:
            supply(folder)
        for there, here in _AT_HAND.items():
            line = line.replace(there, here)
        line = re.sub(r"(?= >|$)", f" {more}", line, count=1) if (more := small(line)) else line
        began = time.monotonic()
        done = shell(line, folder)
        state = "ran" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"{state:<11}{time.monotonic() - began:4.0f} s {line}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stderr[-2000:], flush=True)
    return failed


def small(line: str) -> str:
    """Options that make a command short, unless it says already that it only looks."""
    more = next((more for part, more in _SMALL.items() if part in line), "")
    return "" if "--dry-run" in line.split() or "--list" in line else more


def main(arguments: Sequence[str] | None = None) -> int:
    """Check pages. Returns 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = (str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md") if path.stem != "CLI")
    pages = ["README.md", "CONTRIBUTING.md", *sorted(others)]
    parser.add_argument("pages", nargs="*", default=pages)
    parser.add_argument("--list", action="store_true", help="print the commands, and run none")
    asked = parser.parse_args(arguments)
    failed = 0
    for page in asked.pages:
        found = list(commands(ROOT / page))
        if not found:
            continue
        print(f"{page}: {len(found)} commands", flush=True)
        if asked.list:
            print("\n".join(f"{'run ' if one.run else 'help'} {one.line}" for one in found))
            continue
        with tempfile.TemporaryDirectory(prefix="docs-check-") as name:
            for part in _LINKED:
                (Path(name) / part).symlink_to(ROOT / part)
            if any(command.run for command in found):
                prepare(Path(name), "\n".join(command.line for command in found if command.run))
            failed += check(found, Path(name))
    if not asked.list:
        print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
