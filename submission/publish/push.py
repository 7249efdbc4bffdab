"""Push the kernel, bring its output back, submit it: all through Kaggle's client.

    python -m submission push --wait

Every function here and beside takes `show=True`: it then prints the exact commands for a shell, and nothing is sent.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from submission.data.files import write_json
from submission.data.outputs import made_files
from submission.publish.client import (
    CALL_SECONDS,
    TRANSFER_SECONDS,
    KaggleError,
    Reply,
    failure,
    run_client,
    shell_line,
)
from submission.publish.follow import status, wait_for
from submission.publish.metadata import (
    KERNEL_FILE,
    check_metadata,
    raise_problems,
    read_object,
    with_owner,
)
from submission.publish.needs import ask_for, fit_metadata, needs_of

LOG = logging.getLogger(__name__)

_SOURCES = {
    "invalidDatasetSources": "dataset",
    "invalidCompetitionSources": "competition",
    "invalidKernelSources": "kernel",
    "invalidModelSources": "model",
}
_SOURCE_STEPS = {
    "dataset": "Push the dataset first (and let it finish), or correct dataset_sources: owner/slug.",
    "competition": "Join the competition and accept its rules, or correct competition_sources.",
    "kernel": "Push that kernel first, or correct kernel_sources: owner/slug.",
    "model": "Correct model_sources: the version number must exist, and the model's licence must be accepted.",
}


@dataclass(frozen=True, slots=True)
class Pushed:
    """A version of the kernel that Kaggle has taken and runs."""

    kernel: str
    version: int
    url: str


def push(
    folder: Path,
    *,
    owner: str,
    accelerator: str = "",
    bundle: Path | None = None,
    timeout: float = CALL_SECONDS,
    wait: bool = False,
    show: bool = False,
) -> Pushed | None:
    """Upload the kernel of a folder with `kernel-metadata.json`; Kaggle then runs it.

    Args:
        folder: holds `kernel-metadata.json`; left as it is.
        owner: the user who takes the place of OWNER.
        accelerator: machine instead of the file's or the bundle's: t4x2, l4x4, a100, h100 or a machine shape of Kaggle;
            "none" for a run without a GPU.
        bundle: that the kernel runs; the metadata is fitted to what it needs. None leaves it as it is.
        timeout: seconds for the upload.
        wait: follow the run to its end.
        show: print the commands instead; the folder that they push is left on disk. None is returned.

    Raises:
        UserError: the metadata is against a rule.
        KaggleError: Kaggle refused it, or took it without one of its sources, or the run failed (with `wait`).
    """
    content, changes = kernel_metadata(folder, owner, accelerator, bundle)
    for change in changes:
        LOG.info(change)
    kernel = str(content["id"])
    prepared = Path(tempfile.mkdtemp(prefix="prompt-recovery-kernel-"))
    try:
        _prepare(content, folder, prepared)
        arguments = ["kernels", "push", "-p", str(prepared)]
        if show:
            print(shell_line(arguments))
            if wait:
                status(kernel, show=True)
            return None
        pushed = _pushed(kernel, run_client(arguments, timeout))
    finally:
        if not show:
            shutil.rmtree(prepared, ignore_errors=True)
    LOG.info(f"version {pushed.version} of {kernel} is pushed: {pushed.url}")
    if wait:
        wait_for(kernel)
    return pushed


def output(kernel: str, folder: Path, *, timeout: float = TRANSFER_SECONDS, show: bool = False) -> list[Path]:
    """Download the files and the log of the latest run into a folder; what an earlier download left is replaced.

    Raises:
        KaggleError: there is nothing yet, or a file did not come.
        UserError: a file of the user's has the name of one that came.
    """
    arguments = ["kernels", "output", kernel, "-p", str(folder)]
    if show:
        print(shell_line(arguments))
        return []
    folder.mkdir(parents=True, exist_ok=True)
    # The client saves an error page as if it were the file, and keeps an older file of ours: so not there directly.
    with tempfile.TemporaryDirectory(prefix=".kaggle-output-", dir=folder) as part:
        reply = run_client([*arguments[:-1], part], timeout)
        if reply.exit_code != 0:
            raise failure(f"output of {kernel}", reply)
        if reply.refused:
            raise KaggleError(f"output of {kernel} failed: no {', '.join(reply.refused)}\nRun the command again.")
        came = sorted(path.relative_to(part) for path in Path(part).rglob("*") if path.is_file())
        if not came:
            raise KaggleError(
                f"{kernel} has no output\nSee whether it ran: {shell_line(['kernels', 'status', kernel])}"
            )
        files = [folder / path for path in came]
        with made_files(folder / "kernel", files, {"kernel": kernel}):
            for path in came:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(part) / path, folder / path)
        for path in came:
            LOG.info(f"{folder / path} ({(folder / path).stat().st_size} bytes)")
    if Path("submission.csv") in came:
        LOG.info(f"submission.csv is among the {len(came)} files")
    else:
        LOG.info(f"no submission.csv among the {len(came)} files")
    return [folder / path for path in came]


def submit(
    competition: str,
    kernel: str,
    version: int,
    file: str,
    message: str,
    *,
    timeout: float = CALL_SECONDS,
    show: bool = False,
) -> None:
    """Submit one output file of a version of the kernel to a code competition.

    Raises:
        KaggleError: the competition did not take it.
    """
    what = ["-k", kernel, "-v", str(version), "-f", file, "-m", message]
    arguments = ["competitions", "submit", competition, *what, "-q"]  # -q: no second question, which may fail by itself
    if show:
        print(shell_line(arguments))
        return
    reply = run_client(arguments, timeout)
    if reply.exit_code != 0 or not (reply.said("ref") or re.search("success", reply.text, re.IGNORECASE)):
        raise failure(f"submission of {kernel} to {competition}", reply)
    LOG.info(str(reply.said("message") or reply.text))


def kernel_metadata(
    folder: Path, owner: str, accelerator: str = "", bundle: Path | None = None
) -> tuple[dict[str, object], list[str]]:
    """The metadata that is pushed, checked, and a line for each change that the bundle made.

    Raises:
        UserError: it is against a rule, or does not go with the bundle.
    """
    path = folder / KERNEL_FILE
    content = with_owner(read_object(path), owner)
    raise_problems(path, check_metadata(content, folder))
    changes: list[str] = []
    needs = needs_of(bundle) if bundle is not None and bundle.is_dir() else None
    if needs is not None:
        fitting = replace(needs, gpu=None) if accelerator else needs  # what was asked for decides
        content, changes = fit_metadata(content, fitting)
    if accelerator:
        content = ask_for(content, accelerator, needs)
    raise_problems(path, check_metadata(content, folder))
    return content, changes


def _prepare(content: dict[str, object], folder: Path, prepared: Path) -> None:
    """Write what the client reads: the metadata with the owner, and the one file that is uploaded."""
    write_json(prepared / KERNEL_FILE, content)
    code = prepared / str(content["code_file"])
    code.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / str(content["code_file"]), code)


def _pushed(kernel: str, reply: Reply) -> Pushed:
    found = re.search(r"Kernel version (\d+) successfully pushed.*?(https?://\S+)?$", reply.text, re.MULTILINE)
    if reply.exit_code != 0 or found is None:
        raise failure(f"push of {kernel}", reply)
    for key, kind in _SOURCES.items():  # the client does not even print those of models
        names = reply.said(key)
        if isinstance(names, list) and names:
            raise KaggleError(
                f"push of {kernel} failed: version {found[1]} was saved without the {kind} "
                f"{', '.join(map(str, names))}, which Kaggle does not know\n{_SOURCE_STEPS[kind]}"
            )
    named = re.search(r"not valid (\w+) sources .*?: (\[.*\])", reply.text)  # a client that shows no answers
    if named:
        raise KaggleError(
            f"push of {kernel} failed: Kaggle does not know the {named[1]} {named[2]}\n{_SOURCE_STEPS[named[1]]}"
        )
    for line in re.findall(r"^.*not valid tags.*$", reply.text, re.MULTILINE):
        LOG.info(line)
    return Pushed(kernel, int(found[1]), found[2] or f"https://www.kaggle.com/code/{kernel}")
