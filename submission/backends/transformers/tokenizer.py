"""A transformers tokenizer as this project wants it: data never becomes a special token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from submission.backends.bounded import checked_render
from submission.backends.plain_tokenizer import without_specials
from submission.errors import MissingExtra, UserError, first_line
from submission.prompts.encoding import SpecialToken, looks_like_markup, plain_layout


class HfTokenizer:
    """A transformers tokenizer; see `submission.prompts.encoding.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self.hf = tokenizer
        try:
            added = tokenizer.added_tokens_decoder
            self.specials: Mapping[str, SpecialToken] = {
                token.content: SpecialToken(number, token.lstrip, token.rstrip)
                for number, token in added.items()
                if token.special or looks_like_markup(token.content)
            }
            self._at_start, self._inside = _plain(tokenizer)
            first = tokenizer("x").input_ids[:1]
        except UserError:
            raise
        except Exception as error:  # its files hold values of wrong types, which are met only here
            name = getattr(tokenizer, "name_or_path", "")
            raise UserError(f"the tokenizer of {name} cannot be used: {first_line(error)}") from error
        self.bos: int | None = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        self._render = checked_render(self._apply_template) if tokenizer.chat_template else plain_layout

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._render(messages)

    def _apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return str(self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def tokenize(self, text: str, *, at_start: bool) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")
        encoder = self._at_start if at_start else self._inside
        return list(encoder.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add behind a prompt: the blank of a first word is kept, special tokens go."""
        special = {token.id for token in self.specials.values()}
        anchor = list(prompt[-4:])
        before = self.detokenize(anchor)
        return self.detokenize([*anchor, *(token for token in ids if token not in special)])[len(before) :]


def _plain(tokenizer: Any) -> tuple[Any, Any]:
    """See `submission.backends.plain_tokenizer.without_specials`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MissingExtra("this tokenizer", "tokenizers", "hf")
    return without_specials(json.loads(backend.to_str()))
