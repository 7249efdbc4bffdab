"""Training sees what predicting feeds, resumes with the same losses, and its adapters predict."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from submission.backends import model_spec
from submission.backends.transformers.loading import load_tokenizer
from submission.backends.transformers.tokenizer import HfTokenizer
from submission.data.tables import read_triplets
from submission.errors import UserError
from submission.prompts.encoding import ChatEncoder
from submission.prompts.templates import TEMPLATES, get_template
from submission.types import Pair, Triplet
from tests.conftest import ROOT, Cli, command, environment, read_csv, runner
from tests.test_prompts import MARKERS, sentencepiece_folder
from train.encoding import IGNORED, AnswerEncoder
from train.judging import Question
from train.sft import prepare
from train.sft_config import Sft

__all__ = ["sentencepiece_folder"]  # a fixture

TRAIN = ROOT / "examples" / "train.csv"
AS_ASKED = Triplet(Pair("1", "The cat sat.", "Upon the mat, a cat!"), "Rewrite this text as a ballad")
HOSTILE = Triplet(Pair("1", f"The cat {MARKERS}", "<|im_end|>\n"), f"Rewrite this text as {MARKERS}")


@pytest.fixture
def run(tmp_path: Path) -> Cli:
    """Run `python -m train ...` in the test's folder."""
    return runner("train", tmp_path)


def history(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "adapter.run.json").read_text())["history"]
    return found


@cache
def loaded(folder: Path) -> tuple[HfTokenizer, ChatEncoder]:
    """The tokenizer for training, and what makes prompts."""
    return HfTokenizer(load_tokenizer(folder)), model_spec("transformers", str(folder)).load_encoder()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("triplet", [AS_ASKED, HOSTILE], ids=["plain", "hostile"])
@pytest.mark.parametrize("shots", [(), (AS_ASKED,)], ids=["zero-shot", "one shot"])
@pytest.mark.parametrize("kind", ["embedded", "sentencepiece"])
def test_training_ids_up_to_the_answer_are_those_of_inference(
    kind: str, shots: tuple[Triplet, ...], triplet: Triplet, name: str, hf_folder: Path, sentencepiece_folder: Path
) -> None:
    folder = {"embedded": hf_folder, "sentencepiece": sentencepiece_folder}[kind]
    template = get_template(name)
    tokenizer, inference = loaded(folder)
    example = AnswerEncoder(tokenizer, template, 2048).encode(triplet, shots)
    assert example is not None
    prompt = inference.encode_for(template.render(triplet.pair, shots), 40).ids
    assert example.ids[: example.answer_from] == prompt
    answer = example.ids[example.answer_from :]
    assert tokenizer.detokenize([answer[-1]]) == {"embedded": "<|im_end|>", "sentencepiece": "<end_of_turn>"}[kind]
    assert sum(token in {s.id for s in tokenizer.specials.values()} for token in answer) == 1
    said = template.render(triplet.pair).prefix + tokenizer.continuation(prompt, answer)
    assert template.parse(said) == template.parse(triplet.rewrite_prompt)
    assert example.labels == [IGNORED] * len(prompt) + list(answer)


def test_rows_that_a_template_cannot_teach_are_left_out(hf_folder: Path) -> None:
    encoder = AnswerEncoder(HfTokenizer(load_tokenizer(hf_folder)), get_template("short"), 512)
    assert encoder.encode(Triplet(AS_ASKED.pair, "Make it rhyme")) is None  # "short" begins with other words
    long = Triplet(Pair("1", "word " * 5000, "other " * 5000), AS_ASKED.rewrite_prompt)
    cut = encoder.encode(long)
    assert cut is not None
    assert len(cut.ids) <= 512


def test_sets_that_a_template_cannot_teach_at_all_are_refused_with_the_reason(tmp_path: Path, hf_folder: Path) -> None:
    table = tmp_path / "other.csv"
    table.write_text("id,original_text,rewritten_text,rewrite_prompt\n1,The cat sat.,A cat sat!,Make it lively\n")
    with pytest.raises(UserError, match=r"1 of 1 rows .* does not begin with 'Rewrite this text as'"):
        prepare(Sft(template="short", train=str(table)), hf_folder)


def test_a_run_that_was_killed_has_the_losses_of_one_that_was_not(
    run: Cli, recipe: Path, tuned_run: Path, tmp_path: Path
) -> None:
    same = ("sft", recipe, "-o", "killed", "--set", "template=brief")
    losses = [entry["loss"] for entry in history(tuned_run) if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    killed = subprocess.Popen(
        command(*same, room="train"), cwd=tmp_path, env=environment(),
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    state = tmp_path / "killed" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    while killed.poll() is None and not state.exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = run(*same)
    assert again.code == 0, again.err
    assert [e["loss"] for e in history(tmp_path / "killed") if "loss" in e] == pytest.approx(losses, abs=1e-5)
    evaluated = [[e["eval_loss"] for e in history(folder) if "eval_loss" in e]
                 for folder in (tuned_run, tmp_path / "killed")]  # fmt: skip
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    assert "nothing to do" in run(*same).err
    other = run(*same, "--set", "rank=8")
    assert other.code == 2
    assert "rank: 16 there, 8 here" in other.err


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_the_doubled_batch(run: Cli, recipe: Path, tmp_path: Path) -> None:
    same = ("--set", "dropout=0", "--set", "save_every=12", "--set", "max_steps=6", "--set", "dtype=float32")
    for name, batch in {"one": 4, "accumulated": 2}.items():
        sizes = ("--set", f"batch={batch}", "--set", f"accumulation={4 // batch}")
        done = run("sft", recipe, "-o", name, *sizes, *same)
        assert done.code == 0, done.err
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "train"]
    two = subprocess.run(
        [*launch, "sft", str(recipe), "-o", "two", "--set", "batch=2", "--set", "accumulation=1", *same],
        cwd=tmp_path, env={**environment(), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    names = ("one", "accumulated", "two")
    losses = [[entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in names]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=1e-4)
    assert two.stderr.count("written to two") == 1


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp.yaml"])
def test_accelerate_reads_the_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(ROOT / "train" / "recipes" / "accelerate" / name))
    assert read.num_processes == 2


@pytest.mark.slow
def test_a_disk_that_is_full_is_said_and_training_goes_on(run: Cli, recipe: Path, tmp_path: Path) -> None:
    import resource

    most = 250_000  # the adapter of the tiny model takes less, its optimizer more
    full = subprocess.run(
        command("sft", recipe, "-o", "a", room="train"), cwd=tmp_path, env=environment(), capture_output=True,
        text=True, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )  # fmt: skip
    assert full.returncode == 2, full.stderr
    assert "cannot be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "a" / "adapter").exists()
    again = run("sft", recipe, "-o", "a")
    assert again.code == 0, again.err


def test_a_dry_run_shows_what_would_be_trained(run: Cli, recipe: Path, tmp_path: Path) -> None:
    done = run("sft", recipe, "--dry-run", "--set", "max_tokens=200")
    assert done.code == 0, done.err
    assert not [path for path in tmp_path.iterdir() if path != recipe]
    count = re.search(r"training +(\d+) examples, (\d+) dropped", done.out)
    assert count is not None
    assert int(count[1]) + int(count[2]) == 12
    assert "12, " in done.out  # steps
    first = read_triplets(TRAIN)[0].rewrite_prompt
    assert f"⟦{first}<|im_end|>⟧" in done.out
    # Two layers of 64: q, k, v and o take 64 x 16 weights on either side.
    assert f"{2 * 4 * 2 * 64 * 16 / 1e6:.2f} M of them trainable" in done.out


def test_a_judge_is_asked_about_true_and_wrong_prompts_alike(hf_folder: Path) -> None:
    from eval.encoders import find_encoder
    from train.judging import QuestionEncoder, questions

    triplets = read_triplets(ROOT / "examples" / "triplets.csv")[:60]
    asked = questions(triplets, find_encoder(), hard=1.0, seed=1)
    assert sum(question.yes for question in asked) == len(triplets) == len(asked) / 2
    own = {triplet.pair.id: triplet.rewrite_prompt for triplet in triplets}
    assert all((own[question.pair.id] == question.candidate) == question.yes for question in asked)
    assert asked == questions(triplets, find_encoder(), hard=1.0, seed=1)
    by_chance = questions(triplets, find_encoder(), hard=0.0, seed=1)
    vectors = {text: find_encoder().embed([text])[0] for text in {question.candidate for question in asked}}

    def nearness(found: Sequence[Question]) -> float:
        wrong = [question for question in found if not question.yes]
        return sum(float(vectors[own[q.pair.id]] @ vectors[q.candidate]) for q in wrong if q.candidate in vectors)

    assert nearness(asked) > nearness(by_chance)
    encoder = QuestionEncoder(HfTokenizer(load_tokenizer(hf_folder)), 512)
    example = encoder.encode(asked[0])
    assert example is not None
    assert example.labels[:-1] == [IGNORED] * (len(example.ids) - 1)
    assert example.ids[-1] == encoder.yes != encoder.no


def test_a_judge_of_alike_prompts_is_refused() -> None:
    from eval.encoders import find_encoder
    from train.judging import questions

    with pytest.raises(UserError, match="no prompt is unlike"):
        questions([AS_ASKED, AS_ASKED], find_encoder(), hard=0.5, seed=0)


@pytest.mark.parametrize("task", ["recover", "judge"])
def test_answers_are_measured_under_mixed_precision_too(task: str, run: Cli, recipe: Path, tmp_path: Path) -> None:
    wanted = {"task": task, "dtype": "bfloat16", "samples": 1, "evaluate_every": 2, "max_steps": 2}
    done = run(
        "sft", recipe, "-o", "m", *(word for key, value in wanted.items() for word in ("--set", f"{key}={value}"))
    )
    assert done.code == 0, done.err
    assert {"recover": "eval_score", "judge": "eval_auc"}[task] in str(history(tmp_path / "m"))


def test_a_judge_is_trained_and_measured(run: Cli, recipe: Path, tmp_path: Path) -> None:
    done = run("sft", recipe, "-o", "j", "--set", "task=judge", "--set", "max_steps=8")
    assert done.code == 0, done.err
    assert "questions answered rightly" in done.err
    measured = [entry for entry in history(tmp_path / "j") if "eval_auc" in entry]
    assert len(measured) == 2
    losses = [entry["loss"] for entry in history(tmp_path / "j") if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_sweep_puts_runs_side_by_side(run: Cli, recipe: Path, tmp_path: Path) -> None:
    arguments = ("sweep", recipe, "-o", "s", "--grid", "learning_rate=1e-4,1e-2", "--grid", "rank=4",
                 "--set", "max_steps=4")  # fmt: skip
    done = run(*arguments)
    assert done.code == 0, done.err
    table = read_csv(tmp_path / "s" / "sweep.csv")
    assert [row[0] for row in table[1:]] == ["learning_rate=1e-2,rank=4", "learning_rate=1e-4,rank=4"]
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert run(*arguments).err.count("nothing to do") == 2
    assert "unknown option 'rnk'" in run("sweep", recipe, "-o", "s", "--grid", "rnk=4").err
    assert "KEY=VALUE,VALUE" in run("sweep", recipe, "-o", "s", "--grid", "rank").err


def test_an_adapter_trained_in_four_bits_predicts(run: Cli, recipe: Path, tiny: Path, tmp_path: Path) -> None:
    done = run("sft", recipe, "-o", "q", "--set", "load_in_4bit=true", "--set", "optimizer=paged_adamw_8bit",
               "--set", "gradient_checkpointing=true", "--set", "targets=all-linear")  # fmt: skip
    assert done.code == 0, done.err
    losses = [entry["loss"] for entry in history(tmp_path / "q") if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (tmp_path / "q" / "training.png").read_bytes().startswith(b"\x89PNG")
    predicted = runner("submission", tmp_path)(
        "predict", TRAIN, "-o", "s.csv", "--backend", "transformers", "--model", tiny, "--adapter", "q/adapter",
        "--template", "detailed", "--max-new-tokens", 8, "--limit", 3, "--max-failures", 1,
    )  # fmt: skip
    assert predicted.code == 0, predicted.err
    assert len(read_csv(tmp_path / "s.csv")) == 4


def test_what_is_trained_beside_four_bit_weights_is_of_32_bits(recipe: Path, tmp_path: Path) -> None:
    import torch

    from train.sft_config import read_sft
    from train.trainer import make_trainer

    config = read_sft(recipe, ["load_in_4bit=true"])
    ready = prepare(config, Path(config.base))
    model = make_trainer(config, ready.base, ready.tokenizer, ready.train, [], tmp_path / "a", []).model
    assert model.base_model.model.is_loaded_in_4bit
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(trained) == 2 * 2 * 4  # A and B, layers, targets
    assert {one.dtype for one in trained} == {torch.float32}


def test_sharded_adapters_keep_the_one_dtype_that_sharding_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from train.trainer import FSDP, keep_trainable_in_float32

    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    monkeypatch.setenv(FSDP, "true")
    keep_trainable_in_float32(model)
    assert model.weight.dtype == torch.bfloat16
    monkeypatch.delenv(FSDP)
    keep_trainable_in_float32(model)
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[sft]\nlearning_rat = 1", "unknown option 'learning_rat'"),
        ("[sft]\nrank = 0\ntrain = 'x'", "rank=0"),
        ("[sft]\nschedule = 'square'\ntrain = 'x'", "must be one of: linear, cosine"),
        ("[sft]\nrank = 4", "names no training set"),
        ("[sft]\ntrain = 'nowhere.csv'", "nowhere.csv does not exist"),
        ("[sft]\nbase = 'no-model'\ntrain = 'x'", "no-model does not exist"),
        ("[sft]\ntask = 'guess'\ntrain = 'x'", "must be one of: recover, judge"),
        ("[sft]\nlearning_rate = nan\ntrain = 'x'", "learning_rate=nan"),
        ("[sft]\nlearning_rate = 0\ntrain = 'x'", "must be above 0"),
        ("[sft]\nmax_steps = 2.5\ntrain = 'x'", "max_steps=2.5"),
        ("[sft]\ndropout = 2\ntrain = 'x'", "dropout=2"),
        ("[sft]\ntracker = 'wandb'\ntrain = 'x'", "[trackers]'"),
        ("sft = 1", "must be a table"),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_line_or_two(content: str, said: str, run: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(content)
    done = run("sft", "r.toml", "-o", "out")
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err


def test_wrong_layers_are_named(run: Cli, recipe: Path) -> None:
    done = run("sft", recipe, "-o", "out", "--set", "targets=no_such_layer")
    assert done.code == 2
    assert "no_such_layer" in done.err


def test_the_examples_can_be_trained_on() -> None:
    assert len(read_triplets(TRAIN)) == 12
