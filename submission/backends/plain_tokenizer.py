"""Tokenizers of the package tokenizers, without their special tokens: no name of one in a text is parsed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from submission.prompts.encoding import looks_like_markup


def without_specials(description: Mapping[str, Any]) -> tuple[Any, Any]:
    """Two tokenizers from the content of a tokenizer.json.

    Returns:
        one for the beginning of a prompt, and one for text behind other text, which puts no blank before it.
    """
    from tokenizers import Tokenizer

    plain = dict(description)  # the vocabulary, which is long, is not copied
    plain["pre_tokenizer"] = copy.deepcopy(plain["pre_tokenizer"])
    plain["post_processor"] = plain["truncation"] = plain["padding"] = None
    plain["added_tokens"] = [
        token for token in plain["added_tokens"] if not token["special"] and not looks_like_markup(token["content"])
    ]
    at_start = Tokenizer.from_str(json.dumps(plain))
    if not _drop_leading_blank(plain["pre_tokenizer"]):
        return at_start, at_start
    return at_start, Tokenizer.from_str(json.dumps(plain))


def _drop_leading_blank(step: Any) -> bool:
    """Metaspace with the scheme "first" marks the beginning of a text only, not what follows a token.

    Returns:
        whether there was one to change.
    """
    if not isinstance(step, dict):
        return False
    changed = step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first"
    if changed:
        step["prepend_scheme"] = "never"
    return any([changed, *map(_drop_leading_blank, step.get("pretokenizers", []))])
