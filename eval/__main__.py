"""`python -m eval`: scores, baselines, comparisons, reports and speed.

python -m eval score submission.csv truth.csv
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from submission.commands import new_app, run_command
from submission.progress import print_line

app = new_app("Measure predictions and the speed of predicting (eval).")

EncoderOption = Annotated[
    str,
    typer.Option(
        "--encoder",
        help="sentence-transformers folder or name; default: sentence-t5-base if on disk, else the embedded MiniLM.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON on standard output.")]
ReferenceOption = Annotated[
    str, typer.Option(help="Run that the others are compared with. Default: a constant prompt.")
]


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="CSV with id and rewrite_prompt.")],
    truth: Annotated[Path, typer.Argument(metavar="TRUTH", help="CSV or Parquet with id and rewrite_prompt.")],
    by: Annotated[str, typer.Option(metavar="COLUMN", help="Column of TRUTH to break the score down by.")] = "",
    encoder: EncoderOption = "",
    as_json: JsonOption = False,
) -> None:
    """Score predictions: mean with a 95 % interval, median, share above 0.5, best and worst rows."""
    from eval.encoders import find_encoder
    from eval.scoring import lines, read_truth, score_file

    chosen = find_encoder(encoder)
    scored = score_file(predictions, read_truth(truth, chosen, by), chosen)
    _show(lines(scored, chosen.metric), scored.figures, as_json=as_json)


@app.command()
def constant(
    train: Annotated[Path, typer.Argument(metavar="TRAIN", help="CSV or Parquet with id and rewrite_prompt.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="TOML file for `predict --recover-config`.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Score the constants on these prompts too.")] = None,
    exploit: Annotated[
        bool,
        typer.Option("--exploit", help="Write the prompt that the search over words found, not the best sentence."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of the search over words; 0 tries sentences only.")] = 8,
    tries: Annotated[int, typer.Option(min=1, help="Prompts scored per round.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the search.")] = 0,
    encoder: EncoderOption = "",
    as_json: JsonOption = False,
) -> None:
    """Search the constant prompt that scores best on the training prompts.

    First among the training prompts, then by a beam search over words. What the search finds is marked as an
    exploit: it pleases the encoder and need not be a sentence.
    """
    from eval.baselines import write_prompt
    from eval.compare import constant_system
    from eval.constant import Search, fit_constant
    from eval.encoders import find_encoder
    from eval.scoring import read_truth
    from submission.data.outputs import check_output

    if output is not None:
        check_output(output, [("training table", train), *([("test table", test)] if test else [])])
    chosen = find_encoder(encoder)
    known = read_truth(train, chosen)
    held_out = read_truth(test, chosen) if test else None
    search = Search(rounds=rounds, tries=tries, seed=seed)
    found = fit_constant(known.prompts, chosen, search)
    lines = [f"metric     {chosen.metric}", f"rows       {len(known.ids)}"]
    for fitted in found:
        lines += ["", f"{'exploit' if fitted.exploit else 'sentence':<10} {fitted.prompt}",
                  f"train      {fitted.train_mean:.4f}"]  # fmt: skip
        if held_out is not None:
            lines.append(f"test       {constant_system(held_out, chosen, fitted.prompt).scored.interval()}")
    if output is not None:
        write_prompt(output, found[-1 if exploit else 0].prompt)
        lines += ["", f"written to {output}"]
    figures = {"encoder": chosen.name, "n": len(known.ids), "constants": [fitted.figures() for fitted in found]}
    _show(lines, lambda: figures, as_json=as_json)


@app.command()
def baselines(
    train: Annotated[Path, typer.Argument(metavar="TRAIN", help="Triplets: examples and prompts to learn from.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Triplets to predict and score.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the runs.")] = Path("baselines"),
    ood: Annotated[Path | None, typer.Option(help="A second set of triplets, of another origin.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Baseline to run; repeatable. Default: all but best_of.")
    ] = None,
    reference: ReferenceOption = "",
    backend: Annotated[str, typer.Option(help="See `python -m submission predict --help`.")] = "auto",
    model: Annotated[str, typer.Option(help="GGUF file, transformers folder, or 'embedded'.")] = "embedded",
    adapter: Annotated[Path | None, typer.Option(help="GGUF LoRA file or PEFT folder.")] = None,
    tuned_model: Annotated[str, typer.Option(help="A tuned model to compare with the others.")] = "",
    tuned_adapter: Annotated[
        Path | None, typer.Option(help="A tuned adapter of MODEL to compare with the others.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Backend option as KEY=VALUE; repeatable.")
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Examples of the few-shot baselines.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 40,
    limit: Annotated[int, typer.Option(min=0, help="Use only the first N rows of each set; 0 uses all.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; ignore the results of earlier runs.")] = False,
    encoder: EncoderOption = "",
    as_json: JsonOption = False,
) -> None:
    """Run constants, retrieval, zero-shot, few-shot and, if given, a tuned model on TEST, and compare them.

    Finished rows are kept; the same command again goes on.
    """
    from eval.baselines import UNLESS_NAMED, BaselinesConfig, run_baselines
    from eval.encoders import find_encoder
    from submission.predict.deadline import Interrupted

    config = BaselinesConfig(
        train=train, test=test, output=output, ood=ood, only=only or UNLESS_NAMED, reference=reference, backend=backend,
        model=model, adapter=adapter, tuned_model=tuned_model, tuned_adapter=tuned_adapter, settings=settings or [],
        shots=shots, max_new_tokens=max_new_tokens, limit=limit, fresh=fresh,
    )  # fmt: skip
    try:
        result = run_baselines(config, find_encoder(encoder))
    except Interrupted as stop:
        raise typer.Exit(stop.exit_code) from None
    _show(result.lines(), result.figures, as_json=as_json)


RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUNS...", help="Files of predictions, or folders with submission.csv; NAME=PATH names one."
    ),
]
TruthOption = Annotated[Path, typer.Option(help="CSV or Parquet with id and rewrite_prompt.")]
ExploitOption = Annotated[
    list[str] | None, typer.Option(help="Name of a run whose answers exploit the encoder; repeatable.")
]


@app.command()
def compare(
    runs: RunsArgument,
    truth: TruthOption,
    reference: ReferenceOption = "",
    exploit: ExploitOption = None,
    train: Annotated[
        Path | None, typer.Option(help="Warn if the truth shares prompts or texts with these triplets.")
    ] = None,
    ood: Annotated[Path | None, typer.Option(help="Truth of a second set of rows.")] = None,
    ood_run: Annotated[list[str] | None, typer.Option(help="A run on the second set, NAME=PATH; repeatable.")] = None,
    encoder: EncoderOption = "",
    as_json: JsonOption = False,
) -> None:
    """Compare runs: means, paired differences with intervals, won, tied and lost rows, and rows to show each."""
    from eval import leaks
    from eval.compare import compare as put_side_by_side
    from eval.compare import figures, read_system, table
    from eval.encoders import find_encoder
    from eval.scoring import read_truth
    from submission.errors import UserError

    if bool(ood) != bool(ood_run):
        raise UserError("--ood FILE goes with --ood-run NAME=PATH: the truth of a second set, and the runs on it")
    chosen = find_encoder(encoder)
    lines: list[str] = []
    found: dict[str, Any] = {}
    for name, path, arguments in [("test", truth, runs), *([("ood", ood, ood_run)] if ood and ood_run else [])]:
        known = read_truth(path, chosen)
        systems = [read_system(argument, known, chosen, exploit or []) for argument in arguments]
        comparison = put_side_by_side(systems, known, chosen, reference)
        lines += [""] * bool(lines) + ([name] if ood else [])
        found[name] = figures(comparison)
        if train is not None:
            shared = leaks.shared(train, path, chosen)
            lines += leaks.lines(shared)
            found[name]["shared"] = leaks.figures(shared)
        lines += table(comparison)
    _show(lines, lambda: found.pop("test") | found, as_json=as_json)


@app.command()
def report(
    runs: RunsArgument,
    truth: TruthOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file; PNGs go beside it.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Prompt recovery",
    by: Annotated[
        str,
        typer.Option(
            metavar="COLUMN", help="Column of the truth with the kind of prompt. Default: kinds by similarity."
        ),
    ] = "",
    reference: ReferenceOption = "",
    exploit: ExploitOption = None,
    encoder: EncoderOption = "",
) -> None:
    """Write a page that compares runs: scores, differences, kinds of prompt, lengths, examples, speed.

    One file without any link to elsewhere. Where the truth has original_text and rewritten_text, their differences are
    shown.
    """
    from eval.encoders import find_encoder
    from eval.report import write_report
    from eval.sections import Subject, sections
    from submission.data.outputs import check_output

    check_output(output, [("truth", truth)])
    chosen = find_encoder(encoder)
    subject = Subject.read(runs, truth, chosen, by=by, reference=reference, exploits=exploit or [])
    for path in write_report(output, title, list(sections(subject))):
        print_line(f"written to {path}", sys.stdout)


@app.command()
def throughput(
    input: Annotated[Path, typer.Argument(metavar="[INPUT]", help="CSV or Parquet of pairs.")] = Path(
        "examples/test.csv"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Number of rows, from the top of INPUT.")] = 24,
    shots: Annotated[
        Path, typer.Option(help="Triplets: the first 3 are shots, the prompts of the first 5 are candidates.")
    ] = Path("examples/train.csv"),
    model: Annotated[str, typer.Option(help="GGUF file or 'embedded'.")] = "embedded",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses every core.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Maximum length of an answer, in tokens.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way, by turns; the median is reported.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what is fastest here.")] = "auto",
    scenario: Annotated[
        list[str] | None, typer.Option(help="zero_shot, few_shot, samples or likelihood; repeatable. Default: all.")
    ] = None,
    llama_server: Annotated[Path | None, typer.Option(help="A llama-server binary to compare with.")] = None,
    vllm: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="Compare with vLLM, in the environment of this Python.")
    ] = None,
    transformers: Annotated[bool, typer.Option(help="Compare with transformers, which takes minutes.")] = True,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to write: speed against the number of rows and of samples.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time this program beside OpenVINO GenAI, llama.cpp in three ways, transformers, and vLLM where there is one."""
    from eval.throughput import SCENARIOS, ThroughputConfig, measure

    results = measure(
        ThroughputConfig(
            input=input, rows=rows, shots=shots, model=model, threads=threads, new_tokens=max_new_tokens,
            repeats=repeats, dtype=dtype, scenarios=scenario or SCENARIOS, llama_server=llama_server,
            vllm=vllm, transformers=transformers, plot=plot,
        )
    )  # fmt: skip
    if as_json:
        print(json.dumps({name: measured.figures() for name, measured in results.items()}))


def _show(lines: Any, figures: Any, *, as_json: bool) -> None:
    """Print the lines; with `as_json` on standard error, and the figures as JSON on standard output."""
    for line in lines:
        print_line(line, sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(figures()))


def main() -> None:
    """Run a command; see `submission.commands.run_command`."""
    run_command(app)


if __name__ == "__main__":
    main()
