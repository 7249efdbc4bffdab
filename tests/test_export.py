"""Adapters are merged, converted and predicted with, and `train run` does all of it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli, command, environment, runner

TRAIN = ROOT / "examples" / "train.csv"
NOT_REACHED = "cannot be downloaded"


@pytest.fixture
def run(tmp_path: Path) -> Cli:
    """Run `python -m train ...` in the test's folder."""
    return runner("train", tmp_path)


def test_an_adapter_is_asked_as_it_was_trained(run: Cli, tuned_run: Path, tiny: Path, tmp_path: Path) -> None:
    assert run("merge", tuned_run / "adapter", "-o", "merged").code == 0
    predict = runner("submission", tmp_path)
    for name, options in {
        "adapter": ("--model", tiny, "--adapter", tuned_run / "adapter"),
        "merged": ("--model", "merged"),
    }.items():
        done = predict("predict", TRAIN, "-o", f"{name}.csv", "--backend", "transformers", *options,
                       "--max-new-tokens", 4, "--limit", 1, "--max-failures", 1)  # fmt: skip
        assert done.code == 0, done.err
        told = json.loads((tmp_path / f"{name}.csv.run.json").read_text())
        assert "brief" in json.dumps(told)


def test_a_merged_model_is_base_and_adapter(run: Cli, tuned_run: Path, tiny: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tuned_run / "adapter"
    done = run("merge", adapter, "-o", "merged", "--dtype", "float32")
    assert done.code == 0, done.err
    both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(adapter)).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("A cat sat on a mat.", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.allclose(both(ids).logits, merged(ids).logits, atol=1e-4)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny)(ids).logits, merged(ids).logits, atol=1e-2)
    assert run("merge", adapter, "-o", "merged").code == 0, "what the command made, it may replace"
    wrong = run("merge", adapter, "-o", "other", "--base", "embedded")
    assert wrong.code == 2
    assert "does not fit" in wrong.err
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_gguf_files_are_what_they_were_made_from(run: Cli, hf_folder: Path, tmp_path: Path) -> None:
    done = run("gguf", hf_folder, "-o", "m.gguf", "--quantization", "F16,Q8_0")
    if "cannot be downloaded" in done.err:
        pytest.skip("the converter comes from the package registry, which is not reached")
    assert done.code == 0, done.err
    files = {path.name for path in tmp_path.glob("*.gguf")}
    assert files == {"m-F16.gguf", "m-Q8_0.gguf"}
    told = json.loads((tmp_path / "m-F16.gguf.run.json").read_text())
    assert told["from_transformers"] < 1e-3
    assert told["divergence"] < 1e-6
    assert json.loads((tmp_path / "m-Q8_0.gguf.run.json").read_text())["divergence"] < 0.05
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gguf", "MODEL", "-o", "m.gguf", "--quantization", "Q9_9"), "unknown quantisation 'Q9_9'"),
        (("gguf", "nowhere", "-o", "m.gguf"), "nowhere does not exist"),
        (("gguf", "MODEL", "-o", "m.gguf", "--llama-cpp", "."), "is no checkout of llama.cpp"),
        (("gguf", "MODEL", "-o", "no/folder/m.gguf"), "does not exist"),
        (("gguf", "nowhere", "--adapter", "-o", "a.gguf"), "nowhere does not exist"),
        (("merge", "nowhere", "-o", "m"), "nowhere does not exist"),
    ],
)
def test_what_cannot_be_exported_is_said(
    arguments: tuple[str, ...], said: str, run: Cli, hf_folder: Path, tmp_path: Path
) -> None:
    done = run(*(str(hf_folder) if argument == "MODEL" else argument for argument in arguments))
    assert done.code == 2, done.err
    assert said in done.err
    assert not list(tmp_path.glob("*.gguf"))


def test_a_converter_that_is_not_reached_is_said(hf_folder: Path, tmp_path: Path) -> None:
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "", "PIP_NO_CACHE_DIR": "1", "XDG_CACHE_HOME": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        command("gguf", hf_folder, "-o", "m.gguf", room="train"), cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**environment(), **nowhere, "PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert NOT_REACHED in done.stderr
    assert "--llama-cpp DIR" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_recipe_runs_all_stages_and_a_second_time_none(run: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        "[prompts]\nsize = 14\n[texts]\nwrite = 7\nmax_new_tokens = 30\nmin_words = 8\n"
        "[rewrites]\nmax_new_tokens = 24\n"
        "keep_cut = true\n[screens]\nunchanged = 0\nunrelated = 0\nrefusals = false\n"
        f"[sft]\nbase = {json.dumps(str(tiny))}\nmax_tokens = 512\nmax_steps = 3\nevaluate_every = 3\nsamples = 1\n"
        'evaluation_rows = 2\noptimizer = "adamw_torch"\ngradient_checkpointing = false\ntemplate = "brief"\n'
        '[score]\nbackend = "transformers"\nbaselines = ["constant", "zero_shot"]\n'
        "max_new_tokens = 8\nlimit = 3\n"
    )
    arguments = ("run", "r.toml", "--set", "output=made")
    done = run(*arguments)
    assert done.code == 0, done.err
    made = tmp_path / "made"
    assert {path.name for path in (made / "sets").glob("*.parquet")} == {
        "train.parquet", "validation.parquet", "test.parquet",
    }  # fmt: skip
    score = json.loads((made / "score.json").read_text())
    assert set(score["systems"]) == {"constant", "zero_shot", "tuned"}
    assert score["reference"] == "tuned"
    again = run(*arguments, "--set", "gguf.quantizations=F16,Q8_0")
    if NOT_REACHED in again.err:
        pytest.skip("the converter comes from the package registry, which is not reached")
    assert again.code == 0, again.err
    assert again.err.count("nothing to do") == 6  # prompts, texts, rewrites, sets, sft, merge
    assert {path.name for path in made.glob("*.gguf")} == {"merged-f16.gguf", "merged-q8_0.gguf", "adapter.gguf"}
    for name in ("merged-f16.gguf", "adapter.gguf"):
        told = json.loads((made / f"{name}.run.json").read_text())
        assert told["from_transformers"] < 1e-3
        assert told["template"] == "brief"
    changed = (made / "adapter.gguf").stat().st_mtime_ns
    assert run(*arguments, "--set", "gguf.quantizations=F16,Q8_0").code == 0
    assert (made / "adapter.gguf").stat().st_mtime_ns == changed
    assert not list(made.glob(".*"))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("[gguf]\nquantizations = ['F17']", "unknown quantisation 'F17'"),
        ("[gguf]\nquantizations = []", "names no quantisation"),
        ("[score]\nbackend = 'transformers'\nbaselines = ['guess']", "unknown baseline 'guess'"),
        ("[score]", "has no [gguf] for [score]"),
        ("task = 'judge'\n[gguf]\n[score]", "[score] is for task = 'recover', not for 'judge'"),
        ("[gguf]\n[score]\nquantization = 'Q8_0'", "'Q8_0', which [gguf] does not make"),
        ("[gguf]\n[score]\nbackend = 'llama_cpp'", "is a transformers folder"),
        ("[gguf]\nllama_cpp = '.'", "is no checkout of llama.cpp"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_beginning(
    section: str, said: str, run: Cli, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.toml").write_text(
        f"[prompts]\nsize = 30\n[texts]\nwrite = 14\n[sft]\nbase = {json.dumps(str(tiny))}\n{section}\n"
    )
    done = run("run", "r.toml", "--set", "output=made")
    assert done.code == 2, done.err
    assert said in done.err
    assert not (tmp_path / "made" / "prompts.csv").exists()


def test_a_model_is_cut_to_some_of_its_layers(run: Cli, hf_folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    done = run("cut", hf_folder, "-o", "half", "--layers", 15)
    assert done.code == 0, done.err
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    whole = AutoModelForCausalLM.from_pretrained(hf_folder)
    assert half.config.num_hidden_layers == len(half.model.layers) == 15
    for ours, theirs in ((0, 0), (14, 29)):
        a, b = (model.model.layers[n].mlp.up_proj.weight for model, n in ((half, ours), (whole, theirs)))
        assert torch.equal(a, b)
    with torch.inference_mode():
        logits = half.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    assert logits.shape == (1, 5)
    assert "has 30 layers" in run("cut", hf_folder, "-o", "more", "--layers", 31).err
    (tmp_path / "half" / "notes.txt").write_text("mine", encoding="utf-8")
    assert "notes.txt" in run("cut", hf_folder, "-o", "half", "--layers", 15).err
