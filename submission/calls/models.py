"""Models as a strategy sees them: handles that look every call up in the log and have workers compute the rest.

    with open_models({"generator": spec}, log) as models:
        for key, found in models["generator"].generate(requests):   # a list of Completion, or a Failure
            ...

The process that does this loads no model. Workers are started when something is asked that the log does not know.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from submission.backends import ModelSpec
from submission.backends.hardware import visible_gpus
from submission.calls.log import Log
from submission.calls.requests import (
    EMBED,
    ENCODE,
    GENERATE,
    LOGLIKELIHOOD,
    MethodKind,
    PromptItem,
    ScoredItem,
    identity,
)
from submission.calls.supervisor import STALL_SECONDS, Call, DeadlineReached, HopelessError, LostError, Pool
from submission.calls.ways import Tokenizing, Way, ways
from submission.errors import BackendError, PromptRecoveryError, UserError
from submission.types import Completion, Encoded, Failure, LogLikelihood, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOG = logging.getLogger(__name__)

NOT_IN_LOG = "not in the log"  # of a call that is only looked up
_LEAST_FAILED = 8  # items of a call that make a model suspect, if not all failed
_GLANCE = 256  # known answers between two looks at the clock


class Spec(Protocol):
    """A model that can be asked: `submission.backends.ModelSpec`, or an encoder of `eval`."""

    def load(self) -> Any:
        """Load it, in a worker."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """What decides its answers."""
        ...


@runtime_checkable
class Logged(Protocol):
    """A model whose calls are logged in a place of their own, whatever the run."""

    @property
    def log(self) -> Log:
        """The log."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that all models of a run share.

    Attributes:
        end: when all workers are ended, in seconds of `time.monotonic()`; None for never.
        stall: seconds without an answer after which a busy worker is replaced.
        max_failures: share of failed items of a call above which they are asked again, with the model loaded in a safer
            way.
    """

    end: float | None = None
    stall: float = STALL_SECONDS
    max_failures: float = 0.2


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call as it was asked, and its answer; None if the log does not have it."""

    spec: Spec
    item: Any
    answer: Any


class Models(Mapping[str, "Handle"]):
    """The models of a run by role; see `open_models`.

    Attributes:
        found: calls that the log knew.
        computed: calls that workers answered.
        failed: calls that they did not.
        missing: calls that were asked of models that compute nothing, and that the log does not know.
        degraded: what was done because workers were lost again and again, in words.
    """

    def __init__(self, roles: Mapping[str, Spec], log: Log, limits: Limits = Limits(), *, compute: bool = True) -> None:
        self.log, self.limits, self.compute = log, limits, compute
        self.found = self.computed = self.failed = self.missing = 0
        self.degraded: list[str] = []
        self.asked: list[RecordedCall] | None = None  # collects all calls, for `inspect`
        self._by_spec: dict[str, Handle] = {}
        self._roles = {role: self._model(spec) for role, spec in roles.items()}

    def __getitem__(self, role: str) -> Handle:
        return self._roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def close(self) -> None:
        """End all workers."""
        for model in self._by_spec.values():
            model.release()

    def peak_memory(self) -> float:
        """Bytes that the workers of this machine took at their peaks, together; 0 where the system does not tell."""
        return sum(model.peak_memory() for model in self._by_spec.values())

    def make_room(self, wanted: Handle) -> None:
        """Let other models go where there is room for one: on GPUs, and on a cluster, of which each takes its share."""
        on_cluster = isinstance(wanted.spec, ModelSpec) and bool(wanted.spec.placement.ray)
        if visible_gpus() or on_cluster:
            for model in self._by_spec.values():
                if model is not wanted and not model.busy:
                    model.release()

    def _model(self, spec: Spec) -> Handle:
        """Roles may share a model."""
        key = repr(spec)
        if key not in self._by_spec:
            self._by_spec[key] = Handle(spec, self)
        return self._by_spec[key]


@contextmanager
def open_models(
    roles: Mapping[str, Spec], log: Log, limits: Limits = Limits(), *, compute: bool = True
) -> Iterator[Models]:
    """The models of a run; no worker is left when the block ends.

    Args:
        roles: what each is called, and what it is.
        log: of their calls; it is closed with the block.
        limits: of time.
        compute: False: only the log is asked; what it does not know is a `Failure`.
    """
    models = Models(roles, log, limits, compute=compute)
    try:
        yield models
    finally:
        models.close()
        log.close()


class Handle:
    """A handle to a model.

    Args:
        spec: the model.
        run: the models that it belongs to.
    """

    def __init__(self, spec: Spec, run: Models) -> None:
        self.spec = spec
        self._run = run
        self._pool: Pool | None = None
        self._ways = ways(spec)
        self._way, self._safer = next(self._ways), next(self._ways, None)
        self.log = spec.log if isinstance(spec, Logged) else run.log
        self._keyed = isinstance(spec, ModelSpec) and spec.keyed
        self.hopeless = ""

    @cached_property
    def identity(self) -> str:
        """What decides its answers, as a hash: whole files are hashed once."""
        return identity(self.spec.fingerprint())

    def digest(self, kind: MethodKind, item: Any) -> str:
        """The digest of a call."""
        return kind.digest(self.identity, item, keyed=self._keyed)

    @property
    def is_safest(self) -> bool:
        """Whether there is no other way left to hold it."""
        return self._safer is None

    @property
    def busy(self) -> bool:
        """Whether it is in the middle of a call."""
        return self._pool is not None and self._pool.busy

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion] | Failure]]:
        """Yield `(key, completions)` or `(key, Failure)` for each request, in any order.

        Raises:
            UserError: the model cannot be loaded.
            DeadlineReached: the time of the run is over.
        """
        return iter(_Answering(self, self._run, GENERATE, requests))

    def loglikelihood(self, items: Iterable[ScoredItem]) -> Iterator[tuple[str, LogLikelihood | Failure]]:
        """Yield `(key, log P(text | chat))` or `(key, Failure)` for each `(key, chat, text)`, in any order; errors as
        of `generate`.
        """
        return iter(_Answering(self, self._run, LOGLIKELIHOOD, items))

    def embed(self, texts: Sequence[str], *, keep: bool = True) -> NDArray[np.float32]:
        """Embeddings of texts, shape (texts, dim).

        Args:
            texts: of any length; the encoder cuts what is too long for it.
            keep: write those that are computed to the log.

        Raises:
            BackendError: a text has none.
        """
        return self._embed(texts, keep=keep, look_up=True)

    def _embed(self, texts: Sequence[str], *, keep: bool, look_up: bool) -> NDArray[np.float32]:
        import numpy as np

        places: dict[str, list[int]] = {}
        for place, text in enumerate([*texts] or [""]):  # without texts as wide as with some
            places.setdefault(text, []).append(place)
        wanted, mixed = list(places.values()), False
        found: NDArray[np.float32] | None = None
        items = ((str(number), text) for number, text in enumerate(places))
        for key, vector in _Answering(self, self._run, EMBED, items, keep=keep, look_up=look_up):
            if isinstance(vector, Failure):
                raise BackendError(f"a text has no embedding: {vector.reason}")
            if found is None:
                found = np.empty((max(1, len(texts)), len(vector)), np.float32)
            if look_up and len(vector) != found.shape[1]:  # somebody's own line in the log
                mixed = True
            else:
                found[wanted[int(key)]] = vector
        assert found is not None
        return self._embed(texts, keep=False, look_up=False) if mixed else found[: len(texts)]

    def peak_memory(self) -> float:
        """See `Models.peak_memory`."""
        return self._pool.peak_memory() if self._pool is not None else 0.0

    def release(self) -> None:
        """End its workers; the next call starts others."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def open(self, kind: MethodKind) -> Call:
        """Begin a call to its workers, which are started if there are none.

        Raises:
            UserError: the model cannot be loaded.
        """
        while self._pool is None:
            self._run.make_room(self)
            self.check_time()
            try:
                self._pool = Pool(self._way.carrier(), self._run.limits.end, self._run.limits.stall)
            except UserError as error:
                if self._way.words:  # a safer way, after something had been answered or tried
                    if not self.step_down(str(error)):
                        raise LostError(f"{error}\nWhat was computed is safe.") from None
                elif not ("CUDA" in str(error) and self.step_down(str(error))):
                    raise
        return self._pool.open(kind)

    def step_down(self, why: str) -> bool:
        """Load the model in a safer way; False if there is none left."""
        if self._safer is None:
            return False
        self.release()
        self._way, self._safer = self._safer, next(self._ways, None)
        self._run.degraded.append(self._way.words)
        LOG.warning("%s: trying again %s", why.splitlines()[0], self._way.words)
        return True

    def check_time(self) -> None:
        """Raises DeadlineReached: the time of the run is over."""
        end = self._run.limits.end
        if end is not None and time.monotonic() >= end:
            raise DeadlineReached


class _Answering:
    """One call of a handle: what the log knows is yielded at once, the rest as workers answer it."""

    def __init__(
        self,
        model: Handle,
        run: Models,
        kind: MethodKind,
        items: Iterable[Any],
        *,
        keep: bool = True,
        look_up: bool = True,
    ) -> None:
        self._model, self._run, self._kind, self._keep, self._look_up = model, run, kind, keep, look_up
        self._source = iter(items)
        self._more = True
        self._trouble: Exception | None = None
        self._call: Call | None = None
        self._keys: dict[str, list[str]] = {}  # of items that are the same call, by the key of the one that is asked
        self._first: dict[str, str] = {}  # the key of the item that is asked, by digest
        self._digests: dict[str, str] = {}  # and the other way round
        self._failed: list[tuple[Any, Failure]] = []
        self._asked = 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        try:
            while True:
                yield from self._take()
                if self._call is not None and self._call.unfinished:
                    yield from self._wait()
                elif not self._more and not self._ask_failed_again():
                    break
            yield from self._give_up()
        finally:
            if self._call is not None:
                with suppress(PromptRecoveryError):
                    self._call.pool.take_in()
                self._log_results()  # it was computed, though whoever asked has left
                self._call.close()
        if self._trouble is not None:
            raise self._trouble

    def _take(self) -> Iterator[tuple[str, Any]]:
        """Take items until workers have enough to do."""
        kind, known_since = self._kind, 0
        yield from self._reopen()
        while self._more and (self._call is None or self._call.has_room):
            try:
                item = next(self._source)
            except StopIteration:
                self._more = False
                return
            except Exception as error:  # of whoever makes the items: passed on when all is answered
                self._trouble, self._more = error, False
                return
            key, digest = kind.key(item), self._model.digest(kind, item)
            known = self._model.log.get(digest, kind.parse) if self._look_up else None
            if self._run.asked is not None:
                self._run.asked.append(RecordedCall(self._model.spec, item, known))
            if known is not None:
                self._run.found += 1
                yield key, known
                known_since += 1
                if known_since % _GLANCE == 0:
                    self._model.check_time()
            elif digest in self._first:
                self._keys[self._first[digest]].append(key)
            elif not self._run.compute:
                self._run.missing += 1
                yield key, Failure(NOT_IN_LOG)
            elif self._model.hopeless:
                self._run.failed += 1
                yield key, Failure(self._model.hopeless)
            else:
                self._first[digest], self._digests[key], self._keys[key] = key, digest, [key]
                self._ask([item])

    def _ask(self, items: list[Any]) -> None:
        self._asked += len(items)
        self._call = self._call or self._model.open(self._kind)
        for item in items:
            self._call.add(item)

    def _reopen(self) -> Iterator[tuple[str, Any]]:
        """Ask of new workers what those of this call had, if another call of the model gave them up."""
        if self._call is None or not self._call.pool.closed:
            return
        yield from self._log_results()
        pending = self._call.pending
        self._call.close()
        self._call = None
        if self._model.hopeless:
            self._failed += [(item, Failure(self._model.hopeless)) for item in pending]
        else:
            self._ask(pending)

    def _wait(self) -> Iterator[tuple[str, Any]]:
        """Wait for workers."""
        assert self._call is not None
        pool = self._call.pool
        try:
            self._call.wait(flush=not self._more)
        except (HopelessError, LostError) as error:
            yield from self._log_results()
            if pool.closed:  # by another call
                return
            self._failed += [(item, Failure(str(error))) for item in self._call.pending]
            self._call.close()
            self._call = None
            if self._run.limits.max_failures < 1 and self._model.step_down(str(error)):
                self._ask_again()
                return
            if isinstance(error, HopelessError):
                self._model.hopeless = str(error)
            self._model.release()
            if isinstance(error, LostError):
                raise
            return
        yield from self._log_results()
        if self._model.is_safest:
            yield from self._give_up()

    def _log_results(self) -> list[tuple[str, Any]]:
        """Bring all results that are there to the log; returns what is to be yielded."""
        assert self._call is not None
        kind, told = self._kind, list[tuple[str, Any]]()
        kept: list[tuple[str, Any]] = []
        for item, answer, seconds in self._call.results():
            if isinstance(answer, Failure):
                self._failed.append((item, answer))
                continue
            self._run.computed += 1
            key = kind.key(item)
            digest = self._digests.pop(key)
            if self._keep:
                kept.append((digest, kind.content(answer, seconds)))
            self._first.pop(digest, None)
            timed = kind.timed(answer, seconds)
            told += [(other, timed) for other in self._keys.pop(key)]
        self._model.log.add_all(kept)
        return told

    def _ask_failed_again(self) -> bool:
        """If too many failed, ask those again with the model loaded in a safer way."""
        failed = len(self._failed)
        few = failed < _LEAST_FAILED and not failed == self._asked > 2  # a row on its own tells nothing of the model
        if few or failed <= self._run.limits.max_failures * self._asked:
            return False
        if not self._model.step_down(self._failed[0][1].reason):
            return False
        if self._call is not None:
            self._call.close()
            self._call = None
        self._ask_again()
        return True

    def _ask_again(self) -> None:
        failed, self._failed, self._asked = self._failed, [], 0
        self._ask([item for item, _ in failed])

    def _give_up(self) -> Iterator[tuple[str, Any]]:
        failed, self._failed = self._failed, []
        for item, failure in failed:
            keys = self._keys.pop(self._kind.key(item))
            self._run.failed += len(keys)
            self._first.pop(self._digests.pop(self._kind.key(item)), None)
            yield from ((key, failure) for key in keys)


def encode(
    spec: ModelSpec, items: Iterable[PromptItem], limits: Limits = Limits()
) -> Iterator[tuple[str, Encoded | Failure]]:
    """See prompts as a model does: yield `(key, Encoded)` for each `(key, chat, new tokens)`.

    Only the tokenizer is loaded, by a worker, and nothing is logged. With a text in the chat's place it is the text as
    an answer of the model.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    pool = Pool(Way(Tokenizing(spec)).carrier(), limits.end, limits.stall)
    try:
        call, source, more = pool.open(ENCODE), iter(items), True
        while more or call.pending:
            while more and call.has_room:
                if (item := next(source, None)) is None:
                    more = False
                else:
                    call.add(item)
            if call.pending:
                call.wait()
            for item, answer, _ in call.results():
                yield item[0], answer
    finally:
        pool.close()
