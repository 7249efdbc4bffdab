"""Backends: adapters, four bits, fingerprints, the double; tests/test_contract.py has what all of them do."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from submission.backends import ModelSpec, model_spec, names
from submission.backends.common import stream_seed
from submission.backends.llama.library import _leave_amx
from submission.backends.scripted import Options, Scripted
from submission.data.hashing import content_hash
from submission.errors import UserError
from submission.prompts.templates import TEMPLATES
from submission.types import Chat, Message, Pair, Part, Request, Sampling
from tests.conftest import ROOT, Cli, generated, read_csv, scored, scored_first
from tests.tiny_models import lora_gguf
from train.sft_config import Sft
from train.trainer import training_dtype

CAPITAL = Chat((Message("user", (Part("What is the capital of France?"),)),))


def test_the_stream_of_a_sample_depends_on_seed_key_and_number_only() -> None:
    seeds = {stream_seed(seed, key, sample) for seed in range(5) for key in "abc" for sample in range(5)}
    assert len(seeds) == 75
    assert stream_seed(1, "a", 2) == stream_seed(1, "a", 2)


@pytest.fixture(scope="module")
def adapter(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT LoRA adapter with weights large enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32), config)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def gguf_adapter(adapter: Path) -> Path:
    """The same adapter as a GGUF LoRA file."""
    from safetensors.numpy import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    tensors = {}
    for name, weight in weights.items():
        layer = name.split(".layers.")[1].split(".")[0]
        kind = "q" if "q_proj" in name else "v"
        half = "a" if "lora_A" in name else "b"
        if kind == "q" and half == "b":
            # llama.cpp keeps rotary dimensions interleaved: the rows of the query projection are permuted.
            weight = weight.reshape(9, 2, 32, 4).swapaxes(1, 2).reshape(weight.shape)
        tensors[f"blk.{layer}.attn_{kind}.weight.lora_{half}"] = np.ascontiguousarray(weight, dtype=np.float32)
    return lora_gguf(adapter / "lora.gguf", tensors, float(config["lora_alpha"]))


def test_an_adapter_changes_both_backends_alike(
    adapter: Path, gguf_adapter: Path, hf_folder: Path, example_pairs: list[Pair]
) -> None:
    chat = TEMPLATES["short"].render(example_pairs[0])
    items = [("x", chat, " in a more formal tone.")]
    # A context of its own, fed the same way: a beginning that another row left there rounds differently.
    plain = scored_first(model_spec("llama_cpp").load(), items).sum
    tuned = scored_first(model_spec("llama_cpp", adapter=gguf_adapter).load(), items).sum
    theirs = scored_first(model_spec("transformers", str(hf_folder), adapter).load(), items).sum
    assert abs(tuned - plain) > 2
    assert tuned == pytest.approx(theirs, abs=1), "the same adapter, the same change"
    off = model_spec("llama_cpp", adapter=gguf_adapter, settings=["adapter_scale=0"]).load()
    assert scored_first(off, items).sum == pytest.approx(plain, abs=0.05)


def test_an_adapter_and_its_scale_are_part_of_the_fingerprint(gguf_adapter: Path) -> None:
    marks = [
        model_spec("llama_cpp", adapter=adapter, settings=settings).fingerprint()
        for adapter, settings in ((None, []), (gguf_adapter, []), (gguf_adapter, ["adapter_scale=0.5"]))
    ]
    assert len({json.dumps(mark) for mark in marks}) == 3
    threads = model_spec("llama_cpp", settings=["threads=1"]).fingerprint()
    assert threads == marks[0], "the number of threads decides no answer"


def test_four_bits_are_real_and_answer(hf_folder: Path) -> None:
    backend: Any = model_spec("transformers", str(hf_folder), settings=["load_in_4bit=true"]).load()
    assert {type(module).__name__ for module in backend._model.modules()} & {"Linear4bit"}
    ((_, (completion,)),) = generated(backend, [Request("q", CAPITAL, Sampling(max_new_tokens=6))]).items()
    assert completion.text.strip()


@pytest.mark.slow
def test_the_embedded_model_runs_in_transformers_too() -> None:
    backend = model_spec("transformers").load()
    chat = Chat(CAPITAL.messages, prefix="The capital of France is")
    ((_, (completion,)),) = generated(backend, [Request("q", chat, Sampling(max_new_tokens=4))]).items()
    assert completion.text.startswith(" Paris")


def test_predict_runs_offline_on_the_examples(cli: Cli, tmp_path: Path, example_pairs: list[Pair]) -> None:
    done = cli("predict", ROOT / "examples" / "test.csv", "-o", "s.csv", "--limit", 1, "--json")
    assert done.code == 0, done.err
    assert {"rows": 1, "fallbacks": 0, "computed": 1}.items() <= done.summary.items()
    assert done.summary["rows_per_second"] > 0
    assert all(row[1].startswith("Rewrite this text") for row in read_csv(tmp_path / "s.csv")[1:])
    page = cli("inspect", example_pairs[0].id, "--run", "s.csv").out
    assert "<|im_start|>user\nOriginal text:\n" in page
    assert "Which instruction turned the original text into the rewritten text?<|im_end|>" in page
    assert page.index("tokens)") < page.index("== raw answer")
    assert "== raw answer 8 source embedded-tuned" in page  # the best of ten, with nothing named
    assert cli("doctor").code == 0


def test_predict_with_transformers_gives_a_valid_file(cli: Cli, hf_folder: Path) -> None:
    options = ("--backend", "transformers", "--model", hf_folder, "--max-new-tokens", 8, "--set", "batch=4")
    done = cli("predict", ROOT / "examples" / "test.csv", "-o", "s.csv", "--limit", 3, *options, "--json")
    assert done.code == 0, done.err
    assert done.summary["fallbacks"] == 0


def test_a_content_hash_tells_files_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "b").write_bytes(b"x" * 9 + b"y")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")
    large = bytearray(80 << 20)
    (tmp_path / "c").write_bytes(large)
    large[40 << 20 : 42 << 20] = b"1" * (2 << 20)
    (tmp_path / "d").write_bytes(large)
    assert content_hash(tmp_path / "c") != content_hash(tmp_path / "d")


def test_the_double_streams_and_does_as_it_is_told() -> None:
    def endless() -> Iterator[Request]:
        number = 0
        while True:
            yield Request(str(number), CAPITAL, Sampling(n=2))
            number += 1

    stream = Scripted(lambda request: f"answer {request.key}", Options(batch=3)).generate(endless())
    assert [next(stream)[1][1].text for _ in range(4)] == ["answer 0", "answer 1", "answer 2", "answer 3"]
    likelihoods = scored(Scripted(), [("k", CAPITAL, "three words here")])
    assert (likelihoods["k"].sum, likelihoods["k"].tokens) == (-3.0, 3)


def test_every_backend_is_named_and_checked() -> None:
    assert names() == ["openvino", "llama_cpp", "transformers", "vllm", "scripted"]
    spec = model_spec("scripted", settings=["seconds_per_row=0.5"])
    assert isinstance(spec, ModelSpec)
    described = spec.describe()
    assert model_spec(described["backend"], described["model"], None, described["settings"]) == spec
    with pytest.raises(UserError, match="unknown backend"):
        model_spec("none")
    assert math.isclose(spec.options.seconds_per_row, 0.5)


def test_quantised_weights_keep_away_from_amx() -> None:
    """Compiled by GCC 12 it ends the process: tests/test_export.py decodes such files for real."""
    modules = [SimpleNamespace(llama_model_default_params=lambda: SimpleNamespace(use_extra_bufts=True)) for _ in "ab"]
    for _ in range(2):
        _leave_amx(*modules)
    assert [module.llama_model_default_params().use_extra_bufts for module in modules] == [False, False]


def test_training_takes_32_bits_where_16_are_too_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.trainer.on_gpu", lambda: True)
    monkeypatch.setattr("train.trainer.lowest_capability", lambda _: (7, 5))
    for kind, dtype in {"gemma": "float16", "gemma2": "float32", "mistral": "float16"}.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        assert training_dtype(Sft(), tmp_path / kind) == dtype
        assert training_dtype(Sft(dtype="float16"), tmp_path / kind) == "float16"


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("vendor_id : GenuineIntel flags : avx2 avx512_bf16 amx_bf16", "bfloat16"),
        ("vendor_id : AuthenticAMD flags : avx2 avx512_bf16", "bfloat16"),
        ("vendor_id : GenuineIntel flags : avx2 avx512_bf16", "float32"),
        ("vendor_id : AuthenticAMD flags : avx2", "float32"),
        ("", "float32"),
    ],
)
def test_the_precision_suits_the_processor_and_is_settled_once(
    words: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submission.backends.common._processor", lambda: frozenset(words.encode().split()))
    spec = model_spec("openvino")
    assert spec.fingerprint()["dtype"] == dtype
    assert model_spec("openvino", settings=["dtype=float32"]).fingerprint()["dtype"] == "float32"
    assert training_dtype(Sft()) == dtype
    monkeypatch.undo()
    elsewhere = copy.deepcopy(spec)  # as it travels to a worker
    assert elsewhere.options.dtype == dtype
    assert model_spec(**spec.describe()).fingerprint() == spec.fingerprint()
