"""How fast 7B shapes answer, beside the least time that this device could take, and their memory beside the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from submission.backends.transformers.devices import weight_bytes
from submission.data.files import read_json
from submission.predict.capacity import Gpu, Machine, ModelShape, Precision, Work, fit
from submission.prompts.templates import render_rewrite
from submission.types import Completion, LogLikelihood, Request, Sampling
from tests.gpu.floor import Done, Pace, measure
from tests.gpu.models import base_model, load, release, sized_requests
from tests.gpu.needs import missing
from tests.gpu.report import Check
from tests.gpu.watch import Watch

_MOST_OF_FLOOR = 2.5  # times the floor that is aimed at, for the largest batch in 16 bits
_PLAN = (0.9, 1.1)  # peak memory beside the plan
_TURNS = 12  # measurements that share a part's time


@dataclass(frozen=True, slots=True)
class _Size:
    """What is asked: rows of prompts and answers in tokens, batches, candidates of likelihoods and their tokens."""

    rows: int
    prompt: int
    new: int
    batches: tuple[int, ...]
    samples: int
    candidates: int
    scored: int


_WHOLE = _Size(1400, 500, 40, (16, 64, 256), 8, 5, 300)
_SMALL = _Size(6, 90, 4, (2, 4), 2, 2, 12)


@dataclass(frozen=True, slots=True)
class _Bench:
    """A model that is timed."""

    check: Check
    name: str
    backend: Any
    shape: ModelShape
    precision: Precision
    pace: Pace
    size: _Size
    seconds: float
    """That a measurement may take."""


def run(check: Check, shape: str) -> None:
    """Time a shape in 16 bits and in nf4."""
    folder, size, width, pace = _prepared(check, shape)
    model = ModelShape.from_config(read_json(folder / "config.json"))
    ways = {width: (Precision(16), f"dtype={width}"), "nf4": (Precision(4), "load_in_4bit=true")}
    for name, (precision, setting) in ways.items():
        if name == "nf4" and missing(["bitsandbytes"]):
            check.leave_out(name, "not installed: bitsandbytes")
            continue
        backend = _loaded(check, name, folder, f"dtype={width}", setting)
        watch = Watch(backend)
        bench = _Bench(check, name, backend, model, precision, pace, size, check.left() / _TURNS)
        _warm(bench)
        for batch in size.batches:
            backend._room.rows = batch
            _answers(bench, f"batch {batch}", 1, batch, watch)
        _answers(bench, f"{size.samples} samples a row", size.samples, max(size.batches), watch)
        _likelihoods(bench)
        bench = backend = watch = None  # type: ignore[assignment]  # so that its memory is free
        release()


def run_vllm(check: Check, shape: str) -> None:
    """Time a shape by vLLM, on the same rows."""
    from submission.backends import model_spec

    folder, size, width, pace = _prepared(check, shape)
    began = time.perf_counter()
    backend: Any = model_spec("vllm", str(folder), settings=[f"dtype={width}"]).load()
    check.put("vllm: loading", time.perf_counter() - began, "s")
    model = ModelShape.from_config(read_json(folder / "config.json"))
    bench = _Bench(check, "vllm", backend, model, Precision(16), pace, size, check.left() / 5)
    _warm(bench)
    _answers(bench, "greedy", 1, max(size.batches), None)
    _answers(bench, f"{size.samples} samples a row", size.samples, max(size.batches), None)
    _likelihoods(bench)


def _prepared(check: Check, shape: str) -> tuple[Path, _Size, str, Pace]:
    """The folder of a shape, how much of it is timed, the dtype of 16 bits, and the pace of the device."""
    folder = base_model(check, shape)
    width = _width(check)
    pace = measure(check.device, width, small=check.small)
    _put_pace(check, pace, width)
    release()
    return folder, _SMALL if check.small else _WHOLE, width, pace


def _width(check: Check) -> str:
    """The dtype of 16 bits that suits the device."""
    if check.device == "cpu":
        return "bfloat16"
    import torch

    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _put_pace(check: Check, pace: Pace, width: str) -> None:
    check.put(f"floor: matrix product in {width}", pace.flops / 1e12, "TFLOP/s")
    check.put("floor: copy, bytes read and written", pace.bandwidth / 1e9, "GB/s")


def _loaded(check: Check, name: str, folder: Path, *settings: str) -> Any:
    """The backend, with the figures of its loading."""
    began = time.perf_counter()
    backend = load(folder, check.device, *dict.fromkeys(settings))
    check.put(f"{name}: loading", time.perf_counter() - began, "s")
    if check.device == "cpu":
        return backend
    import torch

    release()
    width = str(backend._model.dtype).removeprefix("torch.")
    planned = weight_bytes(folder, width, load_in_4bit="load_in_4bit=true" in settings)
    taken = torch.cuda.memory_allocated()
    check.put(f"{name}: weights", taken / 1e9, "GB")
    check.put(f"{name}: weights beside the plan", taken / planned, "x", low=_PLAN[0], high=_PLAN[1])
    return backend


def _warm(bench: _Bench) -> None:
    """Once, before anything counts: kernels are chosen, workspaces are made."""
    list(bench.backend.generate(_requests(bench, 2, Sampling(max_new_tokens=4))))


def _requests(bench: _Bench, count: int, sampling: Sampling, seed: int = 0) -> list[Request]:
    return list(sized_requests(bench.backend.encoder, count, bench.size.prompt, sampling, seed))


def _answers(bench: _Bench, what: str, n: int, together: int, watch: Watch | None) -> None:
    """Answer rows in rounds as long as there is time, and tell figures."""
    size, check = bench.size, bench.check
    sampling = Sampling(n=n, temperature=0.8 * (n > 1), max_new_tokens=size.new)
    requests = _requests(bench, size.rows, sampling, seed=together)
    if watch is not None:
        watch.forget()
    found, seconds = _rounds(bench, requests, max(1, max(64, together) // n), bench.backend.generate)
    done = [one for answers in found.values() if isinstance(answers, list) for one in answers]
    name = f"{bench.name}, {what}"
    lost = sum(not isinstance(answers, list) for answers in found.values())
    check.put(f"{name}: rows lost", lost, f"of {len(found)}", high=0)
    if not done:
        return
    prompt = round(_mean([one.prompt_tokens for one in done]))
    new = _mean([float(one.tokens) for one in done])
    together = watch.rows if watch is not None else together
    floor = bench.pace.answers(bench.shape, bench.precision, Done(len(found), len(done), prompt, new, together))
    note = f"{len(found)} rows of {prompt} + {new:.0f} tokens, up to {together} together"
    check.put(f"{name}: rows", len(found) / seconds, "rows/s", note=note)
    check.put(f"{name}: new tokens", len(done) * new / seconds, "tokens/s")
    aimed = n == 1 and bench.precision.bits == 16 and together >= 64 and check.device != "cpu"
    check.put(f"{name}: seconds / floor", seconds / floor, "x", high=_MOST_OF_FLOOR if aimed else None)
    if watch is not None:
        _put_memory(bench, name, watch)
        _put_forecast(bench, name, Work(len(found), prompt, round(new), n), seconds)


def _put_memory(bench: _Bench, name: str, watch: Watch) -> None:
    """Peak memory beside the plan of the batch that was to take most."""
    batch = watch.largest()
    if bench.check.device == "cpu" or batch is None:
        bench.check.leave_out(f"{name}: peak memory beside the plan", "a CPU tells no peak")
        return
    import torch

    weights = torch.cuda.memory_allocated()
    peak, plan = weights + batch.peak, weights + batch.planned
    bench.check.put(f"{name}: peak memory", peak / 1e9, "GB", note=f"the batch took {batch.peak / 1e9:.2f} GB, planned "
                    f"{batch.planned / 1e9:.2f} GB; memory ran out {watch.ran_out} times")  # fmt: skip
    bench.check.put(f"{name}: peak memory beside the plan", peak / plan, "x", low=_PLAN[0], high=_PLAN[1])


def _put_forecast(bench: _Bench, name: str, work: Work, seconds: float) -> None:
    """What `submission.predict.capacity` would have said of a GPU with the figures of this one."""
    if bench.check.device == "cpu":
        return
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    gpu = Gpu("this", memory, bench.pace.bandwidth, bench.pace.flops, bench.pace.flops, (8, 0))
    planned = fit(Machine("this", "", gpu, 1), bench.shape, work, bench.precision)
    bench.check.put(f"{name}: seconds beside --dry-run's forecast", seconds / (60 * planned.minutes), "x",
                    note="the forecast counts loading too")  # fmt: skip


def _likelihoods(bench: _Bench) -> None:
    """Likelihoods of rewrites under candidates, as selecting among samples asks for them."""
    size, check = bench.size, bench.check
    texts = [" ".join(_words(request)) for request in _requests(bench, size.rows // 5 + 1, Sampling(max_new_tokens=1))]
    encoder = bench.backend.encoder
    each = len(encoder.encode_continuation(texts[0])) / len(texts[0].split())
    words = max(1, round(size.scored / each))
    items = [
        (f"{number}/{candidate}", render_rewrite(f"Rewrite this text in way {candidate}", text),
         " ".join(text.split()[:words]))
        for number, text in enumerate(texts) for candidate in range(size.candidates)
    ]  # fmt: skip
    found, seconds = _rounds(bench, items, 64, bench.backend.loglikelihood)
    done = [one for one in found.values() if isinstance(one, LogLikelihood)]
    name = f"{bench.name}, {size.candidates} likelihoods a row"
    check.put(f"{name}: texts lost", len(found) - len(done), f"of {len(found)}", high=0)
    if done:
        scored = _mean([float(one.tokens) for one in done])
        tokens = scored + _mean([float(one.prompt_tokens) for one in done])
        floor = bench.pace.texts(bench.shape, len(done), tokens, scored)
        check.put(f"{name}: rows", len(done) / size.candidates / seconds, "rows/s",
                  note=f"{len(done)} texts of {tokens:.0f} tokens, {scored:.0f} of them scored")  # fmt: skip
        check.put(f"{name}: seconds / floor", seconds / floor, "x")


def _words(request: Request) -> Iterator[str]:
    """The words of a request's data."""
    for message in request.chat.messages:
        for part in message.parts:
            if not part.trusted:
                yield from part.text.split()


def _rounds(
    bench: _Bench, items: Sequence[Any], together: int, ask: Callable[[list[Any]], Any]
) -> tuple[dict[str, list[Completion] | LogLikelihood | Any], float]:
    """Ask items in rounds until all are answered or the time of a measurement is over; answers, and seconds."""
    found: dict[str, Any] = {}
    pending = iter(items)
    began = time.perf_counter()
    while (some := list(islice(pending, together))) and time.perf_counter() - began < bench.seconds:
        found.update(ask(some))
    return found, time.perf_counter() - began


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
