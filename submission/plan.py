"""What a run is asked to do, checked to the last option before any model is loaded or file written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from submission.answers import is_blank, storable
from submission.backends import ModelSpec, model_spec
from submission.config import read_toml
from submission.errors import UserError
from submission.files import check_writable, leftovers
from submission.hardware import ALONE, Fleet
from submission.journal import journal_path
from submission.manifest import check_apart, check_free, manifest_path
from submission.models import PACKAGED, TUNED, adapter_of, noted_template
from submission.pairs import Pairs
from submission.recover import DEFAULT_PROMPT, RecoverSource, Setup, find_recover
from submission.tables import digest_pairs, read_triplets
from submission.templates import Template, get_template
from submission.types import Backend, Pair, Sampling, Triplet


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that a run is asked to do; see `predict --help`."""

    input: Path
    output: Path
    encoding: str = "utf-8"
    limit: int = 0
    backend: str = "llama_cpp"
    model: str = TUNED
    adapter: Path | None = None
    settings: list[str] = field(default_factory=list)
    fleet: Fleet = ALONE
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


@dataclass(frozen=True, slots=True)
class Plan:
    """A run whose every input was checked; nothing is loaded or written yet."""

    config: RunConfig
    pairs: Pairs
    recover: RecoverSource
    spec: ModelSpec | None
    template: Template
    shots: list[Triplet]
    recover_config: dict[str, object]
    fingerprint: dict[str, str]

    def setup(self) -> Setup:
        """What the way of predicting is made from; the model is loaded when first asked for."""
        loaded: list[Backend] = []

        def load() -> Backend:
            if self.spec is None:
                raise UserError(f"recover {self.recover.name} was said to need no model, and asks for one")
            if not loaded:
                loaded.append(self.spec.load())
            return loaded[0]

        return Setup(load, self.template, self.shots, self.config.sampling, self.recover_config)


def plan(config: RunConfig) -> Plan:
    """Check all that was asked for, before any model is loaded.

    Raises:
        UserError: something is missing or wrong.
    """
    check_writable(config.output)
    files = [config.output, journal_path(config.output)]
    files += [file for one in (config.output, manifest_path(config.output)) for file in leftovers(one)]
    check_apart(config.output, files, (one for one in _inputs(config) if not one[1].is_dir()))
    if is_blank(config.fallback) or storable(config.fallback) != config.fallback:
        raise UserError(f"--fallback {config.fallback!r} is blank, reads as null or is not UTF-8: give a prompt")
    if config.shots is not None and config.n_shots < 1:
        raise UserError("--n-shots must be at least 1 when --shots is given")
    recover = find_recover(config.recover or ("few_shot" if config.shots else "zero_shot"))
    if recover.name == "few_shot" and config.shots is None:
        raise UserError(
            "recover few_shot needs examples: --shots FILE with id, original_text, rewritten_text, rewrite_prompt"
        )
    template = choose_template(config.template, config.model, config.adapter, shots=config.shots is not None)
    recover_config = read_toml(config.recover_config, "--recover-config") if config.recover_config else {}
    pairs = Pairs(config.input, config.encoding, config.limit)
    shots = read_triplets(config.shots, config.encoding)[: config.n_shots] if config.shots else []
    spec = (
        model_spec(config.backend, config.model, config.adapter, config.settings, config.fleet)
        if recover.uses_model
        else None
    )
    if spec is not None and config.sampling.max_new_tokens > spec.options.context // 2:
        raise UserError(
            f"--max-new-tokens {config.sampling.max_new_tokens} leaves too little of the context of "
            f"{spec.options.context} tokens to the prompt: lower it, or raise --set context=N"
        )
    check_apart(config.output, files, _inputs(config, recover_config, asdict(spec.options) if spec else {}))
    check_free(config.output, [config.output])
    fingerprint = {"input": pairs.digest, "recover": recover.name}
    if recover_config:
        fingerprint["recover_config"] = repr(sorted(recover_config.items()))
    fingerprint |= recover.fingerprint(recover_config)
    if spec is not None:
        fingerprint |= spec.fingerprint()
        fingerprint |= {"template": template.fingerprint(), "shots": _shots_mark(shots)}
        fingerprint["sampling"] = _sampling_mark(config.sampling)
    checked = Plan(config, pairs, recover, spec, template, shots, recover_config, fingerprint)
    if not recover.uses_model:
        recover.make(checked.setup())  # costs nothing, and its options are checked now
    return checked


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
        with suppress(OSError, ValueError, RuntimeError):  # too long, with a NUL, of no such user: the name of no file
            path = Path(value).expanduser()
            if path.is_file() or any(path.glob("*config.json")) or any(path.glob("*.parquet")):
                yield f"file of {key}", path


def choose_template(asked: str, model: str, adapter: Path | None, *, shots: bool) -> Template:
    """The template that was asked for, or the one that suits: shots, what the model was trained on, any model.

    Raises:
        UserError: there is no such template.
    """
    suits = "few_shot" if shots else noted_template(adapter_of(model, adapter), Path(model).expanduser())
    return get_template(asked or suits or "short")


def _shots_mark(shots: list[Triplet]) -> str:
    texts = (Pair(shot.rewrite_prompt, shot.pair.original_text, shot.pair.rewritten_text) for shot in shots)
    return f"{len(shots)}: {digest_pairs(texts)}" if shots else "none"


def _sampling_mark(sampling: Sampling) -> str:
    mark = f"{sampling.max_new_tokens} tokens"
    if sampling.temperature <= 0:
        return f"{mark}, greedy"
    return (
        f"{mark}, temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, min_p {sampling.min_p:g}, "
        f"seed {sampling.seed}"
    )
