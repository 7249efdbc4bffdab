"""Metadata that Kaggle would refuse, or take and run otherwise, is told before anything is sent."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from submission.errors import UserError
from submission.publish.metadata import check_dataset_metadata, check_metadata, read_metadata, with_owner
from submission.publish.push import kernel_metadata
from tests.conftest import ROOT
from tests.kaggle_server import USER

KERNEL, DATASET, CODE = f"{USER}/prompt-recovery", f"{USER}/prompt-recovery-wheels", 'print("ä kernel")\n'
GEMMA, MISTRAL = "google/gemma/transformers/7b-it/3", "mistral-ai/mistral/pytorch/7b-instruct-v0.1-hf/1"
METADATA = {
    "id": "OWNER/prompt-recovery",
    "title": "Prompt recovery",
    "code_file": "submission/kernel.py",
    "language": "python",
    "kernel_type": "script",
    "is_private": True,
    "enable_gpu": True,
    "enable_tpu": False,
    "enable_internet": False,
    "machine_shape": "NvidiaTeslaT4",
    "dataset_sources": ["OWNER/prompt-recovery-wheels"],
    "competition_sources": ["llm-prompt-recovery"],
    "kernel_sources": [],
    "model_sources": ["google/gemma/transformers/7b-it/2"],
}
DATASET_METADATA = {"title": "Wheels for a kernel", "id": DATASET, "licenses": [{"name": "apache-2.0"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a kernel and its metadata."""
    folder = tmp_path / "kernel"
    (folder / "submission").mkdir(parents=True)
    (folder / "submission" / "kernel.py").write_text(CODE, encoding="utf-8")
    (folder / "kernel-metadata.json").write_text(json.dumps(METADATA))
    return folder


def test_good_metadata_has_no_problems(folder: Path) -> None:
    assert check_metadata(METADATA, folder) == []
    assert read_metadata(folder / "kernel-metadata.json") == METADATA
    filled = with_owner(METADATA, USER)
    assert check_metadata(filled, folder) == []
    assert (filled["id"], filled["dataset_sources"]) == (KERNEL, [DATASET])
    assert filled["model_sources"] == METADATA["model_sources"]
    assert "OWNER" not in json.dumps(filled)
    more = {"docker_image": "gcr.io/kaggle-images/python", "docker_image_pinning_type": "latest", "keywords": ["gpu"]}
    assert check_metadata({**METADATA, **more, "id_no": 5}, folder) == []


def test_the_metadata_of_this_repository_is_sound() -> None:
    content = json.loads((ROOT / "kernel-metadata.json").read_text())
    problems = check_metadata(content, ROOT)
    assert [problem for problem in problems if not problem.startswith("code_file")] == []


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("id", "prompt-recovery", "use owner/slug"),
        ("id", "OWNER/four", "has 4 characters: use 5 to 50"),
        ("id", "OWNER/Prompt_Recovery", "lower-case letters"),
        ("id", "OWNER/prompt-recovery/2", "use owner/slug"),
        ("id", "Some One/prompt-recovery", "no user name"),
        ("id", 5, "use owner/slug"),
        ("id_no", "5", "whole number"),
        ("title", "abc", "5 to 50 characters"),
        ("title", "x" * 51, "5 to 50 characters"),
        ("title", "Another title", "'another-title' of it, id says 'prompt-recovery'"),
        ("code_file", "submission/absent.py", "does not exist"),
        ("code_file", "/submission/kernel.py", "a path relative to"),
        ("code_file", "../kernel/submission/kernel.py", "inside it"),
        ("code_file", "", "use the path of a file"),
        ("language", "Python", "'python' or 'r'"),
        ("kernel_type", "program", "'script' or 'notebook'"),
        ("is_private", "true", "true or false, without quotes"),
        ("enable_gpu", 1, "true or false, without quotes"),
        ("enable_tpu", "no", "true or false, without quotes"),
        ("enable_tpu", True, "use false: enable_gpu is true"),
        ("enable_internet", True, "use false"),
        ("enable_internet", "false", "use false"),
        ("machine_shape", "NvidiaTeslaP100", "is retired: use one of NvidiaTeslaT4"),
        ("machine_shape", "NvidiaTeslaT4Highmem", "staff only"),
        ("machine_shape", "T4", "use one of NvidiaTeslaT4"),
        ("machine_shape", "", "use one of NvidiaTeslaT4"),
        ("dataset_sources", "OWNER/wheels", "use a list"),
        ("dataset_sources", ["wheels"], "'wheels': use owner/slug"),
        ("dataset_sources", ["a/b", "a/b"], "'a/b' appears twice"),
        ("kernel_sources", ["a/b/c"], "use owner/slug"),
        ("competition_sources", ["c/llm-prompt-recovery"], "the competition's slug alone"),
        ("model_sources", ["google/gemma/transformers/7b-it"], "the version number is missing"),
        ("model_sources", ["google/gemma/transformers/7b-it/latest"], "owner/model/framework/variation/VERSION"),
        ("docker_image", "", "use a text"),
        ("docker_image_pinning_type", "newest", "'original' or 'latest'"),
        ("keywords", "gpu", "use a list"),
    ],
)
def test_a_bad_value_is_named_with_its_fix(folder: Path, key: str, value: object, fix: str) -> None:
    named = [problem for problem in check_metadata({**METADATA, key: value}, folder) if problem.startswith(f"{key} ")]
    assert len(named) == 1
    assert repr(value) in named[0]
    assert fix in named[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"enable_internett": False}, "enable_internett False: unknown key; is 'enable_internet' meant?"),
        ({"machine-shape": ""}, "machine-shape '': unknown key; is 'machine_shape' meant?"),
        ({"enable_gpu": False}, "machine_shape 'NvidiaTeslaT4': set enable_gpu to true, or use \"\""),
        (
            {"kernel_type": "notebook"},
            "code_file 'submission/kernel.py': does not go with kernel_type 'notebook': "
            "a notebook is an .ipynb file, a script is not",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_one_problem(folder: Path, change: dict[str, object], problem: str) -> None:
    assert check_metadata({**METADATA, **change}, folder) == [problem]


def test_missing_keys_are_named(folder: Path) -> None:
    for key in ("id", "code_file", "language", "kernel_type", "enable_internet"):
        content = {name: value for name, value in METADATA.items() if name != key}
        assert f"{key} is missing: add it" in check_metadata(content, folder)
    content = {name: value for name, value in METADATA.items() if name != "machine_shape"}
    assert check_metadata(content, folder)[0].startswith("machine_shape is missing: with enable_gpu use one of")


@pytest.mark.parametrize(("text", "problem"), [("{", "not a readable JSON"), ("[]", "a JSON object")])
def test_a_file_that_is_no_metadata_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "kernel-metadata.json"
    with pytest.raises(UserError, match="does not exist"):
        read_metadata(path)
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_metadata(path)
    path.write_text(json.dumps({**METADATA, "is_private": "yes", "languag": "r"}))
    with pytest.raises(UserError, match=r"(?s)is_private 'yes': use true or false.*languag 'r': unknown key"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"title": "short"}, "title 'short': use a text of 6 to 50 characters"),
        ({"id": "wheels"}, "id 'wheels': use owner/slug, as in OWNER/prompt-recovery"),
        ({"licenses": []}, 'licenses []: use exactly one, as in [{"name": "apache-2.0"}]'),
        ({"licenses": [{}]}, 'licenses [{}]: use exactly one, as in [{"name": "apache-2.0"}]'),
        ({"subtitle": "too short"}, "subtitle 'too short': use a text of 20 to 80 characters"),
        ({"license": "mit"}, "license 'mit': unknown key; is 'licenses' meant?"),
    ],
)
def test_the_metadata_of_a_dataset_is_checked(change: dict[str, object], problem: str | None) -> None:
    assert check_dataset_metadata({**DATASET_METADATA, **change}) == ([problem] if problem else [])


# -- what a bundle asks for -----------------------------------------------------------------------------------


def bundle_of(folder: Path, settings: str, attach: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    (folder / "kernel.toml").write_text(settings)
    (folder / "bundle.json").write_text(json.dumps({"files": {}, **({"attach": list(attach)} if attach else {})}))
    return folder


def test_the_models_of_a_bundle_are_written_into_the_metadata(folder: Path, tmp_path: Path) -> None:
    made = bundle_of(tmp_path / "b", 'recover = "ensemble.best_of:best_of"\n', (MISTRAL, GEMMA))
    idle = {**METADATA, "enable_gpu": False, "machine_shape": "", "model_sources": []}
    (folder / "kernel-metadata.json").write_text(json.dumps(idle))
    content, changes = kernel_metadata(folder, USER, "", made)
    assert content["model_sources"] == [MISTRAL, GEMMA]
    assert (content["enable_gpu"], content["machine_shape"]) == (True, "NvidiaTeslaT4")
    assert any(MISTRAL in change for change in changes)
    assert json.loads((folder / "kernel-metadata.json").read_text()) == idle


@pytest.mark.parametrize(
    ("accelerator", "gpu", "shape"),
    [("t4x2", True, "NvidiaTeslaT4"), ("l4x4", True, "NvidiaL4"), ("A100", True, "NvidiaTeslaA100"),
     ("h100", True, "NvidiaH100"), ("NvidiaL4X1", True, "NvidiaL4X1"), ("none", False, "")],
)  # fmt: skip
def test_the_machine_is_an_option(folder: Path, accelerator: str, gpu: bool, shape: str) -> None:
    content, _ = kernel_metadata(folder, USER, accelerator)
    assert (content["enable_gpu"], content["machine_shape"]) == (gpu, shape)


def test_a_machine_that_was_named_is_not_told_to_be_changed(folder: Path, tmp_path: Path) -> None:
    made = bundle_of(tmp_path / "b", 'recover = "zero_shot"\n', (GEMMA,))
    (folder / "kernel-metadata.json").write_text(json.dumps({**METADATA, "enable_gpu": False, "machine_shape": ""}))
    assert any("GPU" in change for change in kernel_metadata(folder, USER, "", made)[1])
    content, changes = kernel_metadata(folder, USER, "none", made)
    assert content["enable_gpu"] is False
    assert not any("GPU" in change for change in changes)


def test_a_machine_that_kaggle_does_not_lend_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="machine_shape 'P100'"):
        kernel_metadata(folder, USER, "P100")


def test_a_gpu_for_a_llama_cpp_of_the_cpu_is_refused(folder: Path, tmp_path: Path) -> None:
    made = bundle_of(tmp_path / "b", 'model = "q4.gguf"\n')
    (made / "q4.gguf").write_bytes(b"GGUF")
    assert kernel_metadata(folder, USER, "", made)[0]["enable_gpu"] is False
    with pytest.raises(UserError, match="CUDA build"):
        kernel_metadata(folder, USER, "t4x2", made)
    with zipfile.ZipFile(made / "llama_cpp_python-0.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llama_cpp/lib/libggml-cuda.so", "")
    assert kernel_metadata(folder, USER, "t4x2", made)[0]["enable_gpu"] is True
