"""What training takes: parameters of a model, and bytes, counted on tensors without content.

What the backward pass keeps is counted, not estimated: the model runs once over the longest batch with PyTorch's fake
tensors, which have shapes and no numbers, and every tensor that autograd saves on the way is added up.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.backends.transformers.loading import load_config
from submission.errors import UserError, first_line
from train.encoding import TrainingExample
from train.sft_config import Sft
from train.trainer import batch_order, device_count, lora_config, skip_casts, training_dtype, weights_dtype

LOG = logging.getLogger(__name__)

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_PROCESS = 0.9e9  # Python and libraries, where they share the memory with the model
_INPUTS_KEPT = 26  # inputs of a layer, by size, that it keeps for the backward pass where it cannot be counted
_NF4_BYTES = 0.52  # with double quantisation, of weights in linear layers


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters of a model, `linear` those that multiply each token, and the bytes that training takes."""

    parameters: int
    linear: int
    in_4bit: int
    trainable: int
    weights: float
    optimizer: float
    activations: float
    process: float

    @property
    def total(self) -> float:
        """Bytes, of the GPU where there is one."""
        return self.weights + self.optimizer + self.activations + self.process


def planned(config: Sft, base: Path, train: Sequence[TrainingExample]) -> Size:
    """What training on these examples takes; see `measure`."""
    lengths = [len(example.ids) for example in train]
    order = batch_order(lengths, config.batch * config.accumulation * device_count(), config.seed)
    batches = [order[start : start + config.batch] for start in range(0, len(order), config.batch)]
    columns = max(  # from before the first answer of a batch to the end of its longest row
        max(lengths[row] for row in rows) - min(train[row].answer_from for row in rows) + 1 for rows in batches
    )
    return measure(config, base, max(lengths), columns)


def measure(config: Sft, base: Path, longest: int, answer: int) -> Size:
    """Count parameters and bytes; nothing is loaded.

    Args:
        config: of the training.
        base: folder of the base model.
        longest: tokens of an example.
        answer: tokens at the end of a batch's rows of which logits are computed.

    Raises:
        UserError: the model has no such layers.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    shape, dtype = load_config(base), training_dtype(config, base)
    if dtype == "float16" and not torch.cuda.is_available() and not config.load_in_4bit:
        dtype = "float32"  # as the trainer computes then
    held = weights_dtype(dtype, load_in_4bit=config.load_in_4bit)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, held))
        parameters = sum(p.numel() for p in model.parameters())
        head = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        weights = (m.weight for m in model.modules() if isinstance(m, torch.nn.Linear))
        linear = sum(weight.numel() for weight in weights if id(weight) not in head)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of one library about another
                tuned = get_peft_model(model, lora_config(config))
        except ValueError as error:
            raise UserError(f"[sft] cannot be set up: {first_line(error)}") from error
    if dtype != "float32":
        skip_casts(tuned)
    trainable = tuned.get_nb_trainable_parameters()[0]
    in_4bit = linear if config.load_in_4bit else 0
    text = shape.get_text_config()
    inputs = text.hidden_size * longest * config.batch * _BYTES[dtype]  # of a layer
    kept: float
    try:
        kept = kept_for_backward(tuned, dtype, rows=config.batch, longest=longest, answer=answer)
    except Exception as error:  # a model whose way depends on its numbers, such as a mixture of experts
        LOG.warning(f"the memory of the activations is a rough estimate: {type(error).__name__} when counting it")
        kept = _INPUTS_KEPT * inputs * text.num_hidden_layers
    if config.gradient_checkpointing:  # the inputs of layers, and one layer computed again
        kept = text.num_hidden_layers * inputs + kept / text.num_hidden_layers
    logits = 3 * _BYTES["float32"] * answer * config.batch * text.vocab_size
    return Size(
        parameters, linear, in_4bit, trainable,
        weights=in_4bit * _NF4_BYTES + (parameters - in_4bit) * _BYTES[held],
        optimizer=trainable * (4 + 4 + (2 if "8bit" in config.optimizer else 8)),
        activations=kept + logits,
        process=0.0 if torch.cuda.is_available() else _PROCESS,
    )  # fmt: skip


def kept_for_backward(model: Any, dtype: str, *, rows: int, longest: int, answer: int) -> int:
    """Bytes that autograd saves of a batch, weights apart.

    Args:
        model: on the device "meta", with adapters; it is left on fake tensors.
        dtype: of the arithmetic; adapters are in float32.
        rows: of the batch.
        longest: tokens of a row.
        answer: tokens at a row's end of which logits are computed.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    saved: dict[int, torch.Tensor] = {}  # by storage: a tensor that is saved twice is there once

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        for module in model.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    dtype_of = torch.float32 if one.requires_grad else one.dtype
                    like = torch.empty(one.shape, dtype=dtype_of, device=device)
                    module._parameters[name] = torch.nn.Parameter(like, requires_grad=one.requires_grad)
            for name, one in module._buffers.items():
                if one is not None:
                    module._buffers[name] = torch.empty(one.shape, dtype=one.dtype, device=device)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        ids = torch.zeros((rows, longest), dtype=torch.long, device=device)
        where = torch.arange(longest - answer, longest, device=device)
        mixed = torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32")
        with mixed, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=where)
    return sum(kept.untyped_storage().nbytes() for place, kept in saved.items() if place not in own)
