"""The tokenizer and chat template that a GGUF file holds."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from submission.backends.bounded import bounded, checked_render
from submission.errors import BackendError, UserError
from submission.prompts.encoding import SpecialToken, looks_like_markup, plain_layout

# llama_token_attr in llama.h
_CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1 << 3, 1 << 4, 1 << 7, 1 << 8


class GgufTokenizer:
    """The tokenizer and chat template of a loaded model; see `submission.prompts.encoding.Tokenizer`."""

    def __init__(self, model: Any) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._model = model
        self.vocab = llama_cpp.llama_model_get_vocab(model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        special: dict[str, SpecialToken] = {}
        for token in range(self.size):
            attributes = llama_cpp.llama_vocab_get_attr(self.vocab, token)
            if not attributes & (_CONTROL | _USER_DEFINED):
                continue
            text = llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")
            if not text or not (attributes & _CONTROL or looks_like_markup(text)):
                continue
            special[text] = SpecialToken(token, bool(attributes & _LSTRIP), bool(attributes & _RSTRIP))
        self.specials: Mapping[str, SpecialToken] = special
        adds_bos = llama_cpp.llama_vocab_get_add_bos(self.vocab)
        self.bos: int | None = llama_cpp.llama_vocab_bos(self.vocab) if adds_bos else None
        chat_format = self._chat_format()
        self._render = (
            checked_render(lambda messages: str(chat_format(messages=list(messages)).prompt))
            if chat_format else plain_layout
        )  # fmt: skip

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._render(messages)

    def tokenize(self, text: str, *, at_start: bool) -> list[int]:
        del at_start  # llama.cpp puts its blank before any text that follows a special token
        content = text.encode("utf-8", "replace")
        room = len(content) + 8
        while True:
            buffer = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self.vocab, content, len(content), buffer, room, False, False)
            if count >= 0:
                return list(buffer[:count])
            room = -count

    def detokenize(self, ids: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in ids).decode("utf-8", "replace")

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """The bytes of one token; those of a special token are empty unless `special`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = self._lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def ends_answer(self, token: int) -> bool:
        """True for end-of-turn, end-of-text and the like."""
        return bool(self._lib.llama_vocab_is_eog(self.vocab, token))

    def _chat_format(self) -> Any:
        template = self._lib.llama_model_chat_template(self._model, None)
        if not template:
            return None
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def text_of(token: int) -> str:
            return self._lib.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace") if token >= 0 else ""

        def make() -> Any:
            return Jinja2ChatFormatter(
                template=template.decode("utf-8", "replace"),
                eos_token=text_of(self._lib.llama_vocab_eos(self.vocab)),
                bos_token=text_of(self._lib.llama_vocab_bos(self.vocab)),
            )

        try:
            return bounded(make, "the model's chat template")
        except BackendError as error:
            raise UserError(str(error)) from error
