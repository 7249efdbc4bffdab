"""The study of docs/STUDY.md from nothing: stages that go on where they were stopped, then its figures.

    make study
    python docs/study/study.py --list
    python docs/study/study.py --only tuned --only compare-ways

What is made lies under runs/study; sets, answers, figures and PNGs are kept beside this file, and what is there is not
made again: remove it to have it anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

HERE = Path("docs/study")
RUNS = Path("runs/study")
SETS = HERE / "sets"
TEST = SETS / "test.parquet"
FRESH = SETS / "fresh.parquet"


def plainly(train: str) -> Sequence[str]:
    """Settings of [sft] for rows whose prompts are said in one plain way."""
    return ("rank=8", "alpha=16", f"train={RUNS}/{train}.parquet", f"validation={RUNS}/plain-validation.parquet")


# What is trained, beside docs/study/tune.toml: settings of [sft].
TUNED: dict[str, Sequence[str]] = {
    "tuned": (),
    "other-seed": ("seed=1",),
    "size-64": ("rows=64",),
    "size-128": ("rows=128",),
    "one-kind": (f"train={RUNS}/one-kind.parquet",),
    "mixed": (f"train={RUNS}/mixed.parquet",),
    "rate-1e-4": ("rows=64", "learning_rate=1e-4"),
    "rate-2e-3": ("rows=64", "learning_rate=2e-3"),
    "epochs-10": ("rows=64", "epochs=10", "evaluate_every=8", "save_every=8", "samples=22"),
    "rank-8": ("rank=8", "alpha=16"),
    "plain": plainly("plain-train"),
    "plain-64": (*plainly("plain-train"), "rows=64"),
    "plain-128": (*plainly("plain-train"), "rows=128"),
    "attention": ("targets=q_proj,k_proj,v_proj,o_proj",),
    "half": (f"base={RUNS}/half-base",),
    "distilled": plainly("distilled"),
    "distilled-default": plainly("distilled-default"),
}
# Minutes that a stage took on two cores, when it was last run.
MINUTES = {
    "sets": 110, "baselines": 4.2, "half-base": 0.1, "tuned": 9.7, "other-seed": 8.8, "size-64": 3.9, "size-128": 5.8,
    "one-kind": 5.9, "mixed": 5.5, "rate-1e-4": 5.0, "rate-2e-3": 4.1, "epochs-10": 14.2, "rank-8": 7.7, "plain": 7.9,
    "plain-64": 4.0, "plain-128": 5.3, "attention": 7.8, "half": 7.6, "default": 1.5, "best-of-nine": 4.2,
    "best-of-ten": 2.8, "search": 15.2, "quantizations": 7.1, "ensemble": 28.8, "best-of": 10.4, "small": 34.4,
    "more-answers": 43.0, "curve": 44.0, "distil-rows": 14.0, "distilled": 22.0,
    "distil-default-rows": 2.2, "distilled-default": 15.5,
    "fresh-sets": 29.0, "more-answers-fresh": 13.5, "search-fresh": 9.8, "speed": 23.7,
}  # fmt: skip
# One way of asking for each kind of prompt, for `plain`: which of its many ways was taken no rewrite tells.
PLAIN = {
    "form": "Rewrite this text as {style}.",
    "voice": "Rewrite this text in the voice of {style}.",
    "tone": "Rewrite this text in a {style} tone.",
}
MERGED = {name: f"merged-{name.lower()}" for name in ("F16", "Q8_0", "Q5_K_M", "Q4_K_M")}  # and their answers
# What is put beside what: a reference, then the others.
COMPARED: dict[str, tuple[str, ...]] = {
    "ways": ("tuned", "constant", "constant_fitted", "zero_shot", "few_shot", "nearest"),
    "diversity": ("mixed", "one-kind", "zero_shot"),
    "size": ("tuned", "size-128", "size-64", "zero_shot"),
    "rates": ("size-64", "rate-1e-4", "rate-2e-3", "epochs-10", "zero_shot"),
    "layers": ("tuned", "rank-8", "attention", "zero_shot"),
    "half": ("tuned", "half", "constant", "zero_shot"),
    "phrasing": ("rank-8", "plain", "zero_shot", "constant"),
    "plain-size": ("plain", "plain-128", "plain-64", "zero_shot"),
    "default": ("best-of-ten", "search", "best-of-nine", "one-answer", "constant", "constant_fitted", "zero_shot",
                "tuned"),
    "seeds": ("tuned", "other-seed", "zero_shot"),
    "distil": ("plain", "distilled", "distilled-default", "search"),
    "quantizations": (*MERGED.values(), "zero_shot"),
}  # fmt: skip
SHIPPED = "plain"
# The picture of the front page, with what an answer takes on two cores with bfloat16 instructions.
SHOWN = {
    "search": "search, 5 s a row",
    "best-of-ten": "the default (best of ten), 1 s",
    "one-answer": "one answer, 0.2 s",
    "zero_shot": "the untuned model, 0.2 s",
    "constant": "a constant prompt",
}
# The nine answers of the tuned model; `predict` with nothing named asks the untuned one too.
TUNED_ALONE = ("--recover", "best_of", "--recover-config", HERE / "best-of-nine.toml")
LONGEST = "epochs-10"  # of which the curve is shown
FREE_OR_LIKELIHOOD = ("first", "most_frequent", "logprob", "logprob_total", "consensus", "likelihood", "noisy_channel",
                      "posterior")  # fmt: skip
CHEAP = ("first", "random", "longest", "most_frequent", "logprob", "consensus", "likelihood", "consensus+likelihood")
EVERY = (*CHEAP, "judge_pick", "judge_rate", "judge_yes_no")
BASELINES = ("constant", "constant_fitted", "nearest", "zero_shot", "few_shot")
PARTS = ("train", "validation", "test")
PROPOSALS = (16, 32, 64, 128, 256)  # of a search, a row


@dataclass(frozen=True)
class Stage:
    """A step that makes `product`; done if it is there."""

    name: str
    product: Path
    work: Callable[[], None]


def stages() -> list[Stage]:
    """All, in order."""
    found = [
        Stage("sets", TEST, sets),
        Stage("kinds", RUNS / "mixed.parquet", one_kind_and_mixed),
        Stage("phrasing", RUNS / "plain-validation.parquet", plain_phrasing),
        Stage("baselines", HERE / "answers/zero_shot.csv", baselines),
        Stage("half-base", RUNS / "half-base/config.json", half_base),
        Stage("fresh-sets", FRESH, fresh_sets),
        Stage("distil-rows", RUNS / "distilled.parquet", distil_rows("distilled", "--recover", "search")),
        Stage("distil-default-rows", RUNS / "distilled-default.parquet", distil_rows("distilled-default")),
        *(Stage(name, HERE / f"answers/{name}.csv", tune(name, settings)) for name, settings in TUNED.items()),
        Stage("default", HERE / "answers/one-answer.csv", default),
        Stage("best-of-nine", HERE / "answers/best-of-nine.csv", best_of("best-of-nine", *TUNED_ALONE)),
        Stage("best-of-ten", HERE / "answers/best-of-ten.csv", best_of("best-of-ten")),
        Stage("search", HERE / "answers/search.csv", best_of("search", "--recover", "search")),
        Stage("quantizations", HERE / "answers/merged-q4_k_m.csv", quantizations),
        Stage("ensemble", HERE / "ensemble.json", many_answers),
        Stage("best-of", HERE / "best-of.json", best_of_default),
        Stage("small", HERE / "small.json", small_generator),
        Stage("more-answers", HERE / "more-answers.json", more_answers("more-answers", TEST)),
        Stage("more-answers-fresh", HERE / "more-answers-fresh.json", more_answers("more-answers-fresh", FRESH)),
        Stage("search-fresh", HERE / "search-fresh.json", search_fresh),
        Stage("curve", HERE / "curve.json", curve),
        Stage("speed", HERE / "speed.json", speed),
    ]
    for name, systems in COMPARED.items():
        found.append(Stage(f"compare-{name}", HERE / f"{name}.json", compare(name, systems)))
    return found


def run(room: str, *arguments: object) -> str:
    """Run a command of this project; its standard output.

    Raises:
        SystemExit: it failed.
    """
    words = [sys.executable, "-m", room, *map(str, arguments)]
    print("$ python", *words[1:], flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def sets() -> None:
    """Prompts, texts and rewrites by the embedded model, screened and divided; they are kept beside this file."""
    run("train", "run", HERE / "sets.toml")
    SETS.mkdir(exist_ok=True)
    for name in ("README.md", "data.run.json", "lengths.png", *(f"{part}.parquet" for part in PARTS)):
        shutil.copyfile(RUNS / "sets" / name, SETS / name)


def one_kind_and_mixed() -> None:
    """The most frequent kind of prompt alone, and as many rows of all kinds."""
    import pandas as pd

    RUNS.mkdir(parents=True, exist_ok=True)
    rows = pd.read_parquet(SETS / "train.parquet")
    kind = rows["kind"].value_counts().index[0]
    alone = rows[rows["kind"] == kind]
    alone.to_parquet(RUNS / "one-kind.parquet", index=False)
    rows.head(len(alone)).to_parquet(RUNS / "mixed.parquet", index=False)


def plain_phrasing() -> None:
    """The training rows with their prompts said in one plain way."""
    import pandas as pd

    RUNS.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation"):
        rows = pd.read_parquet(SETS / f"{part}.parquet")
        rows["rewrite_prompt"] = [
            PLAIN[kind].format(style=style) for kind, style in zip(rows["kind"], rows["style"], strict=True)
        ]
        rows.to_parquet(RUNS / f"plain-{part}.parquet", index=False)


def baselines() -> None:
    """Ways of predicting without tuning."""
    only = [part for name in BASELINES for part in ("--only", name)]
    run("eval", "baselines", SETS / "train.parquet", TEST, "-o", RUNS / "baselines",
        "--backend", "transformers", *only)  # fmt: skip
    for name in BASELINES:
        keep(RUNS / "baselines/test" / name / "submission.csv", name)


def half_base() -> None:
    """Every second layer of the embedded model."""
    if not (RUNS / "half-base/config.json").is_file():
        run("train", "cut", "embedded", "--layers", 15, "-o", RUNS / "half-base")


def tune(name: str, settings: Sequence[str]) -> Callable[[], None]:
    """Tune, and predict with the adapter on the base that it was trained on."""
    folder = RUNS / name

    def work() -> None:
        chosen = [part for setting in settings for part in ("--set", setting)]
        run("train", "sft", HERE / "tune.toml", *chosen, "-o", folder / "sft")
        base = RUNS / "half-base" if name == "half" else "embedded"
        model = ("--backend", "transformers", "--model", base, "--adapter", folder / "sft/adapter")
        run("submission", "predict", TEST, "-o", folder / "submission.csv", *model)
        keep(folder / "submission.csv", name)
        told = json.loads((folder / "sft/adapter.run.json").read_text())
        (HERE / "losses").mkdir(exist_ok=True)
        kept = {key: told[key] for key in ("rows", "steps", "seconds", "best", "history")}
        (HERE / "losses" / f"{name}.json").write_text(json.dumps(kept) + "\n")
        if name == LONGEST:
            shutil.copyfile(folder / "sft/training.png", HERE / f"{name}.png")

    return work


def made(*names: str) -> None:
    """Tune again what is not under runs/study, though its answers are here."""
    for name in names:
        if not (RUNS / name / "sft/adapter").is_dir():
            half_base()
            plain_phrasing()
            tune(name, TUNED[name])()


def default() -> None:
    """The adapter that comes with the package, and one answer of it to each row."""
    made(SHIPPED)
    run("train", "gguf", RUNS / SHIPPED / "sft/adapter", "-o", "submission/tuned/adapter.gguf", "--adapter")
    run("submission", "predict", TEST, "-o", RUNS / "default.csv", "--recover", "zero_shot")
    keep(RUNS / "default.csv", "one-answer")


def best_of(name: str, *options: object) -> Callable[[], None]:
    """The best of several answers, as `predict` gives it."""

    def work() -> None:
        output = RUNS / f"{name}.csv"
        run("submission", "predict", TEST, "-o", output, *options)
        keep(output, name)

    return work


def quantizations() -> None:
    """The tuned model, merged, in several precisions."""
    made("tuned")
    merged = RUNS / "tuned/merged"
    if not (merged / "config.json").is_file():
        run("train", "merge", RUNS / "tuned/sft/adapter", "-o", merged)
    table = run("train", "gguf", merged, "-o", RUNS / "tuned/merged.gguf", "--quantization", ",".join(MERGED))
    (HERE / "quantizations.txt").write_text(table)
    for name, answers in MERGED.items():
        file, output = RUNS / f"tuned/merged-{name}.gguf", RUNS / f"tuned/merged-{name}.csv"
        run("submission", "predict", TEST, "-o", output, "--model", file)
        keep(output, answers)


def many_answers() -> None:
    """Seventeen answers of three models, and ways of choosing among them that take minutes."""
    choose("ensemble", TEST, "sources.toml", ("tuned", "other-seed", "half"), CHEAP)


def best_of_default() -> None:
    """Nine answers of the model that comes with the package, as `ensemble sample` gives them with nothing named."""
    choose("best-of", TEST, "", (), CHEAP)


def more_answers(name: str, pairs: Path) -> Callable[[], None]:
    """A greedy answer and 64 samples: does a choice get worse when there is more to choose from?"""

    def work() -> None:
        choose(name, pairs, "", (), FREE_OR_LIKELIHOOD, "--set", "n=64")

    return work


def fresh_rows() -> pd.DataFrame:
    """Rows of another seed."""
    import pandas as pd

    run("train", "run", HERE / "fresh.toml")
    return pd.read_parquet(RUNS / "fresh/sets/test.parquet")


def style_of(rows: pd.DataFrame, others: pd.DataFrame) -> pd.Series[bool]:
    """Whether each row has a style of one of the others."""
    return rows["style"].str.casefold().isin(set(others["style"].str.casefold()))


def fresh_sets() -> None:
    """Rows of another seed that share no style, prompt or text with what the default learned."""
    import pandas as pd

    from eval.encoders import find_encoder
    from eval.grouping import NEAR, near_pairs

    rows = fresh_rows()
    known = pd.concat([pd.read_parquet(SETS / f"{part}.parquet") for part in ("train", "validation")])
    shared = style_of(rows, known).to_numpy()
    encoder = find_encoder("")
    # Texts by embedding too, as these rows were chosen before `eval.words` was there.
    for column, near in (("rewrite_prompt", NEAR), ("original_text", 0.9), ("rewritten_text", 0.9)):
        ours, _ = near_pairs(list(rows[column]), list(known[column]), encoder, near)
        shared[ours] = True
    rows[~shared].to_parquet(FRESH, index=False)


def distil_rows(name: str, *options: object) -> Callable[[], None]:
    """Pairs of another seed, with the prompts that are recovered for them, beside the training rows in plain words.

    No style of the test set is among them.
    """

    def work() -> None:
        import pandas as pd

        plain_phrasing()
        rows = fresh_rows()
        rows = rows[~style_of(rows, pd.read_parquet(TEST))]
        rows = rows.assign(id="fresh-" + rows["id"])
        pairs, found = RUNS / "distil-pairs.parquet", RUNS / f"{name}.csv"
        rows[["id", "original_text", "rewritten_text"]].to_parquet(pairs, index=False)
        run("submission", "predict", pairs, "-o", found, *options)
        said = pd.read_csv(found, dtype=str).set_index("id")["rewrite_prompt"]
        learned = [pd.read_parquet(RUNS / "plain-train.parquet"), rows.assign(rewrite_prompt=list(said[rows["id"]]))]
        pd.concat(learned).to_parquet(RUNS / f"{name}.parquet", index=False)

    return work


def search_fresh() -> None:
    """Nine answers to the fresh rows, and a search that goes on from them."""
    choose("search-fresh", FRESH, "", (), FREE_OR_LIKELIHOOD, more=("--proposals", 32))


def first_rows() -> Path:
    """The first 60 test rows, for what takes long."""
    import pandas as pd

    some = RUNS / "test-60.parquet"
    RUNS.mkdir(parents=True, exist_ok=True)
    pd.read_parquet(TEST).head(60).to_parquet(some, index=False)
    return some


def curve() -> None:
    """What more proposals buy: choices among more answers, and searches that word nine answers otherwise."""
    rows = first_rows()
    experiment("curve", rows, "", (), FREE_OR_LIKELIHOOD, "--set", "n=64")
    found: dict[str, Any] = {"answers": json.loads((RUNS / "curve/experiment.json").read_text()), "search": {}}
    for proposals in PROPOSALS:  # each goes on with the calls that the one before it logged
        experiment("curve-search", rows, "", (), ("first", "posterior"), more=("--proposals", proposals))
        told = json.loads((RUNS / "curve-search/experiment.json").read_text())
        found["search"][str(proposals)] = told["selectors"]
    (HERE / "curve.json").write_text(json.dumps(found, indent=1) + "\n")
    plot_curve(found)


def plot_curve(found: dict[str, Any]) -> None:
    """Scores against proposals a row, as `curve` found them."""
    from eval.charts import canvas, legend, style

    chosen = found["answers"]["curve"]["chosen"]
    with canvas(4.6) as (axes, png):
        for number, name in enumerate(("oracle", "posterior", "noisy_channel", "likelihood")):
            label = f"{name} of so many answers"
            axes.plot(range(1, len(chosen[name]) + 1), chosen[name], label=label, **style(number))
        for number, (name, label) in enumerate((("search_oracle", "oracle of a search"), ("search", "search")), 4):
            means = [found["search"][str(proposals)][name]["mean"]["mean"] for proposals in PROPOSALS]
            axes.plot(PROPOSALS, means, marker="o", label=label, **style(number))
        axes.set_xscale("log", base=2)
        ticks = [1, 4, *PROPOSALS]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("proposals a row: answers, and answers in other words")
        axes.set_ylabel("mean score by MiniLM")
        axes.set_ylim(bottom=0)
        legend(axes)
    (HERE / "curve.png").write_bytes(png.getvalue())


def small_generator() -> None:
    """The seed's try: a small generator and a bigger judge, on the first 60 rows, since judges cost most."""
    some = first_rows()
    if not (RUNS / "judge/sft/adapter").is_dir():
        run("train", "sft", HERE / "judge.toml", "-o", RUNS / "judge/sft")  # 5.8 minutes
    choose("small", some, "small-sources.toml", ("half",), EVERY)


def choose(
    name: str, pairs: Path, sources: str, models: Sequence[str], selectors: Sequence[str], *sampling: str,
    more: Sequence[object] = (),
) -> None:  # fmt: skip
    """An `experiment` whose figures are kept beside this file."""
    experiment(name, pairs, sources, models, selectors, *sampling, more=more)
    for file, kept in (("experiment.json", f"{name}.json"), ("report-headroom.png", f"{name}-headroom.png")):
        shutil.copyfile(RUNS / name / file, HERE / kept)


def experiment(
    name: str, pairs: Path, sources: str, models: Sequence[str], selectors: Sequence[str], *sampling: str,
    more: Sequence[object] = (),
) -> None:  # fmt: skip
    """Sample answers, let the selectors choose, and score the choices.

    Args:
        name: of the stage.
        pairs: with their true prompts.
        sources: file of [[source]] tables; "" for the default's.
        models: of the study that the sources name.
        selectors: that choose.
        sampling, more: further options of `ensemble sample` and of `ensemble experiment`.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    made(*models)
    candidates = RUNS / f"{name}.parquet"
    named = ("--sources", HERE / sources) if sources else ()
    run("ensemble", "sample", pairs, "-o", candidates, *named, *sampling)
    run("ensemble", "experiment", candidates, "--truth", pairs, "-o", RUNS / name, "--models", HERE / "models.toml",
        "--by", "kind", "--rotations", 3, "--selectors", ",".join(selectors), *more)  # fmt: skip


def speed() -> None:
    """Rows per second beside other programs."""
    told = run("eval", "throughput", TEST, "--plot", HERE / "speed.png", "--json")
    write(HERE / "speed.json", told)


def compare(name: str, systems: Sequence[str]) -> Callable[[], None]:
    """Means and paired differences of some answers, and their plot."""

    def work() -> None:
        answers = [f"{system}={HERE}/answers/{system}.csv" for system in systems]
        told = run("eval", "compare", *answers, "--truth", TEST, "--reference", systems[0], "--json")
        print(told)
        write(HERE / f"{name}.json", told)
        plot(name, name)
        if name == "default":
            plot(name, "front", SHOWN)

    return work


def plot(name: str, picture: str, shown: Mapping[str, str] | None = None) -> None:
    """Means with their intervals, of all systems or of some, which have other names then."""
    from eval.charts import intervals
    from eval.intervals import Interval

    systems = json.loads((HERE / f"{name}.json").read_text())["systems"]
    found = {}
    for system, label in (shown or {system: system for system in systems}).items():
        one = systems[system]
        found[label] = Interval(one["mean"], one["low"], one["high"], (one["high"] - one["low"]) / 3.92)
    png = intervals(found, "mean score by MiniLM, 95 % interval", from_zero=True)
    (HERE / f"{picture}.png").write_bytes(png)


def keep(submission: Path, name: str) -> None:
    """A copy of answers beside this file: all comparisons are made from these."""
    (HERE / "answers").mkdir(exist_ok=True)
    shutil.copyfile(submission, HERE / "answers" / f"{name}.csv")


def write(path: Path, told: str) -> None:
    """The machine-readable last line of a command, for people as well."""
    path.write_text(json.dumps(json.loads(told.splitlines()[-1]), indent=1) + "\n")


def main() -> None:
    """Run what is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="stages, minutes and whether they are done; runs nothing")
    parser.add_argument("--only", action="append", help="a stage; again for more")
    asked = parser.parse_args()
    found = stages()
    if unknown := sorted(set(asked.only or ()) - {stage.name for stage in found}):
        parser.error(f"unknown stage {unknown[0]!r}; --list shows them")
    for stage in found:
        done = stage.product.is_file()
        if asked.list:
            print(f"{stage.name:24} {MINUTES.get(stage.name, 0.1):5.1f} min  {'done' if done else ''}")
        elif not done and (not asked.only or stage.name in asked.only):
            print(f"== {stage.name}", flush=True)
            began = time.monotonic()
            stage.work()
            print(f"== {stage.name}: {(time.monotonic() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
