"""What can be said of a kernel's settings before anything is loaded: a mistake here costs a run of nine hours.

Names in kernel.toml and in the file of recover_config must lead to files of the bundle, its adapters or the attached
models; backends, options, strategies and templates must exist.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from submission import kernel
from submission.backends import AUTO, check_settings, model_spec, names
from submission.backends.models import PACKAGED
from submission.config import read_toml
from submission.errors import UserError
from submission.predict.strategies import RECOVERS, Setup, find_recover
from submission.prompts.grammar import read_grammar
from submission.prompts.templates import INSTRUCT, get_template, read_template

LOG = logging.getLogger(__name__)

_FIND = "find:"
_FOLDERS = ("transformers", "vllm")  # backends whose models and adapters are folders


def checked_settings(folder: Path, handles: Sequence[str] = ()) -> kernel.Settings:
    """The settings of a bundle's folder.

    Args:
        folder: with all its files but the wheels.
        handles: of the models that the bundle attaches; empty where kernel-metadata.json may name them.

    Raises:
        UserError: the kernel could not run with them, or would leave an adapter unused.
    """
    try:
        settings = kernel.read_settings(folder / kernel.SETTINGS)
        _check_settings(settings, folder, handles)
        config = _config(settings, folder, handles)
        _check_config(settings, config, folder, handles)
        _check_adapters(settings, config, folder, handles)
    except (UserError, kernel.KernelFailure) as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from None  # the folder is gone when it is read
    return settings


def _check_settings(settings: kernel.Settings, folder: Path, handles: Sequence[str]) -> None:
    where = kernel.SETTINGS
    if settings.backend not in (AUTO, *names()):
        raise UserError(f"{where}: unknown backend {settings.backend!r}; there are: {AUTO}, {', '.join(names())}")
    if ":" not in settings.recover and settings.recover.replace("-", "_") not in RECOVERS:
        raise UserError(f"{where}: unknown recover {settings.recover!r}; there are: {', '.join(RECOVERS)}, or "
                        "module:object of your own")  # fmt: skip
    _check_options(settings)
    for key in ("recover_config", "shots"):
        if value := getattr(settings, key):
            _check_file(key, value, folder, handles)
    if settings.template.startswith(_FIND) or settings.template.endswith(".toml"):
        _check_file("template", settings.template, folder, handles)
        file = folder / settings.template.removeprefix(_FIND)
        if file.is_file():
            read_template(file)
    elif settings.template:
        get_template(settings.template)
    if settings.backend != "scripted" and settings.model not in (AUTO, *PACKAGED):
        _check_file("model", settings.model, folder, handles)
    if settings.adapter not in (AUTO, "", *kernel.named_adapters(folder)):
        _check_file("adapter", settings.adapter, folder, handles)


def _check_options(settings: kernel.Settings) -> None:
    """Refuse options that no backend has that the model may get."""
    model = settings.model
    if settings.backend != AUTO:
        backends: tuple[str, ...] = (settings.backend,)
    else:
        backends = ("openvino",) if model in PACKAGED else ("transformers", "llama_cpp", "openvino")
        backends = ("llama_cpp",) if model.endswith(".gguf") else backends
    failures = []
    for backend in backends:
        try:
            check_settings(backend, settings.settings)
            return
        except UserError as error:
            failures.append(error)
    raise UserError(f"{kernel.SETTINGS}: settings: {failures[0]}")


def _check_file(key: str, value: str, folder: Path, handles: Sequence[str]) -> None:
    """Refuse a file of kernel.toml that is not there."""
    if value.startswith(_FIND):
        _check_name(f"{kernel.SETTINGS}: {key}", value, folder, handles)
    elif not Path(value).is_absolute() and not (folder / value).exists():
        add = {"model": f"give --model {value}", "adapter": f"give --adapter {value}=PATH"}.get(key)
        raise UserError(f"{kernel.SETTINGS}: {key} = {value!r} is not in the bundle: {add or f'add --include {value}'}"
                        f"\n{_what_is_there(folder, handles)}")  # fmt: skip


def _check_name(where: str, value: str, folder: Path, handles: Sequence[str]) -> None:
    """Refuse "find:NAME" that leads nowhere; a path into another dataset of the kernel's can't be known here."""
    name = value.removeprefix(_FIND)
    if name and (name in kernel.named_adapters(folder) or (folder / name).exists()):
        return
    if any(f"/{name.lower()}/" in f"/{handle.lower()}/" for handle in handles):
        return
    if "/" in name and not (handles and name.count("/") == 4):  # a whole handle is one of those that are attached
        LOG.info(f"{where} = {value!r} was not checked: it is no file of the bundle and no attached model")
        return
    raise UserError(f"{where} = {value!r} leads nowhere: there is neither a file, an adapter nor an attached model of "
                    f"this name\n{_what_is_there(folder, handles)}; what another dataset holds is "
                    f'"{_FIND}DATASET/NAME"')  # fmt: skip


def _what_is_there(folder: Path, handles: Sequence[str]) -> str:
    named = kernel.named_adapters(folder)
    files = sorted(path.name for path in folder.iterdir() if ".lora." not in path.name and path.suffix != ".whl")
    return (f"There are: files {', '.join(files)}; adapters {', '.join(named) or 'none with a name'}; "
            f"attached models {', '.join(handles) or 'none'}")  # fmt: skip


def _config(settings: kernel.Settings, folder: Path, handles: Sequence[str]) -> dict[str, Any]:
    """The content of recover_config; empty where it lies in another dataset."""
    file = folder / settings.recover_config.removeprefix(_FIND)
    return read_toml(file, "recover_config") if settings.recover_config and file.is_file() else {}


def _check_config(settings: kernel.Settings, config: Mapping[str, Any], folder: Path, handles: Sequence[str]) -> None:
    name = settings.recover_config.removeprefix(_FIND)
    for where, value in _named_places(config):
        _check_name(f"{name}: {where}", value, folder, handles)
    if not config:
        return
    if isinstance(grammar := config.get("grammar"), str) and grammar:
        _check_grammar(f"{name}: grammar", grammar, folder)
    if ":" not in settings.recover:
        find_recover(settings.recover).make(Setup(model_spec, get_template(INSTRUCT), config=config))
    elif _is_ours(settings.recover):
        find_recover(settings.recover).check(config)


def _check_grammar(where: str, value: str, folder: Path) -> None:
    if not value.startswith(_FIND) and not Path(value).is_absolute():
        raise UserError(f"{where} = {value!r} is found on Kaggle only as {_FIND + value!r}, with --include {value}")
    file = folder / value.removeprefix(_FIND)
    if file.is_file():
        read_grammar(file)


def _named_places(content: Any, where: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    """What must lead somewhere, and where it is written: texts "find:NAME" under the keys that name a place."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _named_places(value, f"{where}.{name}".lstrip("."), name)
    elif isinstance(content, list):
        for number, value in enumerate(content, start=1):
            yield from _named_places(value, f"{where} {number}", key)
    elif isinstance(content, str) and content.startswith(_FIND) and key in kernel.PLACES:
        yield where, content


def _is_ours(recover: str) -> bool:
    """Whether a strategy comes with this package: code of the user's own is not run to make a bundle."""
    path = Path(__file__).resolve().parents[2].joinpath(*recover.partition(":")[0].split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _check_adapters(settings: kernel.Settings, config: Mapping[str, Any], folder: Path, handles: Sequence[str]) -> None:
    """Refuse a bundle whose kernel would leave an adapter unused without a word."""
    if settings.adapter != AUTO or settings.recover == "constant":
        return
    named = kernel.named_adapters(folder)
    unused = [name for name in named if name not in kernel.used_names(config)]
    alone = [file for file in ("adapter_config.json", "adapter.gguf") if (folder / file).is_file()]
    if unused and (alone or len(named) > 1 or kernel.has_own_models(config)):
        raise UserError(
            f'nothing uses the adapter {unused[0]}: write adapter = "{unused[0]}" in {kernel.SETTINGS} (--settings), '
            f'adapter = "{_FIND}{unused[0]}" in a [[source]] of recover_config, or leave --adapter {unused[0]}=... out'
        )
    kind = _takes_folders(settings, folder, handles)
    is_folder = "adapter_config.json" in alone or any(
        (folder / f"{name}.lora.adapter_config.json").is_file() for name in unused
    )
    if kind is not None and (alone or unused) and kind != is_folder and ":" not in settings.recover:
        raise UserError(
            f"the adapter is a {'PEFT folder' if is_folder else 'GGUF file'}, and the model takes "
            f"{'PEFT folders' if kind else 'GGUF files'}: it would not be used\n"
            "Attach the base model of a PEFT adapter (--attach gemma-7b-it), or convert it to a GGUF LoRA file."
        )


def _takes_folders(settings: kernel.Settings, folder: Path, handles: Sequence[str]) -> bool | None:
    """Whether adapters of the kernel's model are PEFT folders; None where that is not known before it runs."""
    if settings.backend in _FOLDERS:
        return True
    if settings.model in PACKAGED or settings.model.endswith(".gguf") or settings.backend == "llama_cpp":
        return False
    ggufs = [path for path in folder.glob("*.gguf") if not kernel.is_adapter(path, settings)]
    attached = {handle.split("/")[2].lower() == "gguf" for handle in handles}
    return True if attached == {False} and settings.model == AUTO and not ggufs else None
