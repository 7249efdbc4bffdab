"""The manifest of an output, `submission.csv.run.json`: what made it, from what, and which files were made.

It holds no text of the data. `inspect` reads that of a run to show a row's prompt again. A command replaces and deletes
only what a manifest lists under "made":

    check_output(output)                        # early: refuses to start where something of the user's is
    with made_files(output, [output], {...}):   # notes the files as ours; the block writes them
        write_table(output, ...)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import submission
from submission.data.files import (
    atomic_folder,
    check_writable,
    display_path,
    exists,
    files_in,
    on_store,
    read_json,
    sidecar_path,
    write_json,
)
from submission.data.hashing import content_hash
from submission.errors import UserError

_NAMED = 5  # files that an error names


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies."""
    return sidecar_path(output, ".run.json")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of an output.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = manifest_path(output)
    if not path.exists():
        raise UserError(f"{path} does not exist: name the output of a run")
    content = read_json(path)
    if not (isinstance(content, dict) and isinstance(content.get("written"), str) and "version" in content):
        raise UserError(f"{path} is not a manifest of this program")
    return content


def write_manifest(output: Path, content: Mapping[str, Any], made: Iterable[Path] | None = None) -> None:
    """Write the manifest of an output that is no run of `predict`.

    Args:
        output: whose manifest it is.
        content: what made it, from what, with which result; "made_from" is for `up_to_date`.
        made: all files that were made; None for those that are claimed.
    """
    files = sorted(made_by(output) or [output]) if made is None else list(made)
    hashes = {"hashes": _hashes(output, files)} if "made_from" in content else {}
    told = {**stamp(), **content, **hashes, "made": made_names(output, files)}
    write_json(manifest_path(output), told, default=str)


def up_to_date(output: Path, made_from: Any) -> bool:
    """Whether an output is there and unchanged, and was made from the same.

    Args:
        output: whose manifest tells, as "made_from".
        made_from: all that decides its content, as JSON holds it.
    """
    try:
        told = read_manifest(output)
        same = told["made_from"] == json.loads(json.dumps(made_from))
        return bool(same and told["hashes"]) and told["hashes"] == _hashes(output, made_by(output))
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False


def _hashes(output: Path, files: Iterable[Path]) -> dict[str, str]:
    """Hashes of the files that are there, by their names in the manifest of `output`."""
    there = [file for file in files if exists(file)]
    return {made_names(output, [file])[0]: content_hash(file) for file in there}


def made_by(output: Path) -> frozenset[Path]:
    """The files that the manifest of `output` lists as made, as absolute paths; none if there is no manifest of ours.

    What lies outside the manifest's folder does not count: a manifest may come from anywhere.
    """
    try:
        content = read_manifest(output)
    except UserError:
        return frozenset()
    names = content.get(
        "made", [display_path(output) if on_store(output) else output.name]
    )  # version 0.1.0 listed none
    folder = _absolute(manifest_path(output)).parent
    listed = [Path(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []
    found = [name if on_store(name) else _absolute(folder / name) for name in listed]
    return frozenset(file for file in found if file == output or (folder in file.parents and _lies_in(file, folder)))


def check_apart(output: Path, files: Iterable[Path], inputs: Iterable[tuple[str, Path]]) -> None:
    """Refuse to write what is read.

    Args:
        output: whose manifest is written too.
        files: that will be written.
        inputs: what each file or folder that is read is called, and where it is.

    Raises:
        UserError: one of the files is an input, or lies in a folder that is one.
    """
    inputs = list(inputs)
    for file in [*files, manifest_path(output)]:
        for what, given in inputs:
            _check_apart(file, what, given)


def check_free(output: Path, files: Iterable[Path]) -> None:
    """Refuse to write where something of the user's is.

    Args:
        output: whose manifest lists what an earlier run made.
        files: that will be written, or folders that will be replaced. A file without content is free, and so is what a
            link leads to that has the name of the output: whoever put the link there wants it written.

    Raises:
        UserError: one of them is there and was not made by us.
    """
    manifest = manifest_path(output)
    made = made_by(output)
    foreign = [file for one in files for file in _content_of(one) if not _is_ours(file, output, made)]
    if _content_of(manifest) and not _is_manifest(output):
        foreign.append(manifest)
    if foreign:
        names = ", ".join(display_path(file) for file in foreign[:_NAMED])
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise UserError(
            f"{names}{more}: in the way, and not made by this command\n"
            f"Move {'it' if len(foreign) == 1 else 'them'} away, or choose another output."
        )


def check_output(output: Path, inputs: Iterable[tuple[str, Path]] = ()) -> None:
    """Refuse an output file that cannot be written, is an input, or is somebody else's.

    Raises:
        UserError: says which; see `check_writable`, `check_apart` and `check_free`.
    """
    check_writable(output)
    check_apart(output, [output], inputs)
    check_free(output, [output])


def check_folder(path: Path) -> None:
    """Refuse a folder that `made_folder` could not make.

    Raises:
        UserError: it is a file, its parent does not exist, or something of the user's is in there.
    """
    check_folder_name(path)
    check_no_file(path)
    if not path.parent.is_dir():
        raise UserError(f"output folder {path.parent} does not exist: create it with mkdir -p {path.parent}")
    check_free(path, [path])


def check_no_file(folder: Path) -> None:
    """Refuse a file where a folder is to be written.

    Raises:
        UserError: names it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: name a folder")


def check_folder_name(path: Path) -> None:
    """Refuse a folder that cannot be replaced by another, since this process works in it.

    Raises:
        UserError: it is the current folder, or holds it.
    """
    here = Path.cwd()
    if Path(os.path.abspath(path)) in (here, *here.parents):
        raise UserError(f"output {path} is the folder that you are in, or holds it: name a folder to be made")


def claim(output: Path, files: Iterable[Path]) -> list[Path]:
    """List files as made in the manifest of `output`, before they are written: if the command is killed, they are ours.

    What else the manifest said is dropped: it was about an earlier state of these files.

    Returns:
        the files of an earlier run that are not among these.
    """
    before = {file for file in made_by(output) if exists(file)}  # what is gone may come back as somebody else's
    now = set(map(_absolute, files))
    write_json(manifest_path(output), {**stamp(), "state": "writing", "made": made_names(output, before | now)})
    return sorted(before - now)


@contextmanager
def made_files(output: Path, files: Iterable[Path], content: Mapping[str, Any]) -> Iterator[None]:
    """Claim files while the block writes them, and note what they are.

    Raises:
        UserError: see `check_free`.
    """
    files = list(files)
    check_free(output, files)
    claim(output, files)
    yield
    write_manifest(output, content)


@contextmanager
def made_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends well; its files are claimed.

    Raises:
        UserError: see `check_folder`.
    """
    check_folder(path)
    with atomic_folder(path, lambda: check_folder(path)) as part:
        yield part
        check_folder(path)  # before what is there counts as ours
        claim(path, [path / file.relative_to(part) for file in files_in(part)])


def _lies_in(file: Path, folder: Path) -> bool:
    """Whether a file, no folder, lies below a folder when all links are followed."""
    if on_store(file):
        return True
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(file)).parents and not file.is_dir()


def stamp() -> dict[str, str]:
    """When a manifest was written, and by which version."""
    return {"written": datetime.now(UTC).isoformat(timespec="seconds"), "version": submission.__version__}


def _is_manifest(output: Path) -> bool:
    try:
        return bool(read_manifest(output))
    except UserError:
        return False


def _is_ours(file: Path, output: Path, made: frozenset[Path]) -> bool:
    """Whether a file with content may be replaced: we made it, or it is a link in the very place of the output."""
    if not on_store(file) and file.is_symlink():
        return _absolute(file) == _absolute(output)
    return _absolute(file) in made


def _content_of(path: Path) -> list[Path]:
    """What would be lost if a file, or a folder, were replaced."""
    if on_store(path):
        return [path] if exists(path) else []
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if file.is_symlink() or not file.is_dir()]
    blank = not path.exists() or (path.is_file() and path.stat().st_size == 0)
    return [] if blank else [path]


def _check_apart(file: Path, what: str, given: Path) -> None:
    if on_store(file) or on_store(given):
        inside, same = given in file.parents, file == given
    else:
        inside = Path(os.path.realpath(given)) in Path(os.path.realpath(file)).parents and given.is_dir()
        read = [given, *given.glob("*.parquet")] if given.is_dir() else [given]
        same = file.exists() and any(one.exists() and file.samefile(one) for one in read)
    if same or inside:
        where = f"in the {what} {display_path(given)}" if inside else f"the {what}"
        raise UserError(f"output {display_path(file)} is {where}: choose another name")


def _absolute(path: Path) -> Path:
    return path if on_store(path) else Path(os.path.abspath(path))


def made_names(output: Path, files: Iterable[Path]) -> list[str]:
    """Files as a manifest lists them: relative to its own folder, so that they can be moved together."""
    folder = _absolute(manifest_path(output)).parent
    return sorted(display_path(file) if on_store(file) else os.path.relpath(_absolute(file), folder) for file in files)
