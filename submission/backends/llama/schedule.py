"""Which sequence runs in which stream of a context, and when. Knows nothing of models.

Three facts of llama.cpp on a CPU shape it (see docs/SPEED.md for the figures):

- A prompt of some length fills the machine by itself, so prompts are computed one by one as streams fall free.
- One token of one sequence wastes it, so all sequences step together, in neighbouring streams.
- What a stream holds can be copied to another for much less than it costs to compute. So the longest beginning
  that any stream holds is taken over, whether it stems from an instruction common to all rows, from the pair that
  several prompts are about, or from another sample of the same prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from submission.backends.window import Window
from submission.errors import BackendError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHORT = 32  # tokens below which several sequences are computed in one call
PAD = 256  # llama.cpp rounds the size of a stream up to this


class ContextFailed(BackendError):
    """A context could not be made or could not compute; with fewer streams it may."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`streams` sequences of at most `cells` tokens each."""

    streams: int
    cells: int


class Context(Protocol):
    """Streams of a KV cache. What it holds is what `run` and `copy` put there."""

    shape: Shape
    batch: int
    """Most tokens of one `run`."""
    most_scored: int
    """Most tokens of one `run` that logits are wanted for."""
    can_trim: bool
    """Whether a stream can forget its last tokens only; beginnings are shared where it can."""

    def run(
        self, first: int, tokens: NDArray[np.int32], starts: NDArray[np.int32], scored: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Compute tokens, shape (rows, width); row r goes to stream `first + r`, from position `starts[r]`.

        Returns:
            logits of the tokens marked in `scored` (rows, width), shape (marked, vocabulary): a view that the next
            call overwrites.

        Raises:
            ContextFailed: it could not; what the streams hold is unknown.
        """
        ...

    def copy(self, source: int, target: int) -> None:
        """Make a stream hold what another holds."""
        ...

    def trim(self, stream: int, length: int) -> bool:
        """Forget what a stream holds beyond its first `length` tokens; False if it forgot nothing."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


@dataclass(frozen=True, slots=True)
class ContextLimits:
    """What a context may be.

    Attributes:
        tokens: most tokens of all streams together, from the memory that may be used.
        streams: most streams.
    """

    tokens: int
    streams: int

    def shape(self, longest: int, count: int) -> Shape:
        """For sequences of up to `longest` tokens, `count` of which are there."""
        cells = -(-longest // PAD) * PAD
        # Two for a single one: see `Streams.step`.
        return Shape(max(1, min(self.streams, max(count, 2), self.tokens // cells)), cells)


@dataclass(slots=True, eq=False)
class QueuedPrompt:
    """Something to be answered `copies` times, with up to `new_tokens` tokens each time."""

    ids: NDArray[np.int32]
    new_tokens: int
    copies: int = 1
    payload: Any = None
    waiting: deque[int] = field(default_factory=deque)
    logits: NDArray[np.float32] | None = None
    """What follows the prompt, kept while copies wait to begin."""

    def __post_init__(self) -> None:
        self.waiting.extend(range(self.copies))

    @property
    def need(self) -> int:
        return len(self.ids) + self.new_tokens


@dataclass(slots=True, eq=False)
class QueuedText:
    """Tokens whose probabilities are wanted from index `scored_from` (at least 1) on."""

    ids: NDArray[np.int32]
    scored_from: int
    payload: Any = None
    total: float = 0.0

    @property
    def need(self) -> int:
        return len(self.ids)


class AnswerSampler(Protocol):
    """Samples tokens; a state is whatever it keeps of one answer."""

    def begin(self, prompt: QueuedPrompt, number: int) -> Any:
        """The state of the answer of that number to a prompt."""
        ...

    def extend(self, states: Sequence[Any], logits: NDArray[np.float32]) -> list[int | None]:
        """Sample a token for each state from its row of logits; None for an answer that is complete with it."""
        ...


class Scorer(Protocol):
    """Turns logits into log-probabilities."""

    def __call__(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """log softmax(logits)[tokens] by row, shape (rows,)."""
        ...


@dataclass(slots=True, eq=False)
class _Running:
    prompt: QueuedPrompt
    number: int
    state: Any
    token: int


class Scheduler:
    """Runs prompts and texts on contexts that it makes to fit them.

    Args:
        new_context: makes a context; may raise `ContextFailed`.
        limits: of the contexts.
    """

    def __init__(self, new_context: Callable[[Shape], Context], limits: ContextLimits) -> None:
        self._new_context = new_context
        self._limits = self._asked = limits
        self._streams: Streams | None = None

    def generate(self, prompts: Iterable[QueuedPrompt], answers: AnswerSampler) -> Iterator[Any]:
        """Yield the state of every answer as it is completed, in any order.

        Raises:
            ContextFailed: not even a single stream could be computed.
            UserError: there is no memory for one.
        """
        pending = Window(prompts)
        self._forget()
        running: dict[int, _Running] = {}
        while pending.top_up() or running:
            finished: list[Any] = []
            streams = self._fitting(pending, running)
            try:
                if streams is not None:
                    _admit(streams, pending, running, answers, finished)
                if running:
                    _step(self._current(), running, answers, finished)
            except ContextFailed as error:
                self._halve(error)
                for run in running.values():  # their random streams begin anew, with the same seeds
                    _put_back(pending, run.prompt, run.number)
                running.clear()
            yield from finished
        pending.complain()

    def score(self, texts: Iterable[QueuedText], scorer: Scorer) -> Iterator[QueuedText]:
        """Yield every text with its `total` set, in any order.

        Raises:
            ContextFailed: not even a single stream could be computed.
            UserError: there is no memory for one.
        """
        pending = Window(texts)
        self._forget()
        while pending.top_up():
            streams = self._fitting(pending, {})
            assert streams is not None
            group = _next_group(streams, pending)
            try:
                _score(streams, group, scorer)
            except ContextFailed as error:
                self._halve(error)
                for text in group:
                    text.total = 0.0
                pending.items.extendleft(reversed(group))
                continue
            yield from group
        pending.complain()

    def close(self) -> None:
        """Free the context."""
        if self._streams is not None:
            self._streams.close()
            self._streams = None

    def _forget(self) -> None:
        """What an earlier call left is not used: answers shall depend on nothing but what is asked.

        A beginning that is taken over and one that is computed are rounded differently.
        """
        if self._streams is not None:
            self._streams.forget()

    def _current(self) -> Streams:
        assert self._streams is not None
        return self._streams

    def _fitting(self, pending: Window[Any], running: dict[int, _Running]) -> Streams | None:
        """Streams that suit what is pending; None while others run that must end first.

        Raises:
            UserError: there is no memory for a single one.
        """
        if not pending.items:
            return None
        best = self._limits.shape(pending.longest(), _count(pending) + len(running))
        if self._streams is not None:
            now = self._streams.shape
            if best.cells <= now.cells and best.streams < 2 * now.streams:
                return self._streams
            if running:
                return None
            self.close()
        while self._streams is None:
            try:
                self._streams = Streams(self._new_context(best))
            except ContextFailed as error:
                if best.streams == 1:
                    raise UserError(f"{error}\nAsk for less: lower context, memory or gpu_layers (--set)") from error
                self._limits = replace(self._limits, streams=best.streams // 2)
                best = self._limits.shape(best.cells, best.streams)
        return self._streams

    def _halve(self, error: ContextFailed) -> None:
        """After a failure go on with half the streams, and remember that; a single one that fails is the end."""
        tried = self._limits.streams
        if self._streams is not None:
            tried = min(tried, self._streams.shape.streams)
            self.close()
        if tried == 1:
            self._limits = self._asked  # their number was not the cause
            raise error
        self._limits = replace(self._limits, streams=tried // 2)


def _count(pending: Window[Any]) -> int:
    """Sequences that wait, as far as they have been looked at."""
    return sum(len(item.waiting) if isinstance(item, QueuedPrompt) else 1 for item in pending.items)


class Streams:
    """A context together with what its streams hold: finds and takes over common beginnings."""

    def __init__(self, context: Context) -> None:
        import numpy as np

        self._context = context
        self.shape = context.shape
        self.lengths = np.zeros(self.shape.streams, np.int32)
        """Tokens that each stream holds."""
        self._ids = np.zeros((self.shape.streams, self.shape.cells), np.int32)
        self._places = np.arange(self.shape.cells)
        # Copying a stream moves all its cells, which takes about as long as computing one in 64 of them.
        self._worth_copying = self.shape.cells // 64 + 1

    @property
    def short(self) -> int:
        """Tokens up to which several sequences are computed in one call (padded, so they must be cut again)."""
        return min(SHORT, self._context.batch) if self._context.can_trim else 0

    def place(self, ids: NDArray[np.int32], most: int, free: Sequence[int]) -> tuple[int, int]:
        """Choose one of the `free` streams for a sequence, and bring a common beginning into it.

        Returns:
            the stream, and how many of the first `most` ids it holds now.
        """
        if not self._context.can_trim:
            return free[0], self._cut(free[0], 0)
        common = self._common(ids, most)
        donor = int(common.argmax())
        own = max(free, key=lambda stream: (common[stream], -stream))
        if common[donor] - common[own] < self._worth_copying:
            return own, self._cut(own, int(common[own]))
        self.copy(donor, free[0])
        return free[0], self._cut(free[0], int(common[donor]))

    def common(self, ids: NDArray[np.int32], stream: int) -> int:
        """How many of the first ids a stream holds."""
        return int(self._common(ids, len(ids))[stream]) if self._context.can_trim else 0

    def copy(self, source: int, target: int) -> None:
        """Make a stream hold what another holds."""
        self._context.copy(source, target)
        self._ids[target] = self._ids[source]
        self.lengths[target] = self.lengths[source]

    def branch(self, source: int, target: int, length: int) -> int:
        """Make a stream hold the first tokens of another; returns how many it holds now."""
        self.copy(source, target)
        return self._cut(target, length)

    def feed(
        self, stream: int, ids: NDArray[np.int32], start: int, scored_from: int
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Compute `ids[start:]` in a stream that holds `ids[:start]`.

        Yields:
            (index, logits): what follows `ids[index]`, `ids[index + 1]` ..., for every index from `scored_from`.
        """
        import numpy as np

        calls = -(-(len(ids) - start) // self._context.batch)
        even = -(-(len(ids) - start) // max(1, calls))  # a last call with few tokens would be slow
        while start < len(ids):
            unscored = max(0, scored_from - start)
            width = min(even, len(ids) - start, unscored + self._context.most_scored)
            part = ids[start : start + width]
            scored = np.arange(start, start + width) >= scored_from
            logits = self._context.run(stream, part[None], np.array([start], np.int32), scored[None])
            self._note(stream, start, part)
            if len(logits):
                yield max(start, scored_from), logits
            start += width

    def feed_together(
        self, first: int, rows: Sequence[NDArray[np.int32]], starts: Sequence[int], scored_from: Sequence[int]
    ) -> NDArray[np.float32]:
        """Compute `rows[r][starts[r]:]` in stream `first + r`, all in one call.

        Returns:
            what follows the ids of each row from its index `scored_from` on, row after row.
        """
        import numpy as np

        # Unequal rows are split into many small calls by llama.cpp: they are padded and cut again.
        width = max(len(ids) - start for ids, start in zip(rows, starts, strict=True))
        tokens = np.zeros((len(rows), width), np.int32)
        scored = np.zeros((len(rows), width), np.bool_)
        for row, (ids, start, index) in enumerate(zip(rows, starts, scored_from, strict=True)):
            tokens[row, : len(ids) - start] = ids[start:]
            scored[row, max(0, index - start) : len(ids) - start] = True
        logits = self._context.run(first, tokens, np.array(starts, np.int32), scored)
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
            self._note(first + row, start, tokens[row])
            self._cut(first + row, len(ids))
        return logits

    def fits_together(self, widths: Sequence[int], starts: Sequence[int], scored: int) -> bool:
        """Whether rows of these widths can be computed in one call."""
        return (
            len(widths) * max(widths) <= self._context.batch
            and max(starts) + max(widths) <= self.shape.cells
            and scored <= self._context.most_scored
        )

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Add one token to each of the first streams; returns what follows each, shape (tokens, vocabulary).

        A lone token goes with a double in the next stream: llama.cpp has other kernels for one row than for many,
        which round otherwise, and an answer shall not depend on whether others are computed beside it.
        """
        import numpy as np

        count = len(tokens)
        doubled = count == 1 < self.shape.streams and self._context.can_trim
        if doubled:
            tokens = [tokens[0], tokens[0]]
            beside = self._cut(1, min(int(self.lengths[1]), self.shape.cells - 1))
        column = np.array(tokens, np.int32)
        rows = len(column)
        logits = self._context.run(0, column[:, None], self.lengths[:rows].copy(), np.ones((rows, 1), np.bool_))
        self._ids[np.arange(rows), self.lengths[:rows]] = column
        self.lengths[:rows] += 1
        if doubled:
            self._cut(1, beside)
        return logits[:count]

    def forget(self) -> None:
        """Empty all streams."""
        for stream in range(self.shape.streams):
            self._cut(stream, 0)

    def close(self) -> None:
        """Free the memory."""
        self._context.close()

    def _common(self, ids: NDArray[np.int32], most: int) -> NDArray[np.int64]:
        import numpy as np

        most = min(most, len(ids), self.shape.cells)
        same = self._ids[:, :most] == ids[:most]
        same &= self._places[:most] < self.lengths[:, None]
        return np.where(same.all(axis=1), most, same.argmin(axis=1)) if most else np.zeros(len(same), np.int64)

    def _cut(self, stream: int, length: int) -> int:
        if self.lengths[stream] > length:
            if not self._context.trim(stream, length):
                self._context.trim(stream, 0)
                length = 0
            self.lengths[stream] = length
        return int(self.lengths[stream])

    def _note(self, stream: int, start: int, ids: NDArray[np.int32]) -> None:
        self._ids[stream, start : start + len(ids)] = ids
        self.lengths[stream] = start + len(ids)


# -- generating ---------------------------------------------------------------------------------------------


def _admit(
    streams: Streams,
    pending: Window[QueuedPrompt],
    running: dict[int, _Running],
    answers: AnswerSampler,
    finished: list[Any],
) -> None:
    """Compute prompts into all free streams and sample the first token of each answer."""
    together: list[tuple[int, QueuedPrompt, int, int]] = []  # stream, prompt, number, start

    def begin(stream: int, prompt: QueuedPrompt, number: int, logits: NDArray[np.float32]) -> None:
        state = answers.begin(prompt, number)
        (token,) = answers.extend([state], logits)
        if prompt.waiting and prompt.logits is None:
            prompt.logits = logits.copy()  # the next call overwrites them
        if token is None:
            finished.append(state)
            del running[stream]
        else:
            running[stream] = _Running(prompt, number, state, token)

    def flush() -> None:
        if not together:
            return
        chosen, prompts, numbers, starts = zip(*together, strict=True)
        ends = [len(prompt.ids) - 1 for prompt in prompts]
        logits = streams.feed_together(chosen[0], [prompt.ids for prompt in prompts], starts, ends)
        together.clear()
        for row, (stream, prompt, number) in enumerate(zip(chosen, prompts, numbers, strict=True)):
            begin(stream, prompt, number, logits[row : row + 1])

    while pending.items:
        free = [stream for stream in range(streams.shape.streams) if stream not in running]
        if not free or pending.items[0].need > streams.shape.cells:
            break
        prompt = pending.items[0]
        if any(prompt is other for _, other, _, _ in together):
            flush()  # its logits are needed now
            continue
        number = prompt.waiting.popleft()
        if not prompt.waiting:
            pending.items.popleft()
        most = len(prompt.ids) - (prompt.logits is None)
        stream, start = streams.place(prompt.ids, most, free)
        running[stream] = _Running(prompt, number, None, 0)  # taken; a failure finds it here
        if start == len(prompt.ids) and prompt.logits is not None:
            begin(stream, prompt, number, prompt.logits)
            continue
        if len(prompt.ids) - start > streams.short:
            for _, logits in streams.feed(stream, prompt.ids, start, len(prompt.ids) - 1):
                begin(stream, prompt, number, logits)
            continue
        if together:
            widths = [len(other.ids) - begun for _, other, _, begun in together] + [len(prompt.ids) - start]
            starts = [begun for *_, begun in together] + [start]
            if stream != together[-1][0] + 1 or not streams.fits_together(widths, starts, len(widths)):
                flush()
        together.append((stream, prompt, number, start))
    flush()


def _step(streams: Streams, running: dict[int, _Running], answers: AnswerSampler, finished: list[Any]) -> None:
    """Add a token to every answer."""
    for hole in range(len(running)):
        if hole not in running:  # neighbouring streams step in one call, others each in a call of its own
            last = max(running)
            streams.copy(last, hole)
            running[hole] = running.pop(last)
    runs = [running[stream] for stream in range(len(running))]
    logits = streams.step([run.token for run in runs])
    for stream, token in enumerate(answers.extend([run.state for run in runs], logits)):
        if token is None:
            finished.append(running.pop(stream).state)
        else:
            running[stream].token = token


def _put_back(pending: Window[QueuedPrompt], prompt: QueuedPrompt, number: int) -> None:
    prompt.waiting.appendleft(number)
    prompt.logits = None
    if all(item is not prompt for item in pending.items):
        pending.items.appendleft(prompt)


# -- scoring ------------------------------------------------------------------------------------------------

_TRUNK = 0  # the stream that texts are computed in one after the other; short ends branch off it


def _next_group(streams: Streams, pending: Window[QueuedText]) -> list[QueuedText]:
    """The next text, with those behind it that differ from what the trunk holds by short ends only."""
    group: list[QueuedText] = []
    widths: list[int] = []
    starts: list[int] = []
    scored = 0
    while pending.items and len(group) < streams.shape.streams - 1:
        text = pending.items[0]
        start = min(streams.common(text.ids[:-1], _TRUNK), text.scored_from - 1)
        width = len(text.ids) - 1 - start
        scored += len(text.ids) - text.scored_from
        widths.append(width)
        starts.append(start)
        if not 0 < width <= streams.short or not streams.fits_together(widths, starts, scored):
            break
        group.append(pending.items.popleft())
    return group or [pending.items.popleft()]


def _score(streams: Streams, group: Sequence[QueuedText], scorer: Scorer) -> None:
    if len(group) == 1:
        (text,) = group
        fed = text.ids[:-1]
        _, start = streams.place(fed, text.scored_from - 1, [_TRUNK])
        for index, logits in streams.feed(_TRUNK, fed, start, text.scored_from - 1):
            text.total += float(scorer(logits, text.ids[index + 1 : index + 1 + len(logits)]).sum())
        return
    rows = [text.ids[:-1] for text in group]
    firsts = [text.scored_from - 1 for text in group]
    starts = [
        streams.branch(_TRUNK, place, min(streams.common(fed, _TRUNK), first))
        for place, (fed, first) in enumerate(zip(rows, firsts, strict=True), start=_TRUNK + 1)
    ]
    logits = streams.feed_together(_TRUNK + 1, rows, starts, firsts)
    row = 0
    for text in group:
        count = len(text.ids) - text.scored_from
        text.total = float(scorer(logits[row : row + count], text.ids[text.scored_from :]).sum())
        row += count
