"""Models to train on, as transformers folders; a GGUF file is dequantised to one, once."""

from __future__ import annotations

import sys
from pathlib import Path

from submission.backends.hf_loading import load_model, load_tokenizer, stay_offline_and_quiet
from submission.errors import UserError, first_line
from submission.models import cache_folder, content_hash, resolve_folder
from submission.progress import tell
from submission.tables import atomic_folder


def base_folder(model: str) -> Path:
    """The folder of a base model.

    Args:
        model: a transformers folder, a GGUF file or `embedded`.

    Raises:
        UserError: there is no such model, or it cannot be dequantised.
    """
    path = resolve_folder(model)
    if path.is_dir():
        return path
    folder = cache_folder("bases") / f"{path.stem}-{content_hash(path)[:12]}"
    if (folder / "config.json").is_file():
        return folder
    tell(f"{path.name} is dequantised for training, once: {folder}", sys.stderr)
    stay_offline_and_quiet()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        model_of_file = load_model(path, None, device="cpu", dtype="float32", load_in_4bit=False)
        if hasattr(model_of_file.config, "quantization_config"):
            del model_of_file.config.quantization_config  # its weights are plain now
        with atomic_folder(folder) as part:
            model_of_file.save_pretrained(part)
            load_tokenizer(path).save_pretrained(part)
    except (OSError, ValueError, RuntimeError) as error:
        if not (folder / "config.json").is_file():  # another process may have been faster
            raise UserError(f"{path} cannot be dequantised: {first_line(error)}") from error
    return folder
