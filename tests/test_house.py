"""The house keeps its shape: imports follow the arrows, metadata is sound, nothing heavy loads early."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment

ROOMS = ("submission", "eval", "train", "ensemble")
MAY_IMPORT = {
    "submission": set(),
    "eval": {"submission"},
    "train": {"submission", "eval"},
    "ensemble": {"submission", "eval"},
}
HEAVY = {"torch", "transformers", "llama_cpp", "pandas", "numpy", "pyarrow", "peft",
         "sentence_transformers", "openvino", "openvino_genai", "tokenizers", "gguf", "jinja2"}  # fmt: skip


def imported(path: Path, *, top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        others = {name.split(".")[0] for name in imported(path)} & set(ROOMS) - {room}
        assert others <= MAY_IMPORT[room], f"{path} imports {others}"


# The folders and files of a room, from the top floor down: each may import those behind it.
FLOORS = {
    "submission": ("__main__", "publish", "predict", "calls", "backends", "data", "prompts", "commands", "kernel",
                   "config", "progress", "types", "errors"),
}  # fmt: skip


@pytest.mark.parametrize("room", FLOORS)
def test_imports_inside_a_room_run_downward(room: str) -> None:
    floors = FLOORS[room]
    for path in (ROOT / room).rglob("*.py"):
        parts = path.relative_to(ROOT / room).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imported(path):
            if name.startswith(f"{room}."):
                other = name.split(".")[1]
                assert floors.index(parts[0]) <= floors.index(other), f"{path} imports {name}, a floor above"


@pytest.mark.parametrize("room", ROOMS)
def test_no_imports_run_in_a_circle(room: str) -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
               for path in (ROOT / room).rglob("*.py")}  # fmt: skip
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in modules else str(node.module) for name in named}
        edges[module] = {name for name in found if name in modules and name not in (module, room)}
    order = TopologicalSorter(edges)
    order.prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("room", ROOMS)
def test_heavy_packages_are_not_imported_at_the_top_of_a_module(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        top = {name.split(".")[0] for name in imported(path, top_level=True)}
        assert not top & HEAVY, f"{path} imports {top & HEAVY} at its top"


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_a_typed_package_and_a_command(room: str) -> None:
    assert (ROOT / room / "py.typed").is_file()
    done = subprocess.run(
        [sys.executable, "-m", room, "--help"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert room in done.stdout


def test_kernel_metadata_is_json_with_the_internet_off() -> None:
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert metadata["enable_internet"] is False
    assert metadata["is_private"] is True
    assert metadata["competition_sources"] == ["llm-prompt-recovery"]


def test_constraints_pin_every_dependency() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    names = {re.split("==", line)[0].lower().replace("_", "-") for line in pins.splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in wanted:
        name = re.split(r"[\[<>=]", requirement)[0].lower()
        assert name == "prompt-recovery" or name in names, f"{name} is not pinned"
    assert "torch==2.13.0" in pins.splitlines()


def test_nothing_loads_pickles_or_remote_code() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "trust_remote_code=True" not in text.replace(" ", ""), path
            assert "pickle" not in set(imported(path)), path


def test_every_option_of_predict_stands_in_one_group_of_its_help() -> None:
    from typer.main import get_command

    from submission.__main__ import _GROUPS, app

    group: Any = get_command(app)
    command = group.commands["predict"]
    options = [parameter.name for parameter in command.params if parameter.param_type_name == "option"]
    assert sorted(name for names in _GROUPS.values() for name in names) == sorted([*options, "help"])
