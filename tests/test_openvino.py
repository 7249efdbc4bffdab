"""Backend openvino: shared blocks never mix rows, memory decides no answer, GGUF files are converted once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from submission.backends import backend_of, model_spec
from submission.backends.models import EMBEDDED, TUNED, resolve_gguf, tuned_adapter
from submission.backends.openvino import weights
from submission.backends.openvino.backend import OpenVino
from submission.backends.openvino.convert import _check_read, _write_16_bits
from submission.backends.openvino.engine import BLOCK, Engine, Piece, Stepped
from submission.backends.openvino.schedule import Scheduler, Work
from submission.backends.openvino.weights import made_folder
from submission.backends.sampling import sample_token
from submission.errors import BackendError, UserError
from submission.prompts.templates import TEMPLATES, render_rewrite
from submission.types import Backend, Chat, Message, Pair, Part, Request, Sampling, Triplet
from tests.conftest import ROOT, Cli, environment, generated, read_csv, scored, small_disk
from tests.fuzz.models import write_gguf
from tests.test_inference import DRAWS, candidates, chi_square_excess, truncated
from tests.test_schedule import VOCABULARY, follows
from tests.tiny_models import lora_gguf

CAPITAL = Chat((Message("user", (Part("What is the capital of France?"),)),))


class FakeEngine:
    """Keeps the tokens of each block, and answers by all tokens that a sequence's blocks hold."""

    def __init__(self, blocks: int, batch: int) -> None:
        self.blocks, self.batch = blocks, batch
        self.cells = np.full((blocks, BLOCK), -1)
        self.computed = 0

    def copy(self, source: int, target: int) -> None:
        self.cells[target] = self.cells[source]

    def step(self, pieces: Sequence[Piece]) -> Stepped:
        assert 0 < sum(len(piece.ids) for piece in pieces) <= self.batch
        top, logprob, target, rows = [], [], [], []
        for piece in pieces:  # all keys and values are written first
            for place, token in enumerate(piece.ids, piece.past):
                self.cells[piece.blocks[place // BLOCK], place % BLOCK] = token
            self.computed += len(piece.ids)
        for piece in pieces:
            fed = self.cells[list(piece.blocks)].ravel()[: piece.past + len(piece.ids)]
            assert (fed >= 0).all(), "a piece stands on what was never computed"
            for place, wanted in zip(piece.scored, piece.targets, strict=True):
                logits = follows(fed[: piece.past + place + 1].tolist())
                top.append(int(logits.argmax()))
                logprob.append(float(logits.max()))
                target.append(float(logits[wanted]))
            if piece.sampled:
                rows.append(logits)
        return Stepped(
            np.array(top), np.array(logprob), np.array(target), np.array(rows), np.zeros(len(rows), np.float32)
        )


@dataclass
class FakeAnswer:
    """Ends after so many tokens; a sampled one takes the token after the likeliest."""

    name: int
    length: int
    samples: bool
    tokens: list[int] = field(default_factory=list)
    total: float = 0.0

    def sample(self, logits: NDArray[np.float32]) -> int:
        return (int(logits.argmax()) + self.name) % VOCABULARY

    def add(self, token: int, logprob: float) -> bool:
        self.tokens.append(token)
        self.total += logprob
        return len(self.tokens) == self.length


def expected(ids: Sequence[int], answer: FakeAnswer) -> list[int]:
    """An answer computed alone, from everything before each token."""
    content = list(ids)
    for _ in range(answer.length):
        logits = follows(content)
        content.append(answer.sample(logits) if answer.samples else int(logits.argmax()))
    return content[len(ids) :]


@dataclass(frozen=True)
class Job:
    """A prompt of a shared beginning and an end of its own."""

    shared: int
    own: int
    lengths: tuple[int, ...]  # of its answers; none for a likelihood
    samples: bool
    scored: int


JOBS = st.lists(
    st.builds(
        Job, st.sampled_from([0, 5, 31, 32, 64, 100]), st.integers(1, 90),
        st.one_of(st.just(()), st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple)), st.booleans(),
        st.integers(1, 40),
    ),
    min_size=1, max_size=25,
)  # fmt: skip


def run(jobs: Sequence[Job], blocks: int, batch: int, streams: int) -> FakeEngine:
    """Run jobs, and compare every result with the one computed alone."""
    engine = FakeEngine(blocks, batch)
    scheduler = Scheduler(cast(Engine, engine), batch, streams, map)
    common = np.random.default_rng(0).integers(VOCABULARY, size=200, dtype=np.int32)
    given_: list[Work] = []
    for number, job in enumerate(jobs):
        own = np.random.default_rng(number % 7).integers(VOCABULARY, size=job.own, dtype=np.int32)
        ids = np.concatenate([common[: job.shared], own, np.zeros(1, np.int32)])
        answers: deque[Any] = deque(FakeAnswer(n, length, job.samples) for n, length in enumerate(job.lengths))
        scored_from = max(1, len(ids) - job.scored) if not job.lengths else 0
        given_.append(Work(ids, list(answers), max(job.lengths, default=0), answers, scored_from))
    found = list(scheduler.run(iter(given_)))
    assert len(found) == sum(max(1, len(job.lengths)) for job in jobs)
    for work, job in zip(given_, jobs, strict=True):
        for answer in work.payload:
            assert any(answer is one for one in found)
            assert answer.tokens == expected(work.ids.tolist(), answer)
        if not job.lengths:
            alone = [
                follows(work.ids[:place].tolist())[work.ids[place]] for place in range(work.scored_from, len(work.ids))
            ]
            assert work.total == pytest.approx(sum(map(float, alone)))
    assert scheduler._blocks.free == blocks, "all blocks are given back"
    assert scheduler._promised == 0
    return engine


@settings(max_examples=150, deadline=None)
@given(JOBS, st.integers(22, 60), st.sampled_from([9, 32, 100, 512]), st.integers(2, 8))
def test_whatever_is_shared_every_row_is_answered_as_if_alone(
    jobs: list[Job], blocks: int, batch: int, streams: int
) -> None:
    run(jobs, blocks, batch, streams)


def test_what_prompts_begin_with_is_computed_once() -> None:
    jobs = [Job(96, 3, (2,), False, 1)] * 10
    engine = run(jobs, 200, 512, 8)
    assert engine.computed < 10 * 100 / 2


def test_a_run_that_is_left_in_the_middle_spoils_nothing() -> None:
    engine = FakeEngine(40, 16)
    scheduler = Scheduler(cast(Engine, engine), 16, 4, map)
    ids = np.arange(100, dtype=np.int32) % VOCABULARY

    def work() -> Iterator[Work]:
        for _ in range(3):
            yield Work(ids, None, 5, deque([FakeAnswer(0, 1, False)]))

    for _ in range(3):
        stream = scheduler.run(work())
        answer = next(stream)
        assert isinstance(answer, FakeAnswer)
        assert answer.tokens == expected(ids.tolist(), answer)
        stream.close()


def test_a_prompt_that_no_memory_holds_is_an_error() -> None:
    scheduler = Scheduler(cast(Engine, FakeEngine(2, 16)), 16, 4, map)
    work = Work(np.zeros(100, np.int32), None, 5, deque([FakeAnswer(0, 1, False)]))
    with pytest.raises(BackendError, match="no room for 105 tokens"):
        list(scheduler.run([work]))


@pytest.mark.parametrize("sampling", DRAWS, ids=str)
def test_samples_follow_the_probabilities(sampling: Sampling) -> None:
    logits = np.random.default_rng(1).normal(0, 3.2, 20_000).astype(np.float32)
    points = np.random.default_rng(2).random(3000)
    counts = Counter(sample_token(logits, sampling, point) for point in points)
    assert chi_square_excess(counts, truncated(logits.astype(np.float64), sampling), 3000) < 5


def test_very_few_and_very_many_tokens_can_be_sampled() -> None:
    flat, peaked = np.zeros(1000, np.float32), np.array([50.0, *[0.0] * 999], np.float32)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    assert {sample_token(peaked, sampling, point) for point in (0.0, 0.5, 0.999999)} == {0}
    assert len({sample_token(flat, sampling, point / 1000) for point in range(1000)}) == 900
    assert len({sample_token(flat, Sampling(temperature=1.0), point / 1000) for point in range(1000)}) >= 999


@pytest.fixture(scope="module")
def plain() -> OpenVino:
    backend = model_spec("openvino", EMBEDDED, settings=["dtype=float32"]).load()
    assert isinstance(backend, OpenVino)
    return backend


def asked(pairs: Sequence[Pair], sampling: Sampling) -> list[Request]:
    return [Request(pair.id, TEMPLATES["short"].render(pair), sampling) for pair in pairs]


def texts(backend: Backend, requests: Iterable[Request]) -> dict[str, list[str]]:
    return {key: [c.text for c in completions] for key, completions in generated(backend, requests).items()}


@pytest.mark.slow
def test_neighbours_and_memory_decide_no_answer(plain: OpenVino, example_pairs: list[Pair]) -> None:
    greedy = asked(example_pairs[:4], Sampling(max_new_tokens=8))
    sampled = asked(example_pairs[:4], Sampling(n=5, temperature=0.9, top_p=0.95, max_new_tokens=6, seed=5))
    tight = model_spec("openvino", EMBEDDED, settings=["dtype=float32", "context=1024", "memory=1", "batch=48"]).load()
    for requests in (greedy, sampled):
        together = texts(plain, requests)
        assert texts(plain, requests[::-1]) == together
        assert {key: found for one in requests[::3] for key, found in texts(plain, [one]).items()}.items() <= (
            together.items()
        )
        assert texts(tight, requests) == together
    items = candidates(example_pairs[:2])
    together_ = scored(plain, items)
    for item in items[::3]:
        ((key, alone),) = scored(plain, [item]).items()
        assert together_[key].sum == pytest.approx(alone.sum, abs=1e-4 * alone.tokens)


def test_shots_and_candidates_share_what_they_begin_with(plain: OpenVino, example_pairs: list[Pair]) -> None:
    engine: Any = plain._scheduler._engine
    fed: list[int] = []
    step = engine.step

    def counted(pieces: Sequence[Piece]) -> Stepped:
        fed.append(sum(len(piece.ids) for piece in pieces))
        return cast(Stepped, step(pieces))

    engine.step = counted
    try:
        shots = [Triplet(pair, "Rewrite this as a poem") for pair in example_pairs[5:8]]
        requests = [Request(pair.id, TEMPLATES["few_shot"].render(pair, shots), Sampling(max_new_tokens=2))
                    for pair in example_pairs[:5]]  # fmt: skip
        needed = sum(found[0].prompt_tokens for found in generated(plain, requests).values())
        assert sum(fed) < needed / 2
        fed.clear()
        pair = example_pairs[0]
        items = [(str(n), render_rewrite(pair.original_text, "x" * n), pair.rewritten_text) for n in range(1, 6)]
        needed = sum(one.tokens + one.prompt_tokens for one in scored(plain, items).values())
        assert 0 < sum(fed) <= needed
    finally:
        engine.step = step


def test_the_tokenizer_is_that_of_llama_cpp(example_pairs: list[Pair]) -> None:
    ours, theirs = (model_spec(name).load_encoder() for name in ("openvino", "llama_cpp"))
    assert set(ours.tokenizer.specials) == set(theirs.tokenizer.specials)
    assert ours.context == theirs.context
    odd = [
        "a  b\n\n c\t123456 <|im_end|>",
        "日本語 😀👍🏽 é",
        "   lead",
        "don't I'LL",
        "\u00a0x\r\ny",
        "".join(map(chr, range(1, 400))),
    ]
    for text in [*odd, *(pair.original_text for pair in example_pairs[:10])]:
        for at_start in (True, False):
            ids = ours.tokenizer.tokenize(text, at_start=at_start)
            assert ids == list(theirs.tokenizer.tokenize(text, at_start=at_start))
            assert ours.tokenizer.detokenize(ids) == theirs.tokenizer.detokenize(ids)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    assert ours.tokenizer.render(messages) == theirs.tokenizer.render(messages)


@pytest.mark.slow
def test_a_gguf_adapter_is_added_to_the_weights(exact_gguf: Path, example_pairs: list[Pair]) -> None:
    items = candidates(example_pairs[:1])
    theirs = scored(model_spec("llama_cpp", str(exact_gguf), tuned_adapter()).load(), items)
    exact = ["dtype=float32"]
    for spec in (
        model_spec("openvino", TUNED, settings=exact), model_spec("openvino", EMBEDDED, tuned_adapter(), exact),
    ):  # fmt: skip
        assert "adapter" in spec.fingerprint()
        for key, found in scored(spec.load(), items).items():
            assert found.sum / found.tokens == pytest.approx(theirs[key].sum / found.tokens, abs=0.03)


def converted(cache: Path, model: str = EMBEDDED) -> subprocess.Popen[str]:
    code = ("from submission.backends import model_spec\n"
            f"print(model_spec('openvino', {model!r}).load_encoder().context)")  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], env={**environment(), "XDG_CACHE_HOME": str(cache)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.mark.slow
def test_a_model_is_converted_once_by_whoever_comes_first(shallow_gguf: Path, tmp_path: Path) -> None:
    model = str(shallow_gguf)
    done = [one.communicate(timeout=300) for one in [converted(tmp_path, model), converted(tmp_path, model)]]
    assert [out for out, _ in done] == ["2048\n"] * 2, done
    folder = tmp_path / "prompt-recovery" / "models"
    (made,) = (one for one in folder.iterdir() if one.is_dir())
    assert sorted(one.name for one in made.iterdir()) == [
        "config.json", "generation_config.json", "made.json", "openvino_model.bin", "openvino_model.xml",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    before = (made / "made.json").stat().st_mtime_ns
    (made / "config.json").write_text("{")  # a disk that lies
    (killed := folder / f".{made.name}.prompt-recovery-killed__.tmp").mkdir()
    assert converted(tmp_path, model).communicate(timeout=300)[0] == "2048\n"
    assert (made / "made.json").stat().st_mtime_ns > before
    assert json.loads((made / "config.json").read_text())["model_type"] == "llama"
    assert not killed.exists()


@pytest.mark.parametrize(
    ("code", "out", "error", "words"),
    [(2, '"it has no layers"\n', UserError, "it has no layers"), (3, '"no space is left there"\n', OSError, "no space"),
     (-9, "", UserError, "its reader ended with signal 9"), (1, "Traceback", UserError, "ended with exit code 1"),
     (None, "", UserError, "did not finish")],
)  # fmt: skip
def test_what_a_conversion_that_failed_says_is_said(
    code: int | None, out: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if code is None:
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, code, out, "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(error, match=words):
        weights._convert(Path("m.gguf"), Path("made"), "[]")


def test_where_the_cache_is_full_a_model_is_converted_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source := tmp_path / "m.gguf").write_bytes(b"weights")
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    killed = [temporary / f"{weights._TEMPORARY}{process}-x" for process in ("999999999", str(os.getpid()))]
    for folder in killed:
        folder.mkdir()
    full = {tmp_path / "cache"}

    def convert(source: Path, target: Path, how: str) -> None:
        if any(target.is_relative_to(folder) for folder in full):
            raise OSError("no space is left there")
        target.mkdir()
        (target / "config.json").write_text(how)

    monkeypatch.setattr(weights, "_convert", convert)
    with made_folder(source, None, 1.0, exact=False) as made:
        assert made.is_relative_to(temporary)
        assert (made / "config.json").is_file()
    assert not made.exists()
    assert [folder.exists() for folder in killed] == [False, True], "that of a process that is there stays"
    assert "converted for this run only" in capsys.readouterr().err
    full.add(temporary)
    with pytest.raises(UserError, match="either: no space"), made_folder(source, None, 1.0, exact=False):
        pass
    full.clear()
    for _ in range(2):
        with made_folder(source, Path(source), 0.5, exact=True) as made:
            assert made.is_relative_to(tmp_path / "cache")
    assert capsys.readouterr().err.count("is converted for OpenVINO, once") == 2


def test_adapters_are_added_or_refused_by_name(tmp_path: Path) -> None:
    from gguf import GGUFReader

    name = "blk.0.attn_q.weight"
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 32)).astype(np.float32), random.normal(size=(32, 4)).astype(np.float32)
    write_gguf(source := tmp_path / "m.gguf", {})
    plain = next(tensor.data for tensor in GGUFReader(source).tensors if tensor.name == name)
    given = {f"{name}.lora_a": a, f"{name}.lora_b": b}

    def with_factors(factors: dict[str, NDArray[np.float32]], scale: float = 0.5) -> dict[str, NDArray[np.float32]]:
        adapter = lora_gguf(tmp_path / "a.gguf", factors, alpha=8.0)
        _write_16_bits(tmp_path / "sum.gguf", source, GGUFReader(source), adapter, scale)
        return {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "sum.gguf").tensors}

    made = with_factors(given)
    assert made[name].dtype == np.float16
    np.testing.assert_allclose(made[name], plain + 0.5 * 8 / 4 * (b @ a), rtol=2e-3, atol=2e-3)
    assert made["output_norm.weight"].dtype == np.float32
    for factors, scale, words in (
        ({f"{name}.lora_a": a}, 1.0, "has another shape"),
        ({f"{name}.lora_a": a, f"{name}.lora_b": b[:8]}, 1.0, "has another shape"),
        (given | {"blk.9.attn_q.weight.lora_a": a}, 1.0, "it has weights for blk.9"),
        (given, 1e6, "16 bits do not hold with .* added"),
    ):
        with pytest.raises(UserError, match=words):
            with_factors(factors, scale)
    (tmp_path / "broken_gguf").write_bytes(b"no GGUF")
    with pytest.raises(UserError, match="broken_gguf cannot be read"):
        _write_16_bits(tmp_path / "sum.gguf", source, GGUFReader(source), tmp_path / "broken_gguf", 1.0)


def test_a_deadline_ends_a_conversion_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "submission", "predict", str(ROOT / "examples" / "test.csv"), "-o", "s.csv",
               "--deadline", "6s"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, env={**environment(), "XDG_CACHE_HOME": str(tmp_path)}, check=False)
    assert len(read_csv(tmp_path / "s.csv")) == 27
    time.sleep(0.5)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _content(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has gone
        return b""


@pytest.mark.parametrize(
    ("keys", "tensors", "what"),
    [({}, ["blk.0.attn_q.bias", "output.weight"], ""), ({"rope.scaling.factor": 8.0}, [], "llama.rope.scaling.factor"),
     ({}, ["rope_freqs.weight"], "rope_freqs.weight"),
     ({"rope.dimension_count": 32}, [], "llama.rope.dimension_count")],
)  # fmt: skip
def test_what_the_reader_would_leave_out_is_refused(keys: dict[str, float], tensors: list[str], what: str) -> None:
    usual = {"embedding_length": 576, "attention.head_count": 9, "rope.dimension_count": 64, "rope.freq_base": 1e5}
    fields = {f"llama.{name}": value for name, value in (usual | keys).items()}
    with pytest.raises(UserError, match=f"has {what}, which OpenVINO leaves out") if what else nullcontext():
        _check_read(Path("m.gguf"), "llama", fields, ["token_embd.weight", "blk.11.ffn_gate.weight", *tensors])


def test_weights_that_are_kept_otherwise_are_another_model(gguf: Path) -> None:
    assert model_spec("openvino", EMBEDDED).fingerprint() != model_spec("openvino", str(gguf)).fingerprint()
    scales = [model_spec("openvino", TUNED, settings=[f"adapter_scale=0.123456{n}"]).fingerprint() for n in (1, 4)]
    assert scales[0] != scales[1]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_time_only(shallow_gguf: Path, tmp_path: Path) -> None:
    (full := tmp_path / "full").mkdir()
    with small_disk(full, "20M"):
        done = converted(full, str(shallow_gguf)).communicate(timeout=300)
    assert done[0] == "2048\n", done
    assert "converted for this run only" in done[1]
    assert "no space is left" in done[1].lower().replace("no space left", "no space is left")
    whole = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prompt-recovery"
    assert converted(whole.parent).communicate(timeout=300) == ("2048\n", "")
    assert not list(Path(tempfile.gettempdir()).glob("prompt-recovery-openvino-*"))


def test_odd_folders_are_refused_by_name(tmp_path: Path) -> None:
    with made_folder(resolve_gguf(EMBEDDED), None, 1.0, exact=True) as good:
        odd = tmp_path / "odd"
        odd.mkdir()
        for file in good.iterdir():
            (odd / file.name).symlink_to(file)

    def put(name: str, content: str) -> None:
        (odd / name).unlink()
        (odd / name).write_text(content)

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            model_spec("openvino", str(odd)).load()

    kept = {name: (odd / name).read_text() for name in ("config.json", "tokenizer_config.json", "tokenizer.json")}
    for wrong in ("true", "10", '"many"'):
        put("config.json", f'{{"max_position_embeddings": {wrong}}}')
        refused("max_position_embeddings is")
    put("config.json", kept["config.json"])
    put("tokenizer_config.json", '{"chat_template": [1, 2]}')
    refused(r"the tokenizer of .*odd cannot be used")
    put("tokenizer_config.json", kept["tokenizer_config.json"])
    put(
        "tokenizer.json",
        kept["tokenizer.json"]
        .replace('"id": 1,', '"id": 61000,')
        .replace('"<|im_start|>": 1,', '"<|im_start|>": 61000,'),
    )
    refused("they do not belong together")
    put("tokenizer.json", kept["tokenizer.json"])
    put("openvino_model.xml", (odd / "openvino_model.xml").read_text()[:5000])
    refused("cannot be loaded by OpenVINO: (?!RuntimeError: Exception from)")
    with pytest.raises(UserError, match="adapter_scale=inf"):
        model_spec("openvino", settings=["adapter_scale=inf"])
    with pytest.raises(UserError, match="16 bits do not hold"):
        model_spec("openvino", TUNED, settings=["adapter_scale=1e9"]).load_encoder()


def test_what_openvino_cannot_load_is_said(cli: Cli, tmp_path: Path, gguf: Path) -> None:
    import gguf as format_

    other = tmp_path / "other.gguf"
    writer = format_.GGUFWriter(other, "mamba")
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"architecture 'mamba'.*use --backend llama_cpp"):
        model_spec("openvino", str(other)).load_encoder()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "openvino_model.xml").write_text("<net")
    assert backend_of(str(folder)) == "openvino"
    with pytest.raises(UserError, match=r"has openvino_model\.xml and no openvino_model\.bin"):
        model_spec("openvino", str(folder))
    (folder / "openvino_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no adapter beside an OpenVINO folder"):
        model_spec("openvino", str(folder), gguf)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        model_spec("openvino", str(folder)).load()
    with pytest.raises(UserError, match="dtype='float64'"):
        model_spec("openvino", settings=["dtype=float64"])
    (folder / "tokenizer.json").write_text('{"added_tokens": 7}')
    with pytest.raises(UserError, match=r"tokenizer of .* cannot be used"):
        model_spec("openvino", str(folder)).load()
