"""Choices of training on triplets of one's own, each in the same folds; question 6 of docs/STUDY.md.

    python docs/study/choices.py mine.csv -o runs/choices
    python docs/study/choices.py mine.csv -o runs/choices --only rank-1 --only epochs-4

Each choice trains on every fold with the recipe train/recipes/own.toml and one thing changed, and gives each row of its
test set one answer. Answers that are newer than their sets, the recipe and this file are not made again; of other
triplets or a changed recipe name another output. It ends with paired differences to the recipe itself, which is trained
first in any case.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from study import PLAIN, SETS

if TYPE_CHECKING:
    import pandas as pd

OWN, ANOTHER_SEED = "own", "seed-1"
RECIPE = "train/recipes/own.toml"
_POLITE = re.compile(r'^["\' ]*((can|could|would|will) you |please |kindly )+', re.IGNORECASE)
_VERBS = re.compile(
    r"^(revise|transform|edit|adapt|rephrase|reword|redraft|recreate|rework|refine|reconfigure|convert|alter|modify|"
    r"change|recast|restate|restructure|enhance|improve|paraphrase|craft|write|compose|turn|reimagine|make)\b",
    re.IGNORECASE,
)

Rows = Callable[["pd.DataFrame"], "pd.DataFrame"]


@dataclass(frozen=True)
class Choice:
    """Settings of [sft] that differ from the recipe's, and what is done to the training rows."""

    settings: tuple[str, ...] = ()
    rows: Rows | None = None


def plainly_worded(rows: pd.DataFrame) -> pd.DataFrame:
    """Prompts without politeness, each beginning with Rewrite: which verb was taken no rewrite tells."""
    said = [_VERBS.sub("Rewrite", _POLITE.sub("", prompt)) for prompt in rows["rewrite_prompt"]]
    return rows.assign(rewrite_prompt=[text[:1].upper() + text[1:] for text in said])


def with_made_ones(rows: pd.DataFrame) -> pd.DataFrame:
    """The study's own triplets mixed in, said in one plain way."""
    import pandas as pd

    made = pd.read_parquet(SETS / "train.parquet")
    said = [PLAIN[kind].format(style=style) for kind, style in zip(made["kind"], made["style"], strict=True)]
    made = made.assign(rewrite_prompt=said, id="made-" + made["id"])
    mixed = pd.concat([rows, made])[["id", "original_text", "rewritten_text", "rewrite_prompt"]]
    return mixed.sample(frac=1.0, random_state=0)


CHOICES: dict[str, Choice] = {
    OWN: Choice(),
    "plain": Choice(rows=plainly_worded),
    "rank-1": Choice(("rank=1", "alpha=2")),
    "rows-100": Choice(("rows=100",)),
    "rows-200": Choice(("rows=200",)),
    "epochs-1": Choice(("epochs=1",)),
    "epochs-4": Choice(("epochs=4",)),
    "rate-2e-4": Choice(("learning_rate=2e-4",)),
    "rate-1e-3": Choice(("learning_rate=1e-3",)),
    # Not `short`: it begins the answer with words that hardly any real prompt begins with (2 rows of 169).
    "detailed": Choice(("template=detailed",)),
    "mixed": Choice(rows=with_made_ones),
    ANOTHER_SEED: Choice(("seed=1",)),
}
AVERAGE = "average"  # of the adapters of two seeds


def run(room: str, *arguments: object) -> None:
    """Run a command of this project.

    Raises:
        SystemExit: it failed.
    """
    words = [sys.executable, "-m", room, *map(str, arguments)]
    print("$ python", *words[1:], flush=True)
    if code := subprocess.run(words, check=False).returncode:
        raise SystemExit(code)


def fold_sets(triplets: Path, output: Path, folds: int) -> list[Path]:
    """The sets of each fold, as `train run --folds` makes them."""
    found = [output / "sets" / str(fold + 1) for fold in range(folds)]
    recipe = split_of(output)
    for fold, folder in enumerate(found):  # sets that are there, of the same triplets, are left alone
        run("train", "prepare", triplets, "-o", folder, "--recipe", recipe,
            "--set", f"split.folds={folds}", "--set", f"split.fold={fold}")  # fmt: skip
    return found


def split_of(output: Path) -> Path:
    """The recipe's [split] alone, which is what `prepare` takes."""
    text = Path(RECIPE).read_text(encoding="utf-8")
    (found,) = re.findall(r"^\[split\]$.*?(?=^\[)", text, re.MULTILINE | re.DOTALL)
    path = output / "split.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found, encoding="utf-8")
    return path


def train_fold(choice: Choice, sets: Path, output: Path) -> None:
    """Train on a fold, and answer its test rows."""
    import pandas as pd

    train = sets / "train.parquet"
    if choice.rows:
        output.mkdir(parents=True, exist_ok=True)
        choice.rows(pd.read_parquet(train)).to_parquet(output / "train.parquet", index=False)
        train = output / "train.parquet"
    given = ("dtype=bfloat16", "samples=0", f"train={train}", f"validation={sets / 'validation.parquet'}")
    chosen = [part for setting in (*given, *choice.settings) for part in ("--set", setting)]
    run("train", "sft", RECIPE, *chosen, "-o", output / "sft")
    answer(output / "sft/adapter", sets, output)


def average_fold(adapters: list[Path], sets: Path, output: Path) -> None:
    """Put the adapters of two seeds together, half of each, and answer the test rows."""
    from peft import AutoPeftModelForCausalLM

    # No bare numbers: PEFT would take the layers of such a number for parts of another adapter, and leave them out.
    names = [f"seed{number}" for number in range(len(adapters))]
    model = AutoPeftModelForCausalLM.from_pretrained(str(adapters[0]), adapter_name=names[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(path), adapter_name=name)
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "both", combination_type="cat")
    model.set_adapter("both")
    model.save_pretrained(str(output / "adapters"), selected_adapters=["both"])
    answer(output / "adapters/both", sets, output)


def answer(adapter: Path, sets: Path, output: Path) -> None:
    """One greedy answer to each test row."""
    gguf = output / "adapter.gguf"
    run("train", "gguf", adapter, "-o", gguf, "--adapter")
    run("submission", "predict", sets / "test.parquet", "-o", output / "submission.csv", "--model", "embedded",
        "--adapter", gguf, "--recover", "zero_shot")  # fmt: skip


def compare(output: Path, names: list[str], sets: list[Path]) -> None:
    """Means and paired differences over the rows of all folds."""
    import pandas as pd

    truth = output / "truth.parquet"
    pd.concat([pd.read_parquet(folder / "test.parquet") for folder in sets]).to_parquet(truth, index=False)
    systems = []
    for name in names:
        parts = [output / name / folder.name / "submission.csv" for folder in sets]
        if not all(part.is_file() for part in parts):
            continue
        table = pd.concat([pd.read_csv(part, dtype=str, keep_default_na=False) for part in parts])
        table.to_csv(output / f"{name}.csv", index=False)
        systems.append(f"{name}={output / name}.csv")
    run("eval", "compare", *systems, "--truth", truth, "--reference", OWN)


def main() -> None:
    """Train, answer and compare what is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triplets", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=[*CHOICES, AVERAGE], help="a choice; again for more")
    parser.add_argument("--folds", type=int, default=5)
    asked = parser.parse_args()
    if asked.folds < 2:
        parser.error(f"--folds {asked.folds}: two are the least")
    wanted = {OWN, *(asked.only or [*CHOICES, AVERAGE])}
    if AVERAGE in wanted:
        wanted.add(ANOTHER_SEED)
    sets = fold_sets(asked.triplets, asked.output, asked.folds)
    for name in [*CHOICES, AVERAGE]:
        if name not in wanted:
            continue
        for folder in sets:
            here, began = asked.output / name / folder.name, time.monotonic()
            answers, made_from = here / "submission.csv", (folder / "test.parquet", Path(RECIPE), Path(__file__))
            if answers.is_file() and answers.stat().st_mtime > max(path.stat().st_mtime for path in made_from):
                continue
            if name == AVERAGE:
                both = [asked.output / one / folder.name / "sft/adapter" for one in (OWN, ANOTHER_SEED)]
                average_fold(both, folder, here)
            else:
                train_fold(CHOICES[name], folder, here)
            print(f"== {name}, fold {folder.name}: {(time.monotonic() - began) / 60:.1f} min", flush=True)
    compare(asked.output, [*CHOICES, AVERAGE], sets)


if __name__ == "__main__":
    main()
