"""A training session on Kaggle: what the kernel of `python -m train push` does.

It installs the bundle's wheels, takes over what an earlier session left, trains until the recipe's steps are done or
the time is up, and exports what is trained. /kaggle/working then holds:

    training.json      what happened: state, steps, files, and what was left out
    tuning/            adapter, checkpoints, curve and manifest, as `python -m train sft` leaves them
    adapter.gguf       the adapter for llama.cpp
    merged-q4_k_m.gguf and others that the recipe asks for, then merged/: what fits

A session that ended too early is no loss: with its output attached, the next one goes on from the last checkpoint. Only
the standard library is imported here, for this runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from submission import kernel
from submission.config import from_mapping, read_toml
from submission.data.files import read_json, write_json
from submission.errors import UserError

SETTINGS, REPORT, TUNING = "training.toml", "training.json", "tuning"
CONVERTER = "llama-cpp-converter.dat"  # a zip under a name that Kaggle does not unpack
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_ROOM = 19.5e9  # bytes that /kaggle/working may hold: 20 GB, less what the system adds


@dataclass(frozen=True, slots=True)
class Session:
    """The section [session] of training.toml.

    Attributes:
        base: "embedded", or the end of a path below /kaggle/input.
        deadline: seconds from the kernel's start to its end.
        accumulation: of the recipe; it is divided among the GPUs.
    """

    base: str = "embedded"
    deadline: float = 8.5 * 3600
    accumulation: int = 1


@dataclass
class Report:
    """What is known of this session; becomes training.json."""

    state: str = "failed"
    reason: str = ""
    step: int = 0
    steps: int = 0
    resumed_from: int = 0
    base: str = ""
    gpus: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class Work:
    """A session's folders, its bundle and its clock.

    Args:
        bundle: folder of the dataset.
        scratch: a folder for what is not kept.
    """

    def __init__(self, bundle: Path, scratch: Path) -> None:
        content = read_toml(bundle / SETTINGS, "bundle")
        self.bundle, self.scratch = bundle, scratch
        self.output = kernel.ROOT / "working"
        self.tuning = self.output / TUNING
        self.session = from_mapping(Session, content["session"], "[session]")
        self.gguf: list[str] = list(content.get("gguf", {}).get("quantizations", []))
        self.report = Report(gpus=kernel.gpu_memory())
        self._environment: dict[str, str] = {}

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        scale = float(os.environ.get("PROMPT_RECOVERY_SHORTEN", "1"))
        return self.session.deadline * scale - (time.monotonic() - kernel.STARTED)

    def install(self) -> None:
        """Check and install the bundle's wheels."""
        kernel.check_bundle(self.bundle, kernel.Report())
        self._environment = kernel.install(self.bundle, self.scratch)

    def command(self, *arguments: object, processes: int = 1) -> str:
        """Run `python -m train ...`; returns "" or why it failed."""
        many = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *many, "-m", "train", *map(str, arguments)]
        if self.left <= 0:
            return "the time was up before it began"
        code, tail = kernel.run(command, self._environment, self.left)
        return "" if code == 0 else f"train {arguments[0]} ended with {code}: {tail}"


def main(folder: str) -> int:
    """Run a session; 0 if there is anything to go on from, for Kaggle keeps no output of a kernel that failed."""
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-", ignore_cleanup_errors=True) as scratch:
        work = Work(Path(folder), Path(scratch))
        report = work.report
        try:
            work.install()
            run(work)
        except Exception as error:
            report.reason = kernel.words(error)
        report.step, report.steps = progress(work.tuning)
        if (work.tuning / "adapter").is_dir():
            report.state = "trained"
        elif report.step:
            report.state = "unfinished"
        report.files = sorted(path.relative_to(work.output).as_posix() for path in files_of(work.output))
        write_json(work.output / REPORT, asdict(report))
    print(f"{report.state.upper()}: step {report.step} of {report.steps or '?'}; {report.reason or 'all was done'}")
    if report.state == "unfinished":
        print("The next session goes on from there: python -m train push --resume")
    return 1 if report.state == "failed" else 0


def run(work: Work) -> None:
    """Train and export."""
    work.report.resumed_from = take_over(work)
    base = find_base(work)
    work.report.base = base
    sets = {path.stem: path for path in work.bundle.iterdir() if path.stem in ("train", "validation")}
    settings = [f"base={base}", *(f"{name}={path}" for name, path in sets.items())]
    processes = max(1, len(work.report.gpus))
    if processes > 1:
        settings.append(f"accumulation={max(1, work.session.accumulation // processes)}")
    options = [word for setting in settings for word in ("--set", setting)]
    work.report.reason = work.command("sft", work.bundle / SETTINGS, "-o", work.tuning, *options, processes=processes)
    if (work.tuning / "adapter").is_dir() and not work.report.reason:
        export(work, base)


def take_over(work: Work) -> int:
    """Copy what an earlier session left, if its output is attached; returns the step that it came to."""
    earlier = [
        path.parent / TUNING for path in kernel.walk() if path.name == REPORT and (path.parent / TUNING).is_dir()
    ]
    if not earlier or work.tuning.exists():
        return 0
    furthest = max(earlier, key=lambda folder: ((folder / "adapter").is_dir(), progress(folder)[0]))

    def damaged(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if _CHECKPOINT.fullmatch(name) and not steps_of(Path(folder, name))]

    shutil.copytree(furthest, work.tuning, ignore=damaged, copy_function=shutil.copyfile)
    step, steps = progress(work.tuning)
    print(f"going on from {furthest}: step {step} of {steps or '?'}")
    return step


def find_base(work: Work) -> str:
    """The base as `train sft` takes it."""
    wanted = work.session.base
    if wanted == "embedded":
        return wanted
    return kernel.inner_folder(kernel.find(wanted, work.bundle))


def progress(tuning: Path) -> tuple[int, int]:
    """The step of the last whole checkpoint, or of a finished run, and the steps in all; 0 where that is not known."""
    checkpoints = [path for path in tuning.glob("checkpoints/*") if _CHECKPOINT.fullmatch(path.name)]
    last = max(filter(None, map(steps_of, checkpoints)), default=(0, 0))
    if not (tuning / "adapter").is_dir():
        return last
    told = _read(tuning / "adapter.run.json").get("steps")  # a run that was killed after its last step has none
    return (told, told) if _is_step(told) else last


def steps_of(checkpoint: Path) -> tuple[int, int] | None:
    """The step of a checkpoint and the steps in all (0: unknown); None if its trainer_state.json is missing or damaged.

    The trainer writes that file last.
    """
    state = _read(checkpoint / "trainer_state.json")
    step, steps = state.get("global_step"), state.get("max_steps")
    return (step, steps if _is_step(steps) else 0) if _is_step(step) else None


def _is_step(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if it cannot be read."""
    try:
        content = read_json(path)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def export(work: Work, base: str) -> None:
    """Make GGUF files and merged weights of a trained adapter; what fails or does not fit is noted as left out."""
    adapter, left_out = work.tuning / "adapter", work.report.left_out
    converter = find_converter(work) if work.gguf else None
    if converter:
        failed = work.command("gguf", adapter, "--adapter", "-o", work.output / "adapter.gguf", "--base", base,
                              "--llama-cpp", converter)  # fmt: skip
        if failed:
            left_out["adapter.gguf"] = failed
    merged, ggufs = work.scratch / "merged", work.scratch / "gguf"
    if failed := too_full(work.scratch, base, 1) or work.command("merge", adapter, "-o", merged, "--base", base):
        left_out["merged"] = failed
        return
    if converter:
        ggufs.mkdir()
        failed = too_full(work.scratch, base, 2) or work.command(
            "gguf", merged, "-o", ggufs / "merged.gguf", "--quantization", ",".join(work.gguf),
            "--llama-cpp", converter,
        )  # fmt: skip
        if failed:
            left_out["merged.gguf"] = failed
    for path in sorted([*ggufs.glob("*.gguf"), merged], key=size_of):
        keep(path, work)


def keep(path: Path, work: Work) -> None:
    """Move a file or folder and its manifest to the output, if there is room."""
    room = _ROOM - size_of(work.output)
    if size_of(path) > room:
        work.report.left_out[path.name] = f"it has {size_of(path) / 1e9:.1f} GB, and there is room for {room / 1e9:.1f}"
        return
    for part in (path, path.with_name(f"{path.name}.run.json")):
        if part.exists():
            shutil.move(part, work.output / part.name)


def too_full(scratch: Path, base: str, times: int) -> str:
    """Why files of so many times the size of the base cannot be written to a folder; "" if they can."""
    wanted = times * (size_of(Path(base)) if base != "embedded" else 0)
    free = shutil.disk_usage(scratch).free
    return f"it takes {wanted / 1e9:.0f} GB of disk, and {free / 1e9:.0f} are free" if wanted > free else ""


def find_converter(work: Work) -> Path:
    """llama.cpp's converter, unpacked."""
    folder = work.scratch / "llama.cpp"
    with zipfile.ZipFile(work.bundle / CONVERTER) as archive:
        archive.extractall(folder)
    return folder


def files_of(folder: Path) -> Iterator[Path]:
    """The files below a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in (files_of(path) if path.is_dir() else [path]) if file.exists())
