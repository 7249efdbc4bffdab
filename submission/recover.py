"""Ways of predicting: a constant prompt, a model asked with or without examples, or one of your own.

    python -m submission predict test.csv -o submission.csv --recover constant
    python -m submission predict test.csv -o submission.csv --recover mymodule:MyRecover --recover-config my.toml

`module:object` names either a function `(pairs, budget) -> Iterator[Prediction]` or a class that is made
with a `Setup` and whose instances are called so. A class attribute `uses_model = False` (or a function's)
says that no model is needed. An attribute `fingerprint`, called with the content of `--recover-config`, adds to
what a run must have in common with the one that it resumes, such as the content of files named there.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from submission.answers import is_blank
from submission.config import from_mapping
from submission.errors import PromptRecoveryError, UserError, first_line, is_stop
from submission.hashing import content_hash
from submission.templates import Template
from submission.types import Backend, Budget, Pair, Prediction, Recover, Request, Sampling, Triplet

DEFAULT_PROMPT = "Please rewrite this text in a different tone and style while keeping its original meaning."
"""The answer when there is no better one: a plain sentence near many rewrite prompts."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a way of predicting is made from.

    Attributes:
        load_backend: loads the model on the first call and returns the same one after that.
        template: layout of the prompts.
        shots: solved examples.
        sampling: how answers are drawn.
        config: the content of `--recover-config`.
    """

    load_backend: Callable[[], Backend]
    template: Template
    shots: Sequence[Triplet] = ()
    sampling: Sampling = Sampling()
    config: Mapping[str, Any] = field(default_factory=dict)


class Ask:
    """Asks the model once per pair, behind the examples if there are any: zero-shot and few-shot."""

    uses_model = True

    def __init__(self, setup: Setup) -> None:
        from_mapping(_NoOptions, setup.config, "recover zero_shot and few_shot")
        self._backend = setup.load_backend()
        self._setup = setup

    def __call__(self, pairs: Iterable[Pair], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        return self.behind(((pair, self._setup.shots) for pair in pairs), budget)

    def behind(self, shown: Iterable[tuple[Pair, Sequence[Triplet]]], budget: Budget) -> Iterator[Prediction]:
        """Answer pairs, each behind examples of its own."""
        del budget  # the driver stops when it is spent
        template, sampling = self._setup.template, self._setup.sampling
        requests = (Request(pair.id, template.render(pair, shots), sampling) for pair, shots in shown)
        for key, completions in self._backend.generate(requests):
            completion = completions[0]
            text = template.parse(completion.text)
            blank = is_blank(text)
            yield Prediction(
                id=key,
                text="" if blank else text,
                status="failed" if blank else "ok",
                reason="empty answer" if blank else "",
                raw=completion.text,
                prompt_tokens=completion.prompt_tokens,
                truncated=completion.truncated,
            )


class Constant:
    """The same prompt for every pair: the floor that anything else must beat."""

    uses_model = False

    def __init__(self, setup: Setup) -> None:
        self._prompt = from_mapping(_ConstantOptions, setup.config, "recover constant").prompt
        if is_blank(self._prompt):
            raise UserError(f"option prompt={self._prompt!r} for recover constant is blank or reads as null")

    def __call__(self, pairs: Iterable[Pair], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        del budget
        for pair in pairs:
            yield Prediction(pair.id, self._prompt)


@dataclass(frozen=True, slots=True)
class _NoOptions:
    pass


@dataclass(frozen=True, slots=True)
class _ConstantOptions:
    prompt: str = DEFAULT_PROMPT


_ROOMS = ("submission", "eval", "train", "ensemble", "tests", "examples", "docs")  # of this project's checkout
RECOVERS: dict[str, Callable[[Setup], Recover]] = {"zero_shot": Ask, "few_shot": Ask, "constant": Constant}


Fingerprint = Callable[[Mapping[str, Any]], Mapping[str, str]]


def _nothing_more(_: Mapping[str, Any]) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class RecoverSource:
    """A way of predicting that was found by its name and can be made."""

    name: str
    make: Callable[[Setup], Recover]
    uses_model: bool
    fingerprint: Fingerprint = _nothing_more


def find_recover(name: str) -> RecoverSource:
    """Find a way of predicting by name or `module:object`.

    Raises:
        UserError: it is unknown, cannot be imported or cannot be called; lists what exists.
    """
    plain = name.replace("-", "_")
    if plain in RECOVERS:
        return RecoverSource(plain, RECOVERS[plain], plain != "constant")
    module_name, colon, object_name = name.partition(":")
    if not (colon and module_name and object_name):
        raise UserError(f"unknown recover {name!r}; there are: {', '.join(RECOVERS)}, or module:object of your own")
    if os.getcwd() not in sys.path:  # the installed command does not look there by itself
        sys.path.insert(0, os.getcwd())
    with _user_code(name, "the module cannot be imported"):
        module = importlib.import_module(module_name)
    found: Any = module
    with _user_code(name, "it cannot be looked at"):  # attributes may be computed
        for part in object_name.split("."):
            if not hasattr(found, part):
                raise UserError(f"recover {name}: module {module_name} has no {object_name!r}")
            found = getattr(found, part)
        if not callable(found):
            raise UserError(f"recover {name} is neither a function nor a class")
        more = cast(Fingerprint, getattr(found, "fingerprint", _nothing_more))
        uses_model = bool(getattr(found, "uses_model", True))

    def make(setup: Setup) -> Recover:
        with _user_code(name, "it cannot be made"):
            return cast(Callable[[Setup], Recover], found)(setup) if inspect.isclass(found) else cast(Recover, found)

    def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
        with _user_code(name, "its fingerprint failed"):
            return {"source": _source_hash(module), **{str(key): str(value) for key, value in more(config).items()}}

    return RecoverSource(name, make, uses_model, fingerprint)


@contextmanager
def _user_code(name: str, what: str) -> Iterator[None]:
    """Say where code of the user's own failed, whatever it did."""
    try:
        yield
    except PromptRecoveryError:
        raise
    except BaseException as error:
        if is_stop(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if not frame.filename.startswith("<")), None)
        where = f" ({Path(last.filename).name}, line {last.lineno})" if last else ""
        words = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else first_line(error)
        raise UserError(f"recover {name}: {what}: {words}{where}") from error


def _source_hash(module: ModuleType) -> str:
    """Hash of a module's source and of those beside it that it imported: their code decides answers.

    What was installed does not count, nor does this package: they have versions.
    """
    own, ours = getattr(module, "__file__", None), Path(__file__).resolve().parent.parent
    if own is None or (module.__name__.partition(".")[0] in _ROOMS and Path(own).resolve().is_relative_to(ours)):
        return "none"
    root = Path(own).resolve().parents[module.__name__.count(".") + (Path(own).name == "__init__.py")]
    digest = hashlib.sha256()
    for name, other in sorted(sys.modules.items()):
        path = getattr(other, "__file__", None)
        if not isinstance(path, str) or name == "__main__":
            continue
        file = Path(path).resolve()
        is_room = name.partition(".")[0] in _ROOMS and file.is_relative_to(ours)
        if file.is_relative_to(root) and file.suffix == ".py" and "site-packages" not in file.parts and not is_room:
            digest.update(f"{name}:{content_hash(file)};".encode())
    return digest.hexdigest()
