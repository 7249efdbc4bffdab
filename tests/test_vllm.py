"""Backend vllm: what does not suit it is said before anything is loaded; with vLLM installed, the engine itself."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eval.peers import Load, vllm_with
from submission.backends import model_spec
from submission.backends.common import PendingRequest
from submission.backends.vllm.adapters import check_fit
from submission.backends.vllm.backend import Vllm, check, fingerprint
from submission.backends.vllm.jobs import SampleJob, TextJob
from submission.backends.vllm.options import Options, adapter_rank, check_gpus, head_size
from submission.errors import DeviceLostError, MissingExtra, UserError
from submission.prompts.encoding import EncodedPrompt
from submission.types import Chat, Failure, Message, Part, Request, Sampling
from tests.conftest import generated, scored_first

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM has an environment of its own: make test-vllm")
CAPITAL = Chat((Message("user", (Part("What is the capital of France?"),)),))


def spec_of(model: Path | str, adapter: Path | None = None, **options: Any) -> Any:
    return SimpleNamespace(model=str(model), adapter=adapter, options=Options(**options))


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_command_that_brings_it_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"pip install .*\[vllm\]"):
        model_spec("vllm", "somewhere")


def test_what_vllm_does_not_take_is_refused_before_it_is_loaded(tiny: Path, gguf: Path) -> None:
    for model, options, words in (
        (gguf, {}, "is a GGUF file"), ("embedded", {}, "is a GGUF file"), (tiny, {"dtype": "int8"}, "dtype='int8'"),
        (tiny, {"context": 5}, "at least 128"), (tiny, {"gpu_memory": 1.5}, "gpu_memory=1.5"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            check(spec_of(model, **options))
    check(spec_of(tiny))


@pytest.mark.parametrize(
    ("config", "dtype", "gpu", "words"),
    [
        ({"head_dim": 256}, "auto", "7.5, Tesla T4", "heads of 256.*Tesla T4.*use --backend transformers"),
        ({"text_config": {"head_dim": 256}}, "auto", "7.5, Tesla T4", "heads of 256"),
        ({"hidden_size": 3072, "num_attention_heads": 12}, "auto", "7.0, V100", "heads of 256"),
        ({"hidden_size": 4096, "num_attention_heads": 32}, "auto", "7.5, Tesla T4", ""),
        ({"head_dim": 128}, "bfloat16", "7.5, Tesla T4", "no bfloat16.*dtype=float16"),
        ({"head_dim": 256}, "bfloat16", "8.9, NVIDIA L4", ""),
        ({"head_dim": 64}, "auto", "6.0, Tesla P100", "does not support Tesla P100"),
        ({"head_dim": 256}, "auto", "[Not Supported], Old", ""),
        ({}, "auto", "7.5, Tesla T4", ""),
    ],
)
def test_a_gpu_that_the_model_does_not_run_on_is_named(
    config: dict[str, Any], dtype: str, gpu: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert head_size(tmp_path) in (0, 64, 128, 256)
    if words:
        with pytest.raises(UserError, match=words):
            check_gpus(tmp_path, dtype, ["9.0, NVIDIA H100", gpu])
    else:
        check_gpus(tmp_path, dtype, ["9.0, NVIDIA H100", gpu])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 16}, ""), ({"r": 8, "rank_pattern": {"q_proj": 24}}, ""), ({"r": 16, "use_dora": True}, "has use_dora"),
        ({"r": 16, "modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"r": 16, "bias": "all"}, "has bias"),
        ({"r": 1024}, "has rank 1024"), ({}, "no configuration of a LoRA"), ({"r": "x"}, "the rank is 'x'"),
    ],
)  # fmt: skip
def test_an_adapter_that_vllm_does_not_compute_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if words:
        with pytest.raises(UserError, match=words):
            adapter_rank(tmp_path)
    else:
        assert adapter_rank(tmp_path) == max(config["r"], config.get("rank_pattern", {}).get("q_proj", 0))


def test_speed_and_memory_are_no_part_of_what_decides_the_answers(tiny: Path) -> None:
    plain = fingerprint(spec_of(tiny))
    assert fingerprint(spec_of(tiny, streams=3, gpu_memory=0.5, threads=1, eager=True, memory=5)) == plain
    for options in ({"context": 512}, {"dtype": "float16"}, {"load_in_4bit": True}):
        assert fingerprint(spec_of(tiny, **options)) != plain


class Letters:
    """Token n is a letter; 0 ends an answer."""

    ends = frozenset({0})

    def piece(self, token: int, *, special: bool = True) -> bytes:
        return bytes([96 + token])

    def ends_answer(self, token: int) -> bool:
        return token in self.ends


def output(tokens: Sequence[int], logprobs: Sequence[float], prompt: Sequence[float] = ()) -> Any:
    """A `RequestOutput` of these tokens; token 7 is the likeliest everywhere, so beside them."""

    def rows(ids: Sequence[int], values: Sequence[float]) -> list[Any]:
        return [{token: SimpleNamespace(logprob=value), 7: SimpleNamespace(logprob=-0.1)}
                for token, value in zip(ids, values, strict=True)]  # fmt: skip

    part = SimpleNamespace(token_ids=list(tokens), logprobs=rows(tokens, logprobs))
    return SimpleNamespace(outputs=[part], prompt_logprobs=[None, *rows([2, 3, 4], prompt)] if prompt else None)


def sample(sampling: Sampling, number: int = 0) -> SampleJob:
    asked = PendingRequest(Request("k", CAPITAL, sampling), EncodedPrompt((5, 6), False))
    return SampleJob(asked, number, Letters())


def test_tokens_that_come_bit_by_bit_make_an_answer() -> None:
    job = sample(Sampling(max_new_tokens=9, stop=("cd",)))
    assert job.stepwise
    assert not job.take(output([1, 2], [-1.0, -2.0]))
    assert not job.take(output([3], [-0.5]))
    assert job.take(output([4, 5], [-0.25, -9.0]))
    done = job.completion()
    assert (done.text, done.logprob, done.tokens, done.finish_reason) == ("ab", -3.75, 4, "stop")
    ended, cut = sample(Sampling(max_new_tokens=3)), sample(Sampling(max_new_tokens=2))
    assert ended.take(output([1, 0], [-1.0, -2.0]))
    assert (ended.completion().text, ended.completion().finish_reason, ended.completion().logprob) == ("a", "stop", -3)
    assert cut.take(output([1, 2], [-1.0, -2.0]))
    assert cut.completion().finish_reason == "length"


def test_probabilities_that_are_no_numbers_fail_their_item() -> None:
    job = sample(Sampling(max_new_tokens=3))
    assert job.take(output([1, 2], [-1.0, float("nan")]))
    assert "NaN" in job.failure
    text = TextJob("k", np.array([1, 2, 3, 4, 5], np.int32), 2)
    assert text.take(output([5], [-1.0], [-0.5, float("nan"), -0.5]))
    assert "NaN" in text.failure


def test_a_likelihood_is_the_sum_over_its_continuation() -> None:
    text = TextJob("k", np.array([1, 2, 3, 4, 5], np.int32), 2)
    assert text.ids == [1, 2, 3, 4]
    assert text.params()["allowed_token_ids"] == [5]
    assert text.params()["prompt_logprobs"] == 0
    assert text.take(output([5], [-1.0], [-100.0, -0.5, -0.25]))
    found = text.likelihood()
    assert (found.sum, found.tokens, found.prompt_tokens) == (-1.75, 3, 2)
    assert "prompt_logprobs" not in TextJob("k", np.array([1, 2], np.int32), 1).params()


def test_every_sample_has_a_seed_of_its_own_and_a_greedy_answer_none() -> None:
    sampling = Sampling(n=3, temperature=0.7, top_p=0.9, min_p=0.1, seed=5)
    seeds = {sample(sampling, number).params()["seed"] for number in range(3)}
    assert len(seeds) == 3
    assert sample(sampling).params() == sample(sampling).params()
    assert "seed" not in sample(Sampling()).params()


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_a_python_without_vllm_is_no_peer(tmp_path: Path) -> None:
    for python, words in ((Path(sys.executable), "ended with exit code 1"), (tmp_path / "none", "cannot be run")):
        with pytest.raises(UserError, match=words), vllm_with(python, tmp_path, "float32", 1, 256):
            pass


def test_an_adapter_with_a_tensor_that_has_no_place_is_refused(tiny: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def saved(module: str, a: tuple[int, int], b: tuple[int, int]) -> None:
        tensors = {f"base_model.model.{module}.lora_{half}.weight": torch.zeros(shape)
                   for half, shape in (("A", a), ("B", b))}  # fmt: skip
        save_file(tensors, tmp_path / "adapter_model.safetensors")

    down = "model.layers.1.mlp.down_proj"
    saved(down, (4, 128), (64, 4))
    check_fit(tiny, tmp_path)
    other = down.replace("1", "7")
    for module, a, b in (
        (down, (4, 64), (64, 4)), (down, (4, 128), (128, 4)), (other, (4, 128), (64, 4)),
        ("lm_head", (4, 128), (64, 4)),
    ):  # fmt: skip
        saved(module, a, b)
        with pytest.raises(UserError, match=rf"no place for \d of its tensors: base_model\.model\.{module}\.lora"):
            check_fit(tiny, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        check_fit(tiny, tmp_path)


# -- with vLLM ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_head(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 64: of smaller ones vLLM's CPU build has no attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("one_head") / "model"
    shutil.copytree(tiny, folder)
    config = AutoConfig.from_pretrained(tiny, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(one_head: Path) -> Vllm:
    settings = ["dtype=float32", "streams=2", "memory=1000", "context=256", "threads=1"]
    backend = model_spec("vllm", str(one_head), settings=settings).load()
    assert isinstance(backend, Vllm)
    return backend


@needs_vllm
def test_vllm_is_never_asked_more_than_it_can_have_on_its_way(small: Vllm) -> None:
    engine: Any = small._engine
    most = 0
    step = engine._engine.step

    def counted() -> Any:
        nonlocal most
        most = max(most, engine._engine.get_num_unfinished_requests())
        return step()

    engine._engine.step = counted
    try:
        asked = (Request(str(n), CAPITAL, Sampling(n=3, temperature=1, max_new_tokens=2)) for n in range(6))
        assert len(generated(small, asked)) == 6
    finally:
        engine._engine.step = step
    assert 2 < most <= 4
    assert not engine._engine.has_unfinished_requests()


@needs_vllm
def test_a_run_of_vllm_that_is_left_leaves_nothing_behind(small: Vllm) -> None:
    def endless() -> Iterator[Request]:
        while True:
            yield Request("q", CAPITAL, Sampling(max_new_tokens=5, stop=("x",)))

    stream = small.generate(endless())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not small._engine._engine.has_unfinished_requests()


@needs_vllm
def test_a_request_that_vllm_refuses_or_gives_up_fails_alone(small: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    real, step = small._engine._engine.add_request, small._engine._engine.step

    def picky(name: str, prompt: Any, params: Any, **more: Any) -> Any:
        if params.max_tokens == 3:
            raise ValueError("too odd\nfor me")
        return real(name, prompt, params, **more)

    def failing() -> Any:
        outputs = step()
        for one in outputs:
            if one.outputs[0].finish_reason == "length" and len(one.outputs[0].token_ids) == 4:
                one.outputs[0].finish_reason = "error"
        return outputs

    monkeypatch.setattr(small._engine._engine, "add_request", picky)
    monkeypatch.setattr(small._engine._engine, "step", failing)
    asked = [Request(str(n), CAPITAL, Sampling(n=2, temperature=1, max_new_tokens=n)) for n in (1, 2, 3, 4, 5)]
    found = list(small.generate(asked))
    assert sorted(key for key, _ in found) == ["1", "2", "3", "4", "5"]
    failures = {key: one.reason for key, one in found if isinstance(one, Failure)}
    assert failures == {"3": "vLLM refuses it: ValueError: too odd", "4": "vLLM gave the request up (error)"}


@needs_vllm
def test_an_adapter_of_vllm_computes_as_that_of_transformers(hf_folder: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32), config).save_pretrained(
        str(tmp_path)
    )
    items = [("x", CAPITAL, "The capital of France is Paris.")]
    settings = {"vllm": ["memory=1000", "streams=2", "threads=1"], "transformers": []}
    plain, ours, theirs = (
        scored_first(model_spec(name, str(hf_folder), adapter, settings=["context=256", *settings[name]]).load(), items)
        for name, adapter in (("transformers", None), ("vllm", tmp_path), ("transformers", tmp_path))
    )
    assert abs(theirs.sum - plain.sum) > 2
    assert ours.sum == pytest.approx(theirs.sum, abs=0.01 * theirs.tokens)


@needs_vllm
def test_an_engine_of_vllm_that_fails_is_lost_for_good(one_head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = model_spec(
        "vllm", str(one_head), settings=["memory=1000", "context=256", "streams=2", "threads=1"]
    ).load()
    assert isinstance(backend, Vllm)

    def broken() -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(backend._engine._engine, "step", broken)
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="device-side assert"):
            list(backend.generate([Request("q", CAPITAL, Sampling(max_new_tokens=2))]))


@needs_vllm
def test_vllm_answers_as_a_peer_in_a_process_of_its_own(one_head: Path) -> None:
    with vllm_with(Path(sys.executable), one_head, "float32", 1, 256) as peer:
        peer(Load([[1, 2, 3], [4, 5]], 3, [2], samples=2, temperature=0.8))
        peer.forget()
        peer.score([[1, 2, 3], [4, 5, 6, 7]])
