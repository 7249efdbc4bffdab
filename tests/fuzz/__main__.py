"""`python -m tests.fuzz`; see the package."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from tests.fuzz import configs, models, tables
from tests.fuzz.run import Case, ForkedWorker, Trouble, fork_instead, run_cases

KINDS = {
    "csv": Case(tables.csv_case),
    "parquet": Case(tables.parquet_case),
    "toml": Case(configs.toml_case),
    "manifest": Case(configs.manifest_case),
    "gguf": Case(models.gguf_case),
    "adapter": Case(models.adapter_case),
}


def prepare(kind: str) -> None:
    """Import what most cases of a kind import: each is forked from here, and the smaller this process, the faster.

    No thread may be started before the last fork.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the children too
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in _IMPORTS[kind]:
        importlib.import_module(name)
    if kind == "adapter":
        models.prepare()
    llama: Any = importlib.import_module("submission.backends.llama.probe")
    processes: Any = importlib.import_module("submission.calls.processes")

    # In place of the module, which others use too.
    llama.subprocess = SimpleNamespace(run=fork_instead, TimeoutExpired=subprocess.TimeoutExpired)
    processes.subprocess = SimpleNamespace(
        Popen=ForkedWorker, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )


_ROOMS = ("submission.__main__", "eval.__main__", "train.__main__", "ensemble.__main__", "submission.predict.run")
_IMPORTS = {
    "csv": _ROOMS,
    "parquet": (*_ROOMS, "pandas", "pyarrow.parquet"),
    "toml": (*_ROOMS, "train.run", "ensemble.best_of", "pandas", "pyarrow.parquet"),
    "manifest": (*_ROOMS, "train.prepare", "ensemble.select", "eval.compare", "scipy.optimize"),
    "gguf": (*_ROOMS, "llama_cpp", "gguf", "numpy"),
    "adapter": (*_ROOMS, "llama_cpp", "gguf", "torch", "transformers", "peft"),
}


def fuzz(kinds: list[str], cases: int, seed: int, minutes: float, only: int | None = None) -> list[Trouble]:
    """Run cases of each kind for at most so many minutes a kind; says how many ran."""
    found: list[Trouble] = []
    for kind in kinds:
        prepare(kind)
        began = time.monotonic()
        numbers = range(cases) if only is None else [only]
        ran, troubles = run_cases(kind, KINDS[kind], seed, numbers, began + 60 * minutes)
        for trouble in troubles:
            print(trouble, flush=True)
        print(
            f"{kind:<9} seed {seed}: {ran} cases, {len(troubles)} in trouble, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        found += troubles
    return found


def main() -> int:
    """Exit code 1 if any case went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="again for more; default: all")
    parser.add_argument("--cases", type=int, default=5000, help="of each kind (default: 5000)")
    parser.add_argument("--minutes", type=float, default=30, help="at most, of each kind (default: 30)")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--only", type=int, default=None, help="the number of one case")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    return 1 if fuzz(given.kind or list(KINDS), given.cases, seed, given.minutes, given.only) else 0


if __name__ == "__main__":
    sys.exit(main())
