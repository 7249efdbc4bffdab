"""The official converter of the llama.cpp commit that the installed llama-cpp-python was built from.

It comes with that package's source distribution, which is downloaded once and kept in the user's cache; on machines
without a package registry, `--llama-cpp DIR` names a checkout of llama.cpp.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from submission.data.files import atomic_folder, cache_folder
from submission.data.hashing import content_hash
from submission.data.outputs import installed_version
from submission.errors import MissingExtra, UserError
from submission.progress import print_line

_MODEL, _LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_NEEDED = (_MODEL, _LORA, "conversion", "gguf-py", "LICENSE")
_ENDS = 400  # characters of the converter's last words that an error shows


class Converter:
    """Runs the converter's scripts.

    Args:
        folder: a checkout of llama.cpp, or the part of one that the scripts need.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / _MODEL).is_file():
            raise UserError(f"{folder} is no checkout of llama.cpp: it has no {_MODEL}")
        self.folder = folder
        self.fingerprint = content_hash(folder / _MODEL)

    def model(self, folder: Path, target: Path, kind: str) -> None:
        """Convert a transformers folder; `kind` is f32, f16 or bf16."""
        self._run(_MODEL, [str(folder), "--outfile", str(target), "--outtype", kind], f"model {folder}")

    def adapter(self, folder: Path, base: Path, target: Path) -> None:
        """Convert a PEFT folder to a GGUF LoRA file."""
        options = [str(folder), "--base", str(base), "--outfile", str(target), "--outtype", "f16"]
        self._run(_LORA, options, f"adapter {folder}")

    def _run(self, script: str, options: Sequence[str], what: str) -> None:
        # A process of its own: the scripts bring their own gguf package.
        done = subprocess.run(
            [sys.executable, str(self.folder / script), *options],
            capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-_ENDS:]
            raise UserError(f"{what} cannot be converted by llama.cpp's {script}:\n{said}")


def find_converter(llama_cpp: Path | None = None) -> Converter:
    """The converter in a checkout, or that of the installed llama-cpp-python.

    Raises:
        UserError: it cannot be had; says how.
    """
    if llama_cpp is not None:
        return Converter(llama_cpp)
    version = installed_version("llama-cpp-python")
    if version is None:
        raise MissingExtra("the converter", "llama-cpp-python", "")
    folder = cache_folder("llama.cpp") / version
    if not (folder / _MODEL).is_file():
        _download(version, folder)
    return Converter(folder)


def _download(version: str, folder: Path) -> None:
    print_line(
        f"llama.cpp's converter is taken from the source of llama-cpp-python {version}, once: {folder}", sys.stderr
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as name:
        temporary = Path(name)
        download = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
        source = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}", "-d", name]
        done = subprocess.run([*download, *source], capture_output=True, text=True, check=False)
        archives = list(temporary.glob("*.tar.gz"))
        if not archives:
            said = done.stderr.strip()[-_ENDS:]
            raise UserError(
                f"the source of llama-cpp-python {version} cannot be downloaded: {said}\n"
                "Name a checkout of llama.cpp with --llama-cpp DIR."
            )
        with atomic_folder(folder) as part, tarfile.open(archives[0]) as archive:
            for member in archive:
                inside = member.name.partition("/vendor/llama.cpp/")[2]
                if inside.split("/")[0] in _NEEDED and member.isfile() and ".." not in inside.split("/"):
                    content = archive.extractfile(member)
                    assert content is not None
                    (part / inside).parent.mkdir(parents=True, exist_ok=True)
                    (part / inside).write_bytes(content.read())
            if not (part / _MODEL).is_file():
                raise UserError(f"the source of llama-cpp-python {version} holds no {_MODEL}: use --llama-cpp DIR")
