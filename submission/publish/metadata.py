"""`kernel-metadata.json` and `dataset-metadata.json`: read, checked before anything is sent, the owner filled in.

    {"id": "OWNER/prompt-recovery", "title": "prompt-recovery", "code_file": "submission/kernel.py", ...}

The keys are those of https://github.com/Kaggle/kaggle-cli/blob/main/docs/kernels_metadata.md. Kaggle itself accepts
much that is wrong without a word (an unknown key, a text for a boolean), so the check here is stricter.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from submission.data.files import read_json
from submission.errors import UserError

PLACEHOLDER = "OWNER"
"""Stands for the user who pushes, wherever an owner is expected."""

KERNEL_FILE, DATASET_FILE = "kernel-metadata.json", "dataset-metadata.json"

GPUS = ("NvidiaTeslaT4", "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000")
"""Machine shapes with a GPU; `NvidiaTeslaT4` is 2 x T4. Which of them an account gets is for Kaggle to say."""

_TPUS = ("TpuV5E8", "TpuV6E8")
_WITHDRAWN = {
    "NvidiaTeslaP100": "is retired",
    "NvidiaTeslaT4Highmem": "is for Kaggle's staff only",
    "TpuV38": "is retired",
    "Tpu1VmV38": "is retired",
}
_LANGUAGES, _KERNEL_TYPES = ("python", "r", "rmarkdown"), ("script", "notebook")
_PINNING = ("original", "latest")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_OWNER = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")
_PART = re.compile(r"[A-Za-z0-9_.-]+")  # of the name of somebody else's work: old ones follow older rules

_REQUIRED = ("id", "title", "code_file", "language", "kernel_type", "enable_internet")
_REQUIRED_OF_DATASETS = ("id", "title", "licenses")
_OTHER_DATASET_KEYS = (
    "id_no", "subtitle", "description", "resources", "keywords", "collaborators", "data", "isPrivate",
    "expectedUpdateFrequency", "userSpecifiedSources", "image",
)  # fmt: skip

Check = Callable[[object], str]
"""Gives what to do about a value, or "" if it is right."""


def read_metadata(path: Path) -> dict[str, object]:
    """A checked `kernel-metadata.json`; the owner may still be the placeholder.

    Raises:
        UserError: missing, not JSON, or against a rule; names every bad key, its value and the fix.
    """
    content = read_object(path)
    raise_problems(path, check_metadata(content, path.parent))
    return content


def read_object(path: Path) -> dict[str, object]:
    """A JSON file that holds an object.

    Raises:
        UserError: missing, not readable or something else than an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, as in {{...}}")
    return content


def raise_problems(path: Path, problems: list[str]) -> None:
    """Raise all problems of a metadata file as one `UserError`, if there are any."""
    if problems:
        raise UserError("\n".join([f"{path} would not work on Kaggle", *problems]))


def with_owner(content: Mapping[str, object], owner: str) -> dict[str, object]:
    """A copy with the placeholder `OWNER` replaced in `id` and in every `*_sources` list."""

    def fill(value: object) -> object:
        if isinstance(value, str) and value.startswith(f"{PLACEHOLDER}/"):
            return owner + value.removeprefix(PLACEHOLDER)
        return [fill(item) for item in value] if isinstance(value, list) else value

    return {key: fill(value) if key == "id" or key.endswith("_sources") else value for key, value in content.items()}


def check_metadata(content: Mapping[str, object], folder: Path) -> list[str]:
    """What is wrong with a `kernel-metadata.json`: one line for each problem, with the key, the value and the fix.

    Args:
        content: the file's keys and values.
        folder: where the file is; `code_file` is relative to it.
    """
    checks: dict[str, Check] = {
        "id": lambda value: _check_id(value, shortest=5),
        "id_no": lambda value: "" if type(value) is int and value > 0 else "use a whole number, or drop the key",
        "title": lambda value: _check_title(value, content.get("id")),
        "code_file": lambda value: _check_code_file(value, folder, content.get("kernel_type")),
        "language": _one_of(_LANGUAGES),
        "kernel_type": _one_of(_KERNEL_TYPES),
        "is_private": _check_boolean,
        "enable_gpu": _check_boolean,
        "enable_tpu": lambda value: _check_tpu(value, content.get("enable_gpu")),
        "enable_internet": lambda value: "" if value is False else "use false: the competition allows no internet",
        "machine_shape": lambda value: _check_machine(value, content),
        "dataset_sources": _list_of(_check_reference),
        "kernel_sources": _list_of(_check_reference),
        "competition_sources": _list_of(_check_competition),
        "model_sources": _list_of(check_model),
        "docker_image": _check_text,
        "docker_image_pinning_type": _one_of(_PINNING),
        "keywords": _list_of(_check_text),
    }
    problems = list(_problems(content, checks, _REQUIRED))
    if content.get("enable_gpu") is True and "machine_shape" not in content:
        problems.append(f"machine_shape is missing: with enable_gpu use one of {', '.join(GPUS)}")
    return problems


def check_dataset_metadata(content: Mapping[str, object]) -> list[str]:
    """What is wrong with a `dataset-metadata.json`: one line for each problem, as `check_metadata`."""
    checks: dict[str, Check] = {
        "id": lambda value: _check_id(value, shortest=6),
        "title": lambda value: _check_length(value, 6, 50),
        "subtitle": lambda value: _check_length(value, 20, 80),
        "licenses": _check_licenses,
        "keywords": _list_of(_check_text),
    }
    for key in _OTHER_DATASET_KEYS:
        checks.setdefault(key, lambda _: "")
    return list(_problems(content, checks, _REQUIRED_OF_DATASETS))


def _problems(content: Mapping[str, object], checks: Mapping[str, Check], required: tuple[str, ...]) -> Iterator[str]:
    for key in required:
        if key not in content:
            yield f"{key} is missing: add it"
    for key, value in content.items():
        if key not in checks:
            near = difflib.get_close_matches(key, checks, n=1, cutoff=0)
            yield f"{key} {value!r}: unknown key; is {near[0]!r} meant?"
        elif fix := checks[key](value):
            yield f"{key} {value!r}: {fix}"


def _one_of(allowed: tuple[str, ...]) -> Check:
    return lambda value: "" if value in allowed else f"use {' or '.join(repr(item) for item in allowed)}"


def _list_of(check: Check) -> Check:
    def check_list(value: object) -> str:
        if not isinstance(value, list):
            return "use a list, as in [...]"
        twice = [item for index, item in enumerate(value) if item in value[:index]]
        fixes = [f"{item!r}: {fix}" for item in value if (fix := check(item))]
        return "; ".join([*fixes, *(f"{item!r} appears twice: name it once" for item in twice)])

    return check_list


def _check_text(value: object) -> str:
    return "" if isinstance(value, str) and value.strip() else "use a text"


def _check_boolean(value: object) -> str:
    return "" if isinstance(value, bool) else "use true or false, without quotes"


def _check_tpu(value: object, gpu: object) -> str:
    return "use false: enable_gpu is true" if value is True and gpu is True else _check_boolean(value)


def _check_length(value: object, shortest: int, longest: int) -> str:
    if isinstance(value, str) and shortest <= len(value.strip()) <= longest:
        return ""
    return f"use a text of {shortest} to {longest} characters"


def _check_id(value: object, *, shortest: int) -> str:
    owner, _, slug = value.partition("/") if isinstance(value, str) else ("", "", "")
    if not (owner and slug) or "/" in slug:
        return "use owner/slug, as in OWNER/prompt-recovery"
    if owner != PLACEHOLDER and not _OWNER.fullmatch(owner):
        return f"the owner {owner!r} is no user name of Kaggle: use lower-case letters, digits and single hyphens"
    if not _SLUG.fullmatch(slug):
        return f"the slug {slug!r} may hold lower-case letters and digits with single hyphens between them"
    if not shortest <= len(slug) <= 50:
        return f"the slug {slug!r} has {len(slug)} characters: use {shortest} to 50"
    return ""


def _check_title(value: object, identity: object) -> str:
    fix = _check_length(value, 5, 50)
    slug = str(identity).rpartition("/")[2]
    if not fix and _slug_of(str(value)) != slug:
        return f"Kaggle makes the slug {_slug_of(str(value))!r} of it, id says {slug!r}: use the same words in both"
    return fix


def _slug_of(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def _check_code_file(value: object, folder: Path, kernel_type: object) -> str:
    if not isinstance(value, str) or not value:
        return "use the path of a file, as in submission/kernel.py"
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        return f"use a path relative to {folder} and inside it"
    if not (folder / path).is_file():
        return f"{folder / path} does not exist: name the file that Kaggle runs"
    if (path.suffix == ".ipynb") != (kernel_type == "notebook"):
        return f"does not go with kernel_type {kernel_type!r}: a notebook is an .ipynb file, a script is not"
    return ""


def _check_machine(value: object, content: Mapping[str, object]) -> str:
    gpu, tpu = content.get("enable_gpu") is True, content.get("enable_tpu") is True
    allowed = GPUS if gpu else _TPUS if tpu else ("",)
    if value in allowed:
        return ""
    use = f"use one of {', '.join(allowed)}" if gpu or tpu else 'set enable_gpu to true, or use ""'
    reason = _WITHDRAWN.get(str(value), "")
    return f"{reason}: {use}" if reason else use


def _check_reference(value: object) -> str:
    parts = value.split("/") if isinstance(value, str) else []
    return "" if len(parts) == 2 and all(map(_PART.fullmatch, parts)) else "use owner/slug"


def _check_competition(value: object) -> str:
    return "" if isinstance(value, str) and _PART.fullmatch(value) else "use the competition's slug alone"


def check_model(value: object) -> str:
    """What is wrong with a model's handle; "" if nothing is."""
    parts = value.split("/") if isinstance(value, str) else []
    if len(parts) == 5 and all(map(_PART.fullmatch, parts)) and re.fullmatch(r"[1-9]\d*", parts[4]):
        return ""
    example = "google/gemma/transformers/7b-it/2"
    missing = "the version number is missing: " if len(parts) == 4 else ""
    return f"{missing}use owner/model/framework/variation/VERSION, as in {example}"


def _check_licenses(value: object) -> str:
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and not _check_text(value[0].get("name"))
    ):
        return ""
    return 'use exactly one, as in [{"name": "apache-2.0"}]'
