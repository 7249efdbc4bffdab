"""Peak memory and seconds of merging and exporting a 7B model. A study, not a test.

    python -m tests.bench.merge_memory --folder /tmp/seven
    python -m tests.bench.merge_memory --folder /tmp/seven --shape gemma-7b --quantization ""

The base has the shape of a known model, random weights in bfloat16, several files, and the embedded model's tokenizer.
It is made in the folder, which must have room for three and a half times its size and is removed at the end (--keep
leaves it). A Gemma is not exported: the converter wants a SentencePiece vocabulary for it.

Memory is that of a command's process and its children: "own" is what only they can use, and "with files" adds the pages
of mapped files, which the system takes back when others need memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from submission.backends.common import package_path
from submission.backends.models import resolve_gguf
from submission.backends.transformers.loading import load_tokenizer, stay_offline_and_quiet

_SHARD = 2e9  # bytes of a file of the base
_PAUSE = 0.25  # seconds between two looks at a process
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    """Make, merge, export, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=("mistral-7b", "gemma-7b"), default="mistral-7b")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has; 0 for all")
    parser.add_argument("--quantization", default="Q4_K_M")
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir()
    try:
        began = time.perf_counter()
        parameters, size = make_base(asked.folder / "base", asked.shape, asked.layers)
        make_adapter(asked.folder / "base", asked.folder / "adapter")
        print(f"{asked.shape}: {parameters / 1e9:.2f} billion weights, {size / 1e9:.1f} GB on disk, "
              f"made in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        merged = asked.folder / "merged"
        step("merge", "merge", asked.folder / "adapter", "-o", merged, "--base", asked.folder / "base")
        told = json.loads((asked.folder / "merged.run.json").read_text())
        print(f"  {told['divergence']:.1e} nats a token from base and adapter, same most probable token at "
              f"{told['same_first']:.1%}", flush=True)  # fmt: skip
        if not asked.keep:
            shutil.rmtree(asked.folder / "base")  # room for what follows
        if asked.quantization:
            step(f"gguf {asked.quantization}", "gguf", merged, "-o", asked.folder / "m.gguf", "--quantization",
                 asked.quantization)  # fmt: skip
    finally:
        if not asked.keep:
            shutil.rmtree(asked.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Step:
    """What a command took: seconds, and bytes at its peak (own memory, and that with mapped files)."""

    seconds: float
    own: int
    with_files: int


def step(name: str, *arguments: object) -> Step:
    """Run a command of `train`, and print seconds, the two peaks of memory and what it said."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "train", *map(str, arguments)]
    process = subprocess.Popen(command, env={**os.environ, **package_path()})
    own = with_files = 0
    while process.poll() is None:
        found = memory(process.pid)
        own, with_files = max(own, found[0]), max(with_files, found[1])
        time.sleep(_PAUSE)
    took = Step(time.perf_counter() - began, own, with_files)
    print(f"{name:<14}{took.seconds:7.0f} s{own / 1e9:8.2f} GB own{with_files / 1e9:8.2f} GB with files"
          f"{'' if process.returncode == 0 else '  FAILED'}", flush=True)  # fmt: skip
    if process.returncode:
        raise SystemExit(process.returncode)
    return took


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process and its children: anonymous and shared memory, and that with mapped files."""
    own = every = 0
    try:
        for process in (one := psutil.Process(pid), *one.children(recursive=True)):
            with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
                fields = dict(line.split(":", 1) for line in file)
            sizes = {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem", "RssFile")}
            own += sizes["RssAnon"] + sizes["RssShmem"]
            every += sum(sizes.values())
    except (psutil.Error, OSError, KeyError):  # it has just ended
        pass
    return own, every


def make_base(folder: Path, shape: str, layers: int, *, tokenizer: Any = None, device: str = "cpu") -> tuple[int, int]:
    """Write a model of random weights file by file.

    Args:
        folder: to make.
        shape: mistral-7b or gemma-7b.
        layers: fewer than the shape has; 0 for all.
        tokenizer: that goes with it; None for the embedded model's.
        device: that draws the weights: a GPU does it in seconds.

    Returns:
        parameters, and bytes on disk.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    from submission.data.files import write_json
    from train.streamed import skeleton

    stay_offline_and_quiet()
    folder.mkdir()
    tokenizer = tokenizer or load_tokenizer(resolve_gguf("embedded"))
    tokenizer.save_pretrained(folder)
    kinds = {"mistral-7b": transformers.MistralConfig, "gemma-7b": transformers.GemmaConfig}
    more: dict[str, Any] = {"num_hidden_layers": layers} if layers else {}
    if len(tokenizer) > kinds[shape]().vocab_size:  # as the embedded model's is beside Mistral's
        more["vocab_size"] = len(tokenizer)
    config = kinds[shape](
        **more, pad_token_id=0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        dtype=torch.bfloat16, architectures=[kinds[shape].__name__.replace("Config", "ForCausalLM")],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    files: list[dict[str, Any]] = [{}]
    where: dict[str, str] = {}
    parameters = filled = 0
    shapes = {name: one.shape for name, one in skeleton(folder).named_parameters()}  # without the head of a tied model
    for name, size in [*shapes.items(), ("", torch.Size())]:
        if not name or (files[-1] and filled + 2 * size.numel() > _SHARD):
            file = f"model-{len(files):05}.safetensors"
            save_file(files[-1], folder / file, {"format": "pt"})
            where |= dict.fromkeys(files[-1], file)
            files[-1], filled = {}, 0
            files.append({})
        if name:
            tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
            tensor = tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02, generator=generator)
            files[-1][name] = tensor.cpu()
            parameters, filled = parameters + size.numel(), filled + 2 * size.numel()
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": 2 * parameters}, "weight_map": where}
    )
    return parameters, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def make_adapter(base: Path, folder: Path) -> None:
    """Write a LoRA adapter of random weights for the attention of every layer."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from train.streamed import skeleton

    folder.mkdir()
    LoraConfig(r=16, lora_alpha=32, target_modules=list(_TARGETS), task_type="CAUSAL_LM").save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in skeleton(base).named_modules():
        if name.endswith(_TARGETS):
            for key, size in {"lora_A": (16, module.in_features), "lora_B": (module.out_features, 16)}.items():
                tensors[f"base_model.model.{name}.{key}.weight"] = torch.randn(size, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
