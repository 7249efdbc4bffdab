"""The real backends with the embedded model: right answers, right probabilities, the same on both."""

from __future__ import annotations

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
from submission.errors import BackendError, UserError
from submission.prompts.templates import TEMPLATES
from submission.types import Backend, Chat, Message, Pair, Part, Request, Sampling
from tests.conftest import ROOT, Cli, generated, read_csv, scored, scored_first

CAPITAL = Chat((Message("user", (Part("What is the capital of France?"),)),))


@pytest.fixture(scope="module")
def llama() -> Backend:
    return model_spec("llama_cpp").load()


@pytest.fixture(scope="module")
def hf(hf_folder: Path) -> Backend:
    return model_spec("transformers", str(hf_folder), settings=["batch=4"]).load()


def requests(pairs: list[Pair], sampling: Sampling, template: str = "short") -> list[Request]:
    return [Request(pair.id, TEMPLATES[template].render(pair), sampling) for pair in pairs]


def test_a_known_question_has_the_known_answer(llama: Backend, hf: Backend) -> None:
    chat = Chat(CAPITAL.messages, prefix="The capital of France is")
    for backend in (llama, hf):
        ((key, (completion,)),) = generated(backend, [Request("q", chat, Sampling(max_new_tokens=40))]).items()
        assert key == "q"
        assert completion.text.startswith(" Paris")  # a forced prefix goes on where it ends
        assert completion.finish_reason == "stop"
        assert "<|im_end|>" not in completion.text
        assert -2 < completion.logprob < 0
        assert completion.prompt_tokens == 37 + 5


def test_both_backends_find_the_same_answers_likely(llama: Backend, hf: Backend, example_pairs: list[Pair]) -> None:
    """llama.cpp also quantises activations, so greedy answers may part at a near-tie; probabilities may not."""
    asked = requests(example_pairs[:6], Sampling(max_new_tokens=12))
    answers = {key: completions[0] for key, completions in generated(hf, asked).items()}
    assert set(answers) == {pair.id for pair in example_pairs[:6]}
    items = [(request.key, request.chat, answers[request.key].text) for request in asked]
    ours, theirs = scored(llama, items), scored(hf, items)
    for key in answers:
        assert ours[key].tokens == theirs[key].tokens
        assert ours[key].sum / ours[key].tokens == pytest.approx(theirs[key].sum / theirs[key].tokens, abs=0.15)


def test_the_answer_of_a_row_does_not_depend_on_its_neighbours(
    llama: Backend, hf: Backend, example_pairs: list[Pair]
) -> None:
    asked = requests(example_pairs[:5], Sampling(max_new_tokens=8))
    together = {key: completions[0].text for key, completions in generated(hf, asked).items()}
    assert together == {key: c[0].text for request in reversed(asked) for key, c in generated(hf, [request]).items()}
    # llama.cpp's quantised kernels round by the shape of a batch, which the shared beginning changes.
    items = [(request.key, request.chat, together[request.key]) for request in asked]
    forwards, backwards = scored(llama, items), scored(llama, items[::-1])
    for key in forwards:
        assert forwards[key].sum == pytest.approx(backwards[key].sum, abs=0.1 * forwards[key].tokens)


def test_the_probability_of_an_answer_is_its_likelihood(llama: Backend, hf: Backend, example_pairs: list[Pair]) -> None:
    """A completion's logprob and `loglikelihood` of its text are the same number, end-of-turn token aside."""
    # Batches and single tokens take different kernels of llama.cpp, which round differently.
    for backend, tolerance in ((llama, 0.1), (hf, 0.001)):
        for request in requests(example_pairs[:3], Sampling(max_new_tokens=6)):
            ((_, (completion,)),) = generated(backend, [request]).items()
            ((key, likelihood),) = scored(backend, [(request.key, request.chat, completion.text)]).items()
            assert key == request.key
            if completion.finish_reason == "length" and likelihood.tokens == completion.tokens:
                assert likelihood.sum == pytest.approx(completion.logprob, abs=tolerance * likelihood.tokens)


def test_likelihoods_of_both_backends_agree_and_make_sense(llama: Backend, hf: Backend) -> None:
    items = [(answer, CAPITAL, answer) for answer in ("The capital of France is Paris.", "Bananas swim upwards.")]
    scores = [{key: value.sum / value.tokens for key, value in scored(b, items).items()} for b in (llama, hf)]
    for score in scores:
        assert score["The capital of France is Paris."] > -0.6
        assert score["Bananas swim upwards."] < -5
    for answer in scores[0]:
        assert scores[0][answer] == pytest.approx(scores[1][answer], abs=0.15)


def test_samples_share_a_prompt_and_a_seed_brings_them_back(llama: Backend, hf: Backend) -> None:
    sampling = Sampling(n=4, temperature=1.0, top_p=0.95, max_new_tokens=8, seed=7)
    for backend in (llama, hf):
        ((_, first),) = generated(backend, [Request("q", CAPITAL, sampling)]).items()
        ((_, again),) = generated(backend, [Request("q", CAPITAL, sampling)]).items()
        assert [c.text for c in first] == [c.text for c in again]
        assert len({c.text for c in first}) > 1
        ((_, other),) = generated(backend, [Request("q2", CAPITAL, sampling)]).items()
        assert [c.text for c in first] != [c.text for c in other]


def test_the_stream_of_a_sample_depends_on_seed_key_and_number_only() -> None:
    seeds = {stream_seed(seed, key, sample) for seed in range(5) for key in "abc" for sample in range(5)}
    assert len(seeds) == 75
    assert stream_seed(1, "a", 2) == stream_seed(1, "a", 2)


def test_stop_strings_and_length_end_an_answer(llama: Backend, hf: Backend) -> None:
    chat = Chat(CAPITAL.messages, prefix="The capital of")
    for backend in (llama, hf):
        ((_, (stopped,)),) = generated(
            backend, [Request("q", chat, Sampling(max_new_tokens=40, stop=(" is",)))]
        ).items()
        assert stopped.text == " France"
        assert stopped.finish_reason == "stop"
        ((_, (cut,)),) = generated(backend, [Request("q", chat, Sampling(max_new_tokens=2))]).items()
        assert cut.finish_reason == "length"
        assert cut.tokens == 2


def test_a_prompt_without_room_is_an_error_of_its_row(llama: Backend) -> None:
    with pytest.raises(BackendError, match="leave no room"):
        list(llama.generate([Request("q", CAPITAL, Sampling(max_new_tokens=2000))]))
    assert len(list(llama.generate([Request("q", CAPITAL, Sampling(max_new_tokens=2))]))) == 1


def test_a_long_row_is_cut_to_the_context(example_pairs: list[Pair]) -> None:
    backend = model_spec("llama_cpp", settings=["context=256", "batch=64"]).load()
    pair = Pair("long", example_pairs[0].original_text * 50, example_pairs[0].rewritten_text)
    ((_, (completion,)),) = generated(backend, requests([pair], Sampling(max_new_tokens=4))).items()
    assert completion.truncated
    assert 200 < completion.prompt_tokens <= 252


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
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    path = adapter / "lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, weight in weights.items():
        layer = name.split(".layers.")[1].split(".")[0]
        kind = "q" if "q_proj" in name else "v"
        half = "a" if "lora_A" in name else "b"
        if kind == "q" and half == "b":
            # llama.cpp keeps rotary dimensions interleaved: the rows of the query projection are permuted.
            weight = weight.reshape(9, 2, 32, 4).swapaxes(1, 2).reshape(weight.shape)
        tensor = np.ascontiguousarray(weight, dtype=np.float32)
        writer.add_tensor(f"blk.{layer}.attn_{kind}.weight.lora_{half}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_the_embedded_model_runs_in_transformers_too() -> None:
    backend = model_spec("transformers").load()
    chat = Chat(CAPITAL.messages, prefix="The capital of France is")
    ((_, (completion,)),) = generated(backend, [Request("q", chat, Sampling(max_new_tokens=4))]).items()
    assert completion.text.startswith(" Paris")


def test_predict_runs_offline_on_the_examples(cli: Cli, tmp_path: Path) -> None:
    done = cli("predict", ROOT / "examples" / "test.csv", "-o", "s.csv", "--limit", 6, "--json")
    assert done.code == 0, done.err
    assert {"rows": 6, "fallbacks": 0, "computed": 6}.items() <= done.summary.items()
    assert done.summary["rows_per_second"] > 0
    assert all(row[1].startswith("Rewrite this text") for row in read_csv(tmp_path / "s.csv")[1:])
    page = cli("inspect", "story-train", "--run", "s.csv").out
    assert "<|im_start|>user\nOriginal text:\n" in page
    assert "Which instruction turned the original text into the rewritten text?<|im_end|>" in page
    assert page.index("tokens)") < page.index("== raw answer")
    assert cli("doctor").code == 0


def test_predict_with_transformers_gives_a_valid_file(cli: Cli, hf_folder: Path) -> None:
    options = ("--backend", "transformers", "--model", hf_folder, "--max-new-tokens", 8, "--set", "batch=4")
    done = cli("predict", ROOT / "examples" / "test.csv", "-o", "s.csv", "--limit", 6, *options, "--json")
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
    assert names() == ["openvino", "llama_cpp", "transformers", "scripted"]
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
