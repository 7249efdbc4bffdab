"""Speed of backend vllm beside transformers: the same rows, the same weights, in an environment that has both.

.venv-vllm/bin/python -m tests.bench.vllm_speed examples/test.csv --rows 24
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from submission.backends import model_spec
from submission.data.tables import read_pairs
from submission.prompts.templates import get_template, render_rewrite
from submission.types import Backend, Request, Sampling
from tests.conftest import generated, scored
from train.bases import base_folder


def main() -> None:
    """Print seconds and rows per second of each, model loaded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    pairs = read_pairs(arguments.input)[: arguments.rows]
    layout = get_template("short")
    scored_items = [(pair.id, render_rewrite("Rewrite this as a poem", pair.original_text), pair.rewritten_text)
                    for pair in pairs]  # fmt: skip

    def asked(n: int) -> list[Request]:
        sampling = Sampling(n=n, temperature=0.8 * (n > 1), max_new_tokens=arguments.max_new_tokens)
        return [Request(pair.id, layout.render(pair), sampling) for pair in pairs]

    ways: dict[str, Callable[[Backend], object]] = {
        "greedy": lambda backend: generated(backend, asked(1)),
        "eight samples a row": lambda backend: generated(backend, asked(8)),
        "likelihoods": lambda backend: scored(backend, scored_items),
    }
    folder = str(base_folder("embedded"))
    print(f"{len(pairs)} rows, {arguments.dtype}; seconds (rows/s)")
    backends = {
        name: model_spec(name, folder, settings=[f"dtype={arguments.dtype}"]).load()
        for name in ("vllm", "transformers")
    }
    for way, run in ways.items():
        for name, backend in backends.items():
            began = time.perf_counter()
            run(backend)
            seconds = time.perf_counter() - began
            print(f"  {way:20} {name:14} {seconds:7.1f} ({len(pairs) / seconds:.2f})", flush=True)


if __name__ == "__main__":
    main()
