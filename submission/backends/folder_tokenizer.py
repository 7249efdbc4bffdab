"""The tokenizer and chat template of a folder that Hugging Face's tools wrote, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from submission.backends.bounded import bounded, checked_render
from submission.backends.common import LEAST_CONTEXT
from submission.backends.plain_tokenizer import without_specials
from submission.data.files import read_json
from submission.errors import BackendError, UserError, first_line
from submission.prompts.encoding import ChatEncoder, SpecialToken, looks_like_markup, plain_layout

_BLANK = "\u2581"  # what SentencePiece writes for a blank


class FolderTokenizer:
    """The tokenizer of a tokenizer.json; see `submission.prompts.encoding.Tokenizer`.

    Args:
        folder: with tokenizer.json, and with tokenizer_config.json and generation_config.json if there are any.

    Raises:
        UserError: it has no tokenizer.json, or one that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"model {folder} has no tokenizer.json")
        self._config = read_table(folder / "tokenizer_config.json")
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
            whole = Tokenizer.from_str(json.dumps(description))
            self.specials: Mapping[str, SpecialToken] = {
                token["content"]: SpecialToken(token["id"], bool(token["lstrip"]), bool(token["rstrip"]))
                for token in description["added_tokens"]
                if token["special"] or looks_like_markup(token["content"])
            }
            self._at_start, self._inside = without_specials(description)
            first = whole.encode("x").ids[:1]
            self._by_bytes = "ByteLevel" in json.dumps(description["decoder"])
            self._literal = {token["id"]: str(token["content"]) for token in description["added_tokens"]}
            self.largest = max(whole.get_vocab(with_added_tokens=True).values())
            template = self._template(folder)
        except Exception as error:  # it may hold anything
            raise UserError(f"the tokenizer of {folder} cannot be used: {first_line(error)}") from error
        self._whole = whole
        self._special_ids = {token.id for token in self.specials.values()}
        bos = whole.token_to_id(_text(self._config.get("bos_token")))
        self.bos: int | None = bos if bos is not None and first == [bos] else None
        self.ends = self._end_tokens(folder)
        self._render = checked_render(_renderer(template, self._config)) if template else plain_layout

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._render(messages)

    def tokenize(self, text: str, *, at_start: bool) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")
        return list((self._at_start if at_start else self._inside).encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in ids).decode("utf-8", "replace")

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """The bytes of one token; those of a special token are empty unless `special`."""
        text = self._whole.id_to_token(token) or ""
        if token in self._special_ids:
            return text.encode() if special else b""
        if token in self._literal:
            return self._literal[token].encode()
        if self._by_bytes:
            return b"".join(self._bytes.get(character) or character.encode() for character in text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace(_BLANK, " ").encode()

    def ends_answer(self, token: int) -> bool:
        """True for end-of-turn, end-of-text and the like."""
        return token in self.ends

    @cached_property
    def _bytes(self) -> dict[str, bytes]:
        """The byte that each character of a byte-level vocabulary stands for (Radford et al., 2019, `encoder.py`)."""
        plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in plain]
        return {chr(byte): bytes([byte]) for byte in plain} | {
            chr(256 + number): bytes([byte]) for number, byte in enumerate(others)
        }

    def _end_tokens(self, folder: Path) -> set[int]:
        named = read_table(folder / "generation_config.json").get("eos_token_id")
        listed = named if isinstance(named, list) else [named]
        ends = {number for number in listed if isinstance(number, int)}
        eos = self._whole.token_to_id(_text(self._config.get("eos_token")))
        return ends | ({eos} if eos is not None else set())

    def _template(self, folder: Path) -> str:
        alone = folder / "chat_template.jinja"
        if alone.is_file():
            return alone.read_text(encoding="utf-8", errors="replace")
        found = self._config.get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        return found if isinstance(found, str) else ""


def folder_encoder(folder: Path, context: int, config: Mapping[str, Any]) -> tuple[ChatEncoder, FolderTokenizer]:
    """The encoder of a folder, and its tokenizer.

    Args:
        folder: of a model.
        context: tokens of a prompt and its answer; no more than the model was trained with.
        config: of the model.

    Raises:
        UserError: it was trained with fewer than a prompt takes.
    """
    tokenizer = FolderTokenizer(folder)
    trained = config.get("max_position_embeddings")
    if trained is None:
        return ChatEncoder(tokenizer, context), tokenizer
    if type(trained) is not int or trained < LEAST_CONTEXT:
        raise UserError(f"{folder / 'config.json'}: max_position_embeddings is {trained!r:.40}, which no prompt fits")
    return ChatEncoder(tokenizer, min(context, trained)), tokenizer


def _renderer(template: str, config: Mapping[str, Any]) -> Any:
    """A function that renders messages, as transformers does (`utils/chat_template_utils.py`)."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    try:
        made = bounded(lambda: environment.from_string(template), "the model's chat template")
    except BackendError as error:
        raise UserError(str(error)) from error
    names = {name: _text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return lambda messages: made.render(messages=list(messages), add_generation_prompt=True, tools=None, **names)


def read_table(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where it is missing or holds something else."""
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _text(token: Any) -> str:
    """A token's text; some files hold it with its properties."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""
