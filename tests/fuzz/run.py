"""Runs cases, each in a process of its own that is forked from one with everything imported."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 30.0  # after which a case counts as hanging
_ALLOWED = (0, 1, 2, 3)  # exit codes of commands


@dataclass(frozen=True)
class Case:
    """A folder is made, then a command runs in it.

    Attributes:
        make: fills the folder; returns the command.
    """

    make: Callable[[random.Random, Path], Callable[[], object]]


@dataclass(frozen=True)
class Trouble:
    """A case that went wrong."""

    kind: str
    seed: int
    number: int
    what: str
    said: str

    def __str__(self) -> str:
        tail = "\n".join(f"    {line}" for line in self.said.strip().splitlines()[-12:])
        return f"{self.kind} --seed {self.seed} --only {self.number}: {self.what}\n{tail}"


def run_cases(kind: str, case: Case, seed: int, numbers: Sequence[int], until: float) -> tuple[int, list[Trouble]]:
    """Run cases two at a time until a time of `time.monotonic()`; returns how many ran, and what went wrong."""
    ran = 0
    found: list[Trouble] = []

    def one(number: int) -> Trouble | bool | None:
        return False if time.monotonic() > until else run_case(kind, case, seed, number)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for outcome in pool.map(one, numbers):
            ran += outcome is not False
            if isinstance(outcome, Trouble):
                found.append(outcome)
    return ran, found


def run_case(kind: str, case: Case, seed: int, number: int) -> Trouble | None:
    """Run one case; None if all is as it should be."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder, said = Path(name) / "here", Path(name) / "said"
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            _child(kind, case, seed, number, folder, said)
        code = _wait(pid)
        words = said.read_text("utf-8", "replace") if said.exists() else ""
        changed = list(_changed(folder, Path(name) / "before"))
        if code is None:
            what = f"it hangs for more than {SECONDS:.0f} s"
        elif code < 0:
            what = f"it was ended by signal {-code}"
        elif "Traceback" in words:
            what = "a traceback"
        elif code not in _ALLOWED:
            what = f"exit code {code}"
        elif changed:
            what = f"changed or removed: {', '.join(changed)}"
        else:
            return None
        return Trouble(kind, seed, number, what, words)


def _child(kind: str, case: Case, seed: int, number: int, folder: Path, said: Path) -> None:
    """Make the case and run its command; never returns."""
    code = 99
    try:
        os.setsid()
        os.environ["XDG_CACHE_HOME"] = str(folder.parent / "cache")
        os.environ["HOME"] = str(folder.parent / "home")
        os.chdir(folder)
        command = case.make(random.Random(f"{kind} {seed} {number}"), folder)
        _snapshot(folder, folder.parent / "before")
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", errors="replace") for number in (1, 2))
        from submission.commands import run_command

        try:
            run_command(command)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        with said.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _wait(pid: int) -> int | None:
    """The exit code of a child, negative for a signal; None if it had to be killed."""
    give_up = time.monotonic() + SECONDS
    while time.monotonic() < give_up:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _snapshot(folder: Path, target: Path) -> None:
    lines = [f"{_digest(file)} {file.relative_to(folder).as_posix()}" for file in _files(folder)]
    target.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")


def _changed(folder: Path, before: Path) -> Iterator[str]:
    if not before.exists():
        return
    for line in before.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        digest, _, name = line.partition(" ")
        if _digest(folder / name) != digest:
            yield name


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _digest(file: Path) -> str:
    if file.is_symlink():
        return "link:" + hashlib.sha256(os.readlink(file).encode()).hexdigest()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "gone"


def fork_instead(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stands for `subprocess.run` of `python -m submission.backends.llama.probe`: its `main`, in a forked process.

    The same code in a process of its own, without starting an interpreter for each case.
    """
    from submission.backends.llama import probe

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(writing, 2)
            os.environ["GGML_NO_BACKTRACE"] = "1"
            sys.stderr = os.fdopen(2, "w", errors="replace")
            sys.argv = ["probe", *command[3:]]
            code = probe.main()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return subprocess.CompletedProcess(command, status, "", said)


class ForkedWorker:
    """Stands for `subprocess.Popen` of `python -m submission.calls.worker`, likewise."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **_: Any) -> None:
        from submission.calls import worker

        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.environ.update(env)
                sys.argv = ["worker", *command[-2:]]
                worker.main()
            finally:
                os._exit(70)

    def poll(self) -> int | None:
        """As of `Popen`."""
        if self._code is None:
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> None:
        """As of `Popen`."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """As of `Popen`."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.001)
        return self._code or 0
