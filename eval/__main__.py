"""`python -m eval`: measures the predictor. Metric, baselines, comparisons and reports are to come.

python -m eval throughput examples/test.csv
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from submission.errors import run_command

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Measure predictions and the speed of predicting (eval).",
)


@app.callback()
def _commands() -> None:
    """Measure predictions and the speed of predicting (eval)."""


@app.command()
def throughput(
    input: Annotated[Path, typer.Argument(metavar="[INPUT]", help="CSV or Parquet of pairs.")] = Path(
        "examples/test.csv"
    ),
    rows: Annotated[int, typer.Option(min=1, help="First rows of INPUT.")] = 24,
    shots: Annotated[
        Path, typer.Option(help="Triplets: the first 3 are shots, the prompts of the first 5 are candidates.")
    ] = Path("examples/train.csv"),
    model: Annotated[str, typer.Option(help="GGUF file or 'embedded'.")] = "embedded",
    threads: Annotated[int, typer.Option(min=0, help="0 means every core.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="The median of so many is reported.")] = 3,
    scenario: Annotated[
        list[str] | None, typer.Option(help="zero_shot, few_shot, samples or likelihood; again for more. Default: all.")
    ] = None,
    llama_server: Annotated[Path | None, typer.Option(help="A llama-server binary to compare with.")] = None,
    transformers: Annotated[bool, typer.Option(help="Compare with transformers, which takes minutes.")] = True,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to write: speed against the number of rows and of samples.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one machine-readable line.")] = False,
) -> None:
    """Time this program beside llama-cpp-python, llama-server, transformers and a bare loop of llama_decode."""
    from eval.throughput import SCENARIOS, Config, measure
    from submission.progress import tell

    results = measure(
        Config(
            input=input, rows=rows, shots=shots, model=model, threads=threads, new_tokens=max_new_tokens,
            repeats=repeats, scenarios=scenario or SCENARIOS, llama_server=llama_server, transformers=transformers,
            plot=plot,
        ),
        lambda line: tell(line, sys.stdout),
    )  # fmt: skip
    if as_json:
        print(json.dumps({name: measured.figures() for name, measured in results.items()}))


def main() -> None:
    """Run a command; see `submission.errors.run_command`."""
    run_command(app)


if __name__ == "__main__":
    main()
