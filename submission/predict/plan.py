"""What a run is asked to do, checked to the last option before any model is loaded or file written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from submission.backends import AUTO, ModelSpec, model_spec
from submission.backends.hardware import ALONE, Placement
from submission.backends.models import PACKAGED, TUNED, adapter_of, is_large, template_of
from submission.calls.log import is_log, log_path
from submission.calls.models import Spec
from submission.calls.supervisor import STALL_SECONDS
from submission.config import read_toml
from submission.data.files import check_writable, leftovers
from submission.data.outputs import check_apart, check_free, manifest_path
from submission.data.pairs import Pairs
from submission.data.tables import read_triplets
from submission.errors import UserError
from submission.predict.strategies import DEFAULT_PROMPT, RecoverSource, Setup, find_recover, roles_of
from submission.prompts.answers import is_blank, strip_invalid_utf8
from submission.prompts.templates import INSTRUCT, Template, get_template
from submission.types import Recover, Sampling, Triplet


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that a run is asked to do; see `predict --help`."""

    input: Path
    output: Path
    encoding: str = "utf-8"
    limit: int = 0
    backend: str = AUTO
    model: str = TUNED
    adapter: Path | None = None
    settings: list[str] = field(default_factory=list)
    placement: Placement = ALONE
    template: str = ""
    shots: Path | None = None
    n_shots: int = 3
    sampling: Sampling = Sampling()
    recover: str = ""
    recover_config: Path | None = None
    fallback: str = DEFAULT_PROMPT
    deadline: float | None = None
    max_failures: float = 0.2
    fresh: bool = False
    as_json: bool = False
    stall: float = STALL_SECONDS


@dataclass(frozen=True, slots=True)
class Plan:
    """A run whose every input was checked; nothing is loaded or written yet."""

    config: RunConfig
    pairs: Pairs
    recover: RecoverSource
    strategy: Recover
    roles: dict[str, Spec]
    template: Template
    shots: list[Triplet]

    def describe(self, role: str) -> dict[str, Any]:
        """A role's model, for the manifest and for messages."""
        describe = getattr(self.roles[role], "describe", None)
        return dict(describe()) if describe else {"model": str(self.roles[role])}


def plan(config: RunConfig, read: Callable[[Pairs], object] = lambda _: None, *, writes: bool = True) -> Plan:
    """Check all that was asked for, before any model is loaded.

    Args:
        config: what to do.
        read: takes the pairs as soon as they were read, before the strategy is made.
        writes: False for a run that is only looked at: its output may be anything.

    Raises:
        UserError: something is missing or wrong.
    """
    if writes:
        check_writable(config.output)
    files = [config.output, log_path(config.output)]
    if writes:
        files += [file for one in (config.output, manifest_path(config.output)) for file in leftovers(one)]
        check_apart(config.output, files, (one for one in _inputs(config) if not one[1].is_dir()))
    check_fallback(config.fallback)
    if config.shots is not None and config.n_shots < 1:
        raise UserError("--n-shots must be at least 1 when --shots is given")
    config = replace(config, recover=config.recover or choose_strategy(config, shots=config.shots is not None))
    recover = find_recover(config.recover)
    if recover.name == "few_shot" and config.shots is None:
        raise UserError(
            "recover few_shot needs examples: --shots FILE with id, original_text, rewritten_text, rewrite_prompt"
        )
    template = choose_template(config.template, config.model, config.adapter, shots=config.shots is not None)
    recover_config = read_toml(config.recover_config, "--recover-config") if config.recover_config else {}
    pairs = Pairs(config.input, config.encoding, config.limit)
    read(pairs)
    shots = read_triplets(config.shots, config.encoding)[: config.n_shots] if config.shots else []
    setup = Setup(
        cache(lambda: checked_model(config)), template, shots, config.sampling, recover_config, config.placement
    )
    strategy = recover.make(setup)
    roles = roles_of(strategy, setup)
    if writes:
        options = [asdict(spec.options) for spec in roles.values() if isinstance(spec, ModelSpec)]
        check_apart(config.output, files, _inputs(config, recover_config, *options))
        check_free(config.output, files[:1] if is_log(files[1]) else files[:2])
    return Plan(config, pairs, recover, strategy, roles, template, shots)


def check_fallback(fallback: str) -> None:
    """Refuse a fallback that would be no answer.

    Raises:
        UserError: shows it.
    """
    if is_blank(fallback) or strip_invalid_utf8(fallback) != fallback:
        raise UserError(f"--fallback {fallback!r} is blank, reads as null or is not UTF-8: give a prompt")


def checked_model(config: RunConfig) -> ModelSpec:
    """The model of --model.

    Raises:
        UserError: as `model_spec`, or its context leaves too little to the prompt.
    """
    spec = model_spec(config.backend, config.model, config.adapter, config.settings, config.placement)
    if config.sampling.max_new_tokens > spec.options.context // 2:
        raise UserError(
            f"--max-new-tokens {config.sampling.max_new_tokens} leaves too little of the context of "
            f"{spec.options.context} tokens to the prompt: lower it, or raise --set context=N"
        )
    return spec


def _inputs(config: RunConfig, *named: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """All files and folders that a run reads, with what they are called."""
    model = None if config.model in PACKAGED else Path(config.model).expanduser()
    for what, path in (("input", config.input), ("file of shots", config.shots), ("adapter", config.adapter),
                       ("file of --recover-config", config.recover_config), ("model", model)):  # fmt: skip
        if path is not None:
            yield what, path
    for values in named:
        yield from _files_in(values)


def _files_in(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """Files and folders that options or a configuration name, with the keys under which they do."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _files_in(one, str(name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _files_in(one, key)
    elif isinstance(value, str) and value:
        # predicted:FILE of ensemble, whose parser this room may not import.
        named = [part.partition(":")[2].strip() for part in value.split("+")] if key == "selector" else []
        for name in filter(None, [value, *named]):
            with suppress(OSError, ValueError, RuntimeError):  # too long, with a NUL, of no such user: no file's name
                path = Path(name).expanduser()
                if path.is_file() or any(path.glob("*config.json")) or any(path.glob("*.parquet")):
                    yield f"file of {key}", path


def choose_template(asked: str, model: str, adapter: Path | None, *, shots: bool) -> Template:
    """The template that was asked for, or the one that suits: shots, what the model was trained on, the model's size.

    Raises:
        UserError: there is no such template.
    """
    suits = "few_shot" if shots else template_of(adapter_of(model, adapter), Path(model).expanduser())
    return get_template(asked or suits or (INSTRUCT if is_large(model) else "short"))


def choose_strategy(config: RunConfig, *, shots: bool) -> str:
    """The strategy where none is asked for: one answer a row; with the default model the best of ten."""
    if shots:
        return "few_shot"
    sampling = config.sampling
    greedy = Sampling(max_new_tokens=sampling.max_new_tokens, seed=sampling.seed)
    as_it_comes = config.model == TUNED and config.backend == AUTO and config.adapter is None and sampling == greedy
    return "best_of" if as_it_comes else "zero_shot"
