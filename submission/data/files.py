"""Files that appear whole or not at all, and paths on object stores.

    with atomic_path(Path("submission.csv")) as temporary: ...

`s3://` and `gs://` paths go through the file systems of pyarrow; a `Path` writes them as `s3:/`.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from submission.errors import PromptRecoveryError, UserError, first_line

_STORE = re.compile(r"(s3|gs|gcs):/+(.+)")
_NO_KEY = re.compile(r"(s3|gs|gcs):/*[^/]*/*")  # a bucket at most
_TEMPORARY = "prompt-recovery-"  # in the names of temporary files, so that nobody else's is taken for ours
_ANSWER_SECONDS = 10.0  # for an object store to answer at all
_CACHE_BYTES = 8 << 30  # of a kind, beyond which what was not used for a day goes
_DAY = 86_400.0


def on_store(path: Path) -> bool:
    """Whether a path is of an object store (`s3://`, `gs://`) and not of this machine."""
    return _STORE.fullmatch(path.as_posix()) is not None


def display_path(path: Path) -> str:
    """A path as its user wrote it."""
    return _STORE.sub(r"\1://\2", path.as_posix()) if on_store(path) else str(path)


def sidecar_path(output: Path, ending: str) -> Path:
    """Where what belongs to an output lies: beside it, or in the working directory for one on an object store.

    Raises:
        UserError: the output has no name of its own, such as "/" and the current folder.
    """
    if not output.name:
        raise UserError(
            f"output {display_path(output) or '(blank)'} is no name: give the file or folder to be made one"
        )
    return (Path(output.name) if on_store(output) else output).with_name(output.name + ending)


def cache_folder(kind: str) -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/prompt-recovery/` and the kind."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prompt-recovery" / kind


def note_use(folder: Path) -> None:
    """Note that a folder in the cache is in use, if it is there: before it is looked at, so that it stays."""
    with suppress(OSError):
        os.utime(folder)


def tidy_cache(kind: Path, mark: str) -> None:
    """Remove folders of a kind that were used longest ago, beyond 8 GB; what was used within a day stays.

    Args:
        kind: folder in the cache.
        mark: a file that each folder has which this program made.
    """
    for gone in kind.glob(".*.gone"):  # of a process that was killed here
        shutil.rmtree(gone, ignore_errors=True)
    made = [file.parent for file in kind.glob(f"*/{mark}") if not file.parent.is_symlink()]
    kept = 0
    for folder in sorted(made, key=_last_use, reverse=True):
        with suppress(OSError):
            kept += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if kept > _CACHE_BYTES and time.time() - _last_use(folder) > _DAY:
                # Under another name first, so that nobody takes half of it for whole.
                shutil.rmtree(folder.rename(kind / f".{folder.name}.{os.getpid()}.gone"), ignore_errors=True)


def _last_use(folder: Path) -> float:
    """By the clock; 0 if it is gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def open_binary(path: Path) -> BinaryIO:
    """Open a file of this machine or of an object store for reading, from any place in it.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        if on_store(path):
            store, name = _store(path)
            return cast(BinaryIO, store.open_input_file(name))
        file = path.open("rb")
        if file.seekable():
            return file
        with file:  # a pipe, which can be read once
            copy = tempfile.TemporaryFile()  # noqa: SIM115 - for the caller to close
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            return cast(BinaryIO, copy)
    except FileNotFoundError:
        raise UserError(f"{display_path(path)} does not exist") from None
    except OSError as error:
        raise UserError(f"{display_path(path)} cannot be read: {error.strerror or first_line(error)}") from error


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, here or on an object store.

    Raises:
        UserError: the object store cannot be asked.
    """
    if not on_store(path):
        return path.is_dir()
    return _kind_on_store(path) == "Directory"


def exists(path: Path) -> bool:
    """Whether anything has this name, here or on an object store; a link that leads nowhere counts.

    Raises:
        UserError: the object store cannot be asked.
    """
    if not on_store(path):
        return os.path.lexists(path)
    return _kind_on_store(path) != "NotFound"


def _kind_on_store(path: Path) -> str:
    """What an object store has under a name: Directory, File or NotFound."""
    store, name = _store(path)
    try:
        return str(store.get_file_info(name).type.name)
    except OSError as error:
        raise UserError(f"{display_path(path)} cannot be read: {first_line(error)}") from error


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, here or on an object store, sorted.

    Raises:
        UserError: the object store cannot be asked.
    """
    if not on_store(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    from pyarrow import fs

    store, name = _store(folder)
    root = folder.as_posix()[: -len(name)]
    try:
        found = store.get_file_info(fs.FileSelector(name, recursive=True))
    except OSError as error:
        raise UserError(f"{display_path(folder)} cannot be read: {first_line(error)}") from error
    return sorted(Path(root + info.path) for info in found if info.is_file)


def _store(path: Path) -> tuple[Any, str]:
    """The pyarrow file system of a path, and the name in it."""
    try:
        from pyarrow import ArrowException, fs
    except ImportError:
        raise UserError(f"{display_path(path)} needs pyarrow: pip install pyarrow") from None
    try:
        store, name = fs.FileSystem.from_uri(_bounded(display_path(path)))
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{display_path(path)} cannot be reached: {first_line(error)}") from error
    return store, name


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The name of an empty file beside `path` that takes its place, synced to disk, when the block ends well.

    For a path on an object store it is a file of this machine, which is uploaded then.
    """
    if on_store(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            local.touch()
            yield local
            _upload(local, path)
        return
    path = _target(path)
    handle, temporary = _temporary_beside(path)
    os.close(handle)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error  # of a write, which names no file
        raise


@contextmanager
def atomic_folder(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place when the block ends well; what was there before goes.

    Args:
        path: the folder.
        check: raises if something of the user's is in there; it is asked just before anything goes.
    """
    path = _target(path)
    part, old = (Path(tempfile.mkdtemp(prefix=f".{path.name}.{_TEMPORARY}", suffix=".tmp", dir=path.parent))
                 for _ in range(2))  # fmt: skip
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as content:
                    os.fsync(content.fileno())
        part.chmod(0o777 & ~_umask())
        if path.exists():
            check()
            os.replace(path, old)  # moved aside, so that a kill leaves either folder whole
        try:
            os.replace(part, path)
        except OSError:
            if not path.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[str]]:
    """Open a text file beside `path` that takes its place, synced to disk, when the block ends well."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write an indented JSON file, whole or not at all; `default` as in `json.dump`."""
    with atomic_writer(path) as file:
        json.dump(content, file, indent=2, default=default)
        file.write("\n")


def read_json(path: Path, what: str = "") -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        what: it is, for errors.

    Raises:
        UserError: it is missing, cannot be read, is not JSON or is nested too deeply.
    """
    what = f"{what} {path}" if what else str(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} does not exist") from None
    except RecursionError:
        raise UserError(f"{what} is not a readable JSON file: its values are nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or a number of too many digits
        raise UserError(f"{what} is not a readable JSON file: {first_line(error)}") from None


def _upload(local: Path, path: Path) -> None:
    """Copy a file to an object store, where it appears whole.

    Raises:
        PromptRecoveryError: it could not be written.
    """
    store, name = _store(path)
    try:
        with local.open("rb") as source, store.open_output_stream(name) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise PromptRecoveryError(
            f"{display_path(path)} cannot be written: {first_line(error)}\n"
            f"What was computed is safe in the log: run the same command again, or with -o {path.name}"
        ) from error


def _temporary_beside(path: Path) -> tuple[int, Path]:
    """A new file, open for writing, under a name that `remove_leftovers` knows."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.{_TEMPORARY}", suffix=".tmp", dir=path.parent)
    return handle, Path(name)


def _target(path: Path) -> Path:
    """What a path leads to: where it is a link, the file that it names is replaced, not the link.

    Raises:
        UserError: the links lead in a circle.
    """
    try:
        return Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from None


def leftovers(path: Path) -> list[Path]:
    """What `atomic_path` left beside `path` when its process was killed; on an object store nothing is left."""
    if on_store(path):
        return []
    path = _target(path)
    found = path.parent.glob(f".{glob.escape(path.name)}.{_TEMPORARY}????????.tmp")
    return sorted(file for file in found if file.is_file())


def remove_leftovers(path: Path, idle: float = 0) -> None:
    """Remove what `leftovers` lists.

    Args:
        path: see there.
        idle: seconds since it was written to, where another process may be writing the same file.
    """
    for leftover in leftovers(path):
        with suppress(FileNotFoundError):  # the other process was done with it
            if time.time() - leftover.stat().st_mtime >= idle:
                leftover.unlink()


def check_writable(path: Path) -> None:
    """Refuse an output path that could not be written at the end of a run.

    Raises:
        UserError: the path is a folder, its folder does not exist or cannot be written to.
    """
    scheme, colon, _ = path.as_posix().partition(":")
    if _NO_KEY.fullmatch(path.as_posix()):
        raise UserError(f"output {path} names no object: write it as {scheme}://BUCKET/KEY")
    if on_store(path):
        _check_store(path)
        return
    if colon and re.match(r"\w+:/", path.as_posix()) and not path.parent.is_dir():
        raise UserError(f"output {path} is on no known object store: {scheme}:// is neither s3:// nor gs://")
    target = _target(path)
    if target.is_dir():
        raise UserError(f"output {path} is a folder: name a file, such as {path / 'submission.csv'}")
    if target.exists() and not target.is_file():
        raise UserError(f"output {path} is a device or a pipe: the output must be a file that can appear as a whole")
    if not target.parent.is_dir():
        folder = target.parent if path.is_symlink() else path.parent
        raise UserError(f"output folder {folder} does not exist: create it with mkdir -p {shlex.quote(str(folder))}")
    try:
        handle, temporary = _temporary_beside(target)
        os.close(handle)
        temporary.unlink(missing_ok=True)
        if target.exists():
            with target.open("ab"):
                pass
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from error


def _bounded(uri: str) -> str:
    """A URI with which Google's client gives up after seconds: by itself it tries for minutes, without a word."""
    if not uri.startswith(("gs:", "gcs:")) or "retry_limit_seconds" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_ANSWER_SECONDS:g}"


def _check_store(path: Path) -> None:
    from pyarrow import fs

    store, name = _store(path)
    bucket = name.split("/", 1)[0]
    try:
        if is_folder(path):
            raise UserError(f"output {display_path(path)} is a folder: name a file")
        if store.get_file_info(bucket).type == fs.FileType.NotFound:
            raise UserError(f"output {display_path(path)} cannot be written: there is no bucket {bucket}")
    except OSError as error:
        raise UserError(f"output {display_path(path)} cannot be written: {first_line(error)}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
