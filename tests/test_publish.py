"""Kaggle is talked to by its own client, here against a server of ours; what goes wrong is said in two lines."""

from __future__ import annotations

import importlib.util
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from submission.errors import UserError
from submission.publish.client import KaggleError, configured_user, run_client
from submission.publish.credentials import hide
from submission.publish.datasets import push_dataset, wait_until_ready
from submission.publish.follow import Status, log_lines, status, wait_for
from submission.publish.metadata import read_metadata
from submission.publish.push import Pushed, output, push, submit
from tests.conftest import ROOT
from tests.kaggle_server import DATASET_URL, KERNEL_URL, KEY, USER, KaggleServer, client_environment
from tests.test_kernel_metadata import CODE, DATASET, DATASET_METADATA, KERNEL, METADATA, folder

__all__ = ["folder"]  # a fixture of that module

needs_client = pytest.mark.skipif(importlib.util.find_spec("kagglesdk") is None, reason="pip install -e '.[kaggle]'")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KaggleServer]:
    """Kaggle, and an environment in which the client talks to it."""
    kaggle = KaggleServer()
    kaggle.start()
    use_port(tmp_path, kaggle.port, monkeypatch)
    yield kaggle
    kaggle.stop()


def use_port(folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in client_environment(folder, port).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a dataset of two files and its metadata."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "one.whl").write_bytes(b"first")
    (folder / "two.whl").write_bytes(b"second")
    (folder / "dataset-metadata.json").write_text(json.dumps(DATASET_METADATA))
    return folder


def explained(error: KaggleError, *words: str) -> bool:
    """Whether an error is two lines (what and the server's word; the next step) with these words and no credential."""
    lines = str(error).splitlines()
    assert len(lines) == 2, str(error)
    assert KEY not in str(error)
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{missing} not in: {error}"
    return True


@needs_client
def test_a_push_sends_what_kaggle_expects(server: KaggleServer, folder: Path, said: list[str]) -> None:
    pushed = push(folder, owner=USER)
    assert pushed == Pushed(KERNEL, 3, KERNEL_URL)
    assert said == [f"version 3 of {KERNEL} is pushed: {KERNEL_URL}"]
    (sent,) = server.calls("SaveKernel")
    expected = {
        "slug": KERNEL,
        "newTitle": "Prompt recovery",
        "text": CODE,
        "language": "python",
        "kernelType": "script",
        "datasetDataSources": [DATASET],
        "competitionDataSources": ["llm-prompt-recovery"],
        "modelDataSources": ["google/gemma/transformers/7b-it/2"],
        "isPrivate": True,
        "enableGpu": True,
        "enableTpu": False,
        "enableInternet": False,
        "machineShape": "NvidiaTeslaT4",
    }
    assert {key: sent.get(key) for key in expected} == expected
    assert json.loads((folder / "kernel-metadata.json").read_text()) == METADATA  # left as it was


@needs_client
def test_a_push_takes_another_accelerator(server: KaggleServer, folder: Path, said: list[str]) -> None:
    push(folder, owner=USER, accelerator="NvidiaL4X1")
    assert server.calls("SaveKernel")[0]["machineShape"] == "NvidiaL4X1"
    with pytest.raises(UserError, match=r"NvidiaTeslaP100.*is retired"):
        push(folder, owner=USER, accelerator="NvidiaTeslaP100")


@needs_client
def test_a_push_follows_its_run_to_the_end(server: KaggleServer, folder: Path, said: list[str]) -> None:
    push(folder, owner=USER, wait=True)
    assert said[-1].startswith(f"{KERNEL}: complete, 0m0")


@needs_client
def test_the_status_is_read(server: KaggleServer) -> None:
    server.answer("GetKernelSessionStatus", {"status": "RUNNING"})
    server.answer("GetKernelSessionStatus", {"status": "ERROR", "failureMessage": "out of\nmemory"})
    running, failed = status(KERNEL), status(KERNEL)
    assert (running, failed) == (Status("running", ""), Status("error", "out of\nmemory"))
    assert (str(running), str(failed)) == ("running", "error: out of memory")
    assert [now is not None and now.failed for now in (running, failed)] == [False, True]
    assert server.calls("GetKernelSessionStatus") == [{"userName": USER, "kernelSlug": "prompt-recovery"}] * 2


@needs_client
def test_waiting_tells_each_state_until_the_run_is_complete(server: KaggleServer, said: list[str]) -> None:
    for state in ("QUEUED", "RUNNING", "RUNNING", "COMPLETE"):
        server.answer("GetKernelSessionStatus", {"status": state})
    assert wait_for(KERNEL, poll_seconds=0.01) == Status("complete", "")
    assert [line.split(",")[0] for line in said] == [
        f"{KERNEL}: {state}" for state in ("queued", "running", "complete")
    ]


@needs_client
def test_waiting_outlives_a_fault_of_the_server(server: KaggleServer, said: list[str]) -> None:
    server.answer("GetKernelSessionStatus", {"code": 503, "message": "try later"}, status=503)
    server.answer("GetKernelSessionStatus", {"status": "COMPLETE"})
    wait_for(KERNEL, poll_seconds=0.01)
    assert said[0].startswith("no status this time (1 of 5)")
    assert "try later" in said[0]


@needs_client
def test_a_failed_run_shows_the_end_of_its_log(server: KaggleServer, said: list[str]) -> None:
    server.answer("GetKernelSessionStatus", {"status": "RUNNING"})
    server.answer("GetKernelSessionStatus", {"status": "ERROR", "failureMessage": "Your notebook\nthrew"})
    server.log = json.dumps([{"stream_name": "stdout", "time": n, "data": f"line {n}\n"} for n in range(30)])
    with pytest.raises(KaggleError) as caught:
        wait_for(KERNEL, poll_seconds=0.01)
    assert explained(caught.value, f"the run of {KERNEL} failed: Your notebook threw", "kaggle kernels output")
    assert said[-20:] == [f"  line {n}" for n in range(10, 30)]


@needs_client
def test_a_cancelled_run_is_a_failure_and_a_long_one_a_time_out(server: KaggleServer, said: list[str]) -> None:
    server.answer("GetKernelSessionStatus", {"status": "RUNNING"})
    server.answer("GetKernelSessionStatus", {"status": "CANCEL_ACKNOWLEDGED"})
    with pytest.raises(KaggleError, match="is still running after"):
        wait_for(KERNEL, timeout=0)
    with pytest.raises(KaggleError, match="was cancelled"):
        wait_for(KERNEL)


@needs_client
def test_the_output_comes_with_its_log(server: KaggleServer, tmp_path: Path, said: list[str]) -> None:
    target = tmp_path / "output"
    server.log = "[]"
    server.files = {"submission.csv": b"an older and longer file of the same name"}
    output(KERNEL, target)
    server.files = {"submission.csv": b"id,rewrite_prompt\n", "runs/run.json": b"{}"}
    came = output(KERNEL, target)
    assert came == [target / name for name in ("prompt-recovery.log", "runs/run.json", "submission.csv")]
    assert (target / "submission.csv").read_bytes() == b"id,rewrite_prompt\n"
    assert said[-1] == "submission.csv is among the 3 files"
    there = sorted(path.name for path in target.iterdir())
    assert there == ["kernel.run.json", "prompt-recovery.log", "runs", "submission.csv"]


@needs_client
def test_a_file_of_the_user_s_is_not_replaced_by_the_output(
    server: KaggleServer, tmp_path: Path, said: list[str]
) -> None:
    target = tmp_path / "output"
    target.mkdir()
    (target / "submission.csv").write_text("mine")
    server.files = {"submission.csv": b"id,rewrite_prompt\n", "run.json": b"{}"}
    with pytest.raises(UserError, match=r"submission\.csv: in the way"):
        output(KERNEL, target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("submission.csv", "mine")]


@needs_client
def test_an_error_page_is_not_taken_for_a_file(server: KaggleServer, tmp_path: Path, said: list[str]) -> None:
    server.files = {"submission.csv": b"gone"}
    with pytest.raises(KaggleError) as caught:
        output(KERNEL, tmp_path / "output")
    assert explained(caught.value, "no submission.csv (404)", "again")
    assert list((tmp_path / "output").iterdir()) == []


@needs_client
def test_a_kernel_without_output_is_said_so(server: KaggleServer, tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(KaggleError) as caught:
        output(KERNEL, tmp_path / "output")
    assert explained(caught.value, "no output", f"kaggle kernels status {KERNEL}")


@needs_client
@pytest.mark.parametrize("refusal", [403, 404])
def test_a_dataset_is_created_the_first_time(server: KaggleServer, wheels: Path, said: list[str], refusal: int) -> None:
    server.answer("GetDatasetStatus", {"code": refusal, "message": "no"}, status=refusal)
    assert push_dataset(wheels, "first") == DATASET_URL
    assert server.uploaded == {"one.whl": b"first", "two.whl": b"second"}
    (sent,) = server.calls("CreateDataset")
    assert (sent["ownerSlug"], sent["slug"], sent["title"]) == (USER, "prompt-recovery-wheels", "Wheels for a kernel")
    assert (sent["isPrivate"], sent["licenseName"]) == (True, "apache-2.0")
    assert sorted(file["token"] for file in sent["files"]) == ["token-of-one.whl", "token-of-two.whl"]
    assert said[0] == f"creating {DATASET}: 2 files, 0.0 MB"


@needs_client
def test_a_dataset_that_exists_gets_a_new_version(server: KaggleServer, wheels: Path, said: list[str]) -> None:
    server.answer("CreateDatasetVersion", {"status": "ok", "url": DATASET_URL, "invalidTags": ["no-such-tag"]})
    assert push_dataset(wheels, "second; with care") == DATASET_URL
    (sent,) = server.calls("CreateDatasetVersion")
    assert sent["body"]["versionNotes"] == "second; with care"
    assert len(sent["body"]["files"]) == 2
    assert server.calls("CreateDataset") == []


@needs_client
def test_a_dataset_is_waited_for_until_it_is_ready(server: KaggleServer, said: list[str]) -> None:
    server.answer("GetDatasetStatus", {"status": "BLOBS_RECEIVED"})
    with pytest.raises(KaggleError) as caught:
        wait_until_ready(DATASET, poll_seconds=0.1, timeout=0.1)
    assert explained(caught.value, "is not ready", "push --no-dataset")
    server.answer("GetDatasetStatus", {"status": "READY"})
    wait_until_ready(DATASET, poll_seconds=0.1)


@needs_client
def test_a_dataset_that_cannot_be_unpacked_is_a_failure(server: KaggleServer, said: list[str]) -> None:
    server.answer("GetDatasetStatus", {"status": "FAILED"})
    with pytest.raises(KaggleError) as caught:
        wait_until_ready(DATASET, poll_seconds=0.1)
    assert explained(caught.value, "could not unpack", "push it again")


@needs_client
def test_a_dataset_that_kaggle_refuses_is_a_failure(server: KaggleServer, wheels: Path, said: list[str]) -> None:
    server.answer("CreateDatasetVersion", {"status": "error", "error": f"The title must not hold {KEY}"})
    with pytest.raises(KaggleError) as caught:
        push_dataset(wheels, "m")
    assert explained(caught.value, f"upload of {DATASET} failed", "The title must not hold [hidden]", "Correct")


@needs_client
def test_a_dataset_of_the_placeholder_is_pushed_by_its_owner(
    server: KaggleServer, wheels: Path, said: list[str]
) -> None:
    path = wheels / "dataset-metadata.json"
    path.write_text(json.dumps({**DATASET_METADATA, "id": "OWNER/prompt-recovery-wheels"}))
    with pytest.raises(UserError, match="write your user name of Kaggle for OWNER"):
        push_dataset(wheels, "m")
    assert push_dataset(wheels, "m", owner=USER) == DATASET_URL
    (sent,) = server.calls("CreateDatasetVersion")
    assert (sent["ownerSlug"], len(sent["body"]["files"])) == (USER, 2)
    assert "OWNER" in path.read_text()


def test_a_dataset_with_a_folder_or_without_files_is_refused(wheels: Path, said: list[str]) -> None:
    (wheels / "deep").mkdir()
    with pytest.raises(UserError, match="holds the folder deep"):
        push_dataset(wheels, "m")
    for path in (wheels / "deep", wheels / "one.whl", wheels / "two.whl"):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="holds no file"):
        push_dataset(wheels, "m")


@needs_client
def test_a_submission_names_kernel_version_and_file(server: KaggleServer, said: list[str]) -> None:
    submit("llm-prompt-recovery", KERNEL, 3, "submission.csv", "a first try")
    (sent,) = server.calls("CreateCodeSubmission")
    assert sent == {
        "competitionName": "llm-prompt-recovery",
        "kernelOwner": USER,
        "kernelSlug": "prompt-recovery",
        "kernelVersion": 3,
        "fileName": "submission.csv",
        "submissionDescription": "a first try",
    }
    assert said == ["Successfully submitted to LLM Prompt Recovery"]


@needs_client
@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (200, "Submission not allowed: 5 of 5 used", ["not allowed: 5 of 5 used"]),
        (403, "You must accept this competition's rules", ["(403)", "Accept the competition's rules"]),
    ],
)
def test_a_submission_that_is_not_taken_is_a_failure(
    server: KaggleServer, said: list[str], code: int, message: str, words: list[str]
) -> None:
    content = {"message": message} if code == 200 else {"code": code, "message": message}
    server.answer("CreateCodeSubmission", content, status=code)
    with pytest.raises(KaggleError) as caught:
        submit("llm-prompt-recovery", KERNEL, 3, "submission.csv", "m")
    assert explained(caught.value, f"submission of {KERNEL} to llm-prompt-recovery failed", *words)
    assert said == []


FAULTS: list[tuple[int, dict[str, Any], list[str]]] = [
    (200, {"error": "Maximum batch GPU session count of 2 reached."}, ["session count of 2", "Stop a running session"]),
    (200, {"error": "Maximum weekly GPU quota of 30.00 hours reached."}, ["weekly GPU quota", "the quota renews"]),
    (200, {"error": f"no {KEY} here"}, ["no [hidden] here"]),
    (
        200,
        {"versionNumber": 4, "url": KERNEL_URL, "invalidDatasetSources": [DATASET]},
        ["version 4 was saved without the dataset", DATASET, "Push the dataset first"],
    ),
    (
        200,
        {"versionNumber": 4, "url": KERNEL_URL, "invalidModelSources": ["google/gemma/transformers/7b-it/2"]},
        ["without the model google/gemma/transformers/7b-it/2", "the version number must exist"],
    ),
    (
        200,
        {"versionNumber": 4, "url": KERNEL_URL, "invalidCompetitionSources": ["llm-prompt-recovery"]},
        ["without the competition llm-prompt-recovery", "accept its rules"],
    ),
    (400, {"code": 400, "message": "Field 'machineShape' is odd"}, ["'machineShape' is odd (400)", "Correct the"]),
    (
        401,
        {"code": 401, "message": "Unauthenticated"},
        ["Unauthenticated (401)", "Make a new token", "kaggle.json for ~/.kaggle"],
    ),
    (403, {"code": 403, "message": "Permission denied"}, ["denied (403)", "Accept the competition's rules"]),
    (404, {"code": 404, "message": "Notebook not found"}, ["not found (404)", "Look at the name owner/slug"]),
    (429, {"code": 429, "message": "Too many requests"}, ["(429)", "Wait some minutes"]),
    (500, {"code": 500, "message": "Oh"}, ["Oh (500)", "Kaggle has a fault"]),
    (400, {}, ["400 Client Error", "Correct the"]),
]


@needs_client
@pytest.mark.parametrize(("code", "content", "words"), FAULTS)
def test_a_push_that_kaggle_refuses_is_explained(
    server: KaggleServer, folder: Path, said: list[str], code: int, content: dict[str, Any], words: list[str]
) -> None:
    server.answer("SaveKernel", content, status=code)
    with pytest.raises(KaggleError) as caught:
        push(folder, owner=USER)
    assert explained(caught.value, f"push of {KERNEL} failed: ", *words)
    assert said == []


@needs_client
@pytest.mark.parametrize(("code", "step"), [(401, "new token"), (403, "Accept the"), (404, "Look at the name")])
def test_a_status_that_kaggle_refuses_is_explained(server: KaggleServer, code: int, step: str) -> None:
    server.answer("GetKernelSessionStatus", {"code": code, "message": "kernels.get was denied"}, status=code)
    with pytest.raises(KaggleError) as caught:
        status(KERNEL)
    assert explained(caught.value, f"status of {KERNEL} failed: kernels.get was denied ({code})", step)


@needs_client
def test_a_closed_port_is_a_matter_of_the_network(
    folder: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    use_port(tmp_path, port, monkeypatch)
    with pytest.raises(KaggleError) as caught:
        push(folder, owner=USER)
    assert explained(caught.value, "Connection refused", "Look at the network")
    assert caught.value.transient
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_fedcba9876543210")  # the client then calls before it does anything
    with pytest.raises(KaggleError) as caught:
        configured_user()
    assert explained(caught.value, "Connection refused", "Look at the network")


@needs_client
def test_a_server_that_does_not_answer_is_a_time_out(server: KaggleServer, folder: Path, said: list[str]) -> None:
    server.silent = True
    begin = time.monotonic()
    with pytest.raises(KaggleError) as caught:
        push(folder, owner=USER, timeout=2)
    assert explained(caught.value, "no answer within 2 s", "Look at the network")
    assert time.monotonic() - begin < 10
    assert caught.value.__suppress_context__  # what the client had printed holds credentials


@needs_client
def test_credentials_are_sent_and_never_shown(server: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = run_client(["kernels", "status", KERNEL])
    sent = server.received[-1].authorization
    assert sent.startswith("Basic ")
    assert KEY not in repr(reply)
    assert sent.removeprefix("Basic ") not in repr(reply)
    assert hide(f"{sent} and {KEY}") == "Basic [hidden] and [hidden]"
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_fedcba9876543210")
    reply = run_client(["kernels", "status", KERNEL])
    assert server.received[-1].authorization == "Bearer KGAT_fedcba9876543210"
    assert "KGAT" not in repr(reply)


def test_credentials_in_files_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_port(tmp_path, 1, monkeypatch)
    monkeypatch.delenv("KAGGLE_KEY")
    settings = tmp_path / "home" / ".kaggle"
    settings.mkdir()
    (settings / "kaggle.json").write_text('{"username": "filed", "key": "key-in-a-file"}')
    (settings / "access_token").write_text("token-in-a-file\n")
    (settings / "credentials.json").write_text('{"refresh_token": "refresh-in-a-file"}')
    told = hide("key-in-a-file, token-in-a-file, refresh-in-a-file, Authorization: Bearer another-one")
    assert told == "[hidden], [hidden], [hidden], Authorization: Bearer [hidden]"


@needs_client
def test_the_user_is_the_one_whose_credentials_are_used(
    server: KaggleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configured_user() == USER
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(UserError, match=r"(?s)settings/api.*kaggle\.json for ~/\.kaggle"):
        configured_user()
    for place in (tmp_path / "home" / ".config" / "kaggle", tmp_path / "home" / ".kaggle", tmp_path / "given"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "kaggle.json").write_text(json.dumps({"username": f"in-{place.name}", "key": KEY}))
        if place.name == "given":
            monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(place))
        assert configured_user() == f"in-{place.name}"
    assert server.received == []
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_fedcba9876543210")
    assert configured_user() == "token-owner"


def test_show_prints_commands_for_a_shell_and_sends_nothing(
    folder: Path,
    wheels: Path,
    tmp_path: Path,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert push(folder, owner=USER, wait=True, show=True) is None
    assert status(KERNEL, show=True) is None
    assert wait_for(KERNEL, show=True) is None
    assert output(KERNEL, tmp_path / "my output", show=True) == []
    submit("llm-prompt-recovery", KERNEL, 3, "submission.csv", "it's a try", show=True)
    assert push_dataset(wheels, "m", show=True) == ""
    assert push_dataset(wheels, "m", owner=USER, show=True) == ""
    lines = [shlex.split(line, comments=True) for line in capsys.readouterr().out.splitlines()]
    assert lines[5].count("it's a try") == 1
    lines[5][lines[5].index("it's a try")] = "X"
    pushed, copied = Path(lines[0][-1]), Path(lines[8][-2])
    assert lines == [
        ["kaggle", "kernels", "push", "-p", str(pushed)],
        *[["kaggle", "kernels", "status", KERNEL]] * 3,
        ["kaggle", "kernels", "output", KERNEL, "-p", str(tmp_path / "my output")],
        shlex.split(f"kaggle competitions submit llm-prompt-recovery -k {KERNEL} -v 3 -f submission.csv -m X -q"),
        ["kaggle", "datasets", "create", "-p", str(wheels), "-t"],
        ["kaggle", "datasets", "version", "-p", str(wheels), "-m", "m", "-t"],
        ["kaggle", "datasets", "create", "-p", str(copied), "-t"],
        ["kaggle", "datasets", "version", "-p", str(copied), "-m", "m", "-t"],
    ]
    assert sorted(path.name for path in copied.iterdir()) == ["dataset-metadata.json", "one.whl", "two.whl"]
    assert said == []
    assert read_metadata(pushed / "kernel-metadata.json")["id"] == KERNEL  # the shown command works
    assert (pushed / "submission" / "kernel.py").read_text(encoding="utf-8") == CODE


def test_the_client_is_never_imported() -> None:
    code = "import sys, submission.publish.push, submission.publish.datasets; print('kaggle' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_log_is_read_in_any_form() -> None:
    events = [{"stream_name": "stdout", "time": 1.5, "data": "one\ntw"}, {"time": 2, "data": "o\n\n"}]
    assert log_lines(json.dumps(events)) == ["one", "two"]
    assert log_lines("plain\n\ntext") == ["plain", "text"]


@needs_client
def test_the_command_pushes_bundle_and_kernel_and_brings_the_output_back(
    server: KaggleServer, wheels: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # we ask, and the client asks once more
        server.answer("GetDatasetStatus", {"code": 404, "message": "no"}, status=404)
    server.answer("GetDatasetStatus", {"status": "READY"})
    server.answer("GetKernelSessionStatus", {"status": "COMPLETE"})
    content = DATASET_METADATA | {"id": "OWNER/prompt-recovery-bundle", "title": "prompt-recovery bundle"}
    (wheels / "dataset-metadata.json").write_text(json.dumps(content))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "submission", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip

    done = run("push", "--no-dry-run", "--bundle", str(wheels))
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    (sent,) = server.calls("SaveKernel")
    assert sent["text"] == (ROOT / "submission/kernel.py").read_text()
    assert sent["datasetDataSources"] == [f"{USER}/prompt-recovery-bundle"]
    assert sent["enableInternet"] is False
    stands = run("status")
    assert (stands.returncode, stands.stdout.strip()) == (0, "complete")
    assert run("submit", "--version", "3", "-m", "first").returncode == 0


@needs_client
def test_the_command_asks_for_the_models_and_the_machine_that_were_named(
    server: KaggleServer, wheels: Path, tmp_path: Path
) -> None:
    handles = ["google/gemma/transformers/7b-it/3", "mistral-ai/mistral/pytorch/7b-instruct-v0.1-hf/1"]
    (wheels / "kernel.toml").write_text('recover = "ensemble.best_of:best_of"\n')
    (wheels / "bundle.json").write_text(json.dumps({"files": {}, "attach": handles}))
    options = ["--no-dry-run", "--no-dataset", "--no-wait", "--bundle", str(wheels), "--accelerator", "l4x4"]
    done = subprocess.run(
        [sys.executable, "-m", "submission", "push", *options], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (sent,) = server.calls("SaveKernel")
    assert sent["modelDataSources"] == handles
    assert (sent["enableGpu"], sent["machineShape"]) == (True, "NvidiaL4")
