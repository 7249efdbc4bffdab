"""From a chat to the token ids that a model is fed, with data kept apart from instructions.

Two rules hold for every model and for training and inference alike:

- **Untrusted text stays text.** A row that holds `<|im_end|>` or `<start_of_turn>` gives plain characters.
  The chat template is rendered with stand-ins for the parts, special tokens are looked for in trusted text
  only, and each run of text between two of them is tokenised as a whole with special-token parsing off. So
  ids equal those of the usual way (render, then tokenise) whenever the data holds no special token.
- **Long texts are cut in their middle.** Instruction, other parts and answer header always survive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from submission.errors import BackendError
from submission.types import Chat, Message, Part

CUT_MARK = " [...] "
"""Stands where the middle of a text was left out."""

_LEAST_PROMPT = 64  # tokens below which no prompt makes sense

_MARKUP = re.compile(r"[<\[].*\w.*[>\]]|.*<\|.*\|>.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that trusted text may hold by name. `lstrip`/`rstrip`: it swallows blanks beside it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer(Protocol):
    """What a backend's tokenizer must offer; `ChatEncoder` does the rest."""

    specials: Mapping[str, SpecialToken]
    """The special tokens by their text. None may come from data; with special-token parsing off a tokenizer may
    still find them: user-defined ones always, others where merges or a unigram vocabulary lead to them."""

    bos: int | None
    """The id that every prompt begins with, if the model wants one."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Apply the model's chat template, with the header of the answer at the end."""
        ...

    def tokenize(self, text: str, *, at_start: bool) -> list[int]:
        """Token ids of plain text, special-token parsing off. `at_start`: nothing stands before it."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """The ids to feed, and whether texts were cut to make them fit."""

    ids: tuple[int, ...]
    truncated: bool


class ChatEncoder:
    """Encodes chats for one tokenizer.

    Args:
        tokenizer: of the model.
        context: tokens that a prompt and its answer may have together.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, chat: Chat, max_tokens: int) -> EncodedPrompt:
        """Token ids of at most `max_tokens`; untrusted parts are cut in their middle where needed.

        The parts of the last message are cut first, longest first: the messages before it (instruction,
        shots) are the same for every row and stay the same.

        Raises:
            BackendError: even without its texts the prompt is too long.
        """
        chat, cut = _shorten(chat, max_chars=16 * max_tokens)
        ids = self._encode(chat)
        if len(ids) <= max_tokens:
            return EncodedPrompt(tuple(ids), cut)
        for last_only in (True, False):
            for _ in range(8):  # each round aims lower; characters per token differ within a text
                over = len(ids) - max_tokens
                chat = self._cut(chat, over, last_only=last_only)
                ids = self._encode(chat)
                if len(ids) <= max_tokens:
                    return EncodedPrompt(tuple(ids), truncated=True)
                if len(ids) - max_tokens >= over:
                    break
        raise BackendError(
            f"the prompt needs {len(ids)} tokens even with its texts cut, {max_tokens} fit: raise the context "
            "size or give fewer shots"
        )

    def encode_for(self, chat: Chat, new_tokens: int) -> EncodedPrompt:
        """Token ids that leave room for an answer of `new_tokens` in the context; see `encode`.

        Raises:
            BackendError: there is no room for a prompt.
        """
        room = self.context - new_tokens
        if room < _LEAST_PROMPT:
            raise BackendError(f"{new_tokens} new tokens leave no room for a prompt: the context has {self.context}")
        return self.encode(chat, room)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of untrusted text that follows the answer header (or the forced prefix)."""
        return self._tokenize_run([Part(text, trusted=False)], at_start=False)

    def encode_scored(self, chat: Chat, continuation: str) -> tuple[list[int], int]:
        """Token ids of a chat and its continuation, and the index at which the continuation begins.

        Raises:
            BackendError: there is no room for a prompt.
        """
        ids = self.encode_continuation(continuation)
        prompt = self.encode_for(chat, len(ids)).ids
        return [*prompt, *ids], len(prompt)

    def text(self, ids: Sequence[int]) -> str:
        """The prompt as the model sees it, special tokens spelled out."""
        return self.tokenizer.detokenize(ids)

    def _encode(self, chat: Chat) -> list[int]:
        ids: list[int] = []
        run: list[Part] = []
        swallow = False  # the special token before takes the blanks that follow

        def flush() -> None:
            if run:
                ids.extend(self._tokenize_run(run, at_start=not ids))
                run.clear()

        for part in self._segments(chat):
            if not part.trusted or self._special is None:
                run.append(part)
                swallow = False
                continue
            position = 0
            for match in [*self._special.finditer(part.text), None]:
                text = part.text[position : match.start() if match else None]
                special = self.tokenizer.specials[match.group()] if match else None
                text = text.lstrip() if swallow else text
                text = text.rstrip() if special and special.lstrip else text
                if text:
                    run.append(Part(text))
                    swallow = False
                if match and special:
                    flush()
                    ids.append(special.id)
                    swallow = special.rstrip
                    position = match.end()
        flush()
        bos = self.tokenizer.bos
        return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids

    def _segments(self, chat: Chat) -> list[Part]:
        """The rendered chat as trusted and untrusted stretches of text, in order."""
        parts: list[Part] = []

        def stand_in(part: Part) -> str:
            if part.trusted:
                return part.text
            parts.append(part)
            # Private-use characters: chat templates strip blanks and compare roles, they leave these be.
            return f"\ue000{len(parts) - 1}\ue001"

        rendered = self.tokenizer.render(
            [{"role": message.role, "content": "".join(map(stand_in, message.parts))} for message in chat.messages]
        )
        pieces = re.split("\ue000(\\d+)\ue001", rendered + chat.prefix)
        texts = [parts[int(piece)] if number % 2 else Part(piece) for number, piece in enumerate(pieces)]
        return [part for part in texts if part.text]

    def _tokenize_run(self, run: Sequence[Part], *, at_start: bool) -> list[int]:
        """Tokenise neighbouring parts as one text; names of special tokens in untrusted parts are broken in two."""
        text = "".join(part.text for part in run)
        if self._special is None or not any(self._special.search(part.text) for part in run if not part.trusted):
            return self.tokenizer.tokenize(text, at_start=at_start)
        cuts: list[int] = []
        start = 0
        for part in run:
            if not part.trusted:
                cuts += [start + match.start() + 1 for match in self._special.finditer(part.text)]
            start += len(part.text)
        ids: list[int] = []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._tokenize_piece(text[begin:end], at_start=at_start and begin == 0, inside=begin > 0)
        return ids

    def _tokenize_piece(self, text: str, *, at_start: bool, inside: bool) -> list[int]:
        if inside:
            # Some tokenizers put a blank before any text; behind a line break, which merges with nothing
            # here, the piece is tokenised as what it is: the middle of a text.
            anchor = self.tokenizer.tokenize("\n", at_start=False)
            anchored = self.tokenizer.tokenize("\n" + text, at_start=False)
            if anchored[: len(anchor)] == anchor:
                return anchored[len(anchor) :]
        return self.tokenizer.tokenize(text, at_start=at_start)

    def _cut(self, chat: Chat, tokens: int, *, last_only: bool) -> Chat:
        """Take about `tokens` tokens out of the middles of the untrusted parts, longest first."""
        first = len(chat.messages) - 1 if last_only else 0
        lengths = {
            (m, p): (len(part.text), len(self.tokenizer.tokenize(part.text, at_start=False)))
            for m, message in enumerate(chat.messages)
            for p, part in enumerate(message.parts)
            if m >= first and not part.trusted and part.text
        }
        keep = _water_fill({key: count for key, (_, count) in lengths.items()}, tokens)
        limits = {
            key: max(0, chars * keep[key] // count - len(CUT_MARK))
            for key, (chars, count) in lengths.items()
            if keep[key] < count
        }
        return _with_parts(chat, limits)


def cut_middle(text: str, max_chars: int) -> str:
    """Keep the beginning and the end of a text that is longer than `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    tail = max_chars // 2
    return text[: max_chars - tail].rstrip() + CUT_MARK + text[len(text) - tail :].lstrip()


def plain_layout(messages: Sequence[Mapping[str, str]]) -> str:
    """What a base model, which has no chat template, is fed: nothing but the texts."""
    return "\n\n".join(message["content"] for message in messages) + "\n\n"


def looks_like_markup(token: str) -> bool:
    """True for tokens such as `<start_of_turn>` or `[INST]`: nothing that plain text needs as one token."""
    return len(token) > 2 and _MARKUP.fullmatch(token) is not None


def _shorten(chat: Chat, max_chars: int) -> tuple[Chat, bool]:
    """Cut untrusted parts that are hopelessly long, so that a megabyte row is not tokenised whole."""
    limits = {
        (m, p): max_chars
        for m, message in enumerate(chat.messages)
        for p, part in enumerate(message.parts)
        if not part.trusted and len(part.text) > max_chars
    }
    return (_with_parts(chat, limits), True) if limits else (chat, False)


def _with_parts(chat: Chat, limits: Mapping[tuple[int, int], int]) -> Chat:
    def cut(m: int, p: int, part: Part) -> Part:
        limit = limits.get((m, p))
        return part if limit is None else replace(part, text=cut_middle(part.text, limit))

    messages = tuple(
        Message(message.role, tuple(cut(m, p, part) for p, part in enumerate(message.parts)))
        for m, message in enumerate(chat.messages)
    )
    return replace(chat, messages=messages)


def _water_fill(lengths: Mapping[tuple[int, int], int], excess: int) -> dict[tuple[int, int], int]:
    """How much of each length to keep so that `excess` goes, taken from the longest first."""
    room = max(0, sum(lengths.values()) - excess)
    keep: dict[tuple[int, int], int] = {}
    for position, (key, length) in enumerate(sorted(lengths.items(), key=lambda item: item[1])):
        keep[key] = min(length, room // (len(lengths) - position))
        room -= keep[key]
    return keep
