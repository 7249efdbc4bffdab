"""Where a model is computed and in which precision, worked out before anything is loaded."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, MutableMapping
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

from submission.errors import UserError, first_line

BALANCED = "balanced"
"""The device of a model that is spread over all GPUs, layer by layer."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"I64": 8, "F64": 8, "I32": 4, "I16": 2}  # of integers as they are in a file; others take a byte
_OVERFLOWING = ("gemma2", "gemma3")  # model types that float16 is too narrow for
_IN_4_BITS = 0.53  # bytes a weight takes in nf4 with its scales
_GB = 1e9


def choose_dtype(model_type: str, capability: tuple[int, int] | None, asked: str) -> str:
    """The dtype that a model computes in.

    Args:
        model_type: of its configuration.
        capability: CUDA compute capability of the GPU; None on a CPU.
        asked: auto, or a dtype, which is taken as it is.

    Returns:
        float32, bfloat16 or float16. GPUs before 8.0 have no bfloat16 units: float16 there, or float32 for Gemma 2 and
        3, whose activations leave the range of float16. Those of Gemma 1 seldom do: such rows fail and are counted.
    """
    if asked != "auto":
        return asked
    if capability is None:
        return "float32"
    if capability >= (8, 0):
        return "bfloat16"
    return "float32" if model_type.startswith(_OVERFLOWING) else "float16"


def find_device(asked: str) -> str:
    """The device that an option names: `auto` is a GPU where there is one.

    Raises:
        UserError: torch knows no such device, or there is no GPU.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        on_gpu = asked == BALANCED or torch.device(asked).type == "cuda"
    except RuntimeError as error:
        raise UserError(f"option device={asked!r} is no device of torch: {first_line(error)[:200]}") from None
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"option device={asked!r}: torch finds no CUDA GPU; use device=cpu")
    return asked


def gpus_of(device: str) -> list[int | str]:
    """The GPUs that a device stands for; none for a CPU."""
    import torch

    if device == BALANCED:
        return list(range(torch.cuda.device_count()))
    return [device] if torch.device(device).type == "cuda" else []


def lowest_capability(device: str) -> tuple[int, int] | None:
    """The CUDA compute capability of a device, the lowest one of several GPUs; None for a CPU."""
    import torch

    return min((torch.cuda.get_device_capability(gpu) for gpu in gpus_of(device)), default=None)


def device_map(device: str, *, quantised: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` that bring weights straight to where they are computed with.

    Args:
        device: of the model.
        quantised: the weights are quantised, on loading or in the folder; they are placed by transformers everywhere.
    """
    if device == BALANCED:
        return {"device_map": "balanced"}
    return {} if device.startswith("cpu") and not quantised else {"device_map": {"": device}}


def check_fits(path: Path, model_type: str, device: str, dtype: str, *, load_in_4bit: bool) -> None:
    """Refuse a model whose weights are larger than the free memory of its GPUs.

    Raises:
        UserError: says how much it takes, why, and what to do instead.
    """
    import torch

    gpus = gpus_of(device)
    if gpus:
        free = sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
        needed = weight_bytes(path, dtype, load_in_4bit=load_in_4bit)
        refuse_too_large(path, model_type, dtype, needed, free, load_in_4bit=load_in_4bit)


def refuse_too_large(
    path: Path, model_type: str, dtype: str, needed: int, free: int, *, load_in_4bit: bool = False
) -> None:
    """See `check_fits`; sizes in bytes."""
    if needed <= free:
        return
    why = ""
    if dtype == "float32" and model_type.startswith(_OVERFLOWING):
        why = " (its activations leave the range of float16, and this GPU has no bfloat16 units)"
    ways = ([] if load_in_4bit else ["load_in_4bit=true"]) + ["device=balanced, which takes several GPUs"]
    precision = f"{dtype} and nf4" if load_in_4bit else dtype
    raise UserError(
        f"model {path} does not fit: its weights take {needed / _GB:.1f} GB in {precision}{why}, and "
        f"{free / _GB:.1f} GB of GPU memory are free\n"
        f"Use {', '.join(ways)}, or a smaller model."
    )


def weight_bytes(path: Path, dtype: str, *, load_in_4bit: bool = False) -> int:
    """Bytes that the weights of a folder take once they are loaded; 0 where that cannot be told.

    Args:
        path: transformers folder, or a GGUF file.
        dtype: that they are loaded in; integers, which are quantised weights, stay as they are.
        load_in_4bit: matrices are quantised on loading, but for embeddings and the output head.
    """
    try:
        return int(sum(_loaded_bytes(*tensor, dtype, load_in_4bit=load_in_4bit) for tensor in _tensors(path)))
    except (OSError, ValueError, KeyError, TypeError, struct.error):  # damaged: loading says how
        return 0


def _loaded_bytes(name: str, stored: str, shape: list[int], dtype: str, *, load_in_4bit: bool) -> float:
    if not stored.startswith(("F", "BF")):
        return prod(shape) * _STORED.get(stored, 1)
    if load_in_4bit and len(shape) == 2 and not any(part in name for part in ("embed", "lm_head")):
        return prod(shape) * _IN_4_BITS
    return prod(shape) * _BYTES[dtype]


def _tensors(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, stored type and shape of the tensors of a folder that transformers loads."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [file.name for file in path.glob("*.safetensors")]
        names = ["model.safetensors"] if "model.safetensors" in names else names
    for name in names:
        with (path / name).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for tensor, about in header.items():
            if tensor != "__metadata__":
                yield tensor, about["dtype"], about["shape"]


def prepare_allocator(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have torch's allocator grow its segments: batches of many lengths leave gaps otherwise. The user's own wins.

    Call it before torch is imported.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in environment for name in names):
        environment[allocator_variable(metadata.version("torch"))] = "expandable_segments:True"


def allocator_variable(torch_version: str) -> str:
    """The environment variable that sets torch's allocator: 2.9 gave it a new name, and warned of the old one."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return "PYTORCH_ALLOC_CONF" if (major, minor) >= (2, 9) else "PYTORCH_CUDA_ALLOC_CONF"
