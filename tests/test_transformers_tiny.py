"""The transformers backend on tiny models of the architectures it is made for: overflow, windows, large vocabularies,
one prompt for all its answers, quantised folders, memory that runs out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from submission.backends import model_spec
from submission.backends.transformers.sampling import TransformersSampler, sample_tokens
from submission.errors import DeviceLostError
from submission.types import Chat, Completion, Failure, Message, Part, Request, Sampling
from tests.conftest import generated, scored
from tests.tiny_models import bytewise

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import pre_tokenizers

    return bytewise(sorted(pre_tokenizers.ByteLevel.alphabet()), TEMPLATE)


@pytest.fixture(scope="session")
def make(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes a folder with a tiny random model of an architecture."""

    def write(architecture: str, **shape: Any) -> Path:
        import torch
        import transformers

        name = "Gemma3Text" if architecture == "Gemma3" else architecture
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id, initializer_range=0.2, **{**SIZES, **shape},
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="module")
def llama(make: Make) -> Path:
    return make("Llama")


def load(folder: Path, *settings: str, adapter: Path | None = None) -> Any:
    return model_spec("transformers", str(folder), adapter, list(settings)).load()


def chat(text: str) -> Chat:
    return Chat((Message("user", (Part(text),)),))


COMMON = "What all of these questions begin with, word by word. "
TEXTS = [COMMON + more for more in ("One.", "Another one, which is longer.", "A third.", "And the last of them?")]


def requests(sampling: Sampling) -> list[Request]:
    return [Request(str(number), chat(text), sampling) for number, text in enumerate(TEXTS)]


class Same:
    """Answers by key, equal to others of the same texts whose log-probabilities differ by rounding alone."""

    def __init__(self, answers: Mapping[str, list[Completion]]) -> None:
        self.texts = {key: [one.text for one in answers[key]] for key in sorted(answers)}
        self.logprobs = [one.logprob for key in sorted(answers) for one in answers[key]]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Same)
        return self.texts == other.texts and self.logprobs == pytest.approx(other.logprobs, abs=1e-3)

    def __repr__(self) -> str:
        return f"{self.texts} {self.logprobs}"


# -- logits that are not numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", [(0.0, 1.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.9, 0.0), (1.0, 1.0, 0.1), (0.7, 0.5, 0.05)])
def test_no_index_is_made_of_logits_that_are_not_numbers(value: float, way: tuple[float, float, float]) -> None:
    import torch

    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(n=1, temperature=way[0], top_p=way[1], min_p=way[2], max_new_tokens=2)
    expected = TransformersSampler([(sampling, seed) for seed in range(3)], 7)(None, scores).argmax(dim=-1)
    broken = scores.clone()
    broken[1] = value
    sampler = TransformersSampler([(sampling, seed) for seed in range(3)], 7)
    chosen = sampler(None, broken).argmax(dim=-1)
    assert chosen.tolist() == [int(expected[0]), 7, int(expected[2])], "it ends, and its neighbours go on"
    assert sampler.logprobs[0].isfinite().tolist() == [True, False, True]
    indices = sample_tokens(broken, torch.full((3, 1), 0.5, dtype=torch.float64), *way)
    assert ((indices >= 0) & (indices < 50)).all()


def watch(backend: Any, check: Callable[[int], None] = lambda rows: None) -> list[tuple[int, int]]:
    """Rows and tokens that the model is fed from now on; `check` may raise."""
    fed: list[tuple[int, int]] = []
    forward = backend._model.forward

    @functools.wraps(forward)  # its parameters are looked at
    def watched(*args: Any, **kwargs: Any) -> Any:
        fed.append(tuple(kwargs["input_ids"].shape))
        check(fed[-1][0])
        return forward(*args, **kwargs)

    backend._model.forward = watched
    return fed


def poison(backend: Any, token: int) -> None:
    """Logits after this token are not numbers, as where activations overflow."""

    def overflow(module: Any, inputs: Any, output: Any) -> Any:
        hit = inputs[0] == token
        output[hit] = math.nan
        return output

    backend._model.get_input_embeddings().register_forward_hook(overflow)


@pytest.mark.parametrize("n", [1, 3])
def test_a_row_that_overflows_fails_and_its_neighbours_keep_their_answers(llama: Path, n: int) -> None:
    backend = load(llama)
    asked = requests(Sampling(n=n, temperature=float(n > 1), max_new_tokens=5))
    expected = generated(backend, asked)
    poison(backend, backend.encoder.encode(chat("?"), 9).ids[-1])
    found = dict(backend.generate(asked))
    failed = found.pop("3")
    assert isinstance(failed, Failure)
    assert "not finite" in failed.reason
    kept_answers = {key: one for key, one in found.items() if not isinstance(one, Failure)}
    assert Same(kept_answers) == Same({key: expected[key] for key in "012"})


def test_a_text_that_overflows_fails_and_its_neighbours_keep_their_likelihoods(llama: Path) -> None:
    backend = load(llama)
    items = [(str(number), chat(text), "An answer.") for number, text in enumerate(TEXTS)]
    expected = scored(backend, items)
    poison(backend, backend.encoder.encode(chat("?"), 9).ids[-1])
    found = dict(backend.loglikelihood(items))
    failed = found.pop("3")
    assert isinstance(failed, Failure)
    for key, likelihood in found.items():
        assert likelihood.sum == pytest.approx(expected[key].sum, abs=1e-4)


def test_a_lost_gpu_ends_the_worker_and_not_the_rows(llama: Path) -> None:
    import torch

    backend = load(llama)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    backend._model.forward = broken
    with pytest.raises(DeviceLostError, match="device-side assert"):
        list(backend.generate(requests(Sampling())))


# -- prefixes and windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [400, 40])
@pytest.mark.parametrize("architecture", ["Mistral", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_shared_beginning_changes_nothing_under_a_sliding_window(
    architecture: str, window: int, n: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows that are larger and smaller than the prompts, beside every row alone and computed anew."""
    backend = load(make(architecture, sliding_window=window))
    prefixes = backend._generator._prefixes
    assert prefixes.shareable(390) == (window == 400)
    fed = watch(backend)
    asked = requests(Sampling(n=n, temperature=float(n > 1), max_new_tokens=8, seed=3))
    together = Same(generated(backend, asked))
    computed = sum(rows * tokens for rows, tokens in fed)
    fed.clear()
    monkeypatch.setattr(prefixes, "_below", 0.0)
    monkeypatch.setattr(prefixes, "repeatable", False)
    alone = Same({key: one for request in asked for key, one in generated(backend, [request]).items()})
    assert together == alone
    apart = sum(rows * tokens for rows, tokens in fed)
    if window == 400 or n > 1:
        assert computed < 0.7 * apart, "what is shared is computed once"


@pytest.mark.parametrize("window", [400, 40])
def test_likelihoods_share_a_beginning_below_the_window(window: int, make: Make) -> None:
    backend = load(make("Mistral", sliding_window=window))
    items = [
        (f"{number} {answer}", chat(text), answer) for number, text in enumerate(TEXTS) for answer in ("Yes", "No.")
    ]
    together = scored(backend, items)
    backend._scorer._prefixes._below = 0.0
    for item in items:
        ((key, alone),) = scored(backend, [item]).items()
        assert together[key].sum == pytest.approx(alone.sum, abs=1e-4)


# -- likelihoods with a large vocabulary --------------------------------------------------------------------


@pytest.mark.parametrize("bound", [None, 1.5])
def test_likelihoods_with_the_head_in_pieces_are_those_of_the_whole_model(bound: float | None, make: Make) -> None:
    """Gemma-2 bounds its logits behind the head; without that the likelihoods are others."""
    import torch

    backend = load(make("Gemma2", final_logit_softcapping=bound))
    items = [(str(number), chat(text), "An answer of some length.") for number, text in enumerate(TEXTS)]
    assert backend._scorer.outputs is None
    rows: list[int] = []
    head = backend._model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(math.prod(output.shape[:-1])))
    backend._scorer._room = lambda: 16 * 258 * 7  # bytes: logits of seven tokens
    found = scored(backend, items)
    assert max(rows) == 7
    assert sum(rows) <= sum(one.tokens for one in found.values()) + 1, "only what is scored has logits"
    for key, prompt, text in items:
        ids, first = backend.encoder.encode_scored(prompt, text)
        with torch.inference_mode():
            logits = backend._model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        expected = sum(float(logits[place - 1, ids[place]]) for place in range(first, len(ids)))
        assert found[key].sum == pytest.approx(expected, abs=1e-5 * found[key].tokens)


def test_a_head_that_is_not_the_whole_of_it_is_left_to_the_model(make: Make) -> None:
    backend = load(make("Granite", logits_scaling=3.0))
    assert backend._scorer.outputs is not None
    items = [(str(number), chat(text), "Yes.") for number, text in enumerate(TEXTS)]
    together = scored(backend, items)
    for item in items:
        ((key, alone),) = scored(backend, [item]).items()
        assert together[key].sum == pytest.approx(alone.sum, abs=1e-4)


# -- one prompt, many answers -------------------------------------------------------------------------------


def test_a_greedy_answer_and_samples_compute_their_prompt_once(llama: Path) -> None:
    backend = load(llama)
    samplings = (Sampling(max_new_tokens=6), Sampling(n=3, temperature=0.9, top_p=0.9, max_new_tokens=6, seed=1))
    asked = [Request(f"{number}/{which}", chat(text), sampling)
             for number, text in enumerate(TEXTS[1:3]) for which, sampling in enumerate(samplings)]  # fmt: skip
    alone = Same({key: one for request in asked for key, one in generated(backend, [request]).items()})
    backend._generator._prefixes.forget()
    fed = watch(backend)
    assert Same(generated(backend, asked)) == alone
    assert max(rows for rows, tokens in fed if tokens > 1) == 2, "two prompts"
    assert max(rows for rows, _ in fed) == 8, "eight answers"
    lengths = [len(backend.encoder.encode(request.chat, 400).ids) for request in asked[::2]]
    assert sum(rows * tokens for rows, tokens in fed if tokens > 1) <= sum(lengths)


# -- drawing without sorting --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flat_and_steep() -> Any:
    """Logits, (2, 3000): of a row whose nucleus is most of the vocabulary, and of one that is sure."""
    rng = np.random.default_rng(4)
    return np.stack([rng.normal(0, 0.3, 3000), rng.normal(0, 6.0, 3000)]).astype(np.float32)


def kept(logits: np.ndarray[Any, Any], temperature: float, top_p: float, min_p: float) -> np.ndarray[Any, Any]:
    """Probabilities after a full sort, worked out in another library."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    mask = np.zeros(len(logits), bool)
    mask[order[before < top_p]] = True
    mask &= probabilities >= min_p * probabilities.max()
    found: np.ndarray[Any, Any] = np.where(mask, probabilities, 0) / probabilities[mask].sum()
    return found


def test_a_temperature_near_zero_draws_the_most_probable_token() -> None:
    import torch

    scores, half = torch.tensor([[3.0, -50.0, 2.0, -50.0]]), torch.tensor([[0.5]], dtype=torch.float64)
    for top_p in (1.0, 0.9):
        assert int(sample_tokens(scores, half, 1e-40, top_p, 0.0)) == 0


@pytest.mark.parametrize(
    "way", [(1.0, 1.0, 0.0), (0.7, 1.0, 0.05), (1.0, 0.9, 0.0), (1.3, 0.97, 0.02), (1.0, 0.2, 0.0)]
)
def test_draws_have_the_distribution_of_a_full_sort(flat_and_steep: Any, way: tuple[float, float, float]) -> None:
    """Inverting the distribution at evenly spaced points gives each token its probability, whatever their order."""
    import torch

    points = 4_000
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5)[:, None] / points
    for row in flat_and_steep:
        drawn = sample_tokens(torch.from_numpy(row).expand(points, -1)[:1], uniform[:1], *way, top=256)
        assert drawn.shape == (1, 1)
        counts = np.zeros(len(row))
        for part in torch.split(uniform, 2000):
            chosen = sample_tokens(torch.from_numpy(row).expand(len(part), -1), part, *way, top=256)
            counts += np.bincount(chosen[:, 0].numpy(), minlength=len(row))
        assert np.abs(counts / points - kept(row, *way)).max() <= 1.5 / points


def test_a_nucleus_beyond_those_that_were_sorted_is_sorted_whole(flat_and_steep: Any) -> None:
    import torch

    scores = torch.from_numpy(flat_and_steep)
    for value in np.linspace(0, 1, 50, endpoint=False):
        uniform = torch.full((2, 1), float(value), dtype=torch.float64)
        for top_p in (0.5, 0.99):
            some, every = (sample_tokens(scores, uniform, 1.0, top_p, 0.0, top=top) for top in (64, 3000))
            assert some.tolist() == every.tolist()


def test_nothing_is_sorted_where_all_tokens_count(flat_and_steep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def sorts(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", sorts)
    monkeypatch.setattr(torch.Tensor, "topk", sorts)
    uniform = torch.full((2, 1), 0.5, dtype=torch.float64)
    assert sample_tokens(torch.from_numpy(flat_and_steep), uniform, 0.8, 1.0, 0.0).shape == (2, 1)
    assert sample_tokens(torch.from_numpy(flat_and_steep), uniform, 0.8, 1.0, 0.1).shape == (2, 1)


# -- quantised folders --------------------------------------------------------------------------------------


def test_an_adapter_stays_beside_weights_that_are_quantised_already(make: Make, tokenizer: Any, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # bitsandbytes wants whole blocks of 64 columns where the processor has AVX512_BF16.
    llama = make("Llama", hidden_size=64, head_dim=16)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(str(tmp_path / "adapter"))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    quantised = AutoModelForCausalLM.from_pretrained(llama, quantization_config=nf4, device_map={"": "cpu"})
    quantised.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    backend = load(tmp_path / "nf4", adapter=tmp_path / "adapter")
    kinds = {type(module).__name__ for module in backend._model.modules()}
    assert "Linear4bit" in kinds
    assert any("lora" in name for name, _ in backend._model.named_parameters()), "it is not added to 4 bits"
    widths = {module.compute_dtype for module in backend._model.modules() if hasattr(module, "compute_dtype")}
    assert widths == {torch.float32}, "computed in what suits this device, not in what the folder says"
    items = [("1", chat(TEXTS[0]), "An answer.")]
    with_adapter, without = (scored(one, items)["1"].sum for one in (backend, load(tmp_path / "nf4")))
    assert abs(with_adapter - without) > 0.1
    assert len(generated(backend, requests(Sampling(max_new_tokens=3)))) == 4
    plain_model = load(llama, adapter=tmp_path / "adapter")
    assert not any("lora" in name for name, _ in plain_model._model.named_parameters()), "elsewhere it is"


# -- memory that runs out -----------------------------------------------------------------------------------


class Memory:
    """A backend whose batches must not have more than `most` rows."""

    def __init__(self, folder: Path) -> None:
        self.backend = load(folder, "batch=8")
        self.most = 8
        self.fed = watch(self.backend, self._check)

    def _check(self, rows: int) -> None:
        import torch

        kinds = [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
            MemoryError(),
            torch.AcceleratorError("CUDA error: out of memory"),
        ]
        if rows > self.most:
            raise kinds[len(self.fed) % len(kinds)]

    def rows(self) -> list[int]:
        """How many rows were computed together, since this was last asked."""
        rows = [rows for rows, _ in self.fed]
        self.fed.clear()
        return rows


def test_batches_are_smaller_after_memory_ran_out_and_grow_back(llama: Path) -> None:
    memory = Memory(llama)
    asked = [Request(str(number), chat(TEXTS[0]), Sampling(max_new_tokens=1)) for number in range(128)]
    expected = Same(generated(memory.backend, asked))
    assert max(memory.rows()) == 8
    memory.most = 2
    assert Same(generated(memory.backend, asked)) == expected
    rows = memory.rows()
    assert sum(count > 2 for count in rows) < 0.2 * len(rows), "it does not run into the same wall again and again"
    memory.most = 8
    assert Same(generated(memory.backend, asked)) == expected
    rows = memory.rows()
    assert rows[0] < 8 == max(rows)


def test_samples_and_likelihoods_come_whole_though_memory_runs_out(llama: Path) -> None:
    memory = Memory(llama)
    asked = requests(Sampling(n=5, temperature=1.0, max_new_tokens=3, seed=2))
    items = [(f"{number} {text}", chat(one), text) for number, one in enumerate(TEXTS) for text in ("Yes", "No.")]
    samples = Same(generated(memory.backend, asked))
    likelihoods = scored(memory.backend, items)
    memory.most = 2
    assert Same(generated(memory.backend, asked)) == samples
    for key, found in scored(memory.backend, items).items():
        assert found.sum == pytest.approx(likelihoods[key].sum, abs=1e-4)


def test_a_row_that_never_fits_fails_alone(llama: Path) -> None:
    memory = Memory(llama)
    memory.most = 0
    found = dict(memory.backend.generate(requests(Sampling(max_new_tokens=2))))
    assert {key for key, one in found.items() if isinstance(one, Failure)} == set("0123")
    memory.most = 8
    assert len(generated(memory.backend, requests(Sampling(n=3, temperature=1.0, max_new_tokens=2)))) == 4
