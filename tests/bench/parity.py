"""Slow proof: greedy answers in a batch against those of one row at a time.

    python -m tests.bench.parity PAIRS.csv --rows 100

Kernels round by the shape of a batch, so answers may part where two tokens are level. For every row whose answers
differ, the logits of the two tokens at the first difference are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from submission.backends import model_spec
from submission.backends.llama.backend import LlamaCpp
from submission.backends.schedule import Prompt, Text
from submission.data.tables import read_pairs
from submission.prompts.templates import get_template
from submission.types import Request, Sampling


@dataclass(frozen=True)
class Parity:
    """How many of `rows` have `equal` answers, and the largest difference of logits where answers part."""

    rows: int
    equal: int
    largest_gap: float


class _Tokens:
    """Greedy answers as token ids, by number of the request."""

    def __init__(self, backend: LlamaCpp) -> None:
        self._backend = backend

    def begin(self, prompt: Prompt, number: int) -> tuple[int, int, list[int]]:
        return prompt.payload, prompt.new_tokens, []

    def extend(self, states: Sequence[tuple[int, int, list[int]]], logits: NDArray[np.float32]) -> list[int | None]:
        drawn: list[int | None] = []
        for (_, most, tokens), row in zip(states, logits, strict=True):
            tokens.append(int(row.argmax()))
            ended = self._backend.tokenizer.ends_answer(tokens[-1]) or len(tokens) == most
            drawn.append(None if ended else tokens[-1])
        return drawn


def compare_greedy(backend: LlamaCpp, requests: Sequence[Request]) -> Parity:
    """Answer all requests together and one by one; see `Parity`."""
    prompts = []
    for number, request in enumerate(requests):
        encoded = backend.encoder.encode_for(request.chat, request.sampling.max_new_tokens)
        prompts.append((number, np.array(encoded.ids, np.int32), request.sampling.max_new_tokens))
    scheduler, answers = backend._scheduler, _Tokens(backend)

    def run(which: Sequence[tuple[int, NDArray[np.int32], int]]) -> dict[int, list[int]]:
        made = (Prompt(ids, most, payload=number) for number, ids, most in which)
        return {number: tokens for number, _, tokens in scheduler.generate(made, answers)}

    together = run(prompts)
    gaps = []
    for prompt in prompts:
        number, ids, _ = prompt
        alone = run([prompt])[number]
        if alone == together[number]:
            continue
        place = next(i for i, (a, b) in enumerate(zip(alone, together[number], strict=False)) if a != b)
        ends = (alone[place], together[number][place])
        texts = [Text(np.array([*ids, *alone[:place], end], np.int32), len(ids) + place, end) for end in ends]
        scores = [text.total for text in scheduler.score(texts, backend._drawer.log_probabilities)]
        gaps.append(abs(scores[0] - scores[1]))  # of log-probabilities, which is that of the logits
    return Parity(len(prompts), len(prompts) - len(gaps), max(gaps, default=0.0))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    backend = model_spec("llama_cpp", arguments.model).load()
    assert isinstance(backend, LlamaCpp)
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    template = get_template("short")
    pairs = read_pairs(arguments.pairs)[: arguments.rows]
    print(compare_greedy(backend, [Request(pair.id, template.render(pair), sampling) for pair in pairs]))


if __name__ == "__main__":
    main()
