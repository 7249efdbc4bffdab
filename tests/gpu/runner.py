"""Runs each part in a process of its own, ends one that runs past its limit, and keeps what it had told.

python -m tests.gpu.runner JSON   runs one part: what `run_part` starts
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submission.backends.common import end_with, package_path
from submission.backends.transformers.loading import stay_offline_and_quiet
from tests.gpu.report import Check, PartResult, read_figures

_MARGIN = 0.08  # of its limit that a part leaves unused, so that it ends by itself


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is checked.

    Attributes:
        name: as `--parts` takes it, or a group's name, a dash and more.
        about: one line.
        target: the function that does it, as module:function; it is given a `Check` and the options.
        options: its further arguments.
        needs: packages without which it is left out, by the names of their distributions.
        uses: packages without which it leaves out some of its lines.
        cpu: whether it is of use where there is no GPU.
    """

    name: str
    about: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    cpu: bool = False


def run_part(part: Part, *, device: str, small: bool, work: Path, limit: float) -> PartResult:
    """Run a part; see the module.

    Args:
        part: to run.
        device: cuda or cpu.
        small: see `Check`.
        work: folder that all parts share.
        limit: seconds after which it is ended.
    """
    lines, log = work / f"{part.name}.lines", work / f"{part.name}.log"
    lines.unlink(missing_ok=True)
    began = time.time()
    order = {
        "target": part.target, "options": dict(part.options), "parent": os.getpid(),
        "check": {"part": part.name, "device": device, "small": small, "end": began + limit * (1 - _MARGIN),
                  "work": str(work), "lines": str(lines)},
    }  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.runner", json.dumps(order)], stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, **package_path()}, start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end_group(process)
    result = PartResult(seconds=time.time() - began, figures=read_figures(lines))
    if late:
        result.state, result.why = "ended", f"it ran past its limit of {limit:.0f} s"
    elif process.returncode:
        result.state, result.why = "failed", f"{_how(process.returncode)}: {_last_words(log)}"
    else:
        result.state = "done"
    return result


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started, whether or not it has ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last_words(log: Path) -> str:
    """The line of a log that says what went wrong."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it said nothing"


def main() -> None:
    """Run the part that the command line describes."""
    order = json.loads(sys.argv[1])
    end_with(order["parent"])
    check = {**order["check"], "work": Path(order["check"]["work"]), "lines": Path(order["check"]["lines"])}
    stay_offline_and_quiet()  # before anything imports torch: its allocator is to be that of a run
    module, _, name = order["target"].partition(":")
    getattr(importlib.import_module(module), name)(Check(**check), **order["options"])
    sys.stdout.flush()
    os._exit(0)  # unloading CUDA and its libraries is none of what is checked


if __name__ == "__main__":
    main()
