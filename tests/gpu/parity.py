"""Whether every precision says what float32 on the CPU says, and rows the same beside others as alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from submission.prompts.templates import get_template, render_rewrite
from submission.types import Backend, Completion, LogLikelihood, Request, Sampling
from tests.gpu.models import example_pairs, load, parity_model, release
from tests.gpu.needs import missing
from tests.gpu.report import Check

_FLOAT32, _BFLOAT16 = 1e-3, 0.02  # nats a token


@dataclass(frozen=True, slots=True)
class _Precision:
    """A way of loading: limits are nats a token between likelihoods; None where the precision itself decides."""

    name: str
    device: str
    settings: tuple[str, ...]
    limit: float | None = None

    @property
    def exact(self) -> bool:
        return self.settings == ("dtype=float32",)


@dataclass(frozen=True, slots=True)
class _Asked:
    greedy: list[Request]
    samples: list[Request]
    scored: list[tuple[str, Any, str]]


def run(check: Check) -> None:
    """Load the model in each precision, and put it beside float32 on the CPU."""
    folder, what = parity_model(check)
    check.put("model", what)
    asked = _questions(4, 200) if check.small else _questions(12, 800)
    reference = load(folder, "cpu", "dtype=float32")
    likelihoods, greedy = _scores(reference, asked.scored), _texts(reference, asked.greedy)
    _inside(check, _Precision("CPU float32", "cpu", ("dtype=float32",)), reference, asked)
    del reference
    for one in _precisions(check):
        if "load_in_4bit=true" in one.settings and missing(["bitsandbytes"]):
            check.leave_out(one.name, "not installed: bitsandbytes")
            continue
        backend = load(folder, one.device, *one.settings)
        _beside(check, one, likelihoods, _scores(backend, asked.scored), greedy, _texts(backend, asked.greedy))
        _inside(check, one, backend, asked)
        del backend
        release()


def _precisions(check: Check) -> list[_Precision]:
    on_cpu = [_Precision("CPU bfloat16", "cpu", ("dtype=bfloat16",), _BFLOAT16)]
    if check.device == "cpu":
        return [*on_cpu, _Precision("CPU nf4", "cpu", ("dtype=float32", "load_in_4bit=true"))]
    import torch

    widths = ["float32", "float16"]
    if torch.cuda.is_bf16_supported(including_emulation=False):
        widths.insert(1, "bfloat16")
    else:
        check.leave_out("GPU bfloat16", "this GPU has no units for it")
    limits = {"float32": _FLOAT32, "bfloat16": _BFLOAT16, "float16": _BFLOAT16}
    on_gpu = [_Precision(f"GPU {width}", "cuda", (f"dtype={width}",), limits[width]) for width in widths]
    return [*on_gpu, _Precision("GPU nf4", "cuda", ("load_in_4bit=true",)), *on_cpu]


def _questions(count: int, characters: int) -> _Asked:
    """Of so many example pairs, their texts cut to a length."""
    pairs = [replace(p, original_text=p.original_text[:characters], rewritten_text=p.rewritten_text[:characters])
             for p in example_pairs()[:count]]  # fmt: skip
    template = get_template("short")

    def requests(sampling: Sampling) -> list[Request]:
        return [Request(pair.id, template.render(pair), sampling) for pair in pairs]

    drawn = Sampling(n=4, temperature=0.8, top_p=0.95, max_new_tokens=12, seed=7)
    scored = [(pair.id, render_rewrite("Rewrite this as a poem", pair.original_text), pair.rewritten_text)
              for pair in pairs]  # fmt: skip
    return _Asked(requests(Sampling(max_new_tokens=24)), requests(drawn), scored)


def _beside(
    check: Check, one: _Precision, likelihoods: dict[str, float], found: dict[str, float],
    greedy: dict[str, list[str]], answers: dict[str, list[str]],
) -> None:  # fmt: skip
    """The figures of one precision beside the reference's."""
    gaps = [abs(found[key] - likelihoods[key]) for key in likelihoods]
    mean = sum(gaps) / len(gaps)
    check.put(f"{one.name}: likelihoods beside CPU float32, mean", mean, "nats/token", high=one.limit)
    # Of float32 every text is to agree; of less, one text of a few tokens may be off by more than all are.
    check.put(f"{one.name}: likelihoods beside CPU float32, largest", max(gaps), "nats/token",
              high=one.limit if one.exact else None)  # fmt: skip
    check.put(f"{one.name}: greedy answers of CPU float32", _share(greedy, answers), "of 1",
              low=0.9 if one.exact else None)  # fmt: skip


def _inside(check: Check, one: _Precision, backend: Any, asked: _Asked) -> None:
    """Whether what a row says depends on the rows beside it."""
    least, limit = (0.9, _FLOAT32) if one.exact else (None, None)
    together = dict(_complete(backend, asked.greedy))
    alone = {request.key: dict(_complete(backend, [request]))[request.key] for request in asked.greedy[:8]}
    check.put(f"{one.name}: greedy answers alone as in a batch", _equal(alone, together), "of 1", low=least)
    gap = max(abs(alone[key][0].logprob - together[key][0].logprob) / alone[key][0].tokens for key in alone
              if alone[key][0].text == together[key][0].text) if _equal(alone, together) else float("inf")  # fmt: skip
    check.put(f"{one.name}: log-probability of equal answers, alone beside batch", gap, "nats/token", high=limit)
    scores = _scores(backend, asked.scored)
    lone = {item[0]: _scores(backend, [item])[item[0]] for item in asked.scored[:8]}
    gap = max(abs(lone[key] - scores[key]) for key in lone)
    check.put(f"{one.name}: likelihoods alone beside batch, largest", gap, "nats/token", high=limit)
    _without_sharing(check, one, backend, asked, together)
    drawn = dict(_complete(backend, asked.samples))
    lone_samples = {r.key: dict(_complete(backend, [r]))[r.key] for r in asked.samples[:4]}
    check.put(f"{one.name}: same seed, same samples beside other rows", _equal(lone_samples, drawn), "of 1", low=least)


def _without_sharing(
    check: Check, one: _Precision, backend: Any, asked: _Asked, together: dict[str, list[Completion]]
) -> None:
    """Answers and likelihoods with every beginning computed anew."""
    scores = _scores(backend, asked.scored)
    prefixes = backend._generator._prefixes
    below, prefixes._below = prefixes._below, 0.0
    try:
        anew, again = dict(_complete(backend, asked.greedy)), _scores(backend, asked.scored)
    finally:
        prefixes._below = below
    check.put(f"{one.name}: greedy answers with and without shared beginnings", _equal(anew, together), "of 1",
              low=0.9 if one.exact else None)  # fmt: skip
    check.put(f"{one.name}: likelihoods with and without them, largest", max(abs(again[k] - scores[k]) for k in scores),
              "nats/token", high=_FLOAT32 if one.exact else None)  # fmt: skip


def _complete(backend: Backend, requests: Sequence[Request]) -> list[tuple[str, list[Completion]]]:
    found = dict(backend.generate(requests))
    failed = {key: one for key, one in found.items() if not isinstance(one, list)}
    if failed:
        raise RuntimeError(f"rows failed: {failed}")
    return [(key, one) for key, one in found.items() if isinstance(one, list)]


def _texts(backend: Backend, requests: Sequence[Request]) -> dict[str, list[str]]:
    return {key: [one.text for one in answers] for key, answers in _complete(backend, requests)}


def _scores(backend: Backend, items: Sequence[tuple[str, Any, str]]) -> dict[str, float]:
    """Nats a token, by key."""
    found = dict(backend.loglikelihood(items))
    failed = {key: one for key, one in found.items() if not isinstance(one, LogLikelihood)}
    if failed:
        raise RuntimeError(f"texts failed: {failed}")
    return {key: one.per_token for key, one in found.items() if isinstance(one, LogLikelihood)}


def _equal(some: dict[str, list[Completion]], others: dict[str, list[Completion]]) -> float:
    """The share of rows whose texts are equal, of those in `some`."""
    return _share(
        {k: [c.text for c in v] for k, v in some.items()}, {k: [c.text for c in v] for k, v in others.items()}
    )


def _share(some: dict[str, list[str]], others: dict[str, list[str]]) -> float:
    return sum(others[key] == texts for key, texts in some.items()) / len(some)
