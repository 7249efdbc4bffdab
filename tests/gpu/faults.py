"""What happens to a run when its worker is killed, its GPU asserts, a row is not a number, or the time is over.

Each is a run of `python -m submission predict` as a user starts it. The faults are in the models: one character has an
embedding that is not a number, or none at all.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.backends.common import package_path
from submission.data.validation import validate
from tests.gpu.models import CULPRIT, culprit_model
from tests.gpu.report import Check

_FALLBACK = "No answer was found."
_HEADER = ("id", "original_text", "rewritten_text")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run of the predictor left behind.

    Attributes:
        code: its exit code.
        seconds: that it took.
        summary: its JSON line; empty if there is none.
        problems: of the file, by the validator.
        answers: by id.
        left: processes of it that are still there.
        killed: workers that were killed.
        said: its last words.
    """

    code: int
    seconds: float
    summary: dict[str, Any]
    problems: list[str]
    answers: dict[str, str]
    left: list[int]
    killed: int
    said: str

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows have no answer for which reason."""
        found: dict[str, int] = self.summary.get("reasons", {})
        return found


def run_kill(check: Check) -> None:
    """Kill the worker of a run, beside a run without that."""
    folder = check.own_folder()
    rows, tokens = (10, 6) if check.small else (400, 60)
    model = culprit_model(folder / "plain", "")
    whole = predict(check, folder / "whole.csv", model, rows, new_tokens=tokens)
    _put(check, "no fault", whole, {})
    killed = predict(check, folder / "killed.csv", model, rows, new_tokens=tokens, harm=_kill_a_worker)
    check.put("kill -9 of the worker: workers killed", killed.killed, "", low=1)
    _put(check, "kill -9 of the worker", killed, {})
    same = sum(killed.answers.get(key) == text for key, text in whole.answers.items())
    check.put("kill -9 of the worker: answers of a run without it", same / rows, "of 1", low=0.9)


def run_rows(check: Check) -> None:
    """A row that is not a number, and one that CUDA asserts on."""
    folder = check.own_folder()
    rows = _rows(check)
    if check.device == "cpu":
        check.leave_out("CUDA's own assert", "a CPU raises an IndexError instead, which is what is checked here")
    for fault, name, words in (
        ("nan", "a row that is not a number", "not finite"),
        ("assert", "a device-side assert", "IndexError" if check.device == "cpu" else "the GPU is gone"),
    ):
        model = culprit_model(folder / fault, fault)
        found = predict(check, folder / f"{fault}.csv", model, rows, culprit=rows // 2)
        _put(check, name, found, {words: 1})
        fell = found.answers.get(f"{rows // 2}") == _FALLBACK
        check.put(f"{name}: it is the culprit that has no answer", float(fell), "of 1", low=1)


def _rows(check: Check) -> int:
    return 12 if check.small else 48


def run_deadline(check: Check) -> None:
    """More rows than can be answered in time, of many tokens each: the time is over in the middle of a batch."""
    folder = check.own_folder()
    seconds, rows = (60.0, 2_000) if check.device == "cpu" else (40.0, 20_000)  # on no machine are all answered
    model = culprit_model(folder / "plain", "")
    found = predict(check, folder / "late.csv", model, rows, "--deadline", f"{seconds:g}s", new_tokens=600)
    name = f"a deadline of {seconds:g} s"
    check.put(f"{name}: seconds", found.seconds, "s", high=seconds)
    check.put(f"{name}: answered rows", rows - found.summary.get("fallbacks", rows), f"of {rows}")
    check.put(f"{name}: rows that it cut off", found.reasons.get("deadline", 0), f"of {rows}", low=1)
    _put_file(check, name, found)


def predict(
    check: Check, output: Path, model: Path, rows: int, *more: str, culprit: int | None = None, new_tokens: int = 12,
    harm: Callable[[Path, int], int] = lambda log, process: 0,
) -> Run:  # fmt: skip
    """Predict rows of a table that is made for it.

    Args:
        check: of this part.
        output: file to write.
        model: folder.
        rows: how many.
        more: options.
        culprit: the row that holds `CULPRIT`.
        new_tokens: of an answer.
        harm: is called with the log of the run and its process once it is started; tells how many workers it killed.
    """
    table = output.with_suffix(".input.csv")
    ids = [str(number) for number in range(rows)]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_HEADER)
        for number, row_id in enumerate(ids):
            mark = CULPRIT if number == culprit else "."
            writer.writerow([row_id, f"Text {number} as it was{mark}", f"And as it is, number {number}{mark}"])
    command = [
        sys.executable, "-m", "submission", "predict", str(table), "-o", str(output), "--backend", "transformers",
        "--model", str(model), "--set", f"device={check.device}", "--set", "batch=4", "--json", "--template",
        "detailed", "--fallback", _FALLBACK, "--max-new-tokens", str(new_tokens), "--max-failures", "1", *more,
    ]  # fmt: skip
    began = time.monotonic()
    with output.with_suffix(".log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, **package_path()},
        )  # fmt: skip
        killed = harm(Path(f"{output}.calls.jsonl"), process.pid)
        out, _ = process.communicate()
        seconds = time.monotonic() - began
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    lines = out.splitlines()
    return Run(
        process.returncode, seconds, json.loads(lines[-1]) if lines else {},
        validate(output, ids) if output.exists() else ["there is no file"], dict(_answers(output)),
        list(workers_of(process.pid)), killed, said[-1] if said else "",
    )  # fmt: skip


def _put(check: Check, name: str, found: Run, reasons: dict[str, int]) -> None:
    """Whether every row but those with these reasons has an answer."""
    lost = found.reasons
    expected = {why: count for why, count in lost.items() if any(words in why for words in reasons)}
    check.put(f"{name}: other rows without an answer", sum(lost.values()) - sum(expected.values()), "", high=0,
              note="; ".join(lost)[:200])  # fmt: skip
    if reasons:
        wanted = sum(reasons.values())
        check.put(f"{name}: rows that fail for it", sum(expected.values()), "", low=wanted, high=wanted)
    check.put(f"{name}: seconds", found.seconds, "s")
    _put_file(check, name, found)


def _put_file(check: Check, name: str, found: Run) -> None:
    said = "" if found.code == 0 else found.said[:200]
    check.put(f"{name}: exit code", found.code, "", low=0, high=0, note=said)
    check.put(f"{name}: problems of the file", len(found.problems), "", high=0, note="; ".join(found.problems[:2]))
    check.put(f"{name}: processes left", len(found.left), "", high=0)


def _kill_a_worker(log: Path, process: int) -> int:
    """Kill the worker of a run as soon as the log holds an answer; 0 if the run was over before."""
    while not (log.exists() and log.read_bytes().count(b"\n") > 1):
        if _is_zombie(process):
            return 0
        time.sleep(0.01)
    workers = list(workers_of(process))
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return len(workers)


def _is_zombie(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _answers(output: Path) -> Iterator[tuple[str, str]]:
    """Id and answer of each row of a file; nothing if there is none."""
    if output.exists():
        with output.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield row["id"], row["rewrite_prompt"]


def workers_of(process: int) -> Iterator[int]:
    """Processes that compute for a run of the predictor; they are told its number."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "submission.calls.worker" in words and str(process) in words:
            yield int(folder.name)
