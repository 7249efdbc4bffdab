"""A head: a linear map from the embeddings of a pair's texts to the embedding of its prompt, learned in seconds.

    python -m train head triplets.csv -o head.safetensors

It writes no prompt. It tells which of several is likely, with no model that made the rewrites: the selector
`predicted:head.safetensors` of `ensemble`, and `eval.retrieval:Nearest` with `head = "head.safetensors"`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.encoders import Encoder
from eval.grouping import near_duplicate_groups, unit_vectors
from eval.intervals import Interval, bootstrap
from eval.leaks import marks
from submission.data.files import atomic_path
from submission.data.outputs import check_output, made_files
from submission.errors import UserError, first_line
from submission.types import Pair, Triplet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS = 5
_LEAST = 20  # prompts that differ in meaning
_KIND = "prompt-recovery head"
_LARGEST = 1e6  # number in a head; those of real ones are below 10


@dataclass(frozen=True)
class Head:
    """What `train head` writes.

    Attributes:
        weights: shape (2 x dim, dim): of the rewritten text's embedding, and of its difference to the original's.
        bias: shape (dim,), the mean embedding of the prompts.
        encoder: fingerprint of the encoder that it was learned with.
        encoder_name: of the same.
        seen: marks of the triplets; see `eval.leaks.marks`.
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    encoder: str
    encoder_name: str
    seen: Any

    def check(self, encoder: Encoder | None) -> None:
        """Refuse another encoder than that it was learned with.

        Raises:
            UserError: it is another one.
        """
        if encoder is not None and encoder.fingerprint != self.encoder:
            raise UserError(
                f"the head was learned with the encoder {self.encoder_name}, not {encoder.name}: name that with "
                "--encoder, or learn the head again"
            )

    def predict(self, pairs: Sequence[Pair], encoder: Encoder) -> NDArray[np.float32]:
        """Predicted embeddings of the prompts, of length 1, shape (pairs, dim).

        Raises:
            UserError: the encoder is another one, or its embeddings have another size.
        """
        self.check(encoder)
        features = _features(pairs, encoder)
        if features.shape[1] != len(self.weights):
            raise UserError(f"this head is for embeddings of {self.bias.size} numbers, not {features.shape[1] // 2}")
        return unit_vectors(features @ self.weights + self.bias)


@dataclass(frozen=True, slots=True)
class HeadFit:
    """How well a head predicts prompts that it has not seen.

    Attributes:
        rows: triplets that it learned.
        ridge: strength of the regularisation, chosen on the same folds.
        cosine: of predicted and true embeddings, cross-validated, near-duplicate prompts in one fold.
        gain: the same less the cosine of the mean embedding of all prompts, which knows nothing of the pair.
    """

    rows: int
    ridge: float
    cosine: Interval
    gain: Interval


def learn_head(triplets: Sequence[Triplet], encoder: Encoder) -> tuple[Head, HeadFit]:
    """Learn by ridge regression; the regularisation is what predicts best in five folds.

    Raises:
        UserError: there are too few triplets, or too few prompts of unlike meaning.
    """
    import numpy as np

    prompts = [triplet.rewrite_prompt for triplet in triplets]
    groups = near_duplicate_groups(prompts, encoder) if prompts else np.zeros(0, np.int64)
    if (unlike := len(set(groups.tolist()))) < _LEAST:
        raise UserError(
            f"{len(prompts)} triplets with {unlike} prompts that differ in meaning are too few for a head: "
            f"{_LEAST} are needed"
        )
    pairs = [triplet.pair for triplet in triplets]
    x, y = _features(pairs, encoder), unit_vectors(encoder.embed(prompts))
    fold = np.random.default_rng(0).permutation(int(groups.max()) + 1)[groups] % _FOLDS
    found = np.zeros((len(_RIDGES), len(y)), np.float32)  # cosines
    plain = np.zeros(len(y), np.float32)
    for number in range(_FOLDS):
        out, rest = fold == number, fold != number
        mean = y[rest].mean(0)
        plain[out] = y[out] @ unit_vectors(mean[None])[0]
        for place, weights in enumerate(_ridge(x[rest], y[rest] - mean, _RIDGES)):
            found[place, out] = (unit_vectors(x[out] @ weights + mean) * y[out]).sum(1)
    best = int(found.mean(1).argmax())
    bias = y.mean(0)
    head = Head(
        _ridge(x, y - bias, _RIDGES[best : best + 1])[0], bias, encoder.fingerprint, encoder.name, marks(pairs, prompts)
    )
    cosine, gain = bootstrap(np.stack([found[best], found[best] - plain], axis=1), groups)
    return head, HeadFit(len(y), _RIDGES[best], cosine, gain)


def write_head(path: Path, head: Head, fit: HeadFit) -> None:
    """Write it whole, with what it was learned with and from.

    Raises:
        UserError: something else lies there.
    """
    from safetensors.numpy import save_file

    check_output(path)
    told = {"encoder": head.encoder_name, "rows": fit.rows, "ridge": fit.ridge, "cosine": str(fit.cosine)}
    known = {"kind": _KIND, "encoder": head.encoder, "encoder_name": head.encoder_name, "seen": json.dumps(head.seen)}
    with made_files(path, [path], told), atomic_path(path) as unfinished:
        save_file({"weights": head.weights, "bias": head.bias}, unfinished, known)


def read_head(path: Path) -> Head:
    """Read what `write_head` wrote.

    Raises:
        UserError: it is missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(
            f"{path} does not exist: python -m train head TRIPLETS -o {path} writes such a file\n"
            "(where it is named behind a selector, its name holds neither + nor a comma)"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            known = file.metadata() or {}
            weights, bias = file.get_tensor("weights"), file.get_tensor("bias")
        if known["kind"] != _KIND:
            raise ValueError(f"it is of kind {known['kind']!r:.40}")
        _check_numbers(weights, bias)
        return Head(weights, bias, known["encoder"], known["encoder_name"], json.loads(known["seen"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no head of `python -m train head`: {first_line(error)}") from error


def _check_numbers(weights: NDArray[Any], bias: NDArray[Any]) -> None:
    """Raise ValueError where shapes or numbers are not those of a head."""
    import numpy as np

    size = bias.size
    if bias.shape != (size,) or not size or weights.shape != (2 * size, size):
        raise ValueError(f"its shapes are {weights.shape} and {bias.shape}")
    if not all(one.dtype == np.float32 and bool((np.abs(one) < _LARGEST).all()) for one in (weights, bias)):
        raise ValueError("its numbers are damaged")


def _features(pairs: Sequence[Pair], encoder: Encoder) -> NDArray[np.float32]:
    """Shape (pairs, 2 x dim). What a text is about stands in both of them, what was done to it in their difference."""
    import numpy as np

    original = unit_vectors(encoder.embed([pair.original_text for pair in pairs]))
    rewritten = unit_vectors(encoder.embed([pair.rewritten_text for pair in pairs]))
    return np.concatenate([rewritten, rewritten - original], axis=1)


def _ridge(x: NDArray[np.float32], y: NDArray[np.float32], strengths: Sequence[float]) -> list[NDArray[np.float32]]:
    """Weights of a linear map for each strength of regularisation, shape (features, dim)."""
    import numpy as np

    products, targets = x.T @ x, x.T @ y
    unit = np.eye(len(products), dtype=np.float32)
    return [np.linalg.solve(products + strength * unit, targets) for strength in strengths]
