"""Whether a model fits on a machine's GPUs and how long a run would take there, computed from the model's shapes.

    shape = ModelShape.from_config(read_json(folder / "config.json"))
    plan = fit(MACHINES[0], shape, Work(rows=1400, prompt_tokens=500, new_tokens=40), Precision(bits=4))
    print(plan.kv_tokens, plan.minutes)

A roofline: a decoding step takes as long as its bytes or its arithmetic, whichever takes longer, over the GPU's figures
times an efficiency. Nothing here was measured; `python -m submission predict --dry-run` times real rows where the model
can be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from submission.backends.transformers.devices import choose_dtype
from submission.errors import UserError

# Shares of a GPU's figures that batched transformers reach, as assumed here.
_OF_BANDWIDTH, _OF_FLOPS = 0.6, 0.4
_UNMERGED = 1.75  # an adapter beside 4-bit weights: 7 h where the merged model took 4 h, by the competition's reports
_READING = 0.3e9  # bytes a second from Kaggle's inputs, an assumption
_NF4 = 4.127 / 8  # bytes of a weight: 4 bits, 8 bits for 64 of them, 32 bits for 256 of those
_CONTEXT_BYTES, _FREE_SHARE = 0.5 * 2**30, 0.05  # of CUDA itself, and of fragments that cannot be used
_LOGIT_BYTES = 3 * 4  # of a vocabulary's entry: logits, probabilities and their sums in 32 bits
_MOST_AT_ONCE = 256  # answers of a batch of the transformers backend


@dataclass(frozen=True, slots=True)
class Gpu:
    """Figures of a GPU.

    Attributes:
        name: of the GPU.
        memory: bytes that torch reports as its total.
        bandwidth: bytes a second.
        flops: 16-bit floating-point operations a second of the tensor cores, without sparsity.
        float32_flops: 32-bit floating-point operations a second.
        capability: its CUDA compute capability, which decides the dtype (see `choose_dtype`).
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    float32_flops: float
    capability: tuple[int, int]

    def number_bytes(self, kind: str, dtype: str) -> int:
        """Bytes of the numbers that a model of this `model_type` computes in, if it is asked for this dtype."""
        return 4 if choose_dtype(kind, self.capability, dtype) == "float32" else 2


@dataclass(frozen=True, slots=True)
class Machine:
    """What Kaggle lends: `count` of one GPU.

    Attributes:
        name: what `--accelerator` takes.
        shape: Kaggle's `machine_shape`.
    """

    name: str
    shape: str
    gpu: Gpu
    count: int


_GIB = 2.0**30
# Nvidia's data sheets: T4 (nvidia.com/en-us/data-center/tesla-t4), L4 (.../l4), A100 40 GB SXM (.../a100),
# H100 SXM (.../h100). L4 and H100 figures there are with sparsity: half is taken.
_T4 = Gpu("T4", 14.7 * _GIB, 320e9, 65e12, 8.1e12, (7, 5))
_L4 = Gpu("L4", 22.2 * _GIB, 300e9, 121e12, 30.3e12, (8, 9))
_A100 = Gpu("A100", 39.6 * _GIB, 1555e9, 312e12, 19.5e12, (8, 0))
_H100 = Gpu("H100", 79.1 * _GIB, 3350e9, 989e12, 67e12, (9, 0))

MACHINES = (
    Machine("t4x2", "NvidiaTeslaT4", _T4, 2),
    Machine("l4x4", "NvidiaL4", _L4, 4),
    Machine("a100", "NvidiaTeslaA100", _A100, 1),
    Machine("h100", "NvidiaH100", _H100, 1),
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that decide its memory and arithmetic.

    Attributes:
        kind: its `model_type`.
        layers, hidden, intermediate, vocabulary: as usual.
        heads, kv_heads, head_size: of attention.
        tied: whether the output layer is the embedding.
    """

    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape that a `config.json` tells.

        Raises:
            UserError: a size is missing or no whole number above zero.
        """
        text = config.get("text_config", config) if isinstance(config, Mapping) else None
        if not isinstance(text, Mapping):
            raise UserError("config.json is of another kind: memory and time cannot be planned")
        kind = str(text.get("model_type", config.get("model_type", "")))

        def size(key: str, default: object = None) -> int:
            value = text.get(key)
            value = default if value is None else value
            if type(value) is not int or value < 1:
                raise UserError(f"config.json: {key} = {value!r} is no size: memory and time cannot be planned")
            return value

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        return cls(
            kind, size("num_hidden_layers"), hidden, size("intermediate_size"), heads,
            size("num_key_value_heads", heads), size("head_dim", hidden // heads), size("vocab_size"),
            bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", kind.startswith("gemma")))),
        )  # fmt: skip

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers: attention and the gated MLP."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the output layer where it is another."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights, without those of norms."""
        return self.layer_parameters + self.embedding_parameters

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a token takes, in 16 bits; windows of attention save none."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size

    @property
    def working_bytes(self) -> int:
        """Bytes of activations that a prompt's token takes while it is computed."""
        return 2 * (3 * self.intermediate + 6 * self.hidden)


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held.

    Attributes:
        bits: 16 (32 where the model computes in it), or 4 for nf4 with double quantisation; the embedding and the
            output layer are never in 4.
        adapter_bytes: of a LoRA adapter; beside 4-bit weights it is not merged.
        dtype: that the model is asked to compute in; see `choose_dtype`.
    """

    bits: int = 16
    adapter_bytes: float = 0.0
    dtype: str = "auto"

    def weight_bytes(self, shape: ModelShape, number: int = 2) -> float:
        """Bytes of a copy of the weights, where the model computes in numbers of so many bytes."""
        each = _NF4 if self.bits == 4 else number
        beside = self.adapter_bytes if self.bits == 4 else 0.0
        return each * shape.layer_parameters + number * shape.embedding_parameters + beside

    def step_bytes(self, shape: ModelShape, number: int = 2) -> float:
        """Bytes of weights that a decoding step moves; 4-bit weights are written out in such numbers and read again."""
        each = _NF4 + 2 * number if self.bits == 4 else number
        return each * shape.layer_parameters + number * shape.vocabulary * shape.hidden


@dataclass(frozen=True, slots=True)
class Work:
    """What a model is asked: `answers` of up to `new_tokens` for each of `rows` prompts of `prompt_tokens`."""

    rows: int
    prompt_tokens: int
    new_tokens: int
    answers: int = 1


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run goes on a machine, as computed.

    Attributes:
        machine: with a copy of the model on each GPU.
        weight_bytes: of a copy.
        kv_tokens: that fit beside it, on each GPU; 0 if the weights alone do not.
        at_once: answers that are decoded together on each GPU; 0 if none fits.
        minutes: of the whole run, loading included; infinite if it does not fit.
        caution: what else to know; "" if nothing.
    """

    machine: Machine
    weight_bytes: float
    kv_tokens: int
    at_once: int
    minutes: float
    caution: str = ""

    @property
    def fits(self) -> bool:
        """Whether a copy and at least one answer fit on a GPU."""
        return self.at_once > 0


def fit(machine: Machine, shape: ModelShape, work: Work, precision: Precision = Precision()) -> Fit:
    """Plan a run with a copy of the model on each GPU."""
    gpu, number = machine.gpu, machine.gpu.number_bytes(shape.kind, precision.dtype)
    weights, kv_bytes = precision.weight_bytes(shape, number), shape.kv_bytes * number // 2
    flops = gpu.flops if number == 2 else gpu.float32_flops
    room = gpu.memory * (1 - _FREE_SHARE) - _CONTEXT_BYTES - weights
    length = work.prompt_tokens + work.new_tokens
    working = work.prompt_tokens * shape.working_bytes * number // 2
    each = length * kv_bytes + working + _LOGIT_BYTES * shape.vocabulary
    at_once = max(0, min(_MOST_AT_ONCE, int(room // each)))
    kv_tokens = max(0, int(room // kv_bytes))
    if not at_once:
        return Fit(machine, weights, kv_tokens, 0, math.inf)
    rows = math.ceil(work.rows / machine.count)
    prefill = rows * prefill_flop(shape, work.prompt_tokens) / (flops * _OF_FLOPS)
    batch = max(1, min(at_once, rows * work.answers))
    moved = precision.step_bytes(shape, number) + batch * (work.prompt_tokens + work.new_tokens / 2) * kv_bytes
    step = max(
        moved / (gpu.bandwidth * _OF_BANDWIDTH),
        2 * batch * (shape.layer_parameters + shape.vocabulary * shape.hidden) / (flops * _OF_FLOPS),
    )
    decode = math.ceil(rows * work.answers / batch) * work.new_tokens * step
    slower = _UNMERGED if precision.bits == 4 and precision.adapter_bytes else 1.0
    loading = 2.0 * shape.parameters / _READING
    minutes = (loading + slower * (prefill + decode)) / 60
    return Fit(machine, weights, kv_tokens, at_once, minutes, _caution(gpu, shape, precision))


def together(fits: Sequence[Fit]) -> Fit:
    """Models that take turns on one machine: the tightest memory, the sum of the minutes."""
    machine = fits[0].machine
    return Fit(
        machine, max(one.weight_bytes for one in fits), min(one.kv_tokens for one in fits),
        min(one.at_once for one in fits), sum(one.minutes for one in fits),
        "; ".join(dict.fromkeys(one.caution for one in fits if one.caution)),
    )  # fmt: skip


def prefill_flop(shape: ModelShape, tokens: int) -> float:
    """Floating-point operations of one prompt: the layers, causal attention, and the output layer at its end."""
    attention = 2.0 * shape.layers * shape.heads * shape.head_size * tokens**2
    return 2.0 * shape.layer_parameters * tokens + attention + 2.0 * shape.vocabulary * shape.hidden


def _caution(gpu: Gpu, shape: ModelShape, precision: Precision) -> str:
    if gpu.number_bytes(shape.kind, precision.dtype) == 2:
        return ""
    why = f": a {gpu.name} has no bfloat16" if precision.dtype == "auto" else ""
    return f"{shape.kind} computes in float32{why}"


def shown(fits: Iterable[Fit], limit_minutes: float = math.inf) -> Iterator[str]:
    """Lines to print: a heading, then one for each machine."""
    yield "machine  weights/GPU  KV tokens/GPU  at once/GPU  minutes"
    for one in fits:
        head = f"{one.machine.name:7}  {one.weight_bytes / 1e9:8.1f} GB  {one.kv_tokens:13,}"
        if not one.fits:
            yield f"{head}  does not fit: {one.machine.gpu.memory / 1e9:.1f} GB a GPU"
            continue
        late = f"over the {limit_minutes / 60:.3g} h that there are" if one.minutes > limit_minutes else ""
        notes = "; ".join(note for note in (late, one.caution) if note)
        yield f"{head}  {one.at_once:11}  {one.minutes:7.0f}{f'  {notes}' if notes else ''}"
