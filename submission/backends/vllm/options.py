"""Settings of backend vllm, and what vLLM does not run with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.backends.common import check_context
from submission.data.files import read_json
from submission.errors import UserError, first_line

DTYPES = ("auto", "float32", "bfloat16", "float16")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM makes room for
_LEAST_CAPABILITY = 7.0  # of the GPUs that vLLM is built for
_MODERN = 8.0  # Ampere: bfloat16, and shared memory enough for heads of 256
_WIDE_HEAD = 256
_NOT_COMPUTED = ("modules_to_save", "use_dora", "lora_bias", "target_parameters")  # of an adapter's configuration


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of this backend.

    context: tokens that a prompt and its answer may have together.
    streams: answers computed together at most; 0 means 256 on a GPU and 16 on a CPU.
    gpu_memory: share of the GPU's memory for weights and KV cache. Likelihoods need room beside it: 10 bytes for each
        prompt token and entry of the vocabulary.
    memory: megabytes of the KV cache on a CPU; 0 means a quarter of what is free.
    threads: of a CPU; 0 means every core this process may use.
    dtype: auto (bfloat16; float16 on GPUs older than Ampere; float32 on a CPU), float32, bfloat16 or float16.
    load_in_4bit: quantise the weights to nf4 on loading (bitsandbytes, GPUs only).
    eager: neither compile the model nor record CUDA graphs: it loads a minute faster and computes slower.
    """

    context: int = 2048
    streams: int = 0
    gpu_memory: float = 0.85
    memory: int = 0
    threads: int = 0
    dtype: str = "auto"
    load_in_4bit: bool = False
    eager: bool = False


def check_options(options: Options) -> None:
    """Refuse values that are none.

    Raises:
        UserError: names the option.
    """
    if options.dtype not in DTYPES:
        raise UserError(f"option dtype={options.dtype!r} for backend vllm is none of {', '.join(DTYPES)}")
    check_context(options.context, "vllm")
    for name in ("streams", "memory", "threads"):
        if getattr(options, name) < 0:
            raise UserError(f"option {name} for backend vllm must be at least 0")
    if not 0 < options.gpu_memory <= 1:
        raise UserError(f"option gpu_memory={options.gpu_memory:g} for backend vllm must be above 0 and at most 1")


def check_gpus(model: Path, dtype: str, gpus: Iterable[str]) -> None:
    """Refuse a GPU that vLLM does not run the model on.

    Args:
        model: its folder.
        dtype: as of `Options`.
        gpus: compute capability and name of each, as nvidia-smi prints them: "7.5, Tesla T4".

    Raises:
        UserError: names the GPU, the reason and what to do instead.
    """
    for line in gpus:
        capability, _, name = line.partition(",")
        try:
            number = float(capability)
        except ValueError:  # an old driver that does not know the field
            continue
        gpu = f"{name.strip()} (compute capability {capability.strip()})"
        if number < _LEAST_CAPABILITY:
            raise UserError(f"vLLM does not support {gpu}: use --backend transformers")
        if number >= _MODERN:
            continue
        if dtype == "bfloat16":
            raise UserError(f"{gpu} has no bfloat16: use --set dtype=float16")
        if head_size(model) >= _WIDE_HEAD:
            raise UserError(
                f"model {model} has attention heads of {head_size(model)}, as Gemma has, for which vLLM's kernels need "
                f"more shared memory than {gpu} has: use --backend transformers"
            )


def head_size(model: Path) -> int:
    """The size of an attention head by the configuration of a folder; 0 if it does not say."""
    config = text_config(model)
    size, width, heads = (config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(size, int):
        return size
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else 0


def text_config(model: Path) -> Mapping[str, Any]:
    """The configuration of a folder's language model; empty where it is of another kind."""
    config = read_json(model / "config.json", "model configuration")
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    return config if isinstance(config, dict) else {}


def adapter_rank(adapter: Path) -> int:
    """The largest rank in a PEFT adapter.

    Raises:
        UserError: its configuration names none, or something that vLLM does not compute.
    """
    file = adapter / "adapter_config.json"
    config = read_json(file, "adapter configuration")
    try:
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        extra = [name for name in _NOT_COMPUTED if config.get(name)]
        extra += [] if config.get("peft_type", "LORA") == "LORA" else [f"type {config['peft_type']}"]
        extra += ["bias"] if config.get("bias") not in (None, "none") else []
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no configuration of a LoRA adapter: {first_line(error)}") from None
    if type(rank) is not int or rank < 1:
        raise UserError(f"{file}: the rank is {rank!r:.40}")
    if rank > RANKS[-1]:
        extra.append(f"rank {rank}")
    if extra:
        raise UserError(
            f"adapter {adapter} has {', '.join(map(str, extra))}, which vLLM does not compute: use --backend "
            "transformers"
        )
    return rank
