"""`python -m ensemble`: many candidates, judges, selectors, and the experiment that tells whether they help."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from submission.commands import RayCpusOption, RayGpusOption, RayOption, WorkersOption, new_app, run_command
from submission.config import split_list
from submission.errors import UserError
from submission.predict.strategies import DEFAULT_PROMPT
from submission.progress import print_line

LOG = logging.getLogger("ensemble")  # not of __main__, which nobody listens to

app = new_app("Try to beat one answer: sample many, let selectors choose, measure whether and why it helps.")

OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Output file.")]
FolderOption = Annotated[Path, typer.Option("-o", "--output", help="Output folder.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over; ignore logged model calls.")]
EncoderOption = Annotated[str, typer.Option(help="sentence-transformers folder; default: as eval chooses.")]
NearOption = Annotated[
    float, typer.Option(min=0, max=1, help="Merge candidates at least this similar (cosine); 1 merges equal ones only.")
]
ModelsOption = Annotated[
    Path | None,
    typer.Option(
        "--models", help="TOML with [target] (or several), [judge], [gate]: model, backend, adapter, settings."
    ),
]
TargetOption = Annotated[str, typer.Option(help="Model that made the rewrites, for likelihood. Default: embedded.")]
JudgeOption = Annotated[str, typer.Option(help="Model that judges. Default: embedded.")]
GateOption = Annotated[str, typer.Option(help="Model trained to say Yes or No, for judge_yes_no. Default: the judge.")]
WeightsOption = Annotated[
    list[Path] | None,
    typer.Option("--weights", help="Weights that `fit` wrote; its --name becomes a selector; repeatable."),
]
RotationsOption = Annotated[
    int, typer.Option(min=0, help="Candidate orders that judge_pick averages over; 0 uses one per candidate.")
]
CandidatesArgument = Annotated[Path, typer.Argument(metavar="CANDIDATES", help="Candidates, as written by `sample`.")]


@app.command()
def sample(
    pairs: Annotated[
        Path, typer.Argument(metavar="INPUT", help="CSV or Parquet with id, original_text, rewritten_text.")
    ],
    output: OutputOption,
    sources: Annotated[
        Path | None,
        typer.Option(help="TOML with a [[source]] for each. Default: `embedded-tuned`, greedy and 8 samples."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of every source, such as n=4; repeatable.")
    ] = None,
    near: NearOption = 0.95,
    limit: Annotated[int, typer.Option(min=0, help="Use only the first N rows; 0 uses all.")] = 0,
    encoder: EncoderOption = "",
    workers: WorkersOption = 1,
    ray: RayOption = "",
    ray_gpus: RayGpusOption = None,
    ray_cpus: RayCpusOption = 0,
    fresh: FreshOption = False,
) -> None:
    """Sample candidates for every pair. The same command again resumes.

    Keys of a source: name, backend, model, adapter, settings, template, shots, n_shots, n, greedy, temperature, top_p,
    min_p, max_new_tokens, seed.
    """
    from ensemble.sample import sample as ask_sources
    from ensemble.sources import read_sources
    from eval.encoders import find_encoder
    from submission.backends.hardware import Placement
    from submission.data.tables import read_pairs

    _check_apart(output, pairs=pairs, sources=sources)
    listed = read_sources(sources, settings or [])
    placement = Placement(workers, ray, ray_gpus, ray_cpus)
    rows = read_pairs(pairs)
    if not rows:
        raise UserError(f"{pairs} has a header and no row")
    ask_sources(
        rows[: limit or None],
        listed,
        output,
        None if near == 1 else find_encoder(encoder),
        near,
        placement=placement,
        fresh=fresh,
    )


@app.command()
def select(
    candidates: CandidatesArgument,
    selector: Annotated[str, typer.Option(help="Name; a+b sums ranks. `python -m ensemble selectors` lists them.")],
    output: OutputOption,
    models: ModelsOption = None,
    target: TargetOption = "",
    judge: JudgeOption = "",
    gate: GateOption = "",
    weights: WeightsOption = None,
    rotations: RotationsOption = 0,
    concat: Annotated[int, typer.Option(min=1, help="Join the N best candidates into one answer.")] = 1,
    constant: Annotated[str, typer.Option(help="Prompt to append to every answer.")] = "",
    encoder: EncoderOption = "",
    workers: WorkersOption = 1,
    ray: RayOption = "",
    ray_gpus: RayGpusOption = None,
    ray_cpus: RayCpusOption = 0,
    fresh: FreshOption = False,
) -> None:
    """Let a selector choose one candidate of every row, and write a submission."""
    from ensemble.models import read_models
    from ensemble.select import select as choose
    from eval.encoders import find_encoder
    from submission.backends.hardware import Placement

    _check_apart(output, models=models)
    known = read_models(models, {"target": target, "judge": judge, "gate": gate})
    counts = choose(
        candidates, output, selector, known, find_encoder(encoder), weights=weights or [], rotations=rotations,
        concat=concat, constant=constant, placement=Placement(workers, ray, ray_gpus, ray_cpus), fresh=fresh,
    )  # fmt: skip
    LOG.info(
        f"written to {output}: {counts['rows']} rows, {counts['without']} without a candidate (default prompt), "
        f"{counts['undecided']} of which {selector} said nothing (first candidate)"
    )


@app.command()
def experiment(
    candidates: CandidatesArgument,
    truth: Annotated[Path, typer.Option(help="CSV or Parquet with id and rewrite_prompt.")],
    output: FolderOption,
    selectors: Annotated[str, typer.Option(help="Names with commas; default: all.")] = "",
    models: ModelsOption = None,
    target: TargetOption = "",
    judge: JudgeOption = "",
    gate: GateOption = "",
    weights: WeightsOption = None,
    rotations: RotationsOption = 0,
    constant: Annotated[str, typer.Option(help="The constant prompt to compare with.")] = DEFAULT_PROMPT,
    concat_by: Annotated[
        str, typer.Option(help="Selector whose best candidates are joined. Default: consensus if compared, else first.")
    ] = "",
    by: Annotated[str, typer.Option(help="Column of the truth with the kind of prompt.")] = "",
    proposals: Annotated[
        int,
        typer.Option(
            min=0, help="Add a search that scores so many candidates a row, the model's answers included; 0 adds none."
        ),
    ] = 0,
    encoder: EncoderOption = "",
    fresh: FreshOption = False,
) -> None:
    """Compare all selectors on the same candidates, and find out why they help or don't.

    Writes report.html, experiment.json and figures. Models' answers are logged in the folder.
    """
    from ensemble.experiment import ALL, ExperimentConfig, lines_of
    from ensemble.models import read_models
    from ensemble.report import experiment_with_page
    from eval.encoders import find_encoder
    from submission.data.outputs import check_no_file

    check_no_file(output)
    names = split_list(selectors) or list(ALL)
    known = read_models(models, {"target": target, "judge": judge, "gate": gate})
    config = ExperimentConfig(
        candidates, truth, output, names, known, constant, concat_by=concat_by, weights=weights or [],
        rotations=rotations, by=by, proposals=proposals, fresh=fresh,
    )  # fmt: skip
    for line in lines_of(experiment_with_page(config, find_encoder(encoder))):
        print_line(line, sys.stdout)
    LOG.info(f"written to {output / 'report.html'}")


@app.command()
def fit(
    candidates: CandidatesArgument,
    truth: Annotated[Path, typer.Option(help="CSV or Parquet with id and rewrite_prompt, of a validation set.")],
    output: OutputOption,
    selectors: Annotated[str, typer.Option(help="Names with commas.")],
    name: Annotated[str, typer.Option(help="Name of the weighted sum.")] = "weighted",
    models: ModelsOption = None,
    target: TargetOption = "",
    judge: JudgeOption = "",
    gate: GateOption = "",
    rotations: RotationsOption = 0,
    encoder: EncoderOption = "",
    fresh: FreshOption = False,
) -> None:
    """Fit the weights of a sum of selectors on a validation set; `experiment` refuses them for its rows.

    With `--selectors posterior` alone the powers of its kinds of evidence are fitted.
    """
    from ensemble.experiment import fit_weights
    from ensemble.models import read_models
    from eval.encoders import find_encoder

    _check_apart(output, models=models)
    names = split_list(selectors)
    known = read_models(models, {"target": target, "judge": judge, "gate": gate})
    weights = fit_weights(
        candidates, truth, output, name, names, known, find_encoder(encoder), rotations=rotations, fresh=fresh
    )  # fmt: skip
    for part, weight in weights.items():
        print(f"{part:<20} {weight:.3f}")


@app.command()
def selectors() -> None:
    """List the selectors."""
    from ensemble.selectors import SELECTORS

    for name, known in SELECTORS.items():
        print(f"{name:<16} {known.about}{f'; asks the {known.needs}' if known.needs else ''}")


@app.command()
def trial(
    output: FolderOption = Path("trial"),
    rows: Annotated[int, typer.Option(min=2, help="Number of pairs, up to 170.")] = 18,
    encoder: EncoderOption = "",
    fresh: FreshOption = False,
) -> None:
    """Sample, select and compare with the embedded model on pairs that it has not seen, in three minutes."""
    from ensemble.candidates import NEAR
    from ensemble.experiment import lines_of
    from ensemble.trial import trial as run
    from eval.encoders import find_encoder

    for line in lines_of(run(output, find_encoder(encoder), NEAR, rows=rows, fresh=fresh)):
        print_line(line, sys.stdout)
    LOG.info(f"written to {output / 'report.html'}")


def _check_apart(output: Path, **inputs: Path | None) -> None:
    """Refuse to write over a file that is read."""
    from submission.data.outputs import check_apart

    check_apart(output, [output], ((f"file of {what}", path) for what, path in inputs.items() if path is not None))


def main() -> None:
    """Run a command; see `submission.commands.run_command`."""
    run_command(app)


if __name__ == "__main__":
    main()
