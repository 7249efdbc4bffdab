"""Slow proof: greedy answers in a batch against those of one row at a time, or against another backend's.

    python -m tests.bench.parity PAIRS.csv --rows 100
    python -m tests.bench.parity PAIRS.csv --rows 100 --against transformers --dtype float32

Kernels round by the shape of a batch, so answers may part where two tokens are level. For every row whose answers
differ, the log-probabilities of both answers are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from submission.backends import model_spec
from submission.data.tables import read_pairs
from submission.prompts.templates import get_template
from submission.types import Backend, Request, Sampling
from tests.conftest import generated, scored


@dataclass(frozen=True)
class Parity:
    """How many of `rows` have `equal` answers, and the largest difference of log-probability a token where
    answers part.
    """

    rows: int
    equal: int
    largest_gap: float


def compare_greedy(backend: Backend, requests: Sequence[Request]) -> Parity:
    """Answer all requests together and one by one; see `Parity`."""
    alone: dict[str, str] = {}
    for request in requests:
        ((answer,),) = generated(backend, [request]).values()
        alone[request.key] = answer.text
    return _compare(backend, requests, alone)


def compare_backends(backend: Backend, other: Backend, requests: Sequence[Request]) -> Parity:
    """Answer all requests with both; see `Parity`."""
    return _compare(backend, requests, {key: one.text for key, (one,) in generated(other, requests).items()})


def _compare(backend: Backend, requests: Sequence[Request], others: Mapping[str, str]) -> Parity:
    together = {key: one.text for key, (one,) in generated(backend, requests).items()}
    gaps = []
    for request in requests:
        texts = (others[request.key], together[request.key])
        if texts[0] != texts[1]:
            found = scored(backend, [(str(number), request.chat, text) for number, text in enumerate(texts)])
            gaps.append(abs(found["0"].per_token - found["1"].per_token))
    return Parity(len(requests), len(requests) - len(gaps), max(gaps, default=0.0))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--dtype", default="", help="of the arithmetic; default: what is fastest here")
    parser.add_argument("--against", default="", help="another backend, in float32")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    settings = [f"dtype={arguments.dtype}"] if arguments.dtype else None
    backend = model_spec(arguments.backend, arguments.model, settings=settings).load()
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    template = get_template("short")
    pairs = read_pairs(arguments.pairs)[: arguments.rows]
    requests = [Request(pair.id, template.render(pair), sampling) for pair in pairs]
    if arguments.against:
        other = model_spec(arguments.against, arguments.model).load()
        print(compare_backends(backend, other, requests))
    else:
        print(compare_greedy(backend, requests))


if __name__ == "__main__":
    main()
