"""What this machine is, as one line of JSON: asked in a process of its own, so that nobody else starts CUDA.

python -m tests.gpu.machine
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from submission.backends.common import package_path

_PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "trl", "accelerate", "vllm", "llama-cpp-python")


def describe() -> dict[str, Any]:
    """GPU, processor and versions; `gpu` is None where torch finds none."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.machine"], capture_output=True, text=True, check=False,
        env={**os.environ, **package_path()},
    )  # fmt: skip
    if done.returncode:
        return {"gpu": None, "trouble": done.stderr.strip()[-300:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print it."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        gpu = {"name": about.name, "count": torch.cuda.device_count(), "memory": about.total_memory,
               "capability": f"{about.major}.{about.minor}"}  # fmt: skip
    print(json.dumps({
        "gpu": gpu, "cuda": torch.version.cuda, "cores": len(os.sched_getaffinity(0)), "processor": platform.machine(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "python": platform.python_version(),
        "versions": dict(_versions()),
    }))  # fmt: skip


def _versions() -> Any:
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    main()
