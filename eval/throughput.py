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
from pathlib import Path
from typing import TYPE_CHECKING

from eval.peers import BareLoop, LlamaCppPython, Load, TransformersRows, llama_server
from submission.backends import model_spec
from submission.backends.common import thread_count
from submission.backends.llama.backend import LlamaCpp, weights
from submission.backends.models import EMBEDDED
from submission.backends.schedule import QueuedText
from submission.backends.transformers.loading import stay_offline_and_quiet
from submission.data.files import atomic_path
from submission.data.outputs import check_output, made_files
from submission.data.tables import read_pairs, read_triplets
from submission.errors import UserError
from submission.prompts.templates import get_template, render_rewrite
from submission.types import Chat, Request, Sampling, Triplet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG = logging.getLogger(__name__)

SCENARIOS = ("zero_shot", "few_shot", "samples", "likelihood")
OURS = "this program"
_SHOTS, _SAMPLES, _CANDIDATES = 3, 8, 5
_STREAMS = (4, 8, 16, 32)


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
    scenarios: Sequence[str] = SCENARIOS
    llama_server: Path | None = None
    transformers: bool = True
    plot: Path | None = None


@dataclass(slots=True)
class Measured:
    """One scenario: how long each way took, in seconds by repeat.

    Attributes:
        rows: that were computed each time.
        prompt_tokens: of a row's prompt, on average.
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
        """For programs."""
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
    bench = _Bench(config)
    results: dict[str, Measured] = {}
    with ExitStack() as stack:
        bench.start_server(stack)
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
    """Lines for people."""
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

    def __init__(self, config: ThroughputConfig) -> None:
        unknown = [name for name in config.scenarios if name not in SCENARIOS]
        if unknown:
            raise UserError(f"unknown scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}")
        stay_offline_and_quiet()
        self._config = config
        self._pairs = read_pairs(config.input)[: config.rows]
        self._threads = thread_count(config.threads)
        self._file = weights(model_spec("llama_cpp", config.model))[0]
        backend = model_spec("llama_cpp", str(self._file), settings=[f"threads={self._threads}"]).load()
        assert isinstance(backend, LlamaCpp)
        self._ours = backend
        self._bare = BareLoop(backend)
        self._one_by_one = LlamaCppPython(self._file, self._threads, backend.encoder.context)
        self._transformers: TransformersRows | None = None
        self._server: Callable[[Load], None] | None = None
        LOG.info(f"model      {self._file.name}, {self._threads} threads, {config.repeats} repeats")

    def start_server(self, stack: ExitStack) -> None:
        if self._config.llama_server is not None:
            server = llama_server(self._config.llama_server, self._file, self._threads, self._ours.encoder.context)
            self._server = stack.enter_context(server)

    def zero_shot(self) -> Measured:
        return self._greedy(self._chats("short", ()), others=True)

    def few_shot(self) -> Measured:
        return self._greedy(self._chats("few_shot", self._triplets(_SHOTS)), others=False)

    def samples(self) -> Measured:
        """Eight samples a row against one."""
        chats = self._chats("short", ())
        drawn = {n: Sampling(n=n, temperature=0.8, max_new_tokens=self._config.new_tokens) for n in (1, _SAMPLES)}
        answered = self._answer(chats, drawn[_SAMPLES])
        measured = self._measured(chats, [sum(counts) for counts in answered])
        self._by_turns(measured, {
            OURS: lambda: self._answer(chats, drawn[_SAMPLES]),
            "this program, one sample a row": lambda: self._answer(chats, drawn[1]),
        })  # fmt: skip
        return measured

    def likelihood(self) -> Measured:
        """log P(rewrite | candidate prompt, original) of five candidates a row."""
        prompts = [triplet.rewrite_prompt for triplet in self._triplets(_CANDIDATES)]
        items = [
            (f"{pair.id} {number}", render_rewrite(prompt, pair.original_text), pair.rewritten_text)
            for pair in self._pairs
            for number, prompt in enumerate(prompts)
        ]
        texts = list(self._texts(items))
        measured = Measured(
            len(self._pairs),
            sum(text.scored_from for text in texts) / len(self._pairs),
            sum(len(text.ids) - text.scored_from for text in texts) / len(self._pairs),
        )
        self._by_turns(measured, {
            OURS: lambda: list(self._ours.loglikelihood(items)),
            "bare llama_decode, same tokens and logits": lambda: self._bare.score(texts),
        })  # fmt: skip
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
        ours = [count / _time(lambda n=count: self._answer(chats[:n], greedy)) for count in counts]  # type: ignore[misc]
        rows = [count / _time(lambda n=count: self._one_by_one(self._load(chats[:n]))) for count in counts]  # type: ignore[misc]
        _lines(by_rows, counts, {OURS: ours, "llama-cpp-python, row by row": rows}, "rows", "rows/s")
        numbers = (1, 2, 4, 8)
        drawn = [Sampling(n=n, temperature=0.8, max_new_tokens=self._config.new_tokens) for n in numbers]
        times = [_time(lambda s=sampling: self._answer(chats, s)) for sampling in drawn]  # type: ignore[misc]
        speed = {"rows/s": [len(chats) / t for t in times],
                 "answers/s": [n * len(chats) / t for n, t in zip(numbers, times, strict=True)]}  # fmt: skip
        _lines(by_samples, numbers, speed, "samples a row", "per second")
        figure.suptitle(f"{self._file.stem}, {self._threads} threads, up to {self._config.new_tokens} new tokens")
        figure.savefig(path, format="png", dpi=120)
        pyplot.close(figure)

    # -- what the scenarios share ---------------------------------------------------------------------------

    def _greedy(self, chats: Sequence[Chat], *, others: bool) -> Measured:
        load = self._load(chats)
        sampling = Sampling(max_new_tokens=self._config.new_tokens)
        answered = [counts[0] for counts in self._answer(chats, sampling)]
        measured = self._measured(chats, answered)
        # The number of streams that is best for the bare loop is found once.
        trials = {streams: _time(lambda n=streams: self._bare(load, answered, n)) for streams in _STREAMS}  # type: ignore[misc]
        best = min(trials, key=lambda streams: trials[streams])
        ways: dict[str, Callable[[], object]] = {
            OURS: lambda: self._answer(chats, sampling),
            "llama-cpp-python, one completion a row": lambda: self._one_by_one(load),
        }
        if self._server is not None:
            server = self._server
            ways["llama-server -np 8, eight clients"] = lambda: server(load)
        ways[f"ceiling: bare llama_decode, {best} streams"] = lambda: self._bare(load, answered, best)
        self._by_turns(measured, ways)
        if others and self._config.transformers:
            # Slow and steady: once is enough, and it would only lengthen the turns of the others.
            self._transformers = self._transformers or TransformersRows(self._file, self._threads)
            transformers = self._transformers
            measured.seconds["transformers fp32, one generate a row"] = [_time(lambda: transformers(load))]
        return measured

    def _by_turns(self, measured: Measured, ways: Ways) -> None:
        measured.seconds.update({way: [] for way in ways})
        for repeat in range(self._config.repeats):
            for way, run in ways.items():
                measured.seconds[way].append(_time(run))
            LOG.info(f"repeat {repeat + 1} of {self._config.repeats} is done")

    def _chats(self, template: str, shots: Sequence[Triplet]) -> list[Chat]:
        layout = get_template(template)
        return [layout.render(pair, shots) for pair in self._pairs]

    def _triplets(self, count: int) -> list[Triplet]:
        triplets = read_triplets(self._config.shots)[:count]
        if len(triplets) < count:
            raise UserError(f"--shots {self._config.shots} has {len(triplets)} rows, {count} are needed")
        return triplets

    def _answer(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[int]]:
        """Answer all chats; the tokens of each one's answers."""
        requests = (Request(str(number), chat, sampling) for number, chat in enumerate(chats))
        counts = {key: [c.tokens for c in completions] for key, completions in self._ours.generate(requests)}
        return [counts[str(number)] for number in range(len(chats))]

    def _load(self, chats: Sequence[Chat]) -> Load:
        new = self._config.new_tokens
        return Load([self._ours.encoder.encode_for(chat, new).ids for chat in chats], new)

    def _measured(self, chats: Sequence[Chat], answered: Sequence[int]) -> Measured:
        prompts = self._load(chats).prompts
        return Measured(len(chats), statistics.mean(map(len, prompts)), statistics.mean(answered))

    def _texts(self, items: Sequence[tuple[str, Chat, str]]) -> Iterator[QueuedText]:
        import numpy as np

        for _, chat, continuation in items:
            ids, scored_from = self._ours.encoder.encode_scored(chat, continuation)
            yield QueuedText(np.array(ids, np.int32), scored_from)


def _time(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


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
