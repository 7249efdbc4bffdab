"""Language models behind the two-method `Backend` protocol, loaded by name when asked for.

A backend module holds `Options` (a frozen dataclass), `check`, `load` and `load_encoder`; importing it
imports none of the packages that it needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from submission.backends.hardware import ALONE, Placement
from submission.backends.models import EMBEDDED, PACKAGED, TUNED, is_openvino_folder
from submission.config import from_settings
from submission.errors import MissingExtra, UserError
from submission.prompts.encoding import ChatEncoder
from submission.types import Backend

# name -> (module, packages it needs as (import name, extra); "" is the core installation)
_BACKENDS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "openvino": (
        "submission.backends.openvino.backend",
        (("openvino_genai", ""), ("openvino", ""), ("tokenizers", ""), ("jinja2", ""), ("gguf", "")),
    ),
    "llama_cpp": ("submission.backends.llama.backend", (("llama_cpp", "llama"),)),
    "transformers": ("submission.backends.transformers.backend", (("torch", "hf"), ("transformers", "hf"))),
    "vllm": ("submission.backends.vllm.backend", (("vllm", "vllm"), ("tokenizers", ""), ("jinja2", ""))),
    "scripted": ("submission.backends.scripted", ()),
}

AUTO = "auto"
"""The backend that suits the model; see `backend_of`."""

_MOST_WORKERS, _MOST_ACTORS = 16, 10_000  # on a small machine; on a cluster. More is a slip of the hand.


class _Module(Protocol):
    """What a backend module holds."""

    Options: type[Any]

    def check(self, spec: ModelSpec) -> None: ...
    def fingerprint(self, spec: ModelSpec) -> dict[str, str]: ...
    def load(self, spec: ModelSpec) -> Backend: ...
    def load_encoder(self, spec: ModelSpec) -> ChatEncoder: ...


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model to load, how, and in how many copies; made by `model_spec`, which has checked it."""

    backend: str
    model: str
    adapter: Path | None
    options: Any
    placement: Placement = ALONE

    def load(self) -> Backend:
        """Load the model, in this process; runs have workers do it (`submission.calls`).

        Raises:
            UserError: the files are there but cannot be loaded.
        """
        return _module(self.backend).load(self)

    @property
    def keyed(self) -> bool:
        """Whether answers depend on the keys of requests too, as of a double that answers from a file."""
        return bool(getattr(_module(self.backend), "KEYED", False))

    def held_by(self, placement: Placement) -> ModelSpec:
        """The same in these copies, if more is asked for than the one that anybody has."""
        return self if placement == ALONE else replace(self, placement=placement)

    def load_encoder(self) -> ChatEncoder:
        """Load the tokenizer and chat template only."""
        return _module(self.backend).load_encoder(self)

    def fingerprint(self) -> dict[str, str]:
        """What decides the answers: the model's and adapter's content, the options that matter."""
        return {"backend": self.backend, **_module(self.backend).fingerprint(self)}

    def describe(self) -> dict[str, Any]:
        """All that was asked for, for the manifest; `model_spec(**...)` takes it back."""
        return {
            "backend": self.backend,
            "model": self.model if self.model in PACKAGED else str(Path(self.model).expanduser().resolve()),
            "adapter": str(self.adapter.resolve()) if self.adapter else None,
            "settings": [f"{key}={value}" for key, value in asdict(self.options).items()],
        }


def backend_of(model: str) -> str:
    """The backend of a model by what it is: an embedded one, an OpenVINO or transformers folder, or a GGUF file."""
    path = Path(model).expanduser()
    if model in PACKAGED or is_openvino_folder(path):
        return "openvino"
    return "transformers" if (path / "config.json").is_file() else "llama_cpp"


def names() -> list[str]:
    """The names of all backends."""
    return list(_BACKENDS)


def model_spec(
    backend: str = AUTO,
    model: str = EMBEDDED,
    adapter: Path | None = None,
    settings: list[str] | None = None,
    placement: Placement = ALONE,
) -> ModelSpec:
    """Check that a backend, its packages, the model files and the options are there. Loads nothing.

    Args:
        backend: its name, or `auto`.
        model: file, folder, `embedded`, or `embedded-tuned`, which with an adapter of one's own is `embedded`.
        adapter: file or folder.
        settings: `key=value` for the backend's options.
        placement: copies of it, and where they are.

    Raises:
        UserError: what is missing or wrong, with what exists or the pip command.
    """
    if backend == AUTO:
        if model not in PACKAGED and not Path(model).expanduser().exists():
            raise UserError(f"model {model} does not exist: name a GGUF file, a transformers folder or 'embedded'")
        backend = backend_of(model)
    if backend not in _BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are: {AUTO}, {', '.join(_BACKENDS)}")
    for package, extra in _BACKENDS[backend][1]:
        require(package, extra, f"backend {backend}")
    module = _module(backend)
    if model == TUNED and adapter is not None:
        model = EMBEDDED
    most = _MOST_ACTORS if placement.ray else max(_MOST_WORKERS, os.cpu_count() or 1)
    if placement.workers > most:
        raise UserError(
            f"workers={placement.workers} is too many: at most {most} {'actors' if placement.ray else 'here'}"
        )
    options = from_settings(module.Options, settings or [], f"backend {backend}")
    spec = ModelSpec(backend, model, adapter, options, placement)
    if placement.ray:
        require("ray", "ray", "--ray")
    module.check(spec)
    return spec


def check_settings(backend: str, settings: list[str]) -> None:
    """Refuse options that a backend does not have; needs none of its packages.

    Raises:
        UserError: names the option and what is allowed.
    """
    from_settings(_module(backend).Options, settings, f"backend {backend}")


def require(package: str, extra: str, what: str) -> None:
    """Refuse to go on without a package.

    Raises:
        MissingExtra: with the pip command that brings it.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(what, package, extra)


def _module(backend: str) -> _Module:
    return cast(_Module, importlib.import_module(_BACKENDS[backend][0]))
