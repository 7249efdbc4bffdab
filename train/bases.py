"""Models to train on, as transformers folders; a GGUF file is dequantised to one, once."""

from __future__ import annotations

import sys
from pathlib import Path

from submission.backends.models import resolve_folder
from submission.backends.transformers.loading import load_model, load_tokenizer, stay_offline_and_quiet
from submission.data.files import atomic_folder, cache_folder
from submission.data.hashing import content_hash
from submission.data.outputs import check_apart, check_folder, made_folder, write_manifest
from submission.errors import UserError, first_line
from submission.progress import print_line


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
    print_line(f"{path.name} is dequantised for training, once: {folder}", sys.stderr)
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


def cut_layers(model: str, layers: int, output: Path) -> list[int]:
    """Write a smaller model of some of a model's layers, spread evenly from the first to the last, to be tuned.

    Args:
        model: as `base_folder` takes it.
        layers: how many to keep.
        output: folder to write; what an earlier cut left there is replaced.

    Returns:
        the layers that were kept, counted from 0.

    Raises:
        UserError: the model has no list of layers of that name, or not so many.
    """
    check_folder(output)
    folder = base_folder(model)
    check_apart(output, [output], [("model", folder)])
    stay_offline_and_quiet()
    import torch

    loaded = load_model(folder, None, device="cpu", dtype="float32", load_in_4bit=False)
    stack = getattr(loaded.model, "layers", None)
    if stack is None or hasattr(loaded.config, "layer_types"):
        raise UserError(f"{folder} is not built of one list of like layers: cutting it is not provided for")
    if not 2 <= layers <= len(stack):
        raise UserError(f"--layers {layers}: {folder} has {len(stack)} layers, and 2 are the least to keep")
    kept = [round(place * (len(stack) - 1) / (layers - 1)) for place in range(layers)]
    loaded.model.layers = torch.nn.ModuleList(stack[place] for place in kept)
    loaded.config.num_hidden_layers = layers
    with made_folder(output) as part:
        loaded.save_pretrained(part)
        load_tokenizer(folder).save_pretrained(part)
    write_manifest(output, {"base": str(folder), "base_hash": content_hash(folder), "layers": kept})
    return kept
