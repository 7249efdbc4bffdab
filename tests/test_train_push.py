"""A session on Kaggle trains, is killed, goes on from its own output, and leaves adapter, weights and GGUF files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from submission.errors import UserError
from submission.publish.image import Image
from submission.publish.metadata import check_metadata
from tests.conftest import ROOT
from tests.kaggle_server import USER, KaggleServer
from tests.test_publish import needs_client, server
from train.gguf import Gguf
from train.push import SLUG, Training, kernel_folder, lay_out_session, make_bundle, missing, push_training, run_session
from train.session import REPORT, TUNING
from train.sft_config import read_sft

__all__ = ["server"]  # a fixture

BASE = "google/gemma/transformers/7b-it/3"


@pytest.fixture
def training(recipe: Path) -> Training:
    """Twelve steps on the tiny model, which stands for a base on Kaggle."""
    return Training(read_sft(recipe, ["samples=0"]), None, BASE)


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
    code, log, report = run_session(again, [sys.executable])
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
    code, log, report = run_session(tmp_path / "one" / "kaggle", [sys.executable])
    assert (code, report["state"]) == (1, "failed"), log
    assert "the time was up" in report["reason"]


def test_what_is_not_on_kaggle_is_refused(training: Training, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not on Kaggle"):
        make_bundle(replace(training, base=""), tmp_path / "bundle", wheels=False)
    assert not (tmp_path / "bundle").exists()


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
