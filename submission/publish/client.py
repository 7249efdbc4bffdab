"""Runs the real Kaggle client in a process of its own, and says in one or two lines what went wrong.

`import kaggle` signs in, may call the server and may end the process: it never happens in ours. The exit code of the
client is no guide (an error that the server reports exits 0), so a reply carries the server's own answers as well:
the client prints them when VERBOSE is set. It prints the credentials of each request too, which are dropped before
anything else reads the text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from submission.errors import MissingExtra, PromptRecoveryError, UserError
from submission.publish.credentials import access_tokens, hide, stored

CALL_SECONDS = 120.0
"""Time for a command that moves no files."""

TRANSFER_SECONDS = 6 * 3600.0
"""Time for a command that moves files: weights have gigabytes."""

_BLOCK = re.compile(r"-+(Request|Response)-+")
_BLOCK_END = re.compile(r"-{20,}")
_TRANSFER = re.compile(r'"(?:GET|PUT) \S*?([^\s/?]+)(?:\?\S*)? HTTP/[\d.]+" ([45]\d\d)')  # without the signed query
_NOISE = re.compile(r"\s|Traceback|Warning|.*Warning: |Request failed|Starting upload|\d+%\||During handling")
_TELLING = re.compile(r"error|invalid|not valid|could not|cannot|must|unsuccessful|denied|required", re.IGNORECASE)
_NETWORK = "Look at the network (a proxy, a firewall), then run the command again."
_SETTINGS = "https://www.kaggle.com/settings/api"
_PLACES = (
    "Create Legacy API Key gives a kaggle.json for ~/.kaggle, Generate New Token a text for ~/.kaggle/access_token"
)


@dataclass(frozen=True, slots=True)
class _Step:
    """What to do about an error: known by its HTTP status or, where there is none, by words."""

    codes: str
    words: str
    advice: str
    transient: bool = False

    def fits(self, status: int, word: str) -> bool:
        """True if this step handles the error; a step without codes is matched by its words alone."""
        if status and self.codes:
            return re.fullmatch(self.codes, str(status)) is not None
        return re.search(self.words, word, re.IGNORECASE) is not None


_STEPS = (  # the first that fits counts
    _Step(
        "",
        r"session count|quota",
        "Stop a running session on kaggle.com (View Active Events), or wait until one ends or the quota renews.",
    ),
    _Step("429", r"too many requests", "Wait some minutes, then run the command again.", transient=True),
    _Step(
        "0",
        r"connection|max retries|timed? ?out|name or service|name resolution|nodename|getaddrinfo|unreachable|proxy",
        _NETWORK,
        transient=True,
    ),
    _Step("5..", r"internal error", "Kaggle has a fault: run the command again in some minutes.", transient=True),
    _Step(
        "401",
        r"authentication required|invalid credentials|unauthori[sz]ed",
        f"Make a new token at {_SETTINGS} ({_PLACES}).",
    ),
    _Step(
        "403",
        r"denied|forbidden|rules",
        "Accept the competition's rules on its page; look at the token and at the name owner/slug.",
    ),
    _Step(
        "404",
        r"not found",
        "Look at the name owner/slug; a competition must have been joined (accept its rules on its page).",
    ),
    _Step("400", r"valid|must", "Correct the metadata file: the names and values are as Kaggle's documentation asks."),
    _Step("", "", "Run the same command of kaggle by hand to see all that it says."),
)


class KaggleError(PromptRecoveryError):
    """Kaggle, or the way to it, failed: what failed, the server's word, the next step.

    Args:
        message: one or two lines; credentials in them are hidden.
        transient: whether the same command may well work later.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(hide(message))
        self.transient = transient


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One answer of the server: HTTP status and JSON object (empty if it was something else)."""

    status: int
    content: dict[str, object]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command of the client left: its text without credentials, and what the server answered.

    `refused` names the files whose transfer the server refused: the client takes no notice of that.
    """

    text: str
    exit_code: int
    answers: tuple[HttpAnswer, ...] = ()
    refused: tuple[str, ...] = ()

    def said(self, key: str) -> object:
        """The value of a key in the last answer that has it and is no refusal, or None."""
        good = [answer.content for answer in reversed(self.answers) if answer.status < 400]
        return next((content[key] for content in good if key in content), None)


def shell_line(arguments: Sequence[str]) -> str:
    """The command as a user types it."""
    return shlex.join(["kaggle", *arguments])


def run_client(arguments: Sequence[str], timeout: float = CALL_SECONDS) -> Reply:
    """Run one command of the client; whether it did what it should is for the caller to judge.

    Raises:
        MissingExtra: the client is not installed.
        KaggleError: no end within `timeout` seconds; the client is stopped.
    """
    found = importlib.util.find_spec("kaggle")
    if found is None or found.origin is None:  # a folder of that name, such as Kaggle's own /kaggle, is no package
        raise MissingExtra("Kaggle's client", "kaggle", "kaggle")
    try:
        done = subprocess.run(
            # -P: a file kaggle.py in the current folder is not the client.
            [sys.executable, "-P", "-m", "kaggle", *arguments],
            env={**os.environ, "VERBOSE": "true", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:  # it carries the output, with credentials: nobody must see its chain
        command = " ".join(arguments[:2])
        raise KaggleError(
            f"kaggle {command} failed: no answer within {timeout:g} s (time-out)\n{_NETWORK}", transient=True
        ) from None
    if "No module named 'six'" in done.stderr:  # the client forgets to ask for it
        raise MissingExtra("Kaggle's client", "six", "kaggle")
    text, answers = _without_blocks(done.stdout)
    refused = tuple(f"{name} ({status})" for name, status in _TRANSFER.findall(done.stderr))
    errors = re.sub(r"^DEBUG:.*\n?", "", done.stderr, flags=re.MULTILINE)
    return Reply(hide(f"{text}\n{errors}".strip()), done.returncode, tuple(answers), refused)


def failure(what: str, reply: Reply) -> KaggleError:
    """The error for a command that did not do what it should.

    Args:
        what: what was tried, such as "push of someone/prompt-recovery".
        reply: what came of it.
    """
    word, status = _server_word(reply), http_status(reply)
    where = f" ({status})" if status and str(status) not in word else ""
    step = _next_step(reply)
    return KaggleError(f"{what} failed: {word}{where}\n{step.advice}", transient=step.transient)


def http_status(reply: Reply) -> int:
    """The HTTP status of the last refusal, or 0."""
    told = [answer.status for answer in reply.answers if answer.status >= 400]
    named = re.search(r"\b([45]\d\d) (?:Client|Server) Error", reply.text)
    return told[-1] if told else int(named[1]) if named else 0


def configured_user() -> str:
    """The user name that goes with the credentials, which the client looks for in the same places.

    Raises:
        UserError: there are no credentials; says where they come from and where to put them.
        KaggleError: there is an access token and the server cannot be asked whose it is.
    """
    legacy = stored("kaggle.json")
    name = os.environ.get("KAGGLE_USERNAME") or legacy.get("username", "")
    if name and not access_tokens() and (os.environ.get("KAGGLE_KEY") or legacy.get("key")):
        return name
    reply = run_client(["config", "view"])
    found = re.search(r"^- username: (\S+)$", reply.text, re.MULTILINE)
    if found and found[1] != "None":
        return found[1]
    if _next_step(reply).transient:
        raise failure("asking for the user name", reply)
    raise UserError(
        "no valid credentials of Kaggle were found\n"
        f"Make a token at {_SETTINGS} ({_PLACES}), or set KAGGLE_USERNAME and KAGGLE_KEY."
    )


def _without_blocks(printed: str) -> tuple[str, list[HttpAnswer]]:
    """The text to show, and the server's answers, from what the client prints when it is verbose."""
    kept, answers = [], []
    block: list[str] | None = None
    kind = ""
    for line in printed.splitlines():
        if block is None and (begin := _BLOCK.fullmatch(line)):
            kind, block = begin[1], []
        elif block is None:
            kept.append(line)
        elif not _BLOCK_END.fullmatch(line):
            block.append(line)
        else:
            if kind == "Response":
                answers.append(_answer(block))
            block = None
    return "\n".join(kept), answers


def _answer(block: list[str]) -> HttpAnswer:
    """An answer from its lines: status, headers, a blank line, body."""
    body = "\n".join(block[block.index("") + 1 :]) if "" in block else ""
    content: object = None
    with suppress(ValueError, RecursionError):
        content = json.loads(body)
    status = int(block[0]) if block and block[0].isdigit() else 0
    return HttpAnswer(status, content if isinstance(content, dict) else {})


def _next_step(reply: Reply) -> _Step:
    status, word = http_status(reply), _server_word(reply)
    return next(step for step in _STEPS if step.fits(status, word))


def _server_word(reply: Reply) -> str:
    """What the server, or else the client, says is wrong, in one line."""
    for answer in reversed(reply.answers):
        word = answer.content.get("error") or (answer.status >= 400 and answer.content.get("message"))
        if word:
            return hide(_short(str(word)))
    lines = [line for line in reply.text.splitlines() if line.strip() and not _NOISE.match(line)]
    line = next((line for line in lines if _TELLING.search(line)), lines[0] if lines else "the client said nothing")
    cause = re.search(r"\[Errno -?\d+\] [^'\")]+", line)  # requests wraps it in two hundred characters
    return _short(cause[0] if cause else line)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 240 else f"{line[:239]}…"
