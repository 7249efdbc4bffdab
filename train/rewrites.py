"""Rewrites: prompts meet texts, and the target model does what the prompts say.

    python -m train rewrites prompts.csv texts.csv -o triplets.csv

The target model is the one whose prompts are to be recovered (Gemma-7b-it in the competition). It is asked as there:
`{prompt}:\\n{text}` in its chat template.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from submission.data.tables import has_columns, read_table
from submission.errors import UserError
from submission.prompts.grammar import MadePrompt
from submission.prompts.templates import render_rewrite
from submission.types import Encoded, Failure, Request, Sampling

COLUMNS = ("id", "original_text", "rewritten_text", "rewrite_prompt", "kind", "style")
_BLOCKS = 50


@dataclass(frozen=True, slots=True)
class Length:
    """How long a rewrite may be, in tokens: in proportion to the text, within bounds."""

    factor: float = 2.0
    at_least: int = 32
    at_most: int = 512


@dataclass(frozen=True, slots=True)
class RewriteTask:
    """A text to be rewritten under a prompt."""

    id: str
    text: str
    prompt: MadePrompt


def read_prompts(path: Path) -> list[MadePrompt]:
    """Prompts of a table; kind and style are blank where it has no such columns.

    Raises:
        UserError: it cannot be read or holds no prompt.
    """
    more = [name for name in ("kind", "style") if has_columns(path, [name])]
    rows = read_table(path, ("rewrite_prompt", *more))
    found = []
    for row in rows:
        cells = dict(zip(more, row.cells[1:], strict=True))
        if row.cells[0].strip():
            found.append(MadePrompt(row.cells[0].strip(), cells.get("kind", ""), cells.get("style", "")))
    if not found:
        raise UserError(f"{path} holds no rewrite_prompt")
    return found


def pair_up(prompts: Sequence[MadePrompt], texts: Sequence[str], *, size: int = 0, seed: int = 0) -> list[RewriteTask]:
    """Give each prompt a text.

    Prompts of one style and a share of the texts form a block, and prompts meet texts of their block only: so the rows
    can be split later with no style and no text on both sides.

    Args:
        prompts: to be used once each, or again and again with other texts if `size` asks for more.
        texts: distinct ones; those of a block take turns.
        size: rows; 0 means one for each prompt.
        seed: of the pairing.

    Raises:
        UserError: there are not so many pairs within blocks.
    """
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise UserError("there is no text to rewrite")
    rng = random.Random(seed)
    styles = list(dict.fromkeys(prompt.style or prompt.text for prompt in prompts))
    rng.shuffle(styles)
    rng.shuffle(texts)
    blocks = min(_BLOCKS, len(styles), len(texts))
    block_of = {style: number % blocks for number, style in enumerate(styles)}
    shares = [texts[number::blocks] for number in range(blocks)]
    by_block: list[list[MadePrompt]] = [[] for _ in range(blocks)]
    for prompt in prompts:
        by_block[block_of[prompt.style or prompt.text]].append(prompt)
    pairs: list[tuple[MadePrompt, str]] = []
    most = max(len(share) for share in shares)
    wanted = size or len(prompts)
    for turn in range(most):
        for members, share in zip(by_block, shares, strict=True):
            if turn < len(share):
                pairs += [(prompt, share[(place + turn) % len(share)]) for place, prompt in enumerate(members)]
        if len(pairs) >= wanted:
            break
    if len(pairs) < wanted:
        raise UserError(
            f"these prompts and texts make {len(pairs)} pairs, {wanted} were asked for: add texts or prompts"
        )
    return [RewriteTask(f"r{number:06}", text, prompt) for number, (prompt, text) in enumerate(pairs[:wanted], start=1)]


def requests(
    tasks: Sequence[RewriteTask], seen: Mapping[str, Encoded | Failure], sampling: Sampling, length: Length
) -> list[Request]:
    """What the model is asked, each with a length that its text bounds.

    Args:
        tasks: texts and prompts.
        seen: each text as the model sees it, by the task's id; see `submission.calls.models.encode`.
        sampling: how rewrites are sampled.
        length: bounds.

    Raises:
        UserError: a text cannot be tokenised.
    """
    found = []
    for task in tasks:
        text = seen[task.id]
        if isinstance(text, Failure):
            raise UserError(f"the text of {task.id} cannot be tokenised: {text.reason}")
        most = max(length.at_least, min(length.at_most, text.context // 2, round(length.factor * text.tokens)))
        found.append(
            Request(task.id, render_rewrite(task.prompt.text, task.text), replace(sampling, max_new_tokens=most))
        )
    return found
