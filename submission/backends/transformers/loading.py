"""Models, adapters and tokenizers of transformers, from disk only."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submission.backends.common import END_MARKERS
from submission.backends.transformers.devices import (
    check_fits,
    choose_dtype,
    device_map,
    find_device,
    lowest_capability,
    prepare_allocator,
)
from submission.backends.transformers.tokenizer import HfTokenizer
from submission.data.tables import some
from submission.errors import UserError, first_line


def stay_offline_and_quiet() -> None:
    """Set what torch and transformers read from the environment when they are first imported."""
    prepare_allocator()
    # Read when huggingface_hub is first imported; `local_files_only` alone leaves some look-ups.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # the run has a progress bar of its own
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that a CPU does not need


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, path, "tokenizer")


def load_config(path: Path) -> Any:
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, path, "configuration")


def _from_pretrained(kind: Any, path: Path, what: str) -> Any:
    folder, file = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **file)
    except Exception as error:
        raise UserError(f"the {what} of {path} cannot be loaded: {first_line(error)}") from error


def load_model(path: Path, adapter: Path | None, *, device: str, dtype: str, load_in_4bit: bool) -> Any:
    """A model that is ready to compute, with its adapter.

    Args:
        path: folder or GGUF file.
        adapter: PEFT folder; added to the weights, unless these are quantised.
        device: auto, balanced (over all GPUs), or one of torch.
        dtype: auto (see `choose_dtype`), or one of torch.
        load_in_4bit: quantise the weights on loading, to nf4.

    Raises:
        UserError: something of this is not there, does not go together, or does not fit.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = find_device(device)
    config = load_config(path)
    dtype = choose_dtype(config.model_type, lowest_capability(device), dtype)
    check_fits(path, config.model_type, device, dtype, load_in_4bit=load_in_4bit)
    quantised = getattr(config, "quantization_config", None) is not None
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    folder = path
    if path.is_file():
        from transformers import GgufConfig

        folder = path.parent
        # Without `dequantize` the weights stay packed, at half the speed.
        arguments |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        quantised = False
    elif load_in_4bit and not quantised:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )  # fmt: skip
        quantised = True
    model = from_disk(folder, path, **arguments, **device_map(device, quantised=quantised))
    quantised = is_quantised(model)  # what became of it
    if quantised:
        _compute_in(model, getattr(torch, dtype))
    if adapter is not None:
        model = with_adapter(model, adapter)
        if not quantised:
            model = model.merge_and_unload()  # an unmerged adapter nearly halves the speed
    return model.eval()


def is_quantised(model: Any) -> bool:
    """Whether the weights are packed, so that an adapter added to them would be rounded to a few bits."""
    return any(getattr(model, name, False) for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"))


def _compute_in(model: Any, dtype: Any) -> None:
    """Have layers of 4 bits compute in the dtype that suits the device; a folder brings that of who quantised it."""
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "compute_type_is_set"):
            module.compute_dtype = dtype


def from_disk(folder: Path, path: Path, **arguments: Any) -> Any:
    """A causal language model, with all of its tensors.

    Args:
        folder: that holds it.
        path: of the model, as its user named it.
        arguments: more, as `from_pretrained` takes them.

    Raises:
        UserError: it cannot be loaded, or its weights are not those of its configuration.
    """
    from transformers import AutoModelForCausalLM

    if path.is_dir():
        arguments["use_safetensors"] = True
    try:
        # Mismatched sizes are let through here: the library's own error does not name them.
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True,
            trust_remote_code=False, **arguments,
        )  # fmt: skip
    except Exception as error:
        raise UserError(f"model {path} cannot be loaded by transformers: {first_line(error)}") from error
    _check_complete(path, found)
    return model


def _check_complete(path: Path, found: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the configuration; what is missing would be random.

    Args:
        path: of the model.
        found: the loading info of `from_pretrained`.
    """
    mismatched = [f"{name} (shape {tuple(there)} instead of {tuple(wanted)})"
                  for name, there, wanted in found["mismatched_keys"]]  # fmt: skip
    for what, names in (("lacks", found["missing_keys"]), ("has, and its configuration does not know,",
                        found["unexpected_keys"]), ("has in other shapes", mismatched)):  # fmt: skip
        if names:
            raise UserError(
                f"model {path} {what} {len(names)} tensors: {some(sorted(names))}\n"
                "Its weights and its config.json do not go together, or a file is missing."
            )


def with_adapter(model: Any, adapter: Path) -> Any:
    """A model with a PEFT adapter beside its weights.

    Raises:
        UserError: it is damaged, or one of its tensors has no place in the model, or a place has no tensor.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    own = set(model.state_dict())
    try:
        model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            given = set(file.keys())
        places = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    except Exception as error:
        words = " ".join(str(error).split())[:300]  # torch names the tensor on its second line
        raise UserError(f"adapter {adapter} does not fit this model: {type(error).__name__}: {words}") from error
    # PEFT saves whole layers of the base beside an adapter of its vocabulary, under either of two names.
    of_base = {f"base_model.model.{name}" for name in own}
    homeless = sorted(name for name in given - places if name.replace(".base_layer.", ".") not in of_base)
    for what, names in (("has no place for", homeless), ("misses", sorted(places - given))):
        if names:
            raise UserError(
                f"adapter {adapter} does not fit this model, which {what} {len(names)} of its tensors: {some(names)}\n"
                "Was it trained on another base?"
            )
    return model


def end_tokens(model: Any, tokenizer: HfTokenizer) -> list[int]:
    """All ids that end an answer: the model's, the tokenizer's and the usual end-of-turn markers."""
    configured = model.generation_config.eos_token_id
    ends = [*(configured if isinstance(configured, list) else [configured]), tokenizer.hf.eos_token_id]
    ends += [tokenizer.specials[name].id for name in END_MARKERS if name in tokenizer.specials]
    found = [end for end in dict.fromkeys(ends) if end is not None]
    if not found:
        raise UserError("the model names no end-of-text token")
    return found
