"""The kernel with four adapters on two bases, rehearsed with tiny models, killed again and again, and cut short.

python -m tests.bench.kernel_kills --kills 10 --deadlines 10

Whatever happens there is a valid submission; kills change no answer, and a run that is cut short has what was known of
each row.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from submission.data.validation import validate
from submission.predict.strategies import DEFAULT_PROMPT
from submission.publish import bundle as bundles
from submission.publish.attachable import Attached, handle_of
from submission.publish.dry_run import LAYOUTS, Outcome, lay_out, run_kernel
from submission.publish.wheels import own_wheel
from tests.conftest import ROOT, write_examples
from tests.tiny_models import tiny_adapter, tiny_model

EXAMPLE = ROOT / "examples" / "four-adapters"
CONSTANT = "Improve the text."  # of the example


def make_models(folder: Path) -> tuple[list[Attached], dict[str, Path]]:
    """Tiny bases under the handles of the real ones, and two adapters for each."""
    gemma, mistral = tiny_model(folder / "gemma", "gemma"), tiny_model(folder / "mistral", "mistral", 1)
    adapters = {
        f"{base.name}-{letter}": tiny_adapter(folder / f"{base.name}-{letter}", base, seed)
        for base in (gemma, mistral)
        for seed, letter in enumerate("ab", start=2)
    }
    return [Attached(gemma, handle_of("gemma-7b-it")), Attached(mistral, handle_of("mistral-7b-it"))], adapters


def make_bundle(folder: Path, wheel: Path, adapters: Mapping[str, Path], deadline: float = 3000.0) -> Path:
    """The bundle of examples/four-adapters, for an image that has all packages; answers have six tokens at most."""
    source = folder.with_name(f"{folder.name}-source")
    shutil.copytree(EXAMPLE, source)
    settings, recover = source / "kernel.toml", source / "best_of.toml"
    settings.write_text(f"{settings.read_text()}deadline = {deadline}\n")
    recover.write_text(recover.read_text().replace("n = 0\n", "n = 0\nmax_new_tokens = 6\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "lacking", lambda *_: [])
        bundles.bundle(bundles.BundleConfig(
            folder, settings, bundles.ATTACHED, None, [recover, source / "winner.toml"], [wheel],
            adapters=adapters, attach=["gemma-7b-it", "mistral-7b-it"],
        ))  # fmt: skip
    return folder


def run(
    folder: Path, bundle: Path, models: Sequence[Attached], rows: int, layout: str, kills: int = 0, seed: int = 0
) -> tuple[Outcome, dict[str, str]]:
    """Run the kernel on so many rows, kill its predicting process so often; what it leaves is valid.

    Returns:
        the outcome, and answers by id.
    """
    folder.mkdir()
    table, root = folder / "table.csv", folder / "kaggle"
    ids = [f"{number:03}" for number in range(rows)]
    write_examples(table, ids)
    lay_out(root, layout, table, bundle, models)
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(_kill, folder, kills, over, random.Random(seed))
        try:
            outcome = run_kernel(root, layout, table, ROOT / "submission" / "kernel.py", [sys.executable], 1)
        finally:
            over.set()
    assert killer.result() or not kills, "nothing was killed"
    assert validate(root / "working" / "submission.csv", ids) == []
    with (root / "working" / "submission.csv").open(encoding="utf-8", newline="") as file:
        return outcome, {row["id"]: row["rewrite_prompt"] for row in csv.DictReader(file)}


def _kill(folder: Path, kills: int, over: threading.Event, draw: random.Random) -> int:
    """Kill the process that predicts, each time after it computed something; how often it did."""
    known = killed = 0
    while killed < kills and not over.wait(0.02):
        logs = list(folder.glob("prompt-recovery-*/submission.csv.calls.jsonl"))
        if _lines(logs) <= known:
            continue
        time.sleep(draw.uniform(0, 0.3))
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "predict" in words and any(str(logs[0].parent) in word for word in words):
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    process.kill()
                    killed += 1
        known = _lines(logs)
    return killed


def _lines(logs: Sequence[Path]) -> int:
    found = 0
    for log in logs:
        with suppress(OSError):  # its folder goes when the kernel ends
            found += log.read_bytes().count(b"\n")
    return found


def is_part_of(answer: str, whole: str) -> bool:
    """Whether an answer is the fallback, or joins the first parts of another one, with the constant behind them."""
    return answer == DEFAULT_PROMPT or whole.startswith(answer.removesuffix(CONSTANT).rstrip())


def main() -> None:
    """Run all in a temporary folder and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--deadlines", type=int, default=10)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = own_wheel(folder)
        models, adapters = make_models(folder)
        bundle = make_bundle(folder / "bundle", wheel, adapters)
        outcome, whole = run(folder / "whole", bundle, models, given.rows, "flat")
        assert outcome.problem == "", outcome.log
        print(f"{given.rows} rows, four adapters: {outcome.seconds:.0f} s, {outcome.report['fallbacks']} fell back")
        kills = runs = 0
        while kills < given.kills:
            place, layout = folder / f"killed-{runs}", list(LAYOUTS)[runs % 2]
            killed, answers = run(place, bundle, models, given.rows, layout, given.kills - kills, given.seed + runs)
            assert killed.problem == "", killed.log
            assert answers == whole, "a kill changed an answer"
            kills, runs = kills + len(killed.report["attempts"]) - 1, runs + 1
        print(f"{kills} kills in {runs} runs: valid, every answer that of a run without kills")
        for number in range(given.deadlines):
            deadline = max(5.0, outcome.seconds * (number + 1) / (given.deadlines + 1))
            short = make_bundle(folder / f"bundle-{number}", wheel, adapters, deadline)
            layout = list(LAYOUTS)[number % 2]
            cut, answers = run(folder / f"cut-{number}", short, models, given.rows, layout)
            odd = [key for key, answer in answers.items() if not is_part_of(answer, whole[key])]
            assert not odd, f"answers that no source gave: {odd}"
            alike = sum(answers[key] == whole[key] for key in answers)
            print(f"deadline {deadline:5.1f} s: valid, {alike} of {given.rows} answers are those of the whole run, "
                  f"{cut.report['fallbacks']} fell back")  # fmt: skip


if __name__ == "__main__":
    main()
