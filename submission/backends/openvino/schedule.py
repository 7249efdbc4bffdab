"""What is computed in which step: continuous batching over shared blocks of a KV cache. Knows nothing of models.

A step takes up to `batch` tokens: one of every answer on its way, then prompts in the order of the window, the last one
in part. So prompts fill the machine while answers ride along. A prompt begins where what is known of it ends, be it an
instruction that all rows share or the pair that several candidates are about; samples of a prompt share its blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from submission.backends.common import NOT_FINITE
from submission.backends.openvino.blocks import Blocks
from submission.backends.openvino.engine import BLOCK, Engine, Piece, Stepped
from submission.backends.window import Window
from submission.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_SCORED = 256  # positions of a step whose logits are computed: each takes some 200 kB, several times over


class Answer(Protocol):
    """An answer on its way."""

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled; the likeliest ones are taken else."""
        ...

    def sample(self, logits: NDArray[np.float32]) -> int:
        """A token from logits of shape (vocabulary,); may be called in any thread."""
        ...

    def add(self, token: int, logprob: float) -> bool:
        """Take a token; True if the answer is complete with it."""
        ...


@dataclass(slots=True, eq=False)
class Work:
    """A prompt that is to be answered, or a text whose likelihood is wanted.

    Attributes:
        ids: its tokens.
        payload: of whoever asks.
        new_tokens: most tokens of an answer.
        answers: makes the answers that are to be begun, when the prompt was computed; none for a likelihood.
        scored_from: of a likelihood: the first token whose probability counts, at least 1.
        total: of a likelihood: the log-probability.
    """

    ids: NDArray[np.int32]
    payload: Any
    new_tokens: int = 0
    answers: deque[Answer] = field(default_factory=deque)
    scored_from: int = 0
    total: float = 0.0

    @property
    def need(self) -> int:
        """Tokens that it takes in all."""
        return len(self.ids) + self.new_tokens


@dataclass(slots=True, eq=False)
class _Sequence:
    """Tokens that are computed one behind the other."""

    work: Work
    blocks: list[int]
    past: int
    pending: NDArray[np.int32]
    answer: Answer | None = None  # None: it is the prompt


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt that was computed and has answers yet to begin."""

    work: Work
    blocks: list[int]
    token: int
    logprob: float
    logits: NDArray[np.float32] | None
    logsumexp: float


class Scheduler:
    """Runs work on an engine.

    Args:
        engine: the model.
        batch: most tokens of a step.
        streams: most answers on their way at once.
        in_parts: applies a function to many things, in several threads.
    """

    def __init__(
        self, engine: Engine, batch: int, streams: int,
        in_parts: Callable[[Callable[[tuple[Answer, NDArray[np.float32]]], int],
                            Sequence[tuple[Answer, NDArray[np.float32]]]], Iterable[int]],
    ) -> None:  # fmt: skip
        self._engine = engine
        self._batch, self._streams = batch, streams
        self._in_parts = in_parts
        self.forget()

    def forget(self) -> None:
        """Let go of everything that was computed; nothing may be on its way."""
        self._blocks = Blocks(self._engine.blocks, BLOCK)
        self._prompts: deque[_Sequence] = deque()  # that are being computed, in their order
        self._computed: deque[_Prompt] = deque()  # whose answers have yet to begin
        self._running: list[_Sequence] = []  # answers on their way
        self._promised = 0  # blocks that answers yet to begin must find

    def run(self, source: Iterable[Work]) -> Generator[Work | Answer]:
        """Yield each answer when it is complete, and each likelihood's work.

        Raises:
            Exception: of the source, when all that it gave before is done.
        """
        window: Window[Work] = Window(source)
        try:
            while window.top_up() or self._prompts or self._computed or self._running:
                yield from self._begin_answers()
                if not (pieces := self._deal(window)) and window.items:
                    raise BackendError(f"the KV cache has no room for {window.items[0].need} tokens: raise its memory")
                if pieces:
                    yield from self._take(pieces, self._engine.step([piece for _, piece in pieces]))
            window.complain()
        finally:
            if self._prompts or self._computed or self._running:  # left in the middle: blocks may not hold what is told
                self.forget()

    def _deal(self, window: Window[Work]) -> list[tuple[_Sequence, Piece]]:
        """The pieces of the next step."""
        pieces = [(one, self._piece(one, 1, 1)) for one in self._running]
        room, scored = self._batch - len(pieces), _MOST_SCORED - len(pieces)
        waiting = iter(list(self._prompts))
        while room > 0 and scored > 0:
            one = next(waiting, None) or self._admit(window)
            if one is None:
                break
            piece = self._piece(one, room, scored)
            pieces.append((one, piece))
            room -= len(piece.ids)
            scored -= len(piece.scored)
            if len(piece.ids) < len(one.pending):  # what comes later may stand on what is left of it
                break
        return pieces

    def _admit(self, window: Window[Work]) -> _Sequence | None:
        """Begin the next prompt of the window, if there is room for it and its answers."""
        if not window.items or self._computed or len(self._running) + len(self._prompts) >= self._streams:
            return None
        work, blocks = window.items[0], self._blocks
        names = blocks.names(work.ids)
        # What follows the last of the known tokens is to be computed.
        first = work.scored_from if work.scored_from else len(work.ids)
        known = blocks.find(names[: (first - 1) // BLOCK])
        tokens = work.need if work.answers else len(work.ids) - 1
        own = blocks.needed(tokens) - len(known)
        later = self._of_an_answer(work) if len(work.answers) > 1 else 0
        if own + later + self._promised > blocks.free - blocks.free_of(known):
            return None
        window.items.popleft()
        self._promised += later
        blocks.hold(known)
        held = known + blocks.take(own)
        blocks.tell(names[: tokens // BLOCK], held)
        past = len(known) * BLOCK
        end = len(work.ids) if work.answers else len(work.ids) - 1  # nothing follows the last token of a likelihood
        self._prompts.append(one := _Sequence(work, held, past, work.ids[past:end]))
        return one

    def _of_an_answer(self, work: Work) -> int:
        """Blocks that an answer takes beside those that it shares with its prompt."""
        return self._blocks.needed(work.need) - len(work.ids) // BLOCK

    def _piece(self, one: _Sequence, room: int, most_scored: int) -> Piece:
        import numpy as np

        work, count = one.work, min(room, len(one.pending))
        if one.answer is None and not work.answers:  # the output at a place is about the next token
            first = max(0, work.scored_from - 1 - one.past)
            count = min(count, first + most_scored)
            scored = np.arange(first, count, dtype=np.int32)
            targets = work.ids[one.past + scored + 1]
            return Piece(one.pending[:count], one.past, one.blocks, scored, targets)
        scored = np.array([count - 1] if count == len(one.pending) else [], np.int32)
        answer = one.answer or work.answers[0]
        return Piece(one.pending[:count], one.past, one.blocks, scored, np.zeros(len(scored), np.int32),
                     answer.samples and len(scored) > 0)  # fmt: skip

    def _take(self, pieces: list[tuple[_Sequence, Piece]], stepped: Stepped) -> Iterator[Work | Answer]:
        """Take the results of a step."""
        import numpy as np

        if not (np.isfinite(stepped.top_logprob).all() and np.isfinite(stepped.target_logprob).all()):
            raise BackendError(NOT_FINITE)
        tokens = self._sampled(pieces, stepped)
        place = sampled = 0
        running: list[_Sequence] = []
        ended: list[_Sequence] = []
        done: list[Work | Answer] = []
        for one, piece in pieces:
            here, place = place, place + len(piece.scored)
            one.past += len(piece.ids)
            one.pending = one.pending[len(piece.ids) :]
            if one.answer is None and not one.work.answers:
                one.work.total += float(stepped.target_logprob[here:place].sum(dtype=float))
                if not len(one.pending):
                    self._prompts.remove(one)
                    ended.append(one)
                    done.append(one.work)
                continue
            row, sampled = sampled, sampled + piece.sampled
            if not len(piece.scored):
                continue
            if one.answer is None:
                self._prompts.remove(one)
                logits = stepped.logits[row].copy() if piece.sampled else None
                lse = float(stepped.logsumexp[row]) if piece.sampled else 0.0
                self._computed.append(
                    _Prompt(one.work, one.blocks, int(stepped.top[here]), float(stepped.top_logprob[here]), logits, lse)
                )
                continue
            if piece.sampled:
                token = tokens[row]
                logprob = float(stepped.logits[row, token]) - float(stepped.logsumexp[row])
            else:
                token, logprob = int(stepped.top[here]), float(stepped.top_logprob[here])
            if self._add(one, token, logprob):
                ended.append(one)
                done.append(one.answer)
            else:
                running.append(one)
        self._running = running
        for one in ended:
            self._blocks.give(one.blocks)
        yield from done

    def _sampled(self, pieces: list[tuple[_Sequence, Piece]], stepped: Stepped) -> list[int]:
        """A token for each sampled piece; those of prompts are sampled when their answers begin."""
        rows = [one.answer for one, piece in pieces if piece.sampled]
        asked = [(answer, stepped.logits[row]) for row, answer in enumerate(rows) if answer is not None]
        found = iter(self._in_parts(_sample, asked))
        return [-1 if answer is None else next(found) for answer in rows]

    def _add(self, one: _Sequence, token: int, logprob: float) -> bool:
        import numpy as np

        assert one.answer is not None
        one.pending = np.array([token], np.int32)
        return one.answer.add(token, logprob)

    def _begin_answers(self) -> Iterator[Answer]:
        """Begin answers to prompts that were computed, as far as there is room; the last one takes the prompt over."""
        done: list[Answer] = []
        while self._computed and len(self._running) < self._streams:
            prompt = self._computed[0]
            work, last = prompt.work, len(prompt.work.answers) == 1
            own = 0 if last else self._of_an_answer(work)
            if own > self._blocks.free - (self._promised - own):
                break
            answer = work.answers.popleft()
            if last:
                self._computed.popleft()
            if len(work.answers) == 1:  # it needs none of its own
                self._promised -= self._of_an_answer(work)
            token, logprob = prompt.token, prompt.logprob
            if prompt.logits is not None:
                token = answer.sample(prompt.logits)
                logprob = float(prompt.logits[token]) - prompt.logsumexp
            blocks = prompt.blocks if last else self._branch(prompt, own)
            one = _Sequence(work, blocks, len(work.ids), work.ids[:0], answer)
            if self._add(one, token, logprob):
                self._blocks.give(blocks)
                done.append(answer)
            else:
                self._running.append(one)
        yield from done

    def _branch(self, prompt: _Prompt, own: int) -> list[int]:
        """Blocks of another answer: the full ones of the prompt, and a copy of the one that it has begun."""
        full = prompt.blocks[: len(prompt.work.ids) // BLOCK]
        self._blocks.hold(full)
        taken = self._blocks.take(own)
        if len(prompt.work.ids) % BLOCK:
            self._engine.copy(prompt.blocks[len(full)], taken[0])
        return full + taken


def _sample(asked: tuple[Answer, NDArray[np.float32]]) -> int:
    answer, logits = asked
    return answer.sample(logits)
