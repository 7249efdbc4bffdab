"""The OpenVINO folder of a model: as it was named, or made of a GGUF file once and kept in the cache.

`$XDG_CACHE_HOME/prompt-recovery/models` holds what was made. A process that finds another at it waits for that one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from submission.backends.common import package_path
from submission.data.files import cache_folder, note_use, read_json, tidy_cache, write_json
from submission.data.hashing import content_hash
from submission.data.outputs import installed_version
from submission.errors import UserError
from submission.progress import print_line

_MADE = "made.json"  # the hash of each file of a folder that was made
_FORMAT = 1  # of what `convert` makes
_SECONDS = 3600
_TEMPORARY = "prompt-recovery-openvino-"


@contextmanager
def made_folder(source: Path, adapter: Path | None, scale: float, *, exact: bool) -> Iterator[Path]:
    """The OpenVINO folder of a GGUF file, for as long as the block runs; a model that is loaded needs it no longer.

    Args:
        source, adapter, scale, exact: see `submission.backends.openvino.convert`.

    Raises:
        UserError: it cannot be converted.
    """
    marks = [content_hash(source)[:12]]
    if adapter is not None:
        marks.append(f"{content_hash(adapter)[:12]}x{scale!r}")
    if exact:
        marks.append("exact")
    name = f"{source.stem}-{'-'.join(marks)}-openvino-{installed_version('openvino')}-{_FORMAT}"
    target = cache_folder("models") / name
    how = json.dumps([str(adapter) if adapter else None, scale, exact])
    note_use(target)
    if not _is_whole(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_name(f"{name}.lock")):
                if not _is_whole(target):
                    _remove_unfinished(target)
                    print_line(f"the model is converted for OpenVINO, once: {target}", sys.stderr)
                    _convert(source, target, how)
                    write_json(target / _MADE, {file.name: content_hash(file) for file in target.iterdir()})
                    tidy_cache(target.parent, _MADE)
        except OSError as error:
            why = error.strerror or error  # without a number: words of the conversion
            print_line(f"the model is converted for this run only: {target} cannot be written ({why})", sys.stderr)
            with _temporary_folder() as folder:
                try:
                    _convert(source, folder / "model", how)
                except OSError as also:
                    why = also.strerror or also
                    raise UserError(f"the model cannot be converted in {folder} either: {why}") from None
                yield folder / "model"
            return
    yield target


def _convert(source: Path, target: Path, how: str) -> None:
    """Run `submission.backends.openvino.convert`.

    Raises:
        UserError: the model cannot be converted.
        OSError: the folder cannot be written.
    """
    command = [sys.executable, "-P", "-m", "submission.backends.openvino.convert", str(source), str(target), how,
               str(os.getpid())]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
            env={**os.environ, **package_path()},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"model {source}: its conversion for OpenVINO did not finish in {_SECONDS} s") from None
    if done.returncode == 0:
        return
    try:
        words = str(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise UserError(f"model {source} cannot be converted for OpenVINO: its reader ended with {why}") from None
    raise OSError(words) if done.returncode == 3 else UserError(words)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for this process alone; those of processes that were killed are removed."""
    place = Path(tempfile.gettempdir())
    for folder in place.glob(f"{_TEMPORARY}*-*"):
        process = folder.name.removeprefix(_TEMPORARY).partition("-")[0]
        if process.isdecimal() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_TEMPORARY}{os.getpid()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _is_whole(folder: Path) -> bool:
    """Whether all files of a folder that was made are as they were."""
    try:
        made = read_json(folder / _MADE)
        return bool(made) and all(content_hash(folder / name) == known for name, known in made.items())
    except (UserError, OSError, AttributeError, TypeError):
        return False


def _remove_unfinished(target: Path) -> None:
    """Remove what killed conversions left; nobody else is at it."""
    shutil.rmtree(target, ignore_errors=True)
    for folder in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process has it."""
    with path.open("w") as file:
        with suppress(ImportError):  # no such locks on Windows
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print_line(f"waiting for another process that converts the model ({path})", sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
