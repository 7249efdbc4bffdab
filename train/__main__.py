"""`python -m train`: from prompts and texts to training sets, tuned adapters and GGUF files.

python -m train prepare triplets.csv -o data/mine
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from submission.commands import (
    MinPOption,
    RayCpusOption,
    RayGpusOption,
    RayOption,
    TemperatureOption,
    TopPOption,
    WorkersOption,
    new_app,
    run_command,
)
from submission.config import split_list
from submission.errors import UserError
from submission.progress import print_line

LOG = logging.getLogger("train")  # not of __main__, which nobody listens to

app = new_app("Make training sets and weights (train).")

Output = Annotated[Path, typer.Option("-o", "--output", help="Output file.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]
EncoderOption = Annotated[str, typer.Option("--encoder", help="See `python -m eval score --help`.")]
BackendOption = Annotated[str, typer.Option(help="See `python -m submission predict --help`.")]
ModelOption = Annotated[str, typer.Option(help="GGUF file, transformers folder, or 'embedded'.")]
AdapterOption = Annotated[Path | None, typer.Option(help="GGUF LoRA file or PEFT folder.")]
SettingsOption = Annotated[list[str] | None, typer.Option("--set", help="Backend option, key=value; repeatable.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over; ignore the results of earlier runs.")]


@app.command()
def prompts(
    output: Output,
    size: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 1000,
    grammar: Annotated[
        Path | None, typer.Option(help="Grammar as TOML. Default: submission/prompts/grammar.toml.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of prompt to make, comma-separated. Default: all.")] = "",
    near: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Drop prompts more similar than this (cosine); 0 keeps all. Default: 0.95 up to 50,000 prompts.",
        ),
    ] = None,
    seed: Seed = 0,
    fresh: FreshOption = False,
    encoder: EncoderOption = "",
) -> None:
    """Make rewrite prompts from a grammar: balanced over kinds and styles, no two the same."""
    from eval.encoders import find_encoder
    from train.stages import Prompts, make_prompts

    config = Prompts(size, str(grammar or ""), tuple(split_list(kinds)), "" if near is None else f"{near:g}", seed)
    # Prompts come by the thousand and never again: a cache of embeddings would only grow.
    make_prompts(config, output, lambda: find_encoder(encoder, cached=False), fresh=fresh)


@app.command()
def texts(
    output: Output,
    sources: Annotated[
        list[Path] | None, typer.Argument(metavar="[SOURCES...]", help="CSV, Parquet, JSONL or text files.")
    ] = None,
    write: Annotated[int, typer.Option(min=0, help="Number of texts that the model writes.")] = 0,
    topics: Annotated[Path | None, typer.Option(help="TOML of topics and genres; default: train/topics.toml.")] = None,
    min_words: Annotated[int, typer.Option(min=1, help="Drop texts of fewer words.")] = 20,
    max_words: Annotated[int, typer.Option(min=1, help="Drop texts of more words.")] = 300,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature of written texts; 0 is greedy.")
    ] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(min=16, help="Maximum length of a written text, in tokens.")] = 220,
    backend: BackendOption = "auto",
    model: ModelOption = "embedded",
    adapter: AdapterOption = None,
    settings: SettingsOption = None,
    seed: Seed = 0,
    fresh: FreshOption = False,
) -> None:
    """Collect original texts from files, or have a model write them; drops near-duplicates and endless repetition.

    Writing is resumed by the same command.
    """
    from submission.backends import model_spec
    from train.stages import Texts, make_texts

    spec = model_spec(backend, model, adapter, settings) if write else None
    paths = tuple(str(path) for path in sources or [])
    config = Texts(paths, write, str(topics or ""), min_words, max_words, temperature, max_new_tokens, seed)
    make_texts(config, output, spec, fresh=fresh)


@app.command()
def rewrites(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="Table with rewrite_prompt (and kind, style).")],
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help="Table with original_text.")],
    output: Output,
    size: Annotated[int, typer.Option(min=0, help="Triplets; 0 means one for each prompt.")] = 0,
    backend: BackendOption = "auto",
    model: ModelOption = "embedded",
    adapter: AdapterOption = None,
    settings: SettingsOption = None,
    workers: WorkersOption = 1,
    ray: RayOption = "",
    ray_gpus: RayGpusOption = None,
    ray_cpus: RayCpusOption = 0,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    length_factor: Annotated[
        float, typer.Option(min=0.1, help="Maximum length of a rewrite, as a multiple of its text's tokens.")
    ] = 2.0,
    max_new_tokens: Annotated[int, typer.Option(min=16, help="Maximum length of a rewrite, in tokens.")] = 512,
    keep_cut: Annotated[
        bool, typer.Option("--keep-cut", help="Keep rewrites that were cut off at the length limit.")
    ] = False,
    seed: Seed = 0,
    fresh: FreshOption = False,
) -> None:
    """Have the target model rewrite texts under prompts. The same command again resumes.

    Prompts of one style meet texts of their own, so the triplets can be split with no style or text on two sides.
    """
    from submission.backends import model_spec
    from submission.backends.hardware import Placement
    from train.stages import Rewrites, make_rewrites

    config = Rewrites(size, temperature, top_p, min_p, length_factor, max_new_tokens, keep_cut, seed)
    spec = model_spec(backend, model, adapter, settings, Placement(workers, ray, ray_gpus, ray_cpus))
    make_rewrites(config, prompts, texts, output, spec, fresh=fresh)


@app.command()
def prepare(
    output: Annotated[Path, typer.Option("-o", "--output", help="Output folder.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCES...]", help="CSV, Parquet, JSONL, folders of them, or kaggle:owner/dataset."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML with [cleaning], [screens], [mix] and [split]; see train/recipes/.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE of the recipe, such as split.test=0.2.")
    ] = None,
    fresh: FreshOption = False,
    encoder: EncoderOption = "",
) -> None:
    """Clean, screen, mix and split triplets into train, validation and test Parquet files that share nothing.

    OUTPUT gets a data card (README.md) that counts every row, and dropped.csv that names each one that was left out.
    """
    from eval.encoders import find_encoder
    from submission.data.outputs import check_no_file
    from train.prepare import prepare as run
    from train.recipe import read_recipe

    check_no_file(output)
    run(read_recipe(sources or [], recipe, settings or []), output, find_encoder(encoder), fresh=fresh)


@app.command()
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]", help="TOML with all stages; see train/recipes/. Default with --triplets: own.toml."
        ),
    ] = None,
    triplets: Annotated[
        list[str] | None, typer.Option(help="Table of triplets to train on, or a folder of them; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of everything that is made.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE or SECTION.KEY=VALUE of the recipe.")
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            min=0, help="Cross-validate over N folds; the exported model learns from all rows but those of validation."
        ),
    ] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print time, memory and disk of each stage, and stop; sources on Kaggle are downloaded."
        ),
    ] = False,
    fresh: FreshOption = False,
    encoder: EncoderOption = "",
) -> None:
    """Run the stages of a recipe: prompts, texts and rewrites unless it has triplets, prepare, sft, merge, gguf, score.

    With --triplets no recipe is needed. What is finished is not done again. A scored run gets report.html.
    """
    from eval.encoders import find_encoder
    from train import forecast
    from train.folds import check_folds, run_folds
    from train.run import OWN, check, how_to_predict, read_run, run_stages

    if recipe is None and not triplets:
        raise UserError("name a RECIPE, or your triplets with --triplets FILE")
    chosen = [*(settings or []), *([f"output={output}"] if output else [])]
    made, metric = read_run(recipe or OWN, chosen, triplets or [], folds), find_encoder(encoder)
    (check_folds if folds else check)(made, fresh=fresh)
    if dry_run or not (made.output / "run.json").exists():
        for line in forecast.lines(forecast.forecast(made)):
            print_line(line, sys.stdout if dry_run else sys.stderr)
    if dry_run:
        return
    if folds:
        run_folds(made, metric, fresh=fresh)
    else:
        run_stages(made, metric, fresh=fresh)
    if command := how_to_predict(made):
        print_line(f"predict with it: {command}", sys.stderr)


@app.command()
def sft(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML with [sft]; see train/recipes/.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of adapter, checkpoints and curve.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, its memory and time, and stop.")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of [sft]; repeatable.")] = None,
    fresh: FreshOption = False,
) -> None:
    """Tune a model on triplets with LoRA or QLoRA. The same command again goes on from the last checkpoint."""
    from train.sft import sft as tune
    from train.sft_config import read_sft

    config = read_sft(recipe, settings or [])
    if dry_run:
        from train.dry_run import look

        look(config)
    elif output is None:
        raise UserError("name a folder to write to: -o FOLDER")
    else:
        tune(config, output, fresh=fresh)


@app.command()
def head(
    triplets: Annotated[Path, typer.Argument(metavar="TRIPLETS", help="CSV or Parquet of triplets to learn from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Output file, safetensors.")],
    encoder: EncoderOption = "",
) -> None:
    """Learn to predict the embedding of the prompt, in seconds; it chooses among candidates and among known prompts.

    Use it as the selector predicted:FILE of `python -m ensemble`, or with `--recover eval.retrieval:Nearest`.
    """
    from eval.encoders import find_encoder
    from eval.head import learn_head, write_head
    from submission.data.outputs import check_output
    from submission.data.tables import read_triplets

    check_output(output, [("table of triplets", triplets)])
    learned, fit = learn_head(read_triplets(triplets), find_encoder(encoder))
    write_head(output, learned, fit)
    LOG.info(f"{fit.rows} triplets; cosine of predicted and true prompt, in five folds: {fit.cosine}")
    knows = "it knows something of the pair" if fit.gain.low > 0 else "it is not shown to know anything of the pair"
    LOG.info(f"over the mean embedding of all prompts: {fit.gain:+.4f}: {knows}")
    LOG.info(f"written to {output}")


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML with [sft]; see train/recipes/.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the runs, the table and the plot.")],
    grid: Annotated[list[str], typer.Option(help="KEY=VALUE,VALUE of [sft]; repeatable. All combinations are run.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of [sft], for all runs; repeatable.")
    ] = None,
) -> None:
    """Train with several values of a recipe's options, and put the runs side by side. What is finished is kept."""
    from train.sweep import lines
    from train.sweep import sweep as run_all

    for line in lines(run_all(recipe, output, grid, settings or [])):
        print_line(line, sys.stdout)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="PEFT folder, such as runs/a/adapter.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Output folder.")],
    base: Annotated[str, typer.Option(help="Base model; default: what the adapter names.")] = "",
    dtype: Annotated[
        str, typer.Option(help="Type of the merged weights: auto, bfloat16, float16 or float32.")
    ] = "auto",
) -> None:
    """Merge an adapter into its base, in 16 bits or more, and check that nothing has changed."""
    from train.merge import merge as put_together

    put_together(adapter, output, base=base, dtype=dtype)


@app.command()
def cut(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="transformers folder, GGUF file or embedded.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Output folder.")],
    layers: Annotated[int, typer.Option(min=2, help="Number of layers to keep, spread evenly.")],
) -> None:
    """Write a smaller model that keeps some of MODEL's layers; tune it before use."""
    from train.bases import cut_layers

    kept = cut_layers(model, layers, output)
    LOG.info(f"written to {output}: layers {', '.join(map(str, kept))}")


@app.command()
def gguf(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="transformers folder; with --adapter a PEFT folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File; of several quantisations each gets its name.")],
    quantization: Annotated[
        str, typer.Option(help="Quantisations, comma-separated, such as BF16,Q8_0,Q4_K_M.")
    ] = "BF16",
    adapter: Annotated[bool, typer.Option("--adapter", help="Write an adapter alone, as a GGUF LoRA file.")] = False,
    base: Annotated[str, typer.Option(help="Base of the adapter; default: what it names.")] = "",
    base_gguf: Annotated[
        Path | None, typer.Option(help="F32 or F16 GGUF of the base, to check the adapter with.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Checkout of llama.cpp; default: the source of the installed llama-cpp-python.")
    ] = None,
) -> None:
    """Write GGUF files with llama.cpp's own converter, and compare them with transformers and with 16 bits."""
    from train.converter import find_converter
    from train.gguf import make_adapter, make_gguf, table

    names = split_list(quantization)
    if not names:
        raise UserError("--quantization names none")
    if adapter:
        make_adapter(Path(model), output, find_converter(llama_cpp), base=base, base_gguf=base_gguf)
        return
    files = {name: output if len(names) == 1 else output.with_name(f"{output.stem}-{name}.gguf") for name in names}
    for line in table(make_gguf(model, files, find_converter(llama_cpp))):
        print_line(line, sys.stdout)


@app.command()
def push(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML with [sft], and [gguf] for GGUF files.")],
    base: Annotated[
        str,
        typer.Option(
            help="Kaggle model: gemma-7b-it or another short name of `bundle --attach`, or "
            "owner/model/framework/variation/VERSION. Default: the embedded model."
        ),
    ] = "",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the bundle to make.")] = Path(
        "training-bundle"
    ),
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of [sft]; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the output of the last session.")] = False,
    deadline: Annotated[str, typer.Option(help="End the session within this time, 10m or more.")] = "8h30m",
    accelerator: Annotated[
        str, typer.Option(help="t4x2, l4x4, a100, h100, a machine shape of Kaggle, or none for no GPU.")
    ] = "NvidiaTeslaT4",
    rehearse: Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Rehearse first.")] = True,
    model: Annotated[
        Path | None, typer.Option(help="Small transformers folder to rehearse with instead of the base.")
    ] = None,
    send: Annotated[bool, typer.Option("--send/--no-send", help="Send it; otherwise stop after the rehearsal.")] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run to its end.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the client's commands instead of running them.")] = False,
) -> None:
    """Train on Kaggle's GPUs: bundle recipe, sets and wheels, rehearse the kernel, upload both.

    A session that ran out of time left checkpoints in its output: the same command with --resume goes on from there.
    """
    from submission.config import parse_duration
    from train.push import push_training, read_training

    training = read_training(recipe, settings or [], base, parse_duration(deadline, "--deadline"))
    push_training(
        training, output, resume=resume, accelerator=accelerator, rehearse_first=rehearse, model=model, send=send,
        wait=wait, show=show,
    )  # fmt: skip


def main() -> None:
    """Run a command; see `submission.commands.run_command`."""
    run_command(app)


if __name__ == "__main__":
    main()
