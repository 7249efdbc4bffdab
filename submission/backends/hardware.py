"""The GPUs of this machine, and where copies of a model are to be held. No torch, no CUDA is loaded to ask."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


def visible_gpus() -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES takes, of the GPUs that this process may use; none where there is no driver."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for part in allowed.split(",") if (name := part.strip()) and name != "-1"]
    return nvidia_smi("index") or []


def nvidia_smi(query: str) -> list[str] | None:
    """A line for each GPU with the fields that are asked for; None if the tool is there and does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in listed.splitlines() if line.strip()]


def free_gpu_memory() -> int:
    """Bytes that are free on the GPUs that this process may use, together; 0 where nothing tells."""
    visible = visible_gpus()
    free = 0
    for line in nvidia_smi("index,uuid,memory.free") or []:
        index, uuid, memory = (part.strip() for part in line.split(","))
        megabytes = memory.removesuffix("MiB").strip()
        if megabytes.isdigit() and (index in visible or uuid in visible):
            free += int(megabytes) << 20
    return free


@dataclass(frozen=True, slots=True)
class Placement:
    """How many copies of a model there are, and where.

    Attributes:
        workers: copies; 0 means one for each GPU, and one where there is none.
        ray: address of a Ray cluster, or "local" for one that is started for the run; "" for processes of this machine.
        gpus: of a Ray worker; None means one if the cluster has any.
        cpus: of a Ray worker; 0 means that the cluster's are divided.
    """

    workers: int = 1
    ray: str = ""
    gpus: float | None = None
    cpus: int = 0

    @property
    def count(self) -> int:
        """Copies on this machine."""
        return self.workers or max(1, len(visible_gpus()))


ALONE = Placement()
"""One copy, on this machine."""
