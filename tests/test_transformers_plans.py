"""What the transformers backend works out before it computes on a GPU: precision, memory, places, kinds of errors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from submission.backends.hardware import Placement
from submission.backends.transformers.devices import (
    allocator_variable,
    choose_dtype,
    device_map,
    find_device,
    prepare_allocator,
    refuse_too_large,
    weight_bytes,
)
from submission.backends.transformers.memory import (
    TOKENS,
    Footprint,
    Room,
    budget,
    device_lost,
    footprint,
    out_of_memory,
)
from submission.errors import UserError

GB, KIB, MIB = 1e9, 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("model_type", "capability", "asked", "dtype"),
    [
        ("gemma", None, "auto", "float32"),
        ("mistral", None, "auto", "float32"),
        ("gemma", (7, 5), "auto", "float16"),
        ("gemma2", (7, 5), "auto", "float32"),  # T4: float16 overflows
        ("gemma3_text", (7, 0), "auto", "float32"),
        ("mistral", (7, 5), "auto", "float16"),
        ("llama", (6, 0), "auto", "float16"),
        ("gemma", (8, 0), "auto", "bfloat16"),
        ("gemma2", (8, 9), "auto", "bfloat16"),
        ("mistral", (9, 0), "auto", "bfloat16"),
        ("gemma2", (7, 5), "float16", "float16"),  # who asks for it has it: rows that overflow are counted
        ("mistral", None, "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_suits_model_and_gpu(
    model_type: str, capability: tuple[int, int] | None, asked: str, dtype: str
) -> None:
    assert choose_dtype(model_type, capability, asked) == dtype


def gemma_7b() -> Any:
    from transformers import GemmaConfig

    return GemmaConfig()


def mistral_7b(window: int | None = None) -> Any:
    from transformers import MistralConfig

    return MistralConfig(sliding_window=window)


def gemma_2_9b() -> Any:
    from transformers import Gemma2Config

    config = Gemma2Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                          num_key_value_heads=8, head_dim=256)  # fmt: skip
    config._attn_implementation = "eager"  # which transformers chooses for its bounded scores
    return config


@pytest.mark.parametrize(
    ("config", "kept", "windowed", "window"),
    [
        (gemma_7b, 448 * KIB, 0, 0),  # 28 layers x 2 x 16 heads x 256 x 2 bytes
        (mistral_7b, 128 * KIB, 0, 0),  # 32 x 2 x 8 x 128 x 2
        (lambda: mistral_7b(4096), 0, 128 * KIB, 4096),
        (gemma_2_9b, 168 * KIB, 168 * KIB, 4096),  # 42 x 2 x 8 x 256 x 2, every second layer with a window
    ],
)
def test_the_cache_of_a_token_follows_from_the_shape(
    config: Callable[[], Any], kept: int, windowed: int, window: int
) -> None:
    found = footprint(config(), 2)
    assert (found.kept, found.windowed, found.window) == (kept, windowed, window)
    assert found.cache(1000) == 1000 * (kept + windowed)
    assert found.cache(5000) == 5000 * kept + min(5000, window) * windowed
    assert footprint(config(), 4).kept == 2 * kept


def test_windowed_layers_hold_a_whole_prompt_until_the_step_after_it() -> None:
    found = footprint(mistral_7b(512), 2)
    assert found.batch(1, 1, 2000, 2040) >= 2000 * 128 * KIB
    assert found.cache(2040) == 512 * 128 * KIB


WEIGHTS = {"gemma_7b": (17.1, 5.6), "mistral_7b": (14.5, 4.1), "gemma_2_9b": (18.5, 6.2)}  # GB in 16 bits, in nf4


@pytest.mark.parametrize(
    ("config", "gpu", "in_4_bits", "rows"),
    [
        (gemma_7b, 15, True, 12), (gemma_7b, 24, False, 8), (gemma_7b, 24, True, 26), (gemma_7b, 80, False, 91),
        (gemma_7b, 80, True, 110), (gemma_7b, 140, False, 181), (gemma_7b, 140, True, 199),
        (mistral_7b, 15, True, 36), (mistral_7b, 24, False, 29), (mistral_7b, 24, True, 68),
        (mistral_7b, 80, False, 230), (mistral_7b, 140, False, 446),
        (gemma_2_9b, 15, True, 12), (gemma_2_9b, 24, False, 6), (gemma_2_9b, 80, False, 96),
        (gemma_2_9b, 140, False, 193),
    ],
)  # fmt: skip
def test_a_gpu_holds_so_many_rows_of_a_thousand_tokens(
    config: Callable[[], Any], gpu: int, in_4_bits: bool, rows: int
) -> None:
    """Prompts of 984 tokens and answers of 40, each prompt another.

    A row takes 635 MB of Gemma-7b while its prompt is computed (451 of cache, 181 of work, 2 of mask), 264 of Mistral,
    589 of Gemma-2. 0.54 GB and a twentieth of the GPU are left alone.
    """
    weights = WEIGHTS[config.__name__][in_4_bits] * GB
    room = Room(10_000, footprint(config(), 2), lambda: budget(int(gpu * GB - weights), int(gpu * GB)))
    room.look()
    held = next(n for n in range(2000) if not room.holds(n + 1, n + 1, 984, 1024))
    assert held == rows
    free = (gpu - weights / GB) * GB
    assert held * 1024 * footprint(config(), 2).kept < free, "the cache alone is within what is free"


def test_a_t4_holds_few_rows_of_gemma_in_float32() -> None:
    assert footprint(gemma_7b(), 4).batch(1, 1, 984, 1024) > 1.26 * GB
    room = Room(
        64, footprint(gemma_7b(), 4), lambda: budget(int(7.5 * GB), int(14.7 * GB))
    )  # nf4, embeddings in float32
    room.look()
    assert room.holds(4, 4, 984, 1024)
    assert not room.holds(5, 5, 984, 1024)


def test_samples_of_one_prompt_take_the_work_of_one_prompt() -> None:
    found = footprint(gemma_7b(), 2)
    assert found.batch(8, 1, 984, 1024) < 0.8 * found.batch(8, 8, 984, 1024)
    assert TOKENS.batch(8, 1, 984, 1024) == TOKENS.batch(8, 8, 984, 1024) == 8 * 1024


def test_a_reserve_is_left_alone() -> None:
    assert budget(10 << 30, 15 << 30) == (10 << 30) - 512 * MIB - (15 << 30) // 20
    assert budget(1 << 30, 15 << 30) == 0


def test_a_batch_that_did_not_fit_makes_the_next_ones_smaller_for_a_while() -> None:
    room = Room(64, Footprint(kept=1), lambda: 1000)
    room.look()
    assert room.holds(10, 10, 90, 100)
    room.ran_out(10, 10, 90, 100)
    room.look()
    assert room.holds(5, 5, 90, 100)
    assert not room.holds(6, 6, 90, 100)
    held = []
    for _ in range(16):
        room.went_well()
        room.look()
        held.append(max(n for n in range(65) if room.holds(n, n, 90, 100)))
    assert held == sorted(held)
    assert (held[2], held[3], held[-1]) == (5, 6, 10), "it grows back, step by step, to what there is"


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B."
)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "HIP out of memory. Tried to allocate 2.00 GiB.",
        ALLOCATOR,
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "std::bad_alloc",
    ],
)
def test_every_word_for_too_little_memory_is_known(text: str) -> None:
    import torch

    for kind in (RuntimeError, torch.OutOfMemoryError, torch.AcceleratorError):
        assert out_of_memory(kind(text))
        assert not device_lost(kind(text))


def test_too_little_memory_is_known_by_type_too() -> None:
    import torch

    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("whatever it says"))
    assert not out_of_memory(ValueError("CUDA out of memory."))
    assert not out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported.",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "HIP error: invalid device function",
    ],
)
def test_errors_after_which_a_process_cannot_use_its_gpu_are_known(text: str) -> None:
    import torch

    assert device_lost(RuntimeError(text))
    assert device_lost(torch.AcceleratorError(text))
    assert not out_of_memory(RuntimeError(text))
    assert not device_lost(ValueError(text))
    assert not device_lost(RuntimeError("shape mismatch"))


# -- loading ------------------------------------------------------------------------------------------------


def test_weights_go_straight_to_where_they_are_computed_with() -> None:
    assert device_map("cuda", quantised=False) == {"device_map": {"": "cuda"}}
    assert device_map("cuda:1", quantised=True) == {"device_map": {"": "cuda:1"}}
    assert device_map("balanced", quantised=False) == {"device_map": "balanced"}
    assert device_map("cpu", quantised=False) == {}
    assert device_map("cpu", quantised=True) == {"device_map": {"": "cpu"}}


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "balanced", "foo"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device='{device}'"):
        find_device(device)
    assert find_device("auto") == "cpu"


def write_header(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file without its data."""
    header = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for name, (kind, shape) in tensors.items()}
    content = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content)


def test_the_size_of_the_weights_is_known_before_they_are_loaded(tmp_path: Path) -> None:
    write_header(
        tmp_path / "model.safetensors",
        {"embed_tokens.weight": ("BF16", [1000, 100]), "q_proj.weight": ("BF16", [100, 100]), "norm": ("F32", [100])},
    )
    write_header(tmp_path / "consolidated.safetensors", {"a": ("BF16", [10_000_000])})  # the same, for other programs
    assert weight_bytes(tmp_path, "float32") == 4 * 110_100
    assert weight_bytes(tmp_path, "bfloat16") == 2 * 110_100
    assert weight_bytes(tmp_path, "float16", load_in_4bit=True) == 2 * 100_100 + 5_300
    write_header(tmp_path / "model-2.safetensors", {"q_proj.weight": ("U8", [5000, 1]), "norm": ("BF16", [100])})
    index = {"weight_map": {"q_proj.weight": "model-2.safetensors", "norm": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes(tmp_path, "float32") == 5000 + 400, "quantised weights stay as they are"
    (tmp_path / "model-2.safetensors").write_bytes(b"damaged")
    assert weight_bytes(tmp_path, "float32") == 0, "loading says what is wrong"


def test_a_model_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    refuse_too_large(tmp_path, "gemma2", "float32", int(14 * GB), int(15 * GB))
    with pytest.raises(
        UserError, match=r"37\.0 GB in float32 \(its activations.*14\.7 GB of GPU.*\n.*load_in_4bit=true.*balan"
    ):
        refuse_too_large(tmp_path, "gemma2", "float32", int(37 * GB), int(14.7 * GB))
    with pytest.raises(UserError, match=r"20\.0 GB in float16 and nf4, and 14\.7 GB") as refused:
        refuse_too_large(tmp_path, "mistral", "float16", int(20 * GB), int(14.7 * GB), load_in_4bit=True)
    assert "load_in_4bit" not in str(refused.value)


def test_the_allocator_is_told_to_grow_unless_the_user_told_it_something() -> None:
    assert allocator_variable("2.6.0+cu124") == "PYTORCH_CUDA_ALLOC_CONF"
    assert allocator_variable("2.9.1") == allocator_variable("2.13.0+cpu") == "PYTORCH_ALLOC_CONF"
    ours: dict[str, str] = {}
    prepare_allocator(ours)
    assert list(ours.values()) == ["expandable_segments:True"]
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        theirs = {name: "max_split_size_mb:128"}
        prepare_allocator(theirs)
        assert theirs == {name: "max_split_size_mb:128"}


def test_a_model_over_all_gpus_has_one_worker_that_sees_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from submission.backends import ModelSpec
    from submission.backends.transformers.backend import Options
    from submission.calls.processes import Processes
    from submission.calls.ways import Way

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = {}
    for device in ("auto", "balanced"):
        spec = ModelSpec("transformers", str(tmp_path), None, Options(device=device), Placement(2))
        carrier = Way(spec).carrier()
        assert isinstance(carrier, Processes)
        seen[device] = [environment.get("CUDA_VISIBLE_DEVICES", "all") for _, environment in carrier._shares]
    assert seen == {"auto": ["0", "1"], "balanced": ["all"]}
