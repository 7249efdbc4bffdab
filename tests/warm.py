"""Commands in processes that begin with the slow packages imported: torch and its company take seven seconds each time.

A server imports them once, and the product's own modules, and forks for each command: its child runs `python -m ROOM`
as a new interpreter would. What a command starts with the same interpreter, the processes of models above all, is
forked from it in turn, with the same parent, pipes and signals.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread
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
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_ROOMS = ("submission", "train", "ensemble", "eval")
# The product, and what takes more than a quarter of a second to import; none of it starts a thread.
_SLOW = (
    "numpy", "torch", "torch._dynamo", "torch.distributed", "pandas", "pyarrow.parquet", "pydantic.types",
    "typer.main", "transformers.trainer", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
    "peft", "trl.trainer.sft_trainer", "scipy.stats", "sentence_transformers",
    *(f"{room}.__main__" for room in _ROOMS), "submission.predict.run",
)  # fmt: skip
# Beginnings of the names that are read as packages are imported.
_READ_ONCE = ("HF_", "OMP_", "PYTHON", "SQLITE_", "XDG_")
_PATHS = "PYTHONPATH"  # read each time: see `_run`


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
        """Run `python -m ROOM` with arguments; None while the server runs another command, and where the environment
        differs from the first one in a variable that interpreters and packages read as they start.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        if not self._one.acquire(blocking=False):
            return None
        try:
            self.start(environment)
            # While it starts, what imports no torch is sooner done without it.
            ready = self._ready.wait(0 if room == "submission" else timeout)
            if not ready or _read_once(environment) != self._read:
                return None
            with tempfile.TemporaryDirectory() as folder:
                out, err = Path(folder, "out"), Path(folder, "err")
                asked: list[object] = [room, arguments, str(cwd), str(out), str(err), dict(environment)]
                code = self._ask(asked, timeout)
                return subprocess.CompletedProcess([room, *arguments], code, out.read_text(), err.read_text())
        finally:
            self._one.release()

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the server, if there is none."""
        if self._server is not None:
            return
        self._read = _read_once(environment)
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


def _read_once(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_ONCE) and name != _PATHS}


def _serve() -> None:
    for name in _SLOW:
        with suppress(ImportError):  # a product without it is tested too
            importlib.import_module(name)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(*json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(room: str, arguments: list[str], cwd: str, out: str, err: str, environment: Mapping[str, str]) -> NoReturn:
    """Be a command, to its end."""
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (out, os.O_WRONLY | os.O_CREAT), (err, os.O_WRONLY | os.O_CREAT)]
    ):
        file = os.open(path, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    import submission

    submission.STARTED = time.monotonic()
    sys.modules.pop(f"{room}.__main__", None)
    _Forking.environment = _read_once(environment)
    if sys.platform == "linux":
        subprocess.Popen = _Forking  # type: ignore[misc]
    _run(["-m", room, *arguments], environment, cwd)


def _run(command: Sequence[str], environment: Mapping[str, str], *first: str) -> NoReturn:
    """Be an interpreter with these arguments, the first of which is -m or a script, to its end.

    The interpreter itself is not taken apart, which takes half a second with torch.

    Args:
        first: the folder of modules before all others.
    """
    named = filter(None, environment.get(_PATHS, "").split(os.pathsep))
    sys.path[:] = [*first, *named, *(path for path in sys.path if _is_installed(path))]
    os.environ.clear()
    os.environ.update(environment)
    code: object = 0
    try:
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            runpy.run_path(command[0], run_name="__main__")
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


def _is_installed(path: str) -> bool:
    """Whether it is of the interpreter or its packages, and not of the product or of a test."""
    return path.startswith((sys.prefix, sys.base_prefix))


class _Forking(subprocess.Popen):  # type: ignore[type-arg]
    """Starts a process as always, or forks where that comes to the same."""

    environment: Mapping[str, str] = {}

    def _execute_child(self, args: Any, *rest: Any) -> None:
        (executable, before, close, keep, cwd, env, _, _, shell, stdin, into_it, from_it, stdout, errors, stderr,
         _, *whose, session, group) = rest  # fmt: skip
        asked = dict(os.environ if env is None else env)
        alike = not (executable or before or shell) and close and {*whose, group} <= {None, -1}
        if not (alike and _is_ours(args) and _read_once(asked) == self.environment and _has_no_pool()):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become_child(args[1:], asked, (stdin, stdout, stderr), keep, str(cwd or "."), session)
        self._child_created = True
        self._close_pipe_fds(stdin, into_it, from_it, stdout, errors, stderr)  # type: ignore[attr-defined]


def _is_ours(args: Any) -> bool:
    """Whether a command is a module of the product or a script, for this interpreter."""
    if not isinstance(args, list) or len(args) < 2 or args[0] != sys.executable:
        return False
    module = args[args.index("-m") + 1] if "-m" in args[1:3] else ""
    return args[1].endswith(".py") or module.partition(".")[0] in _ROOMS


def _has_no_pool() -> bool:
    """Whether this thread has computed nothing: a thread's pool of OpenMP is lost in a fork, and waited for.

    The one that starts workers has none. Of the main thread it is known where all threads of the process are Python's.
    """
    main = threading.current_thread() is threading.main_thread()
    return not main or len(os.listdir("/proc/self/task")) == threading.active_count()


def _become_child(
    command: list[str], environment: Mapping[str, str], streams: Sequence[int], keep: Sequence[int], cwd: str,
    session: bool,
) -> NoReturn:  # fmt: skip
    """Be what a command starts; what is of the command itself is removed."""
    try:
        if session:
            os.setsid()
        os.chdir(cwd)
        for number, file in enumerate(streams):
            if file != -1:
                os.dup2(file, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in keep:
                with suppress(OSError):
                    os.close(int(name))
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        concurrent.futures.thread._threads_queues.clear()  # type: ignore[attr-defined]
        atexit._clear()
        for name, module in list(sys.modules.items()):
            if name != "__main__" and not _is_installed(getattr(module, "__file__", None) or sys.prefix):
                del sys.modules[name]
        first = {"-P": [], "-m": [os.getcwd()]}.get(command[0], [str(Path(command[0]).parent)])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    _run(command[1:] if command[0] == "-P" else command, environment, *first)


if __name__ == "__main__":
    _serve()
