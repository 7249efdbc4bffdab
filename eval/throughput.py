"""How fast this program is, beside what would be used instead: same rows, same weights, one run.

    python -m eval throughput examples/test.csv

Every way of running is timed once in each repeat, by turns, so that a machine that slows down slows all of them;
medians are reported, and their ratios are what counts.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.peers import GenAi, LlamaCppPython, Load, Vllm, half_precision, llama_server, vllm_peer
from submission.backends import model_spec
from submission.backends.common import thread_count
from submission.backends.models import EMBEDDED, TUNED
from submission.backends.openvino.backend import OpenVino, dtype_of, opened
from submission.backends.openvino.graph import PRECISIONS
from submission.backends.transformers.loading import stay_offline_and_quiet
from submission.data.files import atomic_path
from submission.data.outputs import check_output, made_files
from submission.data.tables import read_pairs, read_triplets
from submission.errors import UserError
from submission.prompts.templates import get_template, render_rewrite
from submission.types import Backend, Chat, Failure, Request, Sampling, Triplet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG = logging.getLogger(__name__)

SCENARIOS = ("zero_shot", "few_shot", "samples", "likelihood")
OURS = "this program"
_GENAI = "OpenVINO GenAI, its own pipeline"
_VLLM = "vLLM, LLM.generate"
_SHOTS, _SAMPLES, _CANDIDATES = 3, 8, 5


@dataclass(frozen=True, slots=True)
class ThroughputConfig:
    """What is measured; see `throughput --help`."""

    input: Path
    rows: int = 24
    shots: Path = Path("examples/train.csv")
    model: str = EMBEDDED
    threads: int = 0
    new_tokens: int = 40
    repeats: int = 3
    dtype: str = "auto"
    scenarios: Sequence[str] = SCENARIOS
    llama_server: Path | None = None
    vllm: Path | None = None
    transformers: bool = True
    plot: Path | None = None


@dataclass(slots=True)
class Measured:
    """One scenario: how long each way took, in seconds by repeat.

    Attributes:
        rows: that were computed each time.
        prompt_tokens: of a row's prompts, on average.
        new_tokens: of a row's answers together, on average; of the scored texts for likelihoods.
        seconds: by way.
    """

    rows: int
    prompt_tokens: float
    new_tokens: float
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, way: str) -> float:
        """Seconds of the middle repeat."""
        return statistics.median(self.seconds[way])

    def ratio(self, way: str) -> float:
        """How many times as fast as that way this program is."""
        return self.median(way) / self.median(OURS)

    def figures(self) -> dict[str, object]:
        """The figures, for JSON."""
        return {
            "rows": self.rows,
            "prompt_tokens": round(self.prompt_tokens, 1),
            "new_tokens": round(self.new_tokens, 1),
            "ways": {
                way: {
                    "seconds": round(self.median(way), 3),
                    "rows_per_second": round(self.rows / self.median(way), 4),
                    "ratio": round(self.ratio(way), 3),
                    "repeats": [round(seconds, 3) for seconds in times],
                }
                for way, times in self.seconds.items()
            },
        }


Ways = Mapping[str, Callable[[], object]]


def measure(config: ThroughputConfig) -> dict[str, Measured]:
    """Run every scenario; see `ThroughputConfig`.

    Raises:
        UserError: something is missing or wrong.
    """
    if config.plot is not None:
        check_output(config.plot, [("input", config.input), ("file of shots", config.shots)])
    results: dict[str, Measured] = {}
    with ExitStack() as stack:
        bench = _Bench(config, stack)
        for scenario in config.scenarios:
            results[scenario] = getattr(bench, scenario)()
            for line in table(scenario, results[scenario]):
                LOG.info(line)
        if config.plot is not None:
            with made_files(config.plot, [config.plot], {"input": config.input}), atomic_path(config.plot) as temporary:
                bench.plot(temporary)
            LOG.info(f"plot       {config.plot}")
    return results


def table(scenario: str, measured: Measured) -> Iterator[str]:
    """Lines to print."""
    yield ""
    yield (
        f"{scenario}: {measured.rows} rows, {measured.prompt_tokens:.0f} prompt tokens and {measured.new_tokens:.0f} "
        "new or scored ones a row"
    )
    yield f"  {'way':<44} {'seconds':>8} {'rows/s':>8} {'this program is':>16}"
    for way in measured.seconds:
        seconds, ratio = measured.median(way), "" if way == OURS else f"{measured.ratio(way):.2f} x"
        yield f"  {way:<44} {seconds:>8.2f} {measured.rows / seconds:>8.2f} {ratio:>16}"


class _Bench:
    """The models, loaded when a scenario asks for them, and the rows."""

    def __init__(self, config: ThroughputConfig, stack: ExitStack) -> None:
        unknown = [name for name in config.scenarios if name not in SCENARIOS]
        if unknown:
            raise UserError(f"unknown scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}")
        if config.model == TUNED:
            raise UserError(f"throughput compares models without adapters: name --model {EMBEDDED}")
        stay_offline_and_quiet()
        self._config = config
        self._pairs = read_pairs(config.input)[: config.rows]
        self._threads = thread_count(config.threads)
        self._file = stack.enter_context(half_precision(config.model, self._threads))
        dtype = dtype_of(config.dtype)
        spec = model_spec("openvino", config.model, settings=[f"threads={self._threads}", f"dtype={dtype}"])
        backend = spec.load()
        assert isinstance(backend, OpenVino)
        self._ours = backend
        with opened(spec) as folder:
            self._genai = GenAi(folder, PRECISIONS[dtype], self._threads)
        self._llama = model_spec("llama_cpp", str(self._file), settings=[f"threads={self._threads}"]).load()
        self._one_by_one = LlamaCppPython(self._file, self._threads, backend.encoder.context)
        self._transformers: Backend | None = None
        if config.transformers:
            settings = [f"threads={self._threads}", "dtype=bfloat16"]
            self._transformers = model_spec("transformers", str(self._file), settings=settings).load()
        self._server: Callable[[Load], None] | None = None
        self._vllm: Vllm | None = None
        if config.vllm is not None:
            peer = vllm_peer(config.vllm, self._file, dtype, self._threads, backend.encoder.context)
            self._vllm = stack.enter_context(peer)
        if config.llama_server is not None:
            server = llama_server(config.llama_server, self._file, self._threads, backend.encoder.context)
            self._server = stack.enter_context(server)
        LOG.info(f"model      {config.model}, {dtype}, {self._threads} threads, {config.repeats} repeats")

    def zero_shot(self) -> Measured:
        chats = self._chats("short", ())
        load = self._load(chats)
        more: dict[str, Callable[[], object]] = {
            "llama-cpp-python, one completion a row": lambda: self._one_by_one(load)
        }
        if self._server is not None:
            server = self._server
            more["llama-server -np 8, eight clients"] = lambda: server(load)
        return self._answers(chats, Sampling(max_new_tokens=self._config.new_tokens), more)

    def few_shot(self) -> Measured:
        chats = self._chats("few_shot", self._triplets(_SHOTS))
        return self._answers(chats, Sampling(max_new_tokens=self._config.new_tokens), {})

    def samples(self) -> Measured:
        """Eight samples a row, and one."""
        chats = self._chats("short", ())
        one, many = (Sampling(n=n, temperature=0.8, max_new_tokens=self._config.new_tokens) for n in (1, _SAMPLES))
        more = {"this program, one sample a row": lambda: self._answer(self._ours, chats, one)}
        return self._answers(chats, many, more)

    def likelihood(self) -> Measured:
        """log P(rewrite | candidate prompt, original) of five candidates a row."""
        prompts = [triplet.rewrite_prompt for triplet in self._triplets(_CANDIDATES)]
        items = [
            (f"{pair.id} {number}", render_rewrite(prompt, pair.original_text), pair.rewritten_text)
            for pair in self._pairs
            for number, prompt in enumerate(prompts)
        ]
        sizes = [self._ours.encoder.encode_scored(chat, text) for _, chat, text in items]
        rows = len(self._pairs)
        measured = Measured(
            rows, sum(start for _, start in sizes) / rows, sum(len(ids) - start for ids, start in sizes) / rows
        )
        ways: dict[str, Callable[[], object]] = {
            way: partial(self._score, backend, items) for way, backend in self._backends().items()
        }
        if self._vllm is not None:
            ways[_VLLM] = partial(self._vllm.score, [ids for ids, _ in sizes])
        self._by_turns(measured, ways)
        return measured

    def plot(self, path: Path) -> None:
        """Rows per second against the number of rows and of samples."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        chats = self._chats("short", ())
        greedy = Sampling(max_new_tokens=self._config.new_tokens)
        figure, (by_rows, by_samples) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        counts = sorted({min(count, len(chats)) for count in (1, 2, 4, 8, 16, 32, 64, 128)})
        ours = [count / self._time(lambda n=count: self._answer(self._ours, chats[:n], greedy)) for count in counts]  # type: ignore[misc]
        rows = [count / self._time(lambda n=count: self._one_by_one(self._load(chats[:n]))) for count in counts]  # type: ignore[misc]
        _lines(by_rows, counts, {OURS: ours, "llama-cpp-python, row by row": rows}, "rows", "rows/s")
        numbers = (1, 2, 4, 8)
        samplings = [Sampling(n=n, temperature=0.8, max_new_tokens=self._config.new_tokens) for n in numbers]
        times = [self._time(lambda s=sampling: self._answer(self._ours, chats, s)) for sampling in samplings]  # type: ignore[misc]
        speed = {"rows/s": [len(chats) / t for t in times],
                 "answers/s": [n * len(chats) / t for n, t in zip(numbers, times, strict=True)]}  # fmt: skip
        _lines(by_samples, numbers, speed, "samples a row", "per second")
        figure.suptitle(f"{self._config.model}, {self._threads} threads, up to {self._config.new_tokens} new tokens")
        figure.savefig(path, format="png", dpi=120)
        pyplot.close(figure)

    # -- what the scenarios share ---------------------------------------------------------------------------

    def _backends(self) -> dict[str, Backend]:
        """The backends of this program, by the names of the ways."""
        found: dict[str, Backend] = {OURS: self._ours, "backend llama_cpp": self._llama}
        if self._transformers is not None:
            found["backend transformers, bfloat16"] = self._transformers
        return found

    def _answers(self, chats: Sequence[Chat], sampling: Sampling, more: Mapping[str, Callable[[], object]]) -> Measured:
        counts = [sum(tokens) for tokens in self._answer(self._ours, chats, sampling)]
        load = self._load(chats, sampling)
        ways: dict[str, Callable[[], object]] = {
            way: partial(self._answer, backend, chats, sampling) for way, backend in self._backends().items()
        }
        ways[_GENAI] = lambda: self._genai(load)
        if self._vllm is not None:
            ways[_VLLM] = partial(self._vllm, load)
        measured = Measured(len(chats), statistics.mean(map(len, load.prompts)), statistics.mean(counts))
        self._by_turns(measured, {**ways, **more})
        return measured

    def _by_turns(self, measured: Measured, ways: Ways) -> None:
        measured.seconds.update({way: [] for way in ways})
        for repeat in range(self._config.repeats):
            for way, run in ways.items():
                if way == _GENAI:
                    self._genai.forget()
                elif way == _VLLM and self._vllm is not None:
                    self._vllm.forget()
                measured.seconds[way].append(self._time(run))
            LOG.info(f"repeat {repeat + 1} of {self._config.repeats} is done")

    def _time(self, run: Callable[[], object]) -> float:
        """Seconds of a run that finds no prompt of ours computed."""
        self._ours.forget()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def _chats(self, template: str, shots: Sequence[Triplet]) -> list[Chat]:
        layout = get_template(template)
        return [layout.render(pair, shots) for pair in self._pairs]

    def _triplets(self, count: int) -> list[Triplet]:
        triplets = read_triplets(self._config.shots)[:count]
        if len(triplets) < count:
            raise UserError(f"--shots {self._config.shots} has {len(triplets)} rows, {count} are needed")
        return triplets

    def _answer(self, backend: Backend, chats: Sequence[Chat], sampling: Sampling) -> list[list[int]]:
        """Answer all chats; the tokens of each one's answers."""
        requests = (Request(str(number), chat, sampling) for number, chat in enumerate(chats))
        counts = {
            key: [c.tokens for c in found]
            for key, found in backend.generate(requests)
            if not isinstance(found, Failure)
        }
        return [counts[str(number)] for number in range(len(chats))]

    def _score(self, backend: Backend, items: Sequence[tuple[str, Chat, str]]) -> None:
        for _ in backend.loglikelihood(items):
            pass

    def _load(self, chats: Sequence[Chat], sampling: Sampling = Sampling()) -> Load:
        new = self._config.new_tokens
        prompts = [self._ours.encoder.encode_for(chat, new).ids for chat in chats]
        return Load(prompts, new, self._ours.tokenizer.ends, sampling.n, sampling.temperature)


def _lines(axes: Axes, places: Sequence[int], lines: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    for label, values in lines.items():
        axes.plot(places, values, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
