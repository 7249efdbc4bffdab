"""A session on Kaggle trains, is killed, goes on from its own output, and leaves adapter, weights and GGUF files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from submission.errors import UserError
from submission.publish.image import Image
from submission.publish.metadata import check_metadata
from tests.conftest import ROOT, runner
from tests.kaggle_server import USER, KaggleServer
from tests.test_publish import needs_client, server
from train.gguf import Gguf
from train.push import (
    SLUG,
    Training,
    kernel_folder,
    lay_out_session,
    make_bundle,
    missing,
    push_training,
    read_training,
)
from train.session import CONVERTER, REPORT, TUNING, Work, export, take_over
from train.session import main as session
from train.sft import _last_checkpoint
from train.sft_config import read_sft

__all__ = ["server"]  # a fixture

BASE = "google/gemma/transformers/7b-it/3"


@pytest.fixture
def training(recipe: Path) -> Training:
    """Twelve steps on the tiny model, which stands for a base on Kaggle."""
    return Training(read_sft(recipe, []), None, BASE)


def in_session(root: Path) -> tuple[int, str, dict[str, Any]]:
    """Exit code, log and report of a session."""
    done = runner("tests.session", root)(root)
    assert done.code == 0, done.err
    return done.summary["code"], done.summary["log"], done.summary["report"]


def test_a_session_that_was_killed_goes_on_from_its_output(training: Training, tiny: Path, tmp_path: Path) -> None:
    try:
        converter = Gguf().converter()
    except UserError:
        converter = None  # the registry is not reached
    training = replace(training, gguf=Gguf(("Q8_0",)) if converter else None)
    make_bundle(training, tmp_path / "bundle", wheels=False)
    root = tmp_path / "one" / "kaggle"
    lay_out_session(root, "flat", tmp_path / "bundle", training, tiny, None)
    killed = subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "kernel.py")], cwd=root / "working", start_new_session=True,
        env={**os.environ, "PROMPT_RECOVERY_KAGGLE": str(root), "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    state = root / "working" / TUNING / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    while killed.poll() is None and not state.exists():
        time.sleep(0.05)
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:  # as a container that ends
        process.kill()
    killed.wait()
    (root / "working" / REPORT).write_text("{}")  # Kaggle ends a session; here the report of one that was in time
    again = tmp_path / "two" / "kaggle"
    lay_out_session(again, "nested", tmp_path / "bundle", training, tiny, root / "working")
    code, log, report = in_session(again)
    assert code == 0, log
    assert (report["state"], report["reason"], report["left_out"]) == ("trained", "", {}), log
    assert 4 <= report["resumed_from"] < report["step"] == report["steps"] == 12
    working = again / "working"
    assert (working / "merged" / "config.json").is_file()
    assert {f"{TUNING}/adapter/adapter_model.safetensors", f"{TUNING}/training.png"} <= set(report["files"])
    if converter:
        assert {path.name for path in working.glob("*.gguf")} == {"adapter.gguf", "merged.gguf"}


def test_a_session_whose_time_is_up_says_so(training: Training, tiny: Path, tmp_path: Path) -> None:
    make_bundle(replace(training, deadline=0.1), tmp_path / "bundle", wheels=False)
    lay_out_session(tmp_path / "one" / "kaggle", "flat", tmp_path / "bundle", training, tiny, None)
    code, log, report = in_session(tmp_path / "one" / "kaggle")
    assert (code, report["state"]) == (1, "failed"), log
    assert "the time was up" in report["reason"]


def _left(tuning: Path, states: dict[int, str], manifest: str | None = None) -> None:
    """Lay out what training leaves: checkpoints with what their states say, and an adapter if there is a manifest."""
    for step, state in states.items():
        (tuning / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        (tuning / f"checkpoints/checkpoint-{step}/trainer_state.json").write_text(state)
    if manifest is not None:
        (tuning / "adapter").mkdir(parents=True)
        (tuning / "adapter.run.json").write_text(manifest)


SOUND = json.dumps({"global_step": 10, "max_steps": 30})
DAMAGED = [SOUND[:9], "{}", "[]", '{"global_step": "20"}', "[" * 100_000]


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda state: state[:9])
def test_a_damaged_checkpoint_is_passed_over(damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submission.kernel.ROOT", tmp_path / "kaggle")
    (tmp_path / "training.toml").write_text("[session]\n")
    working, earlier = tmp_path / "kaggle" / "working", tmp_path / "kaggle" / "input" / "earlier"
    working.mkdir(parents=True)
    _left(earlier / TUNING, {10: SOUND, 20: damaged})
    (earlier / REPORT).write_text("{}")
    assert take_over(Work(tmp_path, tmp_path)) == 10
    checkpoints = working / TUNING / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-10"]
    (checkpoints / "checkpoint-20").mkdir()
    (checkpoints / "checkpoint-20" / "trainer_state.json").write_text(damaged)
    assert _last_checkpoint(checkpoints) == checkpoints / "checkpoint-10"
    assert session(str(tmp_path)) == 0  # its bundle has no wheels
    report = json.loads((working / REPORT).read_text())
    assert (report["state"], report["step"], report["steps"]) == ("unfinished", 10, 30)


@pytest.mark.parametrize("manifest", ["", "{}", '{"steps": 30}'], ids=["none", "without steps", "whole"])
def test_an_adapter_is_kept_whatever_its_manifest_says(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submission.kernel.ROOT", tmp_path)
    (tmp_path / "training.toml").write_text("[session]\n")
    _left(tmp_path / "working" / TUNING, {10: SOUND}, manifest)
    if not manifest:
        (tmp_path / "working" / TUNING / "adapter.run.json").unlink()
    assert session(str(tmp_path)) == 0
    report = json.loads((tmp_path / "working" / REPORT).read_text())
    assert (report["state"], report["step"]) == ("trained", 30 if "steps" in manifest else 10)


@pytest.mark.parametrize("failing", ["", "gguf", "merge", "room", "disk"])
def test_an_output_holds_what_was_made_and_fits_and_says_what_does_not(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submission.kernel.ROOT", tmp_path / "kaggle")
    working, scratch, base = tmp_path / "kaggle" / "working", tmp_path / "scratch", tmp_path / "base"
    for folder in (working / TUNING / "adapter", scratch, base):
        folder.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "training.toml").write_text('[session]\n[gguf]\nquantizations = ["Q8_0"]\n')
    with zipfile.ZipFile(tmp_path / CONVERTER, "w") as archive:
        archive.writestr("convert_hf_to_gguf.py", "")
    work, ran = Work(tmp_path, scratch), []

    def command(name: str, *arguments: object) -> str:
        ran.append(name)
        output = Path(str(arguments[arguments.index("-o") + 1]))
        if name == failing:
            return f"train {name} ended with 1"
        if name == "merge":
            output.mkdir()
            output = output / "model.safetensors"
        output.write_bytes(bytes(500))
        output.with_name(f"{output.name}.run.json").write_text("{}")
        return ""

    monkeypatch.setattr(work, "command", command)
    if failing == "room":
        monkeypatch.setattr("train.session._ROOM", 1100)
    if failing == "disk":
        monkeypatch.setattr("train.session.shutil.disk_usage", lambda folder: SimpleNamespace(free=1500))
    export(work, str(base))
    left_out = {
        "": {}, "gguf": {"adapter.gguf": "ended", "merged.gguf": "ended"}, "merge": {"merged": "ended"},
        "room": {"merged": "and there is room for"}, "disk": {"merged.gguf": "it takes 0 GB of disk"},
    }[failing]  # fmt: skip
    assert work.report.left_out.keys() == left_out.keys()
    assert all(words in work.report.left_out[name] for name, words in left_out.items())
    kept = {path.name for path in working.iterdir() if not path.name.endswith(".run.json")} - {TUNING}
    assert kept == {
        "": {"adapter.gguf", "merged.gguf", "merged"}, "gguf": {"merged"}, "merge": {"adapter.gguf"},
        "room": {"adapter.gguf", "merged.gguf"}, "disk": {"adapter.gguf", "merged"},
    }[failing]  # fmt: skip
    assert ran == ["gguf", "merge", *(["gguf"] if failing not in ("merge", "disk") else [])]


def test_what_is_not_on_kaggle_is_refused(training: Training, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not on Kaggle"):
        make_bundle(replace(training, base=""), tmp_path / "bundle", wheels=False)
    assert not (tmp_path / "bundle").exists()


def test_what_cannot_be_trained_on_is_refused_before_anything_is_made(recipe: Path) -> None:
    assert read_training(recipe, [], "gemma-7b-it", 600).base == BASE
    with pytest.raises(UserError, match="--base foo: use owner/model"):
        read_training(recipe, [], "foo", 600)
    with pytest.raises(UserError, match="--deadline 1s is too short"):
        read_training(recipe, [], BASE, 1)


def test_the_metadata_is_sound_and_names_the_kernels_own_output(training: Training, tmp_path: Path) -> None:
    content = json.loads(
        (kernel_folder(training, tmp_path, resume=True, gpu=True) / "kernel-metadata.json").read_text()
    )
    assert check_metadata(content, tmp_path) == []
    assert content["kernel_sources"] == [f"OWNER/{SLUG}"]
    assert content["model_sources"] == [BASE]


def test_packages_that_the_image_has_too_old_are_brought() -> None:
    old, new = (Image("3.12", "2.35", "3.4.30", {"huggingface-hub": version}) for version in ("0.1", "2.4.0"))
    assert "huggingface-hub" in missing(["transformers"], old)
    assert "huggingface-hub" not in missing(["transformers"], new)


@needs_client
def test_bundle_and_kernel_are_sent(
    training: Training, server: KaggleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.push.fetch", lambda *_: None)
    monkeypatch.setattr("train.push.wait_until_ready", lambda *_, **__: None)
    push_training(
        training, tmp_path / "bundle", resume=False, accelerator="NvidiaL4X1", rehearse_first=False, model=None,
        send=True, wait=False, show=False,
    )  # fmt: skip
    (sent,) = server.calls("SaveKernel")
    assert sent["slug"] == f"{USER}/{SLUG}"
    assert sent["datasetDataSources"] == [f"{USER}/{SLUG}-bundle"]
    assert (sent["machineShape"], sent["enableGpu"], sent["modelDataSources"]) == ("NvidiaL4X1", True, [BASE])
    assert "train.session" in sent["text"]
