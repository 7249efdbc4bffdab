"""The memory that a training is said to take: counted on tensors without content, as a real one keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from train import memory
from train.memory import measure
from train.sft_config import Sft
from train.trainer import lora_config

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

ROWS, LONGEST, ANSWER = 3, 40, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "gemma", "gemma")


def really_kept(base: Path, config: Sft) -> int:
    """Bytes that autograd saves of a batch with real numbers, and three times its logits in 32 bits, for the loss."""
    from peft import get_peft_model

    from train.trainer import keep_trainable_in_float32, load_base, skip_casts

    model = get_peft_model(load_base(base, config.dtype, load_in_4bit=False, cuda=False), lora_config(config)).train()
    keep_trainable_in_float32(model)
    if config.dtype != "float32":
        skip_casts(model)
    kept: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones((ROWS, LONGEST), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a batch with padding has a mask, one without is computed otherwise
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16")
    with mixed, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False,
                    logits_to_keep=torch.arange(LONGEST - ANSWER, LONGEST))  # fmt: skip
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    return saved + 3 * 4 * int(out.logits.numel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_a_batch_keeps_is_counted_to_the_byte(base: Path, dtype: str) -> None:
    config = Sft(base=str(base), batch=ROWS, dtype=dtype, targets="all-linear", gradient_checkpointing=False)
    size = measure(config, base, LONGEST, ANSWER)
    assert size.activations == really_kept(base, config)
    less = measure(replace(config, gradient_checkpointing=True), base, LONGEST, ANSWER)
    assert less.activations < 0.7 * size.activations
    assert measure(replace(config, batch=2 * ROWS), base, LONGEST, ANSWER).activations > 1.9 * size.activations


def test_a_model_that_cannot_be_counted_is_estimated(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = Sft(base=str(base), batch=ROWS, dtype="float32", targets="all-linear", gradient_checkpointing=False)
    counted = measure(config, base, LONGEST, ANSWER)

    def fails(*_: object, **__: object) -> int:
        raise RuntimeError("its way depends on its numbers")

    monkeypatch.setattr(memory, "kept_for_backward", fails)
    estimated = measure(config, base, LONGEST, ANSWER)
    assert 0.3 < estimated.activations / counted.activations < 3
    assert "rough estimate" in caplog.text
