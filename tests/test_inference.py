"""Batched inference with the real model: real rows in a batch as one at a time, fair draws, memory, the weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from submission.backends import model_spec
from submission.backends.common import PendingRequest
from submission.backends.hardware import free_gpu_memory
from submission.backends.llama.backend import LlamaCpp, Options, _limits
from submission.backends.llama.library import cache_bytes_per_token, library
from submission.backends.llama.schedule import Shape
from submission.backends.models import EMBEDDED, TUNED, tuned_adapter
from submission.backends.sampling import PendingAnswer
from submission.data.outputs import manifest_path
from submission.errors import BackendError
from submission.prompts.encoding import EncodedPrompt
from submission.prompts.templates import TEMPLATES, render_rewrite
from submission.types import Backend, Chat, Message, Pair, Part, Request, Sampling, Triplet
from tests.bench.parity import compare_greedy
from tests.conftest import ROOT, Cli, generated, read_csv, runner

CAPITAL = Chat((Message("user", (Part("What is the capital of France?"),)),))


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    backend = model_spec("llama_cpp").load()
    assert isinstance(backend, LlamaCpp)
    return backend


@pytest.fixture(scope="module")
def hf(hf_folder: Path) -> Backend:
    return model_spec("transformers", str(hf_folder)).load()


def chats(pairs: Sequence[Pair]) -> list[tuple[str, Chat]]:
    return [(pair.id, TEMPLATES["short"].render(pair)) for pair in pairs]


def candidates(pairs: Sequence[Pair]) -> list[tuple[str, Chat, str]]:
    """Rewrites under several prompts, and prompts under one pair: texts that share much and texts that do not."""
    prompts = ("Rewrite this as a poem", "Make it formal", "Shorten the text")
    items = [(f"{pair.id} forward {number}", render_rewrite(prompt, pair.original_text), pair.rewritten_text)
             for pair in pairs for number, prompt in enumerate(prompts)]  # fmt: skip
    return items + [(f"{key} backward {n}", chat, f" {p}") for key, chat in chats(pairs) for n, p in enumerate(prompts)]


@pytest.mark.slow
def test_greedy_answers_in_a_batch_are_those_of_one_row_at_a_time(llama: LlamaCpp, example_pairs: list[Pair]) -> None:
    """Kernels round by the shape of a batch: where answers part, the two tokens were level."""
    asked = [Request(key, chat, Sampling(max_new_tokens=16)) for key, chat in chats(example_pairs[:6])]
    result = compare_greedy(llama, asked)
    assert result.rows == 6
    assert result.equal >= 5
    assert result.largest_gap < 0.1


def chi_square_excess(counts: Counter[int], probabilities: NDArray[np.float64], draws: int) -> float:
    """Standard deviations by which chi-square lies above its mean; rare tokens are taken together."""
    common = [token for token in np.argsort(-probabilities)[:200] if probabilities[token] * draws >= 5]
    expected = np.array([*probabilities[common], max(1e-12, 1 - probabilities[common].sum())]) * draws
    seen = [counts[int(token)] for token in common]
    observed = np.array([*seen, draws - sum(seen)], np.float64)
    terms = ((observed - expected) ** 2 / expected)[expected > 1e-6]
    assert observed[expected <= 1e-6].sum() == 0, "nothing is drawn that was cut off"
    degrees = max(1, len(terms) - 1)
    return float((terms.sum() - degrees) / math.sqrt(2 * degrees))


def truncated(logits: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Temperature, top-p, min-p, worked out over the whole vocabulary."""
    scaled = logits / sampling.temperature
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(logits), bool)
    kept[order[before < sampling.top_p]] = True
    kept &= probabilities >= sampling.min_p * probabilities.max()
    probabilities[~kept] = 0
    probabilities /= probabilities.sum()
    return probabilities


DRAWS = [
    Sampling(temperature=1.0), Sampling(temperature=0.7), Sampling(temperature=1.5), Sampling(temperature=3.0),
    Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=1.0, top_p=0.999), Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.2, top_p=0.95, min_p=0.02),
]  # fmt: skip


def test_memory_bounds_the_streams(llama: LlamaCpp) -> None:
    per_token = cache_bytes_per_token(llama._model)
    assert per_token == 30 * 2 * 3 * 64 * 2, "layers, keys and values, heads, width, bytes"
    limits = _limits(llama._model, Options(memory=50))
    assert limits.tokens * per_token <= 50e6
    shape = limits.shape(500, 1000)
    assert shape == Shape(50_000_000 // per_token // 512, 512)
    assert _limits(llama._model, Options(memory=1)).shape(500, 1000).streams == 1


def test_the_cache_of_a_model_on_gpus_is_bounded_by_their_memory(
    llama: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0, GPU-a, 300 MiB\\n1, GPU-b, 100 MiB\\n2, GPU-c, [N/A]\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(library(), "llama_supports_gpu_offload", lambda: True)
    for visible, megabytes in (("0,1", 400), ("GPU-b,2", 100), ("1", 100)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert free_gpu_memory() == megabytes << 20
        tokens = (megabytes << 20) // 2 // cache_bytes_per_token(llama._model)
        assert _limits(llama._model, Options()).tokens == min(tokens, 48 * 512)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # nothing is told of it: as without GPUs
    assert _limits(llama._model, Options()).tokens == _limits(llama._model, Options(gpu_layers=0)).tokens


@pytest.mark.slow
def test_little_memory_changes_the_speed_and_no_answer(llama: LlamaCpp, example_pairs: list[Pair]) -> None:
    asked = [Request(key, chat, Sampling(max_new_tokens=4)) for key, chat in chats(example_pairs[:3])]
    tight = model_spec("llama_cpp", settings=["memory=1", "batch=40"]).load()
    answers = {key: c[0].text for key, c in generated(tight, asked).items()}
    assert set(answers) == {request.key for request in asked}
    shot = Triplet(example_pairs[3], "Rewrite this as a poem")
    many = [Request(pair.id, TEMPLATES["few_shot"].render(pair, [shot]), Sampling(n=2, temperature=1, max_new_tokens=3))
            for pair in example_pairs[:2]]  # fmt: skip
    assert {key: len(c) for key, c in generated(tight, many).items()} == {request.key: 2 for request in many}


@pytest.mark.slow
def test_continuous_batching_of_transformers_gives_the_same_answers(
    hf: Backend, hf_folder: Path, example_pairs: list[Pair]
) -> None:
    continuous = model_spec("transformers", str(hf_folder), settings=["continuous=true"]).load()
    asked = [Request(key, chat, Sampling(max_new_tokens=6)) for key, chat in chats(example_pairs[:3])]
    expected = {key: c[0] for key, c in generated(hf, asked).items()}
    for key, (completion,) in generated(continuous, asked).items():
        assert completion.text == expected[key].text
        assert completion.logprob == pytest.approx(expected[key].logprob, abs=0.01)


def test_the_default_answers_as_the_study_says(cli: Cli, tmp_path: Path) -> None:
    sets, answers = ROOT / "docs/study/sets/test.parquet", ROOT / "docs/study/answers/one-answer.csv"
    assert cli("predict", sets, "-o", "default.csv", "--limit", 8, "--recover", "zero_shot").code == 0
    told = json.loads((tmp_path / "default.csv.run.json").read_text())
    model = told["models"]["generator"]
    assert model["model"] == TUNED
    assert told["template"] == "brief"
    assert model["fingerprint"]["adapter"].split()[0] == json.loads(manifest_path(tuned_adapter()).read_text())["hash"]
    alike = [a == b for a, b in zip(read_csv(tmp_path / "default.csv")[1:], read_csv(answers)[1:9], strict=True)]
    assert sum(alike) >= 5  # another CPU rounds otherwise


def test_another_adapter_takes_the_place_of_the_default_one() -> None:
    assert model_spec("llama_cpp", TUNED, tuned_adapter()) == model_spec("llama_cpp", EMBEDDED, tuned_adapter())
    tuned, plain = (model_spec("llama_cpp", model).fingerprint() for model in (TUNED, EMBEDDED))
    assert tuned["model"] == plain["model"]
    assert tuned != plain


def test_throughput_compares_with_what_would_be_used_instead(shallow_gguf: Path, tmp_path: Path) -> None:
    examples = ROOT / "examples"
    done = runner("eval", tmp_path)(
        "throughput", examples / "test.csv", "--shots", examples / "train.csv", "--rows", 2, "--max-new-tokens", 2,
        "--repeats", 1, "--no-transformers", "--model", shallow_gguf, "--plot", "speed.png", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    figures = done.summary
    assert list(figures) == ["zero_shot", "few_shot", "samples", "likelihood"]
    ways = figures["zero_shot"]["ways"]
    assert ways["this program"]["ratio"] == 1
    for way, measured in ways.items():
        assert measured["ratio"] == pytest.approx(measured["seconds"] / ways["this program"]["seconds"], rel=0.02), way
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_csv(ROOT / "examples" / "test.csv")) > 3


def test_logits_that_are_not_finite_are_an_error_and_no_answer(llama: LlamaCpp) -> None:
    pending = PendingRequest(Request("q", CAPITAL, Sampling(temperature=1.0)), EncodedPrompt((1,), False))
    state = PendingAnswer(pending, 0, llama.tokenizer)
    logits = np.zeros((1, 100), np.float32)
    logits[0, 5] = np.nan
    with pytest.raises(BackendError, match="not finite"):
        llama._sampler.extend([state], logits)
    with pytest.raises(BackendError, match="not finite"):
        llama._sampler.log_probabilities(logits, np.array([3], np.int32))
