"""Configurations in TOML, and what commands leave in JSON and read again: manifests, notes, metadata, weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.tables import invoke

_PAIRS = "id,original_text,rewritten_text,rewrite_prompt\n" + "".join(
    f"{n},An original text number {n} about nothing.,A rewritten one {n}!,Make it {n}.\n" for n in range(12)
)
_SOURCE = {
    "name": "a",
    "backend": "scripted",
    "model": "embedded",
    "n": 2,
    "temperature": 0.8,
    "settings": ["batch=2"],
    "template": "short",
    "greedy": True,
    "seed": 1,
    "shots": "",
    "workers": 1,
}
_TOML: dict[str, dict[str, Any]] = {
    "constant": {"prompt": "Make it rhyme."},
    "best_of": {"selector": "most_frequent", "near": 1.0, "rotations": 0, "source": [_SOURCE]},
    "nearest": {"train": "pairs.csv", "shots": 2, "diversity": 0.3, "encoder": ""},
    "sources": {"source": [_SOURCE, {**_SOURCE, "name": "b"}]},
    "models": {
        "target": {"model": "embedded", "backend": "scripted", "settings": []},
        "judge": {"backend": "scripted"},
    },
    "recipe": {
        "source": [
            {
                "path": "pairs.csv",
                "name": "x",
                "share": 0.0,
                "limit": 0,
                "columns": {"rewrite_prompt": "rewrite_prompt"},
            }
        ],
        "cleaning": {},
        "screens": {"unchanged": 0.97, "refusals": True},
        "split": {"train": 0.8, "by": "group", "seed": 1},
        "mix": {"size": 0, "subsets": [2]},
        "model": {"model": "embedded", "settings": []},
    },
    "run": {
        "output": "runs",
        "prompts": {"size": 5, "near": "0"},
        "texts": {"write": 2},
        "rewrites": {"temperature": 0.5},
        "sft": {"base": "embedded", "rank": 4, "learning_rate": 1e-4},
        "gguf": {"quantizations": ["F16"]},
        "score": {"baselines": ["constant"], "limit": 2},
    },
    "kernel": {
        "recover": "zero_shot",
        "model": "embedded",
        "settings": ["context=1024"],
        "deadline": 100.0,
        "n_shots": 3,
        "fallback": "Make it new.",
        "max_failures": 0.2,
        "workers": 0,
    },
    "grammar": {"template": [{"text": "Rewrite as {style}."}], "style": ["a poem", "a song"]},
}


def toml_case(draw: random.Random, folder: Path) -> Callable[[], object]:
    """A configuration, altered or damaged, for the command that takes it."""
    kind = draw.choice(list(_TOML))
    (folder / "c.toml").write_bytes(mutate.toml_bytes(draw, _TOML[kind]))
    (folder / "pairs.csv").write_text(_PAIRS)
    mutate.user_files(draw, folder)
    out = draw.choice(("out.csv", "out.csv", "c.toml"))
    if kind in ("constant", "best_of", "nearest"):
        name = {"constant": "constant", "best_of": "ensemble.best_of:best_of", "nearest": "eval.retrieval:Nearest"}[
            kind
        ]
        more = ["--recover", name, "--recover-config", "c.toml", "--limit", "2"]
        return invoke("submission", "predict", "pairs.csv", "-o", out, *more, "--backend", "scripted")
    if kind == "sources":
        return invoke(
            "ensemble", "sample", "pairs.csv", "-o", "out.parquet", "--sources", "c.toml", "--near", "1", "--limit", "2"
        )
    if kind == "models":
        (folder / "candidates.csv").write_text(
            'id,original_text,rewritten_text,candidate,answers\n1,a,b,Make it.,"[[""x"", 0, -1.0, 2]]"\n'
        )
        selector = draw.choice(("likelihood", "judge_pick", "first"))
        return invoke("ensemble", "select", "candidates.csv", "--selector", selector, "-o", out, "--models", "c.toml")
    if kind == "recipe":
        return lambda: _read_recipe(folder / "c.toml")
    if kind == "run":
        return lambda: _read_run(folder / "c.toml")
    if kind == "kernel":
        return lambda: _read_settings(folder / "c.toml")
    return invoke("train", "prompts", "-o", out, "--grammar", "c.toml", "--near", "0", "--size", "3")


def manifest_case(draw: random.Random, folder: Path) -> Callable[[], object]:
    """Something in JSON that a command reads again, altered or damaged."""
    (folder / "pairs.csv").write_text(_PAIRS)
    kind = draw.choice(
        ("run", "rerun", "stage", "bundle", "kernel", "weights", "answers", "note", "sets", "report", "kaggle")
    )
    return _KINDS[kind](draw, folder)


def _finished_run(folder: Path) -> Path:
    from submission.predict.plan import RunConfig
    from submission.predict.run import predict

    predict(RunConfig(folder / "pairs.csv", folder / "out.csv", backend="scripted"))
    return folder / "out.csv.run.json"


def _run(draw: random.Random, folder: Path) -> Callable[[], object]:
    manifest = _finished_run(folder)
    manifest.write_bytes(mutate.json_bytes(draw, json.loads(manifest.read_text())))
    return invoke("submission", "inspect", "3", "--run", "out.csv")


def _rerun(draw: random.Random, folder: Path) -> Callable[[], object]:
    manifest = _finished_run(folder)
    content = mutate.json_bytes(draw, json.loads(manifest.read_text()))
    for file in folder.glob("out.csv*"):  # of our making: whether they may be replaced is for the manifest to say
        file.unlink()
    manifest.write_bytes(content)
    (folder / "mine").mkdir()
    return invoke("submission", "predict", "pairs.csv", "-o", "mine/../out2.csv", "--backend", "scripted")


def _report(draw: random.Random, folder: Path) -> Callable[[], object]:
    manifest = _finished_run(folder)
    manifest.write_bytes(mutate.json_bytes(draw, json.loads(manifest.read_text())))
    return lambda: _compare(folder)


def _compare(folder: Path) -> object:
    """What `eval compare` does with a run, by an encoder that costs nothing."""
    import numpy as np

    from eval.compare import compare, read_system, table
    from eval.encoders import Encoder
    from eval.scoring import read_truth

    class Letters(Encoder):
        def embed(self, texts: Sequence[str], *, keep: bool = True) -> Any:
            return np.array([[1 + text.count(letter) for letter in "aeiou"] for text in texts], np.float32)

    encoder = Letters("letters", folder)
    truth = read_truth(folder / "pairs.csv", encoder)
    return list(table(compare([read_system(str(folder / "out.csv"), truth, encoder)], truth, encoder)))


def _stage(draw: random.Random, folder: Path) -> Callable[[], object]:
    content = {
        "written": "2026",
        "version": "0.1.0",
        "made_from": {"stage": "prompts", "config": {"size": 3}},
        "hash": "0" * 64,
        "made": ["prompts.csv"],
    }
    (folder / "prompts.csv.run.json").write_bytes(mutate.json_bytes(draw, content))
    mutate.user_files(draw, folder)
    return invoke("train", "prompts", "-o", "p.csv", "--near", "0", "--size", "3")


def _sets(draw: random.Random, folder: Path) -> Callable[[], object]:
    content = {
        "written": "2026",
        "version": "0.1.0",
        "made_from": "0",
        "hashes": {"train.parquet": "0"},
        "made": ["train.parquet", "../thesis.txt", "/etc/hostname", "old.parquet"],
    }
    (folder / "sets").mkdir()
    (folder / "thesis.txt").write_text("mine")
    (folder / "sets" / "data.run.json").write_bytes(mutate.json_bytes(draw, content))
    (folder / "sets" / "data.run.json").chmod(0o444)
    from submission.data.outputs import up_to_date

    return lambda: up_to_date(folder / "sets" / "data", "0")


def _bundle(draw: random.Random, folder: Path) -> Callable[[], object]:
    made = folder / "bundle"
    made.mkdir()
    content = {"version": "0.1.0", "python": "3.12", "bytes": 3, "files": {"a.txt": {"bytes": 3, "sha256": "0" * 64}}}
    (made / "bundle.json").write_bytes(mutate.json_bytes(draw, content))
    (made / "a.txt").write_text("abc")
    (made / "kernel.toml").write_bytes(mutate.toml_bytes(draw, _TOML["kernel"]))
    metadata = {"title": "a bundle", "id": "OWNER/prompt-recovery-bundle", "licenses": [{"name": "other"}]}
    (made / "dataset-metadata.json").write_bytes(mutate.json_bytes(draw, metadata))
    _metadata(draw, folder)
    return invoke(
        "submission", "push", "--print", "--bundle", "bundle", "--metadata", "kernel-metadata.json", "--no-wait"
    )


def _kernel(draw: random.Random, folder: Path) -> Callable[[], object]:
    _metadata(draw, folder)
    return invoke("submission", draw.choice(("status", "output")), "--print")


def _metadata(draw: random.Random, folder: Path) -> None:
    content = {
        "id": "OWNER/prompt-recovery",
        "title": "prompt-recovery",
        "code_file": "k.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": ["OWNER/prompt-recovery-bundle"],
        "competition_sources": ["llm-prompt-recovery"],
        "kernel_sources": [],
        "model_sources": [],
    }
    (folder / "k.py").write_text("pass\n")
    (folder / "kernel-metadata.json").write_bytes(mutate.json_bytes(draw, content))


def _kaggle(draw: random.Random, folder: Path) -> Callable[[], object]:
    import os

    home = folder / "home" / ".kaggle"
    home.mkdir(parents=True)
    os.environ["HOME"] = str(home.parent)
    for name in ("kaggle.json", "credentials.json", "access_token"):
        (home / name).write_bytes(mutate.json_bytes(draw, {"username": "somebody", "key": "0123456789abcdef"}))
    from submission.publish.client import configured_user
    from submission.publish.credentials import hide

    return lambda: (hide("0123456789abcdef"), configured_user())


def _weights(draw: random.Random, folder: Path) -> Callable[[], object]:
    content = {"name": "w", "weights": {"first": 0.5, "longest": 0.5}, "seen": {"pairs": ["a"], "prompts": []}}
    (folder / "w.json").write_bytes(mutate.json_bytes(draw, content))
    _candidates(folder, '[["x", 0, -1.0, 2]]')
    return invoke("ensemble", "select", "candidates.csv", "--selector", "w", "-o", "out.csv", "--weights", "w.json")


def _answers(draw: random.Random, folder: Path) -> Callable[[], object]:
    cell = mutate.json_bytes(draw, [["x", 0, -1.0, 2], ["y", 1, -2.0, 3]]).decode("utf-8", "replace")
    _candidates(folder, cell.replace("\r", " "))
    return invoke("ensemble", "select", "candidates.csv", "--selector", "logprob", "-o", "out.csv")


def _candidates(folder: Path, answers: str) -> None:
    quoted = answers.replace('"', '""')
    (folder / "candidates.csv").write_text(
        f'id,original_text,rewritten_text,candidate,answers\n1,a,b,Make it.,"{quoted}"\n',
        encoding="utf-8",
        errors="replace",
    )


def _note(draw: random.Random, folder: Path) -> Callable[[], object]:
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "prompt-recovery.json").write_bytes(mutate.json_bytes(draw, {"template": "brief", "base": "embedded"}))
    (adapter / "adapter_config.json").write_bytes(mutate.json_bytes(draw, {"base_model_name_or_path": "none", "r": 4}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    from submission.backends.models import template_of
    from train.merge import named_base

    return lambda: (template_of(adapter), named_base(adapter))


def _read_recipe(path: Path) -> object:
    from train.recipe import read_recipe

    recipe = read_recipe([], path)
    return recipe.split.shares, recipe.model.spec()


def _read_run(path: Path) -> object:
    from train.run import read_run

    run = read_run(path)
    if run.sft:
        run.sft.check()
    return run


def _read_settings(path: Path) -> object:
    from submission.publish.needs import needs_of

    path.rename(path.with_name("kernel.toml"))
    try:
        return needs_of(path.parent)
    finally:
        path.with_name("kernel.toml").rename(path)


_KINDS: dict[str, Callable[[random.Random, Path], Callable[[], object]]] = {
    "run": _run,
    "rerun": _rerun,
    "report": _report,
    "stage": _stage,
    "bundle": _bundle,
    "kernel": _kernel,
    "weights": _weights,
    "answers": _answers,
    "note": _note,
    "sets": _sets,
    "kaggle": _kaggle,
}
