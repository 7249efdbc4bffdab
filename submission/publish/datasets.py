"""Push a folder as a dataset: what a kernel reads (wheels, weights) arrives at Kaggle this way.

python -m submission push --dataset
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from submission.data.files import write_json
from submission.errors import UserError
from submission.publish.client import TRANSFER_SECONDS, KaggleError, failure, http_status, run_client, shell_line
from submission.publish.metadata import (
    DATASET_FILE,
    KERNEL_FILE,
    PLACEHOLDER,
    check_dataset_metadata,
    raise_problems,
    read_object,
    with_owner,
)

LOG = logging.getLogger(__name__)


def push_dataset(
    folder: Path,
    message: str,
    *,
    owner: str = "",
    timeout: float = TRANSFER_SECONDS,
    show: bool = False,
) -> str:
    """Create the private dataset of a folder with `dataset-metadata.json`, or a new version of it; gives its URL.

    Args:
        folder: the files and the metadata; left as it is.
        message: what is new in the version.
        owner: the user who takes the place of OWNER.
        timeout: seconds for the upload.
        show: print the commands instead, both, as only Kaggle knows which is due; "" is returned. What they upload
            is the folder itself, or a copy with the owner filled in, which is left on disk.

    Raises:
        UserError: the metadata is against a rule, or the folder holds folders (which Kaggle would drop) or nothing.
        KaggleError: Kaggle refused it, or one of its files did not arrive.
    """
    if show:
        own = folder
        if owner not in ("", PLACEHOLDER) and folder.is_dir():
            own = Path(tempfile.mkdtemp(prefix="prompt-recovery-dataset-"))
            _prepare(*_dataset(folder, owner), own)
        create, update = _commands(own, message)
        print(f"{shell_line(create)}  # the first time\n{shell_line(update)}  # later")
        return ""
    content, files = _dataset(folder, owner)
    dataset = str(content["id"])
    exists = _dataset_exists(dataset)
    size = sum(file.stat().st_size for file in files) / 1e6
    LOG.info(f"{'new version of' if exists else 'creating'} {dataset}: {len(files)} files, {size:.1f} MB")
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-dataset-") as part:
        _prepare(content, files, Path(part))
        reply = run_client(_commands(Path(part), message)[exists], timeout)
    lost = re.findall(r"^Upload unsuccessful: (.+)$", reply.text, re.MULTILINE)
    if lost:
        raise KaggleError(f"upload of {', '.join(lost)} to {dataset} failed\nRun the command again.")
    # The client calls a version with unknown keywords neither made nor failed: the server's own answer decides.
    made = str(reply.said("status")).lower() == "ok" or "is being created" in reply.text
    if reply.exit_code != 0 or not made:
        raise failure(f"upload of {dataset}", reply)
    url = str(reply.said("url") or f"https://www.kaggle.com/datasets/{dataset}")
    LOG.info(f"{url}: uploaded; Kaggle unpacks it for some minutes")
    return url


def wait_until_ready(dataset: str, poll_seconds: float = 10.0, timeout: float = 3600.0, *, show: bool = False) -> None:
    """Wait until Kaggle has unpacked a dataset: a kernel that starts before would see the version before, or none.

    Raises:
        KaggleError: it failed, or is not ready in time.
    """
    if show:
        print(f"{shell_line(['datasets', 'status', dataset])}  # until it says ready")
        return
    began = time.monotonic()
    while True:
        time.sleep(poll_seconds)
        reply = run_client(["datasets", "status", dataset])
        state = (reply.text.split() or [""])[-1].lower()
        if reply.exit_code == 0 and state == "ready":
            return
        passed = time.monotonic() - began
        if state in ("error", "failed", "deleted"):
            raise KaggleError(f"Kaggle could not unpack {dataset}: {state}\nLook at its page, and push it again.")
        if passed > timeout:
            raise KaggleError(
                f"{dataset} is not ready after {passed:.0f} s: {state or reply.text}\n"
                f"Ask again with {shell_line(['datasets', 'status', dataset])}, then push --no-dataset."
            )
        LOG.info(f"{dataset}: {state or 'no answer'}, {passed:.0f} s")


def _commands(folder: Path, message: str) -> tuple[list[str], list[str]]:
    """What creates the dataset, and what adds a version to it."""
    return (
        ["datasets", "create", "-p", str(folder), "-t"],  # -t: files stay as they are
        ["datasets", "version", "-p", str(folder), "-m", message, "-t"],
    )


def _prepare(content: dict[str, object], files: Sequence[Path], folder: Path) -> None:
    """Fill a folder that the client reads: the metadata with the owner, and links to the files, which may be large."""
    write_json(folder / DATASET_FILE, content)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def _dataset(folder: Path, owner: str) -> tuple[dict[str, object], Sequence[Path]]:
    path = folder / DATASET_FILE
    content = read_object(path)
    if owner:
        content = with_owner(content, owner)
    problems = check_dataset_metadata(content)
    if str(content.get("id")).startswith(f"{PLACEHOLDER}/"):
        problems.append(f"id {content['id']!r}: write your user name of Kaggle for {PLACEHOLDER}")
    raise_problems(path, problems)
    others = sorted(file for file in folder.iterdir() if file.name not in (DATASET_FILE, KERNEL_FILE))
    folders = [file.name for file in others if file.is_dir()]
    if folders:
        raise UserError(
            f"{folder} holds the folder {folders[0]}, which Kaggle would leave out\nPut all files at the top level."
        )
    if not others:
        raise UserError(f"{folder} holds no file beside {DATASET_FILE}: put the dataset's files there")
    return content, others


def _dataset_exists(dataset: str) -> bool:
    reply = run_client(["datasets", "status", dataset])
    if reply.exit_code == 0:
        return True
    # Kaggle says 403 as well of a dataset that does not exist: of one's own it can mean nothing else.
    if http_status(reply) in (403, 404):
        return False
    raise failure(f"status of {dataset}", reply)
