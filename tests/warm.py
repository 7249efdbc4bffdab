"""Commands in processes that begin with the slow packages imported: torch and its company take seven seconds each time.

A server imports them once and forks for each command; its child runs `python -m ROOM` as a new interpreter would. The
product itself, whose clock starts with it, is left to the child.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# What takes more than a quarter of a second to import, and starts no thread.
_SLOW = (
    "numpy", "torch", "torch._dynamo", "torch.distributed", "pandas", "pyarrow.parquet", "pydantic.types",
    "typer.main", "transformers.trainer", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
    "peft", "trl.trainer.sft_trainer",
)  # fmt: skip


class Warm:
    """A server of commands, started with the first one and ended with this process."""

    def __init__(self) -> None:
        self._one = threading.Lock()
        self._ready = threading.Event()
        self._server: subprocess.Popen[str] | None = None
        self._read: dict[str, str] = {}

    def run(
        self, room: str, arguments: list[str], cwd: Path, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str] | None:
        """Run `python -m ROOM` with arguments; None while the server starts or runs another command, and in an
        environment other than the first one: what is imported has read it.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        if not self._one.acquire(blocking=False):
            return None
        try:
            read = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
            if self._server is None:
                self._read = read
                self._start(environment)
            if not self._ready.is_set() or read != self._read:
                return None
            with tempfile.TemporaryDirectory() as folder:
                out, err = Path(folder, "out"), Path(folder, "err")
                asked: list[object] = [room, arguments, str(cwd), str(out), str(err)]
                code = self._ask(asked, timeout)
                return subprocess.CompletedProcess([room, *arguments], code, out.read_text(), err.read_text())
        finally:
            self._one.release()

    def _start(self, environment: Mapping[str, str]) -> None:
        self._server = server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent, env=environment,
        )  # fmt: skip

        def listen() -> None:
            assert server.stdout is not None
            if server.stdout.readline():
                self._ready.set()

        threading.Thread(target=listen, daemon=True).start()

    def _ask(self, asked: list[object], timeout: float) -> int:
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        child = int(self._server.stdout.readline())
        late = threading.Event()

        def end() -> None:
            late.set()
            os.kill(child, signal.SIGKILL)

        watch = threading.Timer(timeout, end)
        watch.start()
        code = int(self._server.stdout.readline())
        watch.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(str(asked), timeout)
        return code


def _serve() -> None:
    for name in _SLOW:
        with suppress(ImportError):  # a product without it is tested too
            importlib.import_module(name)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        room, arguments, cwd, out, err = json.loads(line)
        child = os.fork()
        if not child:
            _become(room, arguments, cwd, out, err)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(room: str, arguments: list[str], cwd: str, out: str, err: str) -> NoReturn:
    """Be the command, to its end; the interpreter itself is not taken apart, which takes half a second with torch."""
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (out, os.O_WRONLY | os.O_CREAT), (err, os.O_WRONLY | os.O_CREAT)]
    ):
        file = os.open(path, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    sys.path[0] = cwd
    sys.argv = [room, *arguments]
    code: object = 0
    try:
        runpy.run_module(room, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
