"""Where the client's credentials are, so that they can be kept out of everything that is shown."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

HIDDEN = "[hidden]"


def hide(text: str) -> str:
    """The text with every credential that the client could use replaced."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        if len(secret) > 3:  # anything shorter is no credential and would hide half of the text
            text = text.replace(secret, HIDDEN)
    return re.sub(r"(?i)(authorization\W+(?:basic|bearer) )[\w+/=.-]+", rf"\1{HIDDEN}", text)


def _secrets() -> Iterator[str]:
    files = [{"username": os.environ.get("KAGGLE_USERNAME", ""), "key": os.environ.get("KAGGLE_KEY", "")}]
    files += [*_all_stored("kaggle.json"), *_all_stored("credentials.json")]
    for content in files:
        yield from (content[name] for name in ("key", "access_token", "refresh_token") if name in content)
    names, keys = ({content[name] for content in files if name in content} for name in ("username", "key"))
    for name in names:  # as they stand in the header of a request
        yield from (base64.b64encode(f"{name}:{key}".encode()).decode() for key in keys if key)
    yield from access_tokens()


def access_tokens() -> list[str]:
    """The tokens that the client takes before a key, from the environment and from files."""
    given = os.environ.get("KAGGLE_API_TOKEN", "")  # the token itself, or the path of a file that holds it
    places = [folder / name for folder in _config_folders() for name in ("access_token", "access_token.txt")]
    found = [(given and _content_of(Path(given))) or given, *map(_content_of, places)]
    return [token for token in found if token]


def stored(name: str) -> dict[str, str]:
    """The texts in the first file of this name that holds a JSON object."""
    return next(iter(_all_stored(name)), {})


def _all_stored(name: str) -> list[dict[str, str]]:
    found = []
    for folder in _config_folders():
        with suppress(ValueError, RecursionError):
            content = json.loads(_content_of(folder / name))
            if isinstance(content, dict):
                found.append({key: value for key, value in content.items() if isinstance(value, str)})
    return found


def _config_folders() -> list[Path]:
    given = os.environ.get("KAGGLE_CONFIG_DIR", "")
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [*([Path(given)] if given else []), Path.home() / ".kaggle", settings / "kaggle"]


def _content_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # not there, or a token that cannot even be the name of a file
        return ""
