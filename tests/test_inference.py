"""Batched inference with the real model: the same answers and likelihoods as one at a time, fair draws."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from submission.backends import model_spec
from submission.backends.llama import embedded
from submission.backends.llama.backend import LlamaCpp, Options, _limits, weights
from submission.backends.llama.library import cache_bytes_per_token, encode_weights
from submission.backends.llama.sampling import Chain, sample_token
from submission.backends.llama.schedule import Shape
from submission.backends.models import EMBEDDED, TUNED, tuned_adapter
from submission.data.hashing import content_hash
from submission.data.outputs import manifest_path
from submission.prompts.templates import TEMPLATES, render_rewrite
from submission.types import Backend, Chat, LogLikelihood, Message, Pair, Part, Request, Sampling, Triplet
from tests.bench.parity import compare_greedy
from tests.conftest import ROOT, Cli, environment, generated, read_csv, scored

CAPITAL = Chat((Message("user", (Part("What is the capital of France?"),)),))


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    backend = model_spec("llama_cpp").load()
    assert isinstance(backend, LlamaCpp)
    return backend


@pytest.fixture(scope="module")
def exact(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    """The embedded model with 32-bit weights in llama.cpp."""
    path = tmp_path_factory.mktemp("exact") / "f32.gguf"
    assert encode_weights(gguf, path, 0, 2)
    backend = model_spec("llama_cpp", str(path)).load()
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


def test_greedy_answers_in_a_batch_are_those_of_one_row_at_a_time(llama: LlamaCpp, example_pairs: list[Pair]) -> None:
    """Kernels round by the shape of a batch: where answers part, the two tokens were level."""
    asked = [Request(key, chat, Sampling(max_new_tokens=16)) for key, chat in chats(example_pairs[:12])]
    result = compare_greedy(llama, asked)
    assert result.rows == 12
    assert result.equal >= 10
    assert result.largest_gap < 0.1


def test_batched_likelihoods_are_those_of_one_text_at_a_time(
    exact: LlamaCpp, hf: Backend, example_pairs: list[Pair]
) -> None:
    items = candidates(example_pairs[:4])
    for backend in (exact, hf):
        together = scored(backend, items)
        assert set(together) == {key for key, _, _ in items}
        for item in items[::3]:
            ((key, alone),) = scored(backend, [item]).items()
            assert together[key].tokens == alone.tokens
            assert together[key].sum == pytest.approx(alone.sum, abs=1e-3 * alone.tokens)


def test_both_backends_agree_on_the_same_weights(exact: LlamaCpp, hf: Backend, example_pairs: list[Pair]) -> None:
    items = candidates(example_pairs[:4])
    ours, theirs = scored(exact, items), scored(hf, items)
    for key, likelihood in ours.items():
        assert likelihood.sum == pytest.approx(theirs[key].sum, abs=1e-2 * likelihood.tokens)
    asked = [Request(key, chat, Sampling(max_new_tokens=12)) for key, chat in chats(example_pairs[:6])]
    texts = [{key: c[0].text for key, c in generated(backend, asked).items()} for backend in (exact, hf)]
    assert sum(texts[0][key] == texts[1][key] for key in texts[0]) >= 5


def test_an_empty_continuation_has_probability_one(llama: LlamaCpp, hf: Backend) -> None:
    for backend in (llama, hf):
        scores = scored(backend, [("empty", CAPITAL, ""), ("full", CAPITAL, "Paris")])
        assert scores["empty"] == LogLikelihood(0.0, 0)
        assert scores["full"].sum < 0


def test_a_rerun_gives_the_same_samples_whatever_ran_before(llama: LlamaCpp, example_pairs: list[Pair]) -> None:
    sampling = Sampling(n=3, temperature=0.9, top_p=0.95, max_new_tokens=8, seed=5)
    asked = [Request(key, chat, sampling) for key, chat in chats(example_pairs[:5])]

    def texts(backend: Backend) -> dict[str, list[str]]:
        return {key: [c.text for c in completions] for key, completions in generated(backend, asked).items()}

    first = texts(llama)
    list(llama.generate([Request("other", CAPITAL, Sampling(max_new_tokens=4))]))
    assert texts(llama) == first == texts(model_spec("llama_cpp").load())


def test_samples_of_transformers_do_not_depend_on_the_batch(hf_folder: Path, example_pairs: list[Pair]) -> None:
    sampling = Sampling(n=2, temperature=1.0, top_p=0.9, min_p=0.01, max_new_tokens=6, seed=3)
    asked = [Request(key, chat, sampling) for key, chat in chats(example_pairs[:3])]
    wide, narrow = (
        {key: [c.text for c in completions] for key, completions in generated(backend, asked).items()}
        for backend in (model_spec("transformers", str(hf_folder), settings=[f"batch={n}"]).load() for n in (16, 1))
    )
    assert wide == narrow


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


@pytest.mark.parametrize("sampling", DRAWS, ids=str)
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    logits = np.random.default_rng(1).normal(0, 3.2, 20_000).astype(np.float32)
    counts = Counter(sample_token(Chain(sampling, seed), logits) for seed in range(3000))
    assert chi_square_excess(counts, truncated(logits.astype(np.float64), sampling), 3000) < 5


def test_tokens_of_the_model_are_drawn_by_their_probabilities(llama: LlamaCpp, hf: Backend) -> None:
    ids = np.array(llama.encoder.encode(CAPITAL, 1000).ids, np.int32)
    context = llama.new_context(Shape(1, 256))
    scored = np.arange(len(ids)) == len(ids) - 1
    logits = context.run(0, ids[None], np.zeros(1, np.int32), scored[None])[0].astype(np.float64)
    context.close()
    for backend, draws in ((llama, 2000), (hf, 1000)):
        tokenizer: Any = backend.tokenizer  # type: ignore[attr-defined]
        sampling = Sampling(n=draws, temperature=1.3, top_p=0.9, max_new_tokens=1, seed=11)
        ((_, completions),) = generated(backend, [Request("q", CAPITAL, sampling)]).items()
        probabilities = truncated(logits, sampling)
        texts = Counter(c.text for c in completions)
        names = {int(token): tokenizer.detokenize([int(token)]) for token in np.argsort(-probabilities)[:200]}
        counts = Counter({token: texts[name] for token, name in names.items() if list(names.values()).count(name) == 1})
        assert sum(counts.values()) > 0.9 * draws
        # Two backends round logits differently, which a thousand draws must not show.
        assert chi_square_excess(counts, probabilities, draws) < 6


def test_memory_bounds_the_streams(llama: LlamaCpp) -> None:
    per_token = cache_bytes_per_token(llama._model)
    assert per_token == 30 * 2 * 3 * 64 * 2, "layers, keys and values, heads, width, bytes"
    limits = _limits(llama._model, Options(memory=50))
    assert limits.tokens * per_token <= 50e6
    shape = limits.shape(500, 1000)
    assert shape == Shape(50_000_000 // per_token // 512, 512)
    assert _limits(llama._model, Options(memory=1)).shape(500, 1000).streams == 1


def test_little_memory_changes_the_speed_and_no_answer(llama: LlamaCpp, example_pairs: list[Pair]) -> None:
    asked = [Request(key, chat, Sampling(max_new_tokens=4)) for key, chat in chats(example_pairs[:5])]
    tight = model_spec("llama_cpp", settings=["memory=1", "batch=40"]).load()
    answers = {key: c[0].text for key, c in generated(tight, asked).items()}
    assert set(answers) == {request.key for request in asked}
    shot = Triplet(example_pairs[5], "Rewrite this as a poem")
    many = [Request(pair.id, TEMPLATES["few_shot"].render(pair, [shot]), Sampling(n=2, temperature=1, max_new_tokens=3))
            for pair in example_pairs[:3]]  # fmt: skip
    assert {key: len(c) for key, c in generated(tight, many).items()} == {request.key: 2 for request in many}


def test_continuous_batching_of_transformers_gives_the_same_answers(
    hf: Backend, hf_folder: Path, example_pairs: list[Pair]
) -> None:
    continuous = model_spec("transformers", str(hf_folder), settings=["continuous=true"]).load()
    asked = [Request(key, chat, Sampling(max_new_tokens=6)) for key, chat in chats(example_pairs[:3])]
    expected = {key: c[0] for key, c in generated(hf, asked).items()}
    for key, (completion,) in generated(continuous, asked).items():
        assert completion.text == expected[key].text
        assert completion.logprob == pytest.approx(expected[key].logprob, abs=0.01)


def test_the_embedded_model_is_encoded_once(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fresh() -> Path:
        embedded.fast_embedded.cache_clear()
        return embedded.fast_embedded()[0]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = fresh()
    folder = tmp_path / "prompt-recovery" / "models"
    assert path.parent == folder
    assert len(capfd.readouterr().err.splitlines()) == 1, "one line, the first time"
    assert fresh() == path
    assert capfd.readouterr().err == ""
    good = content_hash(path)
    path.write_bytes(path.read_bytes()[:1000])  # a disk that lies
    killed, busy = (folder / f".{path.name}.prompt-recovery-{name}.tmp" for name in ("killed__", "busy____"))
    for file in (killed, busy):
        file.touch()
    os.utime(killed, (0, 0))
    assert content_hash(fresh()) == good
    assert busy.exists(), "another process may be writing it"
    assert not killed.exists()
    busy.unlink()
    assert sorted(file.suffix for file in folder.iterdir()) == [".gguf", ".sha256"], "nothing is left over"
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert fresh() == gguf
    assert "used as they are" in capfd.readouterr().err
    embedded.fast_embedded.cache_clear()


def test_the_default_answers_as_the_study_says(cli: Cli, tmp_path: Path) -> None:
    sets, answers = ROOT / "docs/study/sets/test.parquet", ROOT / "docs/study/answers/default.csv"
    assert cli("predict", sets, "-o", "default.csv", "--limit", 8).code == 0
    told = json.loads((tmp_path / "default.csv.run.json").read_text())
    model = told["models"]["generator"]
    assert model["model"] == TUNED
    assert told["template"] == "brief"
    assert model["fingerprint"]["adapter"].split()[0] == json.loads(manifest_path(tuned_adapter()).read_text())["hash"]
    alike = [a == b for a, b in zip(read_csv(tmp_path / "default.csv")[1:], read_csv(answers)[1:9], strict=True)]
    assert sum(alike) >= 5  # another CPU rounds otherwise


def test_another_adapter_takes_the_place_of_the_default_one() -> None:
    assert model_spec("llama_cpp", TUNED, tuned_adapter()) == model_spec("llama_cpp", EMBEDDED, tuned_adapter())
    beside, added, plain = (
        model_spec("llama_cpp", model, adapter).fingerprint()
        for model, adapter in ((EMBEDDED, tuned_adapter()), (TUNED, None), (EMBEDDED, None))
    )
    assert beside["adapter"] == added["adapter"]
    assert beside["model"] == plain["model"] == added["model"]
    assert beside != added  # it is rounded once more


def test_an_adapter_added_to_the_weights_computes_as_beside_them(
    gguf: Path, example_pairs: list[Pair], tmp_path: Path
) -> None:
    base, both = tmp_path / "base.gguf", tmp_path / "both.gguf"
    for path in (base, both):
        assert encode_weights(gguf, path, 0, 2)  # in 32 bits, where rounding hides nothing
    embedded._add(tuned_adapter(), gguf, both)
    asked = list(candidates(example_pairs[:1]))
    specs = (model_spec("llama_cpp", str(both)), model_spec("llama_cpp", str(base), tuned_adapter()),
             model_spec("llama_cpp", str(base)))  # fmt: skip
    added, beside, without = (scored(spec.load(), asked) for spec in specs)
    for key, found in added.items():
        assert found.sum / found.tokens == pytest.approx(beside[key].sum / found.tokens, abs=0.005)
    assert max(abs(found.sum - without[key].sum) / found.tokens for key, found in added.items()) > 0.3


def test_the_packaged_adapter_is_loaded_beside_the_weights_where_it_cannot_be_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    added, plain = model_spec("llama_cpp", TUNED), model_spec("llama_cpp", EMBEDDED)
    assert weights(added)[0] != weights(plain)[0]
    assert weights(added)[1] is None
    scaled = model_spec("llama_cpp", TUNED, settings=["adapter_scale=0.5"])
    assert weights(scaled) == (weights(plain)[0], tuned_adapter())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    embedded.fast_embedded.cache_clear()
    assert weights(added) == (weights(plain)[0], tuned_adapter())
    assert "gguf" in capfd.readouterr().err
    embedded.fast_embedded.cache_clear()


def test_throughput_compares_with_what_would_be_used_instead(cli: Cli, tmp_path: Path) -> None:
    import subprocess

    command = [sys.executable, "-m", "eval", "throughput", ROOT / "examples" / "test.csv", "--shots",
               ROOT / "examples" / "train.csv", "--rows", 3, "--max-new-tokens", 3, "--repeats", 1, "--no-transformers",
               "--plot", "speed.png", "--json"]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert list(figures) == ["zero_shot", "few_shot", "samples", "likelihood"]
    ways = figures["zero_shot"]["ways"]
    assert ways["this program"]["ratio"] == 1
    for way, measured in ways.items():
        assert measured["ratio"] == pytest.approx(measured["seconds"] / ways["this program"]["seconds"], rel=0.02), way
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_csv(ROOT / "examples" / "test.csv")) > 3
