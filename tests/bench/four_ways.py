"""Slow proof: a tuned model answers alike as adapter and merged, in transformers and in llama.cpp.

    python -m train run train/recipes/embedded.toml --set output=runs/embedded
    python -m tests.bench.four_ways runs/embedded PAIRS.csv --rows 40

The base is converted to an F16 file for the fourth way. Where a way's answer parts from the first one's, the
log-probabilities of the two tokens at that place are compared between the ways.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from submission.backends import ModelSpec, model_spec
from submission.backends.models import template_of
from submission.backends.transformers.loading import load_tokenizer, stay_offline_and_quiet
from submission.data.tables import read_pairs
from submission.prompts.templates import get_template
from submission.types import Chat, Request, Sampling
from tests.conftest import generated, scored
from train.bases import base_folder
from train.converter import find_converter
from train.gguf import ADAPTER, Gguf, make_gguf
from train.merge import named_base

FIRST = "transformers, base and adapter"


@dataclass(frozen=True)
class Parted:
    """A row whose answers differ; `apart` is the largest difference of a token's log-probability, nats."""

    id: str
    ours: str
    theirs: str
    apart: float


def ways(run: Path, base: Path, base_gguf: Path) -> dict[str, ModelSpec]:
    """The four ways to predict with what `train run` has written to a folder."""
    adapter = run / "sft" / "adapter"
    return {
        FIRST: model_spec("transformers", str(base), adapter),
        "transformers, merged": model_spec("transformers", str(run / "merged")),
        "llama_cpp, merged F16": model_spec("llama_cpp", str(run / Gguf.file("F16"))),
        "llama_cpp, base F16 and adapter": model_spec("llama_cpp", str(base_gguf), run / ADAPTER),
    }


def answers(spec: ModelSpec, chats: Mapping[str, Chat], sampling: Sampling) -> dict[str, str]:
    """Greedy answers by id."""
    requests = (Request(key, chat, sampling) for key, chat in chats.items())
    return {key: completions[0].text for key, completions in generated(spec.load(), requests).items()}


def log_probabilities(spec: ModelSpec, asked: Mapping[str, tuple[Chat, str, Sequence[str]]]) -> dict[str, list[float]]:
    """By key, log P(token | chat, beginning) of each token, all given as text."""
    items = [(f"{key} {n}", chat, begin + token) for key, (chat, begin, tokens) in asked.items()
             for n, token in enumerate(["", *tokens])]  # fmt: skip
    # A beginning of no tokens has a probability of one.
    found = {key: value.sum for key, value in scored(spec.load(), (i for i in items if i[2])).items()}
    return {
        key: [found[f"{key} {n}"] - found.get(f"{key} 0", 0.0) for n in range(1, len(tokens) + 1)]
        for key, (_, _, tokens) in asked.items()
    }


def main() -> int:
    """Print how many rows are answered alike; 1 if too few are, or answers part where tokens were not level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of `train run`")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    asked = parser.parse_args()
    stay_offline_and_quiet()
    adapter = asked.run / "sft" / "adapter"
    template = get_template(template_of(adapter))
    base = base_folder(named_base(adapter))
    tokenizer = load_tokenizer(base)
    chats = {pair.id: template.render(pair) for pair in read_pairs(asked.pairs)[: asked.rows]}
    sampling = Sampling(max_new_tokens=asked.max_new_tokens)
    good = True
    with TemporaryDirectory() as folder:
        base_gguf = Path(folder) / "base-f16.gguf"
        make_gguf(str(base), {"F16": base_gguf}, find_converter(None))
        specs = ways(asked.run, base, base_gguf)
        given = {name: answers(spec, chats, sampling) for name, spec in specs.items()}
        for name, theirs in list(given.items())[1:]:
            parted = part(specs[FIRST], specs[name], chats, given[FIRST], theirs, tokenizer)
            equal = len(chats) - len(parted)
            apart = max((row.apart for row in parted), default=0.0)
            good &= equal >= 0.95 * len(chats) and apart <= 0.1
            print(f"{name}: {equal} of {len(chats)} answers are those of {FIRST}; apart where not: {apart:.3f} nats")
            for row in parted:
                print(f"  {row.id}: {row.apart:.3f}\n    {row.ours}\n    {row.theirs}")
    return 0 if good else 1


def part(
    first: ModelSpec, second: ModelSpec, chats: Mapping[str, Chat], ours: Mapping[str, str], theirs: Mapping[str, str],
    tokenizer: Any,
) -> list[Parted]:  # fmt: skip
    """The rows that two ways answer differently."""
    asked: dict[str, tuple[Chat, str, Sequence[str]]] = {}
    for key, chat in chats.items():
        if ours[key] != theirs[key]:
            begin, tokens = first_difference(ours[key], theirs[key], tokenizer)
            asked[key] = (chat, begin, tokens)
    if not asked:
        return []
    left, right = log_probabilities(first, asked), log_probabilities(second, asked)
    return [
        Parted(key, ours[key], theirs[key], max(abs(a - b) for a, b in zip(left[key], right[key], strict=True)))
        for key in asked
    ]


def first_difference(a: str, b: str, tokenizer: Any) -> tuple[str, list[str]]:
    """What two answers have in common at their beginning, and the token that comes next in each that goes on."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (a, b)]
    place = next(n for n, (left, right) in enumerate(zip_longest(*ids)) if left != right)
    decode = tokenizer.decode
    begin = decode(ids[0][:place])
    return begin, [decode(row[: place + 1])[len(begin) :] for row in ids if len(row) > place]


if __name__ == "__main__":
    raise SystemExit(main())
