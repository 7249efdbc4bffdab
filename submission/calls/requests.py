"""Calls of a model as the log knows them: what makes two calls the same, and answers as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from submission.types import Chat, Completion, LogLikelihood, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Method = Literal["generate", "loglikelihood", "embed", "encode"]
PromptItem = tuple[str, "Chat | str", int]
"""A key, a chat that is to be shown as the model sees it, and the tokens that its answer may have; or a text."""
ScoredItem = tuple[str, Chat, str]
"""A key, a chat, and the text whose probability as its continuation is wanted."""


@dataclass(frozen=True, slots=True)
class MethodKind:
    """What is special about calls of one method.

    Attributes:
        method: of the backend.
        key: of an item.
        asked: what decides the answer beside the model, as text.
        size: the work that an item is, in characters, about.
        content: an answer and the seconds that it took, as a line of the log has them.
        parse: the answer of such a line; raises anything if it is none.
        timed: an answer with the seconds that it took.
        block: items that are dealt together: neighbours often share a beginning.
        ahead: items that a worker may have: what a backend looks at together, so that none runs dry.
    """

    method: Method
    key: Callable[[Any], str]
    asked: Callable[[Any], str]
    size: Callable[[Any], int]
    content: Callable[[Any, float], Any]
    parse: Callable[[Any], Any]
    timed: Callable[[Any, float], Any]
    block: int = 8
    ahead: int = 256

    def digest(self, model: str, item: Any, *, keyed: bool = False) -> str:
        """The digest of a call, 32 hexadecimal digits.

        Args:
            model: identity of the model.
            item: what is asked of it.
            keyed: whether the answer depends on the item's key, which it does of no real model.
        """
        text = f"{model}\0{self.method}\0{self.asked(item)}"
        if keyed:
            text += f"\0{self.key(item)}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


_ANSWER = 250  # characters of a prompt that take as long as an answer, about


def identity(marks: Mapping[str, str]) -> str:
    """A model by what decides its answers."""
    return hashlib.sha256(json.dumps(sorted(marks.items())).encode()).hexdigest()


def _chat(chat: Chat) -> list[Any]:
    parts = [[message.role, *[[part.text, part.trusted] for part in message.parts]] for message in chat.messages]
    return [parts, chat.prefix]


def _asked_generate(request: Request) -> str:
    s = request.sampling
    how: list[object] = [s.n, s.temperature, s.top_p, s.min_p, s.max_new_tokens, s.stop]
    if s.temperature > 0:  # the key and the seed choose the random stream
        how += [s.seed, request.key]
    return json.dumps([_chat(request.chat), how])


def _size(chat: Chat) -> int:
    return sum(len(part.text) for message in chat.messages for part in message.parts)


def _completions(answer: list[Completion], seconds: float) -> Any:
    return {
        "completions": [
            {"text": one.text, "logprob": one.logprob, "tokens": one.tokens, "finish_reason": one.finish_reason,
             "prompt_tokens": one.prompt_tokens, "truncated": one.truncated}
            for one in answer
        ],
        "seconds": round(seconds, 6),
    }  # fmt: skip


def _parse_completions(content: Any) -> list[Completion]:
    found = []
    for one in content["completions"]:
        if one["finish_reason"] not in ("stop", "length") or type(one["truncated"]) is not bool:
            raise ValueError
        found.append(
            Completion(_text(one["text"]), _number(one["logprob"]), _count(one["tokens"]), one["finish_reason"],
                       _count(one["prompt_tokens"]), one["truncated"], _number(content["seconds"]))
        )  # fmt: skip
    if not found:
        raise ValueError
    return found


def _likelihood(answer: LogLikelihood, seconds: float) -> Any:
    return {"sum": answer.sum, "tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens,
            "seconds": round(seconds, 6)}  # fmt: skip


def _parse_likelihood(content: Any) -> LogLikelihood:
    return LogLikelihood(
        _number(content["sum"]), _count(content["tokens"]), _count(content["prompt_tokens"]),
        _number(content["seconds"]),
    )  # fmt: skip


def _vector(answer: NDArray[np.float32], seconds: float) -> Any:
    del seconds
    return {"vector": base64.b64encode(answer.astype("<f4").tobytes()).decode("ascii")}


def _parse_vector(content: Any) -> NDArray[np.float32]:
    import numpy as np

    found = np.frombuffer(base64.b64decode(_text(content["vector"]), validate=True), "<f4").astype(np.float32)
    if not len(found) or not np.isfinite(found).all():
        raise ValueError
    return found


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _timed_completions(answer: list[Completion], seconds: float) -> list[Completion]:
    return [
        Completion(one.text, one.logprob, one.tokens, one.finish_reason, one.prompt_tokens, one.truncated, seconds)
        for one in answer
    ]  # `replace` takes three times as long


def _untimed(answer: Any, seconds: float) -> Any:
    del seconds
    return answer


def _unlogged(*_: Any) -> Any:
    raise NotImplementedError("prompts are in no log")


GENERATE = MethodKind(
    "generate", lambda item: str(item.key), _asked_generate,
    lambda item: _ANSWER * item.sampling.n + _size(item.chat), _completions, _parse_completions, _timed_completions,
)  # fmt: skip
LOGLIKELIHOOD = MethodKind(
    "loglikelihood", lambda item: str(item[0]), lambda item: json.dumps([_chat(item[1]), item[2]]),
    lambda item: len(item[2]) + _size(item[1]), _likelihood, _parse_likelihood,
    lambda answer, seconds: replace(answer, seconds=seconds),
)  # fmt: skip
EMBED = MethodKind(
    "embed", lambda item: str(item[0]), lambda item: json.dumps(item[1]), lambda item: len(item[1]),
    _vector, _parse_vector, _untimed, block=128, ahead=1024,
)  # fmt: skip
ENCODE = MethodKind(
    "encode", lambda item: str(item[0]), _unlogged,
    lambda item: len(item[1]) if isinstance(item[1], str) else _size(item[1]), _unlogged, _unlogged, _untimed,
)  # fmt: skip
