"""Adapters are merged tensor by tensor into what PEFT makes of a whole model; models are computed layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from submission.errors import UserError
from train.divergence import compare
from train.merge import merge
from train.shards import Shards
from train.streamed import streamed_logits

ROWS = [[5, 6, 7, 8, 9], [11, 12], [42, 17, 300]]
SMALL = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def _model(kind: str, **more: Any) -> Any:
    """A random model of an architecture as transformers names its configuration."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, pad_token_id=0, **more)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


Saved = Callable[..., Path]


@pytest.fixture
def saved(tiny: Path, tmp_path: Path) -> Saved:
    """Save a random model with a tokenizer, in several files."""
    from submission.backends.transformers.loading import load_tokenizer

    def save(kind: str = "Mistral", dtype: str = "float32", max_shard_size: str = "200KB", **more: Any) -> Path:
        import torch

        folder = tmp_path / "base"
        _model(kind, **more).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        load_tokenizer(tiny).save_pretrained(folder)
        return folder

    return save


def _adapter(base: Path, folder: Path, **more: Any) -> Any:
    """Save an adapter of random weights; returns base and adapter, in 32 bits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(plain, LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    ],
    ids=["all linear layers", "patterns", "vocabulary", "one layer"],
)
def test_a_merge_by_tensors_is_that_of_peft(options: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = saved()
    model = _adapter(base, tmp_path / "a", **options)
    merge(tmp_path / "a", tmp_path / "m", base=str(base), dtype="float32")
    expected = model.merge_and_unload().state_dict()
    files = {file.name for file in base.glob("model*")}
    assert len(files) > 3
    assert {file.name for file in (tmp_path / "m").glob("model*")} == files
    merged = {
        name: one for file in files if file.endswith("rs") for name, one in load_file(tmp_path / "m" / file).items()
    }
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-6), name
    index, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (tmp_path / "m", base)
    )
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_base_of_16_bits_is_rounded_once(saved: Saved, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = saved(dtype="bfloat16")
    expected = _adapter(base, tmp_path / "a").merge_and_unload().to(torch.bfloat16).state_dict()
    merge(tmp_path / "a", tmp_path / "m", base=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    told = json.loads((tmp_path / "m.run.json").read_text())
    assert 0 < told["divergence"] < 1e-3


def test_weights_beyond_16_bit_floats_are_written_as_bfloat16(saved: Saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = saved()
    _adapter(base, tmp_path / "a")
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][0] = 7e4
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"cannot hold the weight model\.norm\.weight"):
        merge(tmp_path / "a", tmp_path / "m", base=str(base), dtype="float16")
    assert not (tmp_path / "m").exists()
    merge(tmp_path / "a", tmp_path / "m", base=str(base))
    assert json.loads((tmp_path / "m.run.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "all"}, 'bias="all"'),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "uses for two layers"),
        ({"target_modules": ["lm_head", "q_proj"]}, "uses for two layers"),
    ],
)
def test_an_adapter_with_more_than_products_is_refused(
    options: dict[str, Any], said: str, saved: Saved, tmp_path: Path
) -> None:
    base = saved(tie_word_embeddings=True)
    _adapter(base, tmp_path / "a", **options)
    with pytest.raises(UserError, match=said):
        merge(tmp_path / "a", tmp_path / "m", base=str(base))
    assert not (tmp_path / "m").exists()


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a folder with one file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _set(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_tied_embeddings_that_are_stored_twice_are_tied(saved: Saved, tmp_path: Path) -> None:
    base = saved(tie_word_embeddings=True, max_shard_size="1GB")
    _rewrite(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    _adapter(base, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match="uses for two layers"):
        merge(tmp_path / "a", tmp_path / "m", base=str(base))


def test_a_base_of_other_shapes_than_its_configuration_is_refused(saved: Saved, tmp_path: Path) -> None:
    base = saved()
    _adapter(base, tmp_path / "a", target_modules=["q_proj"])
    _set(base, vocab_size=SMALL["vocab_size"] - 50)
    with pytest.raises(UserError, match=r"lm_head\.weight \(shape \(49152, 64\) instead of \(49102, 64\)\)"):
        merge(tmp_path / "a", tmp_path / "m", base=str(base))


@pytest.mark.parametrize("size", ["200KB", "1GB"], ids=["index", "one file"])
def test_files_that_do_not_belong_to_a_model_are_passed_over(size: str, saved: Saved, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base = saved(max_shard_size=size)
    _adapter(base, tmp_path / "a", target_modules=["q_proj"])
    save_file({"tok_embeddings.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)},
              base / "consolidated.safetensors")  # fmt: skip
    merge(tmp_path / "a", tmp_path / "m", base=str(base), dtype="float32")
    files = {file.name for file in base.glob("model*")}
    assert {file.name for file in (tmp_path / "m").glob("*.safetensors*")} == files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a readable JSON"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": "../b"}}', "no such file"),
        ('{"weight_map": {"a": "x.safetensors"}}', "do not hold: a"),
    ],
)
def test_a_broken_index_is_named(content: str, said: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"b": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json .*{said}"):
        Shards(tmp_path)


def test_a_model_of_one_numbered_file_is_merged_to_one_that_loads(saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = saved(max_shard_size="1GB")
    _adapter(base, tmp_path / "a", target_modules=["q_proj"])
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    names = Shards(base).tensors
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    merge(tmp_path / "a", tmp_path / "m", base=str(base), dtype="float32")
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_base_of_eight_bits_is_refused(saved: Saved, tmp_path: Path) -> None:
    import torch

    base = saved(max_shard_size="1GB")
    _adapter(base, tmp_path / "a", target_modules=["q_proj"])
    name = "model.layers.0.mlp.up_proj.weight"
    _rewrite(base, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(UserError, match=rf"{name} in F8_E4M3, .* 16 or 32 bits"):
        merge(tmp_path / "a", tmp_path / "m", base=str(base))


def test_what_a_model_has_is_never_passed_over(saved: Saved, tmp_path: Path) -> None:
    """The class of GPT-2 has transformers pass over `attn.bias`, and it has a `c_attn.bias`."""
    import torch
    from safetensors.torch import load_file

    base = saved("GPT2", max_shard_size="1GB")
    model = _adapter(base, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    merge(tmp_path / "a", tmp_path / "m", base=str(base), dtype="float32")
    expected, merged = model.merge_and_unload().state_dict(), load_file(tmp_path / "m" / "model.safetensors")
    assert merged.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in merged.items())


def test_a_merge_that_went_wrong_is_not_written(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.merge

    base, right = saved(), train.merge._merged
    _adapter(base, tmp_path / "a")
    monkeypatch.setattr(train.merge, "_merged", lambda layer, weight, name: 2 * right(layer, weight, name) - weight)
    with pytest.raises(UserError, match="diverge from those of base and adapter"):
        merge(tmp_path / "a", tmp_path / "m", base=str(base))
    assert not list(tmp_path.glob("*m*"))


def test_an_adapter_that_holds_no_numbers_is_refused(saved: Saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = saved()
    _adapter(base, tmp_path / "a")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="cannot be merged"):
        merge(tmp_path / "a", tmp_path / "m", base=str(base))


def test_a_base_in_four_bits_is_refused(saved: Saved, tmp_path: Path) -> None:
    base = saved()
    _adapter(base, tmp_path / "a")
    _set(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match="is quantised"):
        merge(tmp_path / "a", tmp_path / "m", base=str(base))


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Gemma2", "Gemma3Text", "Mistral", "Qwen2", "Phi3"])
def test_a_model_computed_by_layers_is_the_model(kind: str, tmp_path: Path) -> None:
    import numpy as np
    import torch

    model = _model(kind, tie_word_embeddings=kind.startswith("Gemma"))
    model.save_pretrained(tmp_path / "base")
    both = _adapter(tmp_path / "base", tmp_path / "a")
    for adapter, whole in ((None, model), (tmp_path / "a", both)):
        streamed = streamed_logits(tmp_path / "base", adapter, ROWS)
        with torch.inference_mode():
            expected = [whole(torch.tensor([row])).logits[0].numpy() for row in ROWS]
        for ours, theirs in zip(streamed, expected, strict=True):
            assert np.allclose(ours, theirs, atol=1e-4)
        assert not np.allclose(streamed[0], expected[1][:1], atol=1e-2)


def test_divergence_is_worked_out_by_hand() -> None:
    import numpy as np

    theirs = [np.log(np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32))]
    ours = [np.log(np.array([[0.5, 0.5], [0.1, 0.9]], dtype=np.float32))]
    apart = compare(theirs, ours)
    assert apart.divergence == pytest.approx(0.8 * np.log(9) / 2, rel=1e-5)
    assert (apart.same_first, apart.tokens) == (0.5, 2)
