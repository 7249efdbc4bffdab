"""How a model is held: by how many workers, with which share of the machine, and how else if that fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from submission.backends import ModelSpec
from submission.backends.common import memory_budget, thread_count
from submission.backends.hardware import ALONE, visible_gpus
from submission.calls.processes import Processes
from submission.calls.shares import one_of
from submission.calls.supervisor import Carrier
from submission.calls.worker import Loadable
from submission.errors import BackendError, first_line
from submission.types import Chat, Encoded, Failure

_SMALL = {"batch": 4, "streams": 4}  # answers that are computed together when memory or a GPU gave trouble
_OF_SMALL = {"transformers": "batch", "llama_cpp": "streams", "openvino": "streams", "vllm": "streams"}


@dataclass(frozen=True, slots=True)
class Way:
    """A way of holding a model.

    Attributes:
        what: is loaded.
        words: how it is held, for messages; "" as it was asked for.
        environment: of its workers, beside that of this process.
    """

    what: Loadable
    words: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def carrier(self) -> Carrier:
        """Workers that hold it so.

        Raises:
            UserError: no such cluster, or no room there.
        """
        spec = self.what
        if not isinstance(spec, ModelSpec):
            return Processes([(spec, self.environment)])
        if spec.placement.ray:
            from submission.calls.ray import Actors

            return Actors(spec, spec.placement)
        spread = getattr(spec.options, "device", "") == "balanced"  # one copy takes all GPUs
        gpus = [] if spread or "CUDA_VISIBLE_DEVICES" in self.environment else visible_gpus()
        count = 1 if spread else spec.placement.count
        share = (
            one_of(spec)
            if count == 1
            else one_of(
                spec, threads=max(1, thread_count(0) // count), memory=max(64, memory_budget() // count // 1_000_000)
            )
        )
        return Processes([
            (share, {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else self.environment)
            for number in range(count)
        ])  # fmt: skip


def ways(what: Loadable) -> Iterator[Way]:
    """The ways of holding a model, the safest last: as it was asked for, smaller, without a GPU."""
    yield Way(what)
    if not isinstance(what, ModelSpec) or what.placement.ray or what.backend not in _OF_SMALL:
        return
    name = _OF_SMALL[what.backend]
    small = replace(what, placement=ALONE, options=replace(what.options, **{name: _SMALL[name]}))
    if small != what:
        yield Way(small, f"with one worker and {name}={_SMALL[name]}")
    if visible_gpus() and what.backend != "vllm":  # whose build is for one or the other
        less = {"load_in_4bit": False, "device": "auto"} if what.backend == "transformers" else {}
        on_cpu = replace(small, options=replace(small.options, **less))
        yield Way(on_cpu, "on the CPU", {"CUDA_VISIBLE_DEVICES": ""})


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """A model's tokenizer and chat template alone, to see prompts as the model does."""

    spec: ModelSpec

    def load(self) -> Tokenizing._Encoder:
        """See `Loadable`."""
        return self._Encoder(self.spec)

    class _Encoder:
        def __init__(self, spec: ModelSpec) -> None:
            self._encoder = spec.load_encoder()

        def encode(self, items: Iterator[tuple[str, Chat | str, int]]) -> Iterator[tuple[str, Any]]:
            """See `submission.calls.models.encode`."""
            encoder = self._encoder
            for key, asked, new_tokens in items:
                try:
                    if isinstance(asked, str):
                        ids = encoder.encode_continuation(asked)
                        yield key, Encoded(len(ids), False, asked, encoder.context)
                    else:
                        prompt = encoder.encode_for(asked, new_tokens)
                        text = encoder.text(prompt.ids)
                        yield key, Encoded(len(prompt.ids), prompt.truncated, text, encoder.context)
                except BackendError as error:
                    yield key, Failure(first_line(error))
