"""`python -m submission`: the offline batch predictor.

python -m submission predict examples/test.csv -o submission.csv
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from submission.commands import (
    MinPOption,
    RayCpusOption,
    RayGpusOption,
    RayOption,
    TemperatureOption,
    TopPOption,
    WorkersOption,
    grouped,
    new_app,
    run_command,
)
from submission.progress import print_line
from submission.publish.commands import add_to

app = new_app("Work out which prompt made a language model rewrite one text into another. Works offline.")

_BACKENDS = (
    "openvino, llama_cpp (GGUF files), transformers or vllm (folders), scripted (no model), or auto: by the model."
)
_MODELS = "GGUF file, transformers folder, 'embedded-tuned', or 'embedded', which is that model without its adapter."
_TEMPLATES = (
    "short, detailed, brief, instruct, few_shot or a TOML file; default: what the model was trained on, few_shot with "
    "--shots, instruct from 1B parameters on, or short"
)


_GROUPS = {
    "What to predict": ("output", "limit", "encoding", "fallback", "max_failures"),
    "Model": ("model", "backend", "adapter", "load_in_4bit", "settings"),
    "Prompt": ("template", "shots", "n_shots", "recover", "recover_config"),
    "Sampling": ("max_new_tokens", "temperature", "top_p", "min_p", "seed"),
    "Run": ("deadline", "fresh", "dry_run", "as_json", "help"),
    "Machines": ("workers", "ray", "ray_gpus", "ray_cpus"),
}


@app.command(cls=grouped(_GROUPS))
def predict(
    input: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="CSV, Parquet or a folder of Parquet, here or on s3:// or gs://: id, original_text, rewritten_text.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="CSV to write (Parquet if it ends so): id, rewrite_prompt.")
    ],
    backend: Annotated[str, typer.Option(help=_BACKENDS)] = "auto",
    model: Annotated[str, typer.Option(help=_MODELS)] = "embedded-tuned",
    adapter: Annotated[
        Path | None, typer.Option(help="GGUF LoRA file (openvino, llama_cpp) or PEFT folder (transformers, vllm).")
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantise to nf4 on loading (transformers, vllm).")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the backend, such as threads=4 or context=4096; repeatable.",
        ),
    ] = None,
    workers: WorkersOption = 1,
    ray: RayOption = "",
    ray_gpus: RayGpusOption = None,
    ray_cpus: RayCpusOption = 0,
    template: Annotated[str, typer.Option(help=_TEMPLATES)] = "",
    shots: Annotated[
        Path | None, typer.Option(help="Triplets (pairs with rewrite_prompt) to show as examples.")
    ] = None,
    n_shots: Annotated[int, typer.Option(min=0, help="Number of examples, from the top of --shots.")] = 3,
    recover: Annotated[
        str,
        typer.Option(
            help="Strategy: zero_shot (one answer a row), few_shot, constant, best_of (ten answers a row, two models "
            "choose), search, or module:object. Default: few_shot with --shots; best_of for the default model "
            "unless --backend, --adapter or a sampling is given; else zero_shot."
        ),
    ] = "",
    recover_config: Annotated[Path | None, typer.Option(help="TOML file with the options of --recover.")] = None,
    fallback: Annotated[
        str | None, typer.Option(help='Prompt for rows without an answer. Default: "Please rewrite this text ..."')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 40,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    deadline: Annotated[
        str | None, typer.Option(help="Write a complete file within this time of the start, such as 8h30m.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Use only the first N rows; 0 uses all.")] = 0,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of failed rows above which the exit code is 3.")
    ] = 0.2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; ignore the log of an earlier run.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print rows, tokens, memory and time, and stop."),
    ] = False,
    encoding: Annotated[str, typer.Option(help="Encoding of the input CSV.")] = "utf-8",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one line of JSON on standard output.")
    ] = False,
) -> None:
    """Predict the rewrite prompt of every pair of INPUT.

    Every call of a model goes to a log beside OUTPUT; the same command again computes nothing twice. Exit codes: 0,
    2 wrong input or option, 3 too many rows failed (the file is written), 130 and 143 stopped by a signal.
    """
    from submission import STARTED
    from submission.backends.hardware import Placement
    from submission.config import parse_duration
    from submission.predict.deadline import Interrupted
    from submission.predict.outcome import print_summary
    from submission.predict.plan import RunConfig
    from submission.predict.run import predict as run
    from submission.predict.strategies import DEFAULT_PROMPT
    from submission.types import Sampling

    config = RunConfig(
        input=input, output=output, encoding=encoding, limit=limit, backend=backend, model=model, adapter=adapter,
        settings=[*(settings or []), *(["load_in_4bit=true"] if load_in_4bit else [])],
        placement=Placement(workers, ray, ray_gpus, ray_cpus), template=template, shots=shots, n_shots=n_shots,
        recover=recover, recover_config=recover_config,
        sampling=Sampling(1, temperature, top_p, min_p, max_new_tokens, seed),
        fallback=DEFAULT_PROMPT if fallback is None else fallback,
        deadline=None if deadline is None else parse_duration(deadline, "--deadline"),
        max_failures=max_failures, fresh=fresh, as_json=as_json,
    )  # fmt: skip
    if dry_run:
        from submission.predict.estimate import estimate

        _print_json(estimate(config), as_json=as_json)
        return
    try:
        summary = run(config, STARTED)
    except Interrupted as stop:
        raise typer.Exit(stop.exit_code) from None
    print_summary(summary, as_json=as_json)
    raise typer.Exit(summary.exit_code)


@app.command()
def validate(
    submission: Annotated[Path, typer.Argument(metavar="SUBMISSION", help="The CSV to check.")],
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="The pairs that the submission answers.")],
    limit: Annotated[int, typer.Option(min=0, help="Use only the first N rows of INPUT; 0 uses all.")] = 0,
    encoding: Annotated[str, typer.Option(help="Encoding of INPUT.")] = "utf-8",
) -> None:
    """Check a submission: ids and order of INPUT, nothing null, blank or twice. Exit code 0 or 1."""
    from submission.data.files import display_path
    from submission.data.pairs import Pairs
    from submission.data.validation import validate as problems_of

    pairs = Pairs(input, encoding, limit)
    problems = problems_of(submission, pairs.ids)
    for problem in problems[:50]:
        print_line(problem, sys.stdout)
    if len(problems) > 50:
        print_line(f"and {len(problems) - 50} more", sys.stdout)
    if problems:
        raise typer.Exit(1)
    print_line(f"{display_path(submission)} is valid: {len(pairs)} rows", sys.stdout)


@app.command(context_settings={"ignore_unknown_options": True})  # an id may be -1
def inspect(
    row_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the row.")],
    run: Annotated[Path, typer.Option("--run", "-o", help="The output of the run.")] = Path("submission.csv"),
) -> None:
    """Show one row of a run: texts, exact prompt with its token count, raw answer, parsed answer, status."""
    from submission.predict.inspect import inspect_row

    print_line(inspect_row(row_id, run), sys.stdout)


@app.command()
def doctor() -> None:
    """Say what is installed, which models, encoders, GPUs and threads would be used, and what is missing."""
    from submission.predict.doctor import report

    print_line(report(), sys.stdout)


add_to(app)


def _print_json(figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(figures))


def main() -> None:
    """Run a command; see `submission.commands.run_command`."""
    run_command(app)


if __name__ == "__main__":
    main()
