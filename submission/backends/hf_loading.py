"""Models, adapters and tokenizers of transformers, from disk only."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from submission.backends.hf_tokenizer import HfTokenizer
from submission.errors import UserError, first_line


def stay_offline_and_quiet() -> None:
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
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        on_gpu = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise UserError(f"option device={device!r} is no device of torch: {first_line(error)[:200]}") from None
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"option device={device!r}: torch finds no CUDA GPU; use device=cpu")
    if dtype == "auto":
        # T4 and older have no bfloat16 units.
        dtype = ("bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16") if on_gpu else "float32"
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "local_files_only": True,
        "trust_remote_code": False,
    }
    folder = path
    if path.is_dir():
        arguments["use_safetensors"] = True
    else:
        from transformers import GgufConfig

        folder = path.parent
        # Without `dequantize` the weights stay packed, at half the speed.
        arguments |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    if load_in_4bit:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )  # fmt: skip
        arguments["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except Exception as error:
        raise UserError(f"model {path} cannot be loaded by transformers: {first_line(error)}") from error
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        except Exception as error:
            raise UserError(f"adapter {adapter} does not fit this model: {first_line(error)}") from error
        if not load_in_4bit:
            model = model.merge_and_unload()  # an unmerged adapter nearly halves the speed
    if not load_in_4bit:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # unknown, or not there, or too small
            raise UserError(f"the model cannot be put on device={device!r}: {first_line(error)}") from error
    return model.eval()


def end_tokens(model: Any, tokenizer: HfTokenizer) -> list[int]:
    """All ids that end an answer: the model's, the tokenizer's and the usual end-of-turn markers."""
    configured = model.generation_config.eos_token_id
    ends = [*(configured if isinstance(configured, list) else [configured]), tokenizer.hf.eos_token_id]
    markers = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "</s>")
    ends += [tokenizer.specials[name].id for name in markers if name in tokenizer.specials]
    found = [end for end in dict.fromkeys(ends) if end is not None]
    if not found:
        raise UserError("the model names no end-of-text token")
    return found
