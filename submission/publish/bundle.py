"""The dataset that a kernel needs: wheels, model or adapter, kernel.toml and a list of contents.

    python -m submission bundle -o bundle
    python -m submission bundle -o bundle --model tuned.gguf --settings my-kernel.toml
    python -m submission bundle -o bundle --attach gemma-7b-it --attach mistral-7b-it \\
        --adapter gemma-a=runs/a --adapter mistral-a=runs/b --settings kernel.toml --include best_of.toml

Only `submission/kernel.py` is uploaded by a push; everything else arrives as this dataset.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import submission
from submission import kernel
from submission.backends.models import PACKAGED, TUNED, check_gguf_adapter, check_peft_adapter, is_gguf, resolve_folder
from submission.data.files import atomic_folder, files_in, read_json, write_json
from submission.data.outputs import check_apart, check_folder_name, check_no_file, made_folder, manifest_path
from submission.data.tables import some
from submission.errors import UserError
from submission.publish.attachable import handle_of
from submission.publish.checks import checked_settings
from submission.publish.image import Image, kaggle_image
from submission.publish.metadata import DATASET_FILE
from submission.publish.roots import roots as roots
from submission.publish.wheels import OURS, distribution, fetch, lacking, newest_needed, own_wheel, version_of

LOG = logging.getLogger(__name__)

DATASET = "prompt-recovery-bundle"
ATTACHED = "attached"
MOST_BYTES = 100 << 30  # of a dataset
_TITLE = "prompt-recovery bundle"
_PLAIN_SETTINGS = """\
# What the kernel runs; `submission/kernel.py` (class Settings) lists all keys.
recover = "zero_shot"  # constant, zero_shot, few_shot, best_of, search or module:object
model = "{model}"  # auto (what is attached), embedded-tuned, embedded or "find:NAME" below /kaggle/input
"""


@dataclass(frozen=True, slots=True)
class BundleConfig:
    """What goes into a bundle.

    Attributes:
        output: folder to make; an earlier bundle there is replaced.
        settings: a kernel.toml; None for a plain one.
        model: embedded-tuned, embedded, a GGUF file, or attached (by `attach`, or by model_sources in
            kernel-metadata.json).
        adapter: GGUF LoRA file or PEFT folder, for the model; None for none.
        include: more files: the TOML of recover_config, shots, modules of your own.
        wheels: of your own; they go before those of the same distribution.
        owner: of the dataset; stays a placeholder until it is pushed.
        adapters: more of them by name, for `"find:NAME"` in the sources of an ensemble.
        attach: models of Kaggle that the kernel reads: names of `submission.publish.attachable`, or handles.
    """

    output: Path
    settings: Path | None = None
    model: str = TUNED
    adapter: Path | None = None
    include: Sequence[Path] = ()
    wheels: Sequence[Path] = ()
    owner: str = "OWNER"
    adapters: Mapping[str, Path] = field(default_factory=dict)
    attach: Sequence[str] = ()


def bundle(config: BundleConfig) -> dict[str, Any]:
    """Make the folder, whole or not at all; returns its list of contents.

    Raises:
        UserError: something is missing or wrong; nothing was written.
        PromptRecoveryError: a wheel cannot be had.
    """
    check_replaceable(config.output)
    handles = list(dict.fromkeys(handle_of(name) for name in config.attach))
    if handles and config.model not in (TUNED, ATTACHED):
        both = f"--model {config.model} and --attach {config.attach[0]}"
        raise UserError(f"{both}: the kernel reads one of them: leave the other out")
    image = kaggle_image()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(config.output, lambda: check_replaceable(config.output)) as part:
        _put_files(config, part)
        settings = checked_settings(part, handles)
        for wheel in config.wheels:
            _put(wheel, part)
        given = {distribution(wheel) for wheel in config.wheels}
        if OURS not in given:
            LOG.info(f"wheel of {OURS} {submission.__version__}")
            own_wheel(part)
        wanted = lacking(roots(settings, part, handles), image)
        fetch([name for name in wanted if name not in given], part, image.python)
        _check_wheels(part, image)
        write_json(part / DATASET_FILE, {
            "title": _TITLE, "id": f"{config.owner}/{DATASET}", "licenses": [{"name": "other"}],
        })  # fmt: skip
        contents = write_contents(part, image.python, handles)
    for name, about in contents["files"].items():
        LOG.info(f"  {about['bytes'] / 1e6:8.1f} MB  {name}")
    LOG.info(f"{config.output}: {contents['bytes'] / 1e6:.0f} MB, ready for `python -m submission push`")
    return contents


def split_adapters(given: Sequence[str]) -> tuple[Path | None, dict[str, Path]]:
    """What `--adapter` was given: one without a name, and those with names, NAME=PATH.

    Raises:
        UserError: two have one name, or several have none.
    """
    named: dict[str, Path] = {}
    alone: list[Path] = []
    for text in given:
        name, equals, path = text.partition("=")
        if not (path if equals else name):
            raise UserError(f"--adapter {text!r}: write it as NAME=PATH, or PATH alone")
        if not equals or Path(text).exists():
            alone.append(Path(text).expanduser())
        elif name in named:
            raise UserError(f"--adapter: two are called {name!r}")
        else:
            named[name] = Path(path).expanduser()
    if len(alone) + bool(named) > 1:
        raise UserError(f"--adapter {alone[0]}: of several adapters each needs a name: --adapter NAME={alone[0]}")
    return (alone[0] if alone else None), named


def write_contents(folder: Path, python: str, attach: Sequence[str] = ()) -> dict[str, Any]:
    """Write the list of contents, with sizes and SHA-256, and the handles of the models that go with it.

    Raises:
        UserError: it is more than a dataset may hold.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (kernel.CONTENTS, DATASET_FILE)
    }
    total = sum(path.stat().st_size for path in map(folder.joinpath, files))
    if total > MOST_BYTES:
        raise UserError(f"the bundle has {total / 1e9:.0f} GB, and a dataset may have {MOST_BYTES / 1e9:.0f}: attach "
                        "the model apart (bundle --model-instance)")  # fmt: skip
    contents = {"version": submission.__version__, "python": python, "bytes": total, "files": files}
    if attach:
        contents["attach"] = list(attach)
    write_json(folder / kernel.CONTENTS, contents)
    return contents


def model_instance(model: str, handle: str, output: Path, license_name: str) -> None:
    """Make a folder that `kaggle models variations create` takes: weights and their metadata.

    Args:
        model: transformers folder or GGUF file.
        handle: owner/model/framework/variation.
        output: folder to make.
        license_name: as Kaggle names it, such as "Apache 2.0" or "Gemma".

    Raises:
        UserError: the model or the handle is wrong.
    """
    parts = handle.split("/")
    if len(parts) != 4 or not all(parts):
        raise UserError(f"--model-instance {handle} must be owner/model/framework/variation")
    owner, name, framework, variation = parts
    path = resolve_folder(model)
    right = "gguf" if path.is_file() else "transformers"
    if framework != right:
        raise UserError(f"--model-instance {handle}: {path} is of the framework {right!r}, not {framework!r}")
    output.parent.mkdir(parents=True, exist_ok=True)
    check_apart(output, [output], [("model", path)])
    with made_folder(output) as part:
        for file in [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file()):
            _put(file, part)
        write_json(part / "model-metadata.json", {
            "ownerSlug": owner, "title": name, "slug": name, "isPrivate": True, "description": "", "publishTime": "",
            "provenanceSources": "",
        })  # fmt: skip
        write_json(part / "model-instance-metadata.json", {
            "ownerSlug": owner, "modelSlug": name, "instanceSlug": variation, "framework": framework, "overview": "",
            "usage": "", "licenseName": license_name, "fineTunable": True, "trainingData": [],
            "modelInstanceType": "Unspecified", "baseModelInstanceId": 0, "externalBaseModelUrl": "",
        })  # fmt: skip
    LOG.info(f"{output} is ready:\n  kaggle models create -p {output}\n  kaggle models variations create -p {output}\n"
        f"then: python -m submission bundle -o bundle --attach {handle}/1")  # fmt: skip


def check_replaceable(output: Path) -> None:
    """Refuse a bundle's folder that holds something else than its list of contents says.

    Raises:
        UserError: names what is in the way.
    """
    check_folder_name(output)
    check_no_file(output)
    try:
        listed = set(read_contents(output)["files"]) | {kernel.CONTENTS, DATASET_FILE}
    except UserError:
        listed = set()
    there = [path.relative_to(output).as_posix() for path in files_in(output)] if output.is_dir() else []
    foreign = [name for name in there if name not in listed]
    if foreign:
        raise UserError(
            f"{output} holds {some(foreign)}, which this command did not make: move it away, or choose another name"
        )


def _put_files(config: BundleConfig, folder: Path) -> None:
    model = ATTACHED if config.attach else config.model
    if model not in (*PACKAGED, ATTACHED):
        path = Path(model).expanduser()
        if path.is_dir():
            raise UserError(f"model {path} is a folder: attach it as a Kaggle model (bundle --model-instance)")
        if not is_gguf(path):
            raise UserError(f"model {path} is no GGUF file, or does not exist")
        _put(path, folder)
        _put_note(path, folder)
    for adapter in [*([config.adapter] if config.adapter else []), *config.adapters.values()]:
        if not adapter.exists():
            raise UserError(f"adapter {adapter} does not exist: name a PEFT folder or a GGUF LoRA file")
    if config.adapter is not None:
        if config.adapter.is_dir():
            check_peft_adapter(config.adapter)
            for file in sorted(one for one in config.adapter.iterdir() if one.is_file()):
                _put(file, folder)
        else:
            check_gguf_adapter(config.adapter)
            _put(config.adapter, folder, "adapter.gguf")
            _put_note(config.adapter, folder, "adapter.gguf")
    for name, adapter in config.adapters.items():
        _put_named(name, adapter, folder)
    for path in config.include:
        if path.name in (kernel.CONTENTS, DATASET_FILE):
            raise UserError(f"--include {path}: a file of this name is made by the bundle: rename it")
        _put(path, folder)
    if config.settings is not None:
        _put(config.settings, folder, kernel.SETTINGS)
    elif (folder / kernel.SETTINGS).exists():
        raise UserError(f"--include {kernel.SETTINGS}: give the settings with --settings instead")
    else:
        known = model if model in PACKAGED else "auto" if model == ATTACHED else Path(model).name
        (folder / kernel.SETTINGS).write_text(_PLAIN_SETTINGS.format(model=known), encoding="utf-8")


def _put_named(name: str, adapter: Path, folder: Path) -> None:
    """An adapter beside others: a dataset has no folders, so its name goes before its files'."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"--adapter {name}={adapter}: a name may hold letters, digits, - and _")
    if adapter.is_dir():
        check_peft_adapter(adapter)
        for file in sorted(one for one in adapter.iterdir() if one.is_file()):
            _put(file, folder, f"{name}.lora.{file.name}")
    else:
        check_gguf_adapter(adapter)
        _put(adapter, folder, f"{name}.lora.gguf")
        _put_note(adapter, folder, f"{name}.lora.gguf")


def _put_note(path: Path, folder: Path, name: str = "") -> None:
    """The manifest beside a GGUF file tells the template that it was trained on."""
    note = manifest_path(path)
    if note.is_file():
        _put(note, folder, manifest_path(Path(name or path.name)).name)


def _put(path: Path, folder: Path, name: str = "") -> None:
    name = name or path.name
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a dataset has none: name its files, each with --include")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if (folder / name).exists():
        raise UserError(f"two files of the bundle are called {name}: rename one")
    shutil.copyfile(path, folder / name)


def _check_wheels(folder: Path, image: Image) -> None:
    for wheel in folder.glob("*.whl"):
        for library, there in (("GLIBC", image.glibc), ("GLIBCXX", image.glibcxx)):
            needed = newest_needed(wheel, library)
            if needed > version_of(there):
                raise UserError(
                    f"{wheel.name} needs {library} {'.'.join(map(str, needed))}, and Kaggle's image has {there}: build "
                    "it on an older system and give it with --wheel"
                )
    names = sorted(wheel.name for wheel in folder.glob("*.whl"))
    double = [pair for pair in pairwise(names) if distribution(Path(pair[0])) == distribution(Path(pair[1]))]
    if double:
        raise UserError(f"two wheels of one package: {', '.join(double[0])}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_contents(folder: Path) -> dict[str, Any]:
    """The list of contents of a bundle.

    Raises:
        UserError: the folder is no bundle.
    """
    try:
        content = read_json(folder / kernel.CONTENTS)
    except UserError as error:
        raise UserError(f"{folder} is no bundle ({error}): make one with `python -m submission bundle`") from None
    if not (isinstance(content, dict) and isinstance(content.get("files"), dict)):
        raise UserError(f"{folder / kernel.CONTENTS} is no list of contents: make the bundle again")
    return content
