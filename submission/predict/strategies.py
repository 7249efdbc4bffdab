"""Strategies: a constant prompt, a model asked with or without examples, or one of your own.

    python -m submission predict test.csv -o submission.csv --recover constant
    python -m submission predict test.csv -o submission.csv --recover mymodule:MyRecover --recover-config my.toml

`module:object` names either a function `(pairs, models, budget) -> Iterator[Prediction]` or a class that is made with
a `Setup` and whose instances are called so; see `submission.types.Recover`. Its attribute `roles` says which models it
asks: names, each for the model of `--model`, or a mapping from names to models. Without it there is one, "generator".
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from submission.backends import ModelSpec
from submission.backends.hardware import ALONE, Placement
from submission.calls.models import Spec
from submission.config import from_mapping
from submission.errors import PromptRecoveryError, UserError, first_line, is_stop
from submission.prompts.answers import is_blank
from submission.prompts.templates import Template
from submission.types import Budget, Failure, Model, Pair, Prediction, Recover, Request, Sampling, Triplet

GENERATOR = "generator"
"""The role of the model that writes answers, in strategies that ask one only."""

DEFAULT_PROMPT = "Please rewrite this text in a different tone and style while keeping its original meaning."
"""The answer when there is no better one: a plain sentence near many rewrite prompts."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a strategy is made from.

    Attributes:
        model: the model of `--model`, with its adapter, options and workers; nothing is loaded.
        template: layout of the prompts.
        shots: solved examples.
        sampling: how answers are sampled.
        config: the content of `--recover-config`.
        placement: copies of each model, and where they are.
    """

    model: Callable[[], ModelSpec]
    template: Template
    shots: Sequence[Triplet] = ()
    sampling: Sampling = Sampling()
    config: Mapping[str, Any] = field(default_factory=dict)
    placement: Placement = ALONE


class Ask:
    """Asks the model once per pair, behind the examples if there are any: zero-shot and few-shot."""

    roles = (GENERATOR,)
    prompted = GENERATOR
    """The role that is asked by template and shots of the setup alone, for `predict --dry-run`."""

    def __init__(self, setup: Setup) -> None:
        from_mapping(_NoOptions, setup.config, "recover zero_shot and few_shot")
        self._setup = setup

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        return self.behind(((pair, self._setup.shots) for pair in pairs), models, budget)

    def behind(
        self, shown: Iterable[tuple[Pair, Sequence[Triplet]]], models: Mapping[str, Model], budget: Budget
    ) -> Iterator[Prediction]:
        """Answer pairs, each behind examples of its own."""
        del budget  # one answer a row: there is nothing to leave out
        template, sampling = self._setup.template, self._setup.sampling
        requests = (Request(pair.id, template.render(pair, shots), sampling) for pair, shots in shown)
        for key, found in models[GENERATOR].generate(requests):
            if isinstance(found, Failure):
                yield Prediction(key, "", "failed", found.reason)
                continue
            completion = found[0]
            text = template.parse(completion.text)
            blank = is_blank(text)
            yield Prediction(
                key, "" if blank else text, "failed" if blank else "ok", "empty answer" if blank else "",
                completion.text, completion.prompt_tokens, completion.truncated,
            )  # fmt: skip


class Constant:
    """The same prompt for every pair: the floor that anything else must beat. It needs no model."""

    roles: tuple[str, ...] = ()

    def __init__(self, setup: Setup) -> None:
        self._prompt = from_mapping(_ConstantOptions, setup.config, "recover constant").prompt
        if is_blank(self._prompt):
            raise UserError(f"option prompt={self._prompt!r} for recover constant is blank or reads as null")

    def __call__(self, pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        """See `submission.types.Recover`."""
        del models, budget
        for pair in pairs:
            yield Prediction(pair.id, self._prompt)


@dataclass(frozen=True, slots=True)
class _NoOptions:
    pass


@dataclass(frozen=True, slots=True)
class _ConstantOptions:
    prompt: str = DEFAULT_PROMPT


RECOVERS: dict[str, Callable[[Setup], Recover]] = {"zero_shot": Ask, "few_shot": Ask, "constant": Constant}
ELSEWHERE = {"best_of": "ensemble.best_of:best_of", "search": "ensemble.search:search"}
"""Short names of strategies in other rooms, which are imported when they are asked for."""


@dataclass(frozen=True, slots=True)
class RecoverSource:
    """A strategy that was found by its name and can be made.

    Attributes:
        check: refuses a configuration with UserError, before what it names is there; the strategy's `check_config`.
    """

    name: str
    make: Callable[[Setup], Recover]
    check: Callable[[Mapping[str, Any]], None] = lambda _: None


def roles_of(recover: Recover, setup: Setup) -> dict[str, Spec]:
    """The models that a strategy asks, by role.

    Raises:
        UserError: its `roles` are neither names nor a mapping from names to models, or a model is wrong.
    """
    with _user_code(type(recover).__name__, "its roles cannot be told"):
        roles = getattr(recover, "roles", (GENERATOR,))
    if isinstance(roles, Mapping):
        found = {str(role): setup.model() if spec is None else spec for role, spec in roles.items()}
    elif isinstance(roles, tuple | list | set | frozenset) and all(isinstance(role, str) for role in roles):
        found = {role: setup.model() for role in roles}
    else:
        raise UserError(f"roles of a strategy must be names, or a mapping from names to models: {roles!r:.80}")
    for role, spec in found.items():
        if not callable(getattr(spec, "load", None)) or not callable(getattr(spec, "fingerprint", None)):
            raise UserError(f"role {role!r} of the strategy is no model: {spec!r:.80}")
    return {
        role: spec.held_by(setup.placement) if isinstance(spec, ModelSpec) else spec for role, spec in found.items()
    }


def find_recover(name: str) -> RecoverSource:
    """Find a strategy by name or `module:object`.

    Raises:
        UserError: it is unknown, cannot be imported or cannot be called; lists what exists.
    """
    plain = name.replace("-", "_")
    if plain in RECOVERS:
        return RecoverSource(plain, RECOVERS[plain])
    name = ELSEWHERE.get(plain, name)
    module_name, colon, object_name = name.partition(":")
    if not (colon and module_name and object_name):
        raise UserError(
            f"unknown recover {name!r}; there are: {', '.join([*RECOVERS, *ELSEWHERE])}, or module:object of your own"
        )
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
        check_config = getattr(found, "check_config", lambda _: None)

    def make(setup: Setup) -> Recover:
        with _user_code(name, "it cannot be made"):
            return cast(Callable[[Setup], Recover], found)(setup) if inspect.isclass(found) else cast(Recover, found)

    return RecoverSource(name, make, check_config)


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
