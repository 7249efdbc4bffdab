"""A model and the blocks of its KV cache: one step computes pieces of many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends.openvino.graph import compiled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK = 32  # tokens of a block: what OpenVINO's paged attention has on CPUs


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence that are computed in a step.

    Attributes:
        ids: the tokens.
        past: how many stand before them, whose keys and values lie in `blocks`.
        blocks: of the sequence, enough for its past and these.
        scored: places in `ids` whose logits are wanted, rising.
        targets: a token for each of them.
        sampled: the logits of the last scored place leave the graph.
    """

    ids: NDArray[np.int32]
    past: int
    blocks: Sequence[int]
    scored: NDArray[np.int32]
    targets: NDArray[np.int32]
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Stepped:
    """What came of a step: by scored place, in the order of the pieces, and by sampled piece.

    Attributes:
        top, top_logprob: the likeliest token and its log-probability.
        target_logprob: of the target.
        logits: shape (sampled, vocabulary); the next step overwrites them.
        logsumexp: shape (sampled,).
    """

    top: NDArray[np.int32]
    top_logprob: NDArray[np.float32]
    target_logprob: NDArray[np.float32]
    logits: NDArray[np.float32]
    logsumexp: NDArray[np.float32]


class Engine:
    """A compiled model and its cache.

    Args:
        folder: with openvino_model.xml.
        dtype: float32 or bfloat16.
        threads: to compute with.
        cache_bytes: that the cache may take.
        least_tokens: that it must hold, whatever that takes.
        most_tokens: that are of use.
    """

    def __init__(
        self, folder: Path, dtype: str, threads: int, *, cache_bytes: int, least_tokens: int, most_tokens: int
    ) -> None:
        import numpy as np
        import openvino

        model = compiled(folder, dtype, threads)
        self._request = model.create_infer_request()
        self.vocabulary = model.output("logits").partial_shape[1].get_length()
        caches = [one for one in model.inputs if "_cache." in one.any_name]
        shapes = {one.any_name: [d.get_length() for d in list(one.partial_shape)[1:]] for one in caches}
        sizes = {one.any_name: int(np.prod(shapes[one.any_name])) * one.element_type.size for one in caches}
        tokens = min(most_tokens, cache_bytes // sum(sizes.values()) * BLOCK)
        self.blocks = -(-max(tokens, least_tokens) // BLOCK)
        self._caches: list[NDArray[np.uint8]] = []
        for one in caches:
            memory = np.zeros((self.blocks, sizes[one.any_name]), np.uint8)
            tensor = openvino.Tensor(memory, openvino.Shape([self.blocks, *shapes[one.any_name]]), one.element_type)
            self._request.set_tensor(one.any_name, tensor)
            self._caches.append(memory)

    def copy(self, source: int, target: int) -> None:
        """Make a block hold what another holds."""
        for memory in self._caches:
            memory[target] = memory[source]

    def step(self, pieces: Sequence[Piece]) -> Stepped:
        """Compute pieces, of different sequences each. One may stand on blocks that another before it fills."""
        import numpy as np

        lengths = np.array([len(piece.ids) for piece in pieces])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        past = np.array([piece.past for piece in pieces])
        used = [piece.blocks[: -(-(piece.past + len(piece.ids)) // BLOCK)] for piece in pieces]
        scored = [start + piece.scored for start, piece in zip(starts, pieces, strict=False) if len(piece.scored)]
        last = np.cumsum([len(piece.scored) for piece in pieces]) - 1
        # No input may be empty: what is computed for these is not looked at.
        sampled = [place for place, piece in zip(last, pieces, strict=True) if piece.sampled] or [0]
        self._set("input_ids", np.concatenate([piece.ids for piece in pieces]), np.int64)
        self._set("position_ids", np.concatenate([np.arange(p, p + n) for p, n in zip(past, lengths, strict=True)]),
                  np.int64)  # fmt: skip
        self._set("past_lens", past)
        self._set("subsequence_begins", starts)
        self._set("block_indices", np.concatenate(used))
        self._set("block_indices_begins", np.concatenate([[0], np.cumsum([len(blocks) for blocks in used])]))
        self._set("max_context_len", np.array(int((past + lengths).max())))
        self._set("scored", np.concatenate(scored) if scored else np.zeros(1))
        self._set("targets", np.concatenate([piece.targets for piece in pieces]) if scored else np.zeros(1))
        self._set("sampled", np.array(sampled))
        self._request.infer()
        return Stepped(
            self._get("top")[:, 0].copy(), self._get("top_logprob")[:, 0].copy(),
            self._get("target_logprob")[:, 0].copy(), self._get("logits"), self._get("logsumexp")[:, 0].copy(),
        )  # fmt: skip

    def _set(self, name: str, values: NDArray[Any], kind: type = int) -> None:
        import numpy as np
        import openvino

        exact = np.array(values, np.int64 if kind is np.int64 else np.int32)
        self._request.set_tensor(name, openvino.Tensor(exact))

    def _get(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = self._request.get_tensor(name).data
        return found
