"""llama.cpp with all layers on the GPU beside none of them: a model of 1B's shape with random weights."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from submission.backends import model_spec
from submission.backends.models import EMBEDDED, resolve_gguf
from submission.prompts.templates import get_template
from submission.types import Request, Sampling
from tests.gpu.models import example_pairs
from tests.gpu.report import Check


def run(check: Check) -> None:
    """Time both ways, and compare what they answer."""
    from submission.backends.llama.library import library

    model = resolve_gguf(EMBEDDED) if check.small else _one_billion(check.own_folder() / "1b.gguf")
    ways = {"on the CPU": 0}
    if library().llama_supports_gpu_offload():
        ways["on the GPU"] = 999
    else:
        check.leave_out("on the GPU", "this llama-cpp-python was built without CUDA")
    rows = {"on the CPU": 1 if check.small else 4, "on the GPU": 64}
    pace, answers = {}, {}
    for name, layers in ways.items():
        backend = model_spec("llama_cpp", str(model), settings=[f"gpu_layers={layers}"]).load()
        requests = _requests(rows[name], small=check.small)
        began = time.perf_counter()
        found = dict(backend.generate(requests))
        pace[name] = len(found) / (time.perf_counter() - began)
        answers[name] = {key: one[0].text for key, one in found.items() if isinstance(one, list)}
        check.put(f"{name}: rows", pace[name], "rows/s", note=f"{len(found)} rows")
        check.put(f"{name}: rows lost", len(requests) - len(answers[name]), f"of {len(requests)}", high=0)
        del backend
    if len(pace) == 2:
        check.put("GPU beside CPU", pace["on the GPU"] / pace["on the CPU"], "x", low=1)
        same = [answers["on the GPU"][key] == text for key, text in answers["on the CPU"].items()]
        check.put("same greedy answers", sum(same) / len(same), "of 1", note="kernels round differently")


def _one_billion(path: Path) -> Path:
    from gguf import GGMLQuantizationType

    from tests.bench.random_gguf import write

    write(path, GGMLQuantizationType.Q8_0)
    return path


def _requests(count: int, *, small: bool) -> list[Request]:
    pairs = example_pairs()
    template, sampling = get_template("short"), Sampling(max_new_tokens=4 if small else 40)
    if small:
        pairs = [replace(pair, original_text=pair.original_text[:80], rewritten_text=pair.rewritten_text[:80])
                 for pair in pairs]  # fmt: skip
    return [Request(str(number), template.render(pairs[number % len(pairs)]), sampling) for number in range(count)]
