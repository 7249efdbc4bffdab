"""The scheduler on a small fake context: every row once, nothing lost, limits kept, whatever the lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from submission.backends.llama.schedule import ContextFailed, ContextLimits, QueuedPrompt, QueuedText, Scheduler, Shape
from submission.backends.window import in_order
from submission.errors import UserError

VOCABULARY = 23


def follows(content: Sequence[int]) -> NDArray[np.float32]:
    """The fake model's logits: decided by all that was fed, so that a wrong beginning gives a wrong answer."""
    logits = np.zeros(VOCABULARY, np.float32)
    state = 7
    for place, token in enumerate(content):
        state = (state * 31 + token * (place + 3)) % 1_000_003
    logits[state % VOCABULARY] = 1 + state % 5
    return logits


@dataclass
class FakeContext:
    """Keeps the tokens of each stream; refuses what a real context would refuse."""

    shape: Shape
    batch: int
    most_scored: int
    can_trim: bool
    fail_at: set[int]
    calls: list[int]
    held: list[list[int]] = field(default_factory=list)
    computed: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self.held = [[] for _ in range(self.shape.streams)]

    def run(
        self, first: int, tokens: NDArray[np.int32], starts: NDArray[np.int32], scored: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        assert not self.closed
        self.calls[0] += 1
        if self.calls[0] in self.fail_at:
            raise ContextFailed("told to fail")
        rows, width = tokens.shape
        assert 0 < rows * width <= self.batch
        assert scored.sum() <= self.most_scored
        assert first + rows <= self.shape.streams
        logits = []
        for row in range(rows):
            stream = self.held[first + row]
            assert len(stream) == starts[row], "positions go on where the stream ends"
            assert len(stream) + width <= self.shape.cells, "no more cells than there are"
            for token, wanted in zip(tokens[row], scored[row], strict=True):
                stream.append(int(token))
                if wanted:
                    logits.append(follows(stream))
        self.computed += rows * width
        return np.array(logits, np.float32).reshape(-1, VOCABULARY)

    def copy(self, source: int, target: int) -> None:
        assert source != target
        self.held[target] = list(self.held[source])

    def trim(self, stream: int, length: int) -> bool:
        assert self.can_trim or length == 0
        del self.held[stream][length:]
        return True

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass
class FakeContexts:
    """Makes fake contexts and remembers them."""

    batch: int = 64
    can_trim: bool = True
    fail_at: set[int] = field(default_factory=set)
    made: list[FakeContext] = field(default_factory=list)
    calls: list[int] = field(default_factory=lambda: [0])

    def __call__(self, shape: Shape) -> FakeContext:
        batch = max(self.batch, shape.streams)
        context = FakeContext(shape, batch, max(shape.streams, 40), self.can_trim, self.fail_at, self.calls)
        self.made.append(context)
        return context


@dataclass
class Answer:
    prompt: QueuedPrompt
    number: int
    tokens: list[int] = field(default_factory=list)


class Sampler:
    """Each number of a sample draws in its own way; a multiple of 6 ends an answer."""

    def begin(self, prompt: QueuedPrompt, number: int) -> Answer:
        return Answer(prompt, number)

    def extend(self, states: Sequence[Answer], logits: NDArray[np.float32]) -> list[int | None]:
        assert len(states) == len(logits)
        drawn: list[int | None] = []
        for state, row in zip(states, logits, strict=True):
            token = (int(row.argmax()) + state.number) % VOCABULARY
            state.tokens.append(token)
            drawn.append(None if token % 6 == 0 or len(state.tokens) == state.prompt.new_tokens else token)
        return drawn


def alone(prompt: QueuedPrompt, number: int) -> list[int]:
    """What one answer is when nothing else runs."""
    state = Sampler().begin(prompt, number)
    content = prompt.ids.tolist()
    while True:
        (token,) = Sampler().extend([state], follows(content)[None])
        if token is None:
            return state.tokens
        content.append(token)


def score(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    return np.array([row[token] for row, token in zip(logits, tokens, strict=True)], np.float64)


@st.composite
def sequences(draw: st.DrawFn) -> list[list[int]]:
    """Sequences that share beginnings in ways that rows, shots and candidates do."""
    root = draw(st.lists(st.integers(0, 3), max_size=70))
    stems = [[*root, *draw(st.lists(st.integers(0, 3), max_size=90))] for _ in range(draw(st.integers(1, 4)))]
    tails = st.tuples(st.sampled_from(stems), st.lists(st.integers(0, 3), min_size=1, max_size=60))
    return [[*stem, *tail] for stem, tail in draw(st.lists(tails, max_size=25))]


limits = st.builds(ContextLimits, tokens=st.integers(256, 8000), streams=st.integers(1, 9))


@settings(max_examples=150)
@given(
    sequences(), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=25, max_size=25), limits,
    st.booleans(), st.integers(1, 200),
)  # fmt: skip
def test_every_sample_is_answered_once_as_if_it_were_alone(
    rows: list[list[int]], wanted: list[tuple[int, int]], limits: ContextLimits, can_trim: bool, batch: int
) -> None:
    contexts = FakeContexts(batch, can_trim)
    prompts = [
        QueuedPrompt(np.array(ids, np.int32), new, copies) for ids, (new, copies) in zip(rows, wanted, strict=False)
    ]
    answers = list(Scheduler(contexts, limits).generate(iter(prompts), Sampler()))
    assert Counter((id(a.prompt), a.number) for a in answers) == Counter(
        (id(prompt), number) for prompt in prompts for number in range(prompt.copies)
    )
    for answer in answers:
        assert answer.tokens == alone(answer.prompt, answer.number)
    for context in contexts.made:
        assert context.shape.streams <= limits.streams
        assert context.shape.streams == 1 or context.shape.streams * context.shape.cells <= limits.tokens


@settings(max_examples=150)
@given(sequences(), st.data(), limits, st.booleans(), st.integers(1, 200))
def test_every_text_is_scored_once_as_if_it_were_alone(
    rows: list[list[int]], data: st.DataObject, limits: ContextLimits, can_trim: bool, batch: int
) -> None:
    contexts = FakeContexts(batch, can_trim)
    rows = [ids for ids in rows if len(ids) > 1]
    texts = [QueuedText(np.array(ids, np.int32), data.draw(st.integers(1, len(ids) - 1)), number)
             for number, ids in enumerate(rows)]  # fmt: skip
    scored = list(Scheduler(contexts, limits).score(iter(texts), score))
    assert sorted(text.payload for text in scored) == list(range(len(rows)))
    for text in scored:
        ids = text.ids.tolist()
        expected = sum(float(follows(ids[:end])[ids[end]]) for end in range(text.scored_from, len(ids)))
        assert text.total == pytest.approx(expected)


@settings(max_examples=60)
@given(sequences(), st.sets(st.integers(1, 60), max_size=3), st.integers(1, 3))
def test_a_context_that_fails_costs_streams_and_no_answer(
    rows: list[list[int]], fail_at: set[int], copies: int
) -> None:
    contexts = FakeContexts(fail_at=fail_at)
    rows = 8 * [[1, 2], *rows]  # enough for eight streams, which three failures bring down to one
    prompts = [QueuedPrompt(np.array(ids, np.int32), 5, copies) for ids in rows]
    answers = list(Scheduler(contexts, ContextLimits(9000, 8)).generate(iter(prompts), Sampler()))
    assert len(answers) == len(prompts) * copies
    assert all(answer.tokens == alone(answer.prompt, answer.number) for answer in answers)
    texts = [QueuedText(prompt.ids, 1) for prompt in prompts if len(prompt.ids) > 1]
    contexts.calls[0] = 0
    assert len(list(Scheduler(contexts, ContextLimits(9000, 8)).score(iter(texts), score))) == len(texts)


def prompts_of(*lengths: int, new_tokens: int = 4) -> list[QueuedPrompt]:
    return [
        QueuedPrompt(np.arange(length, dtype=np.int32) % 5 + number, new_tokens)
        for number, length in enumerate(lengths)
    ]


def test_a_single_stream_that_fails_is_an_error_and_the_limits_come_back() -> None:
    contexts = FakeContexts(fail_at=set(range(1, 5)))
    scheduler = Scheduler(contexts, ContextLimits(9000, 8))
    with pytest.raises(ContextFailed, match="told to fail"):
        list(scheduler.generate(prompts_of(*range(40, 60)), Sampler()))
    assert [context.shape.streams for context in contexts.made] == [8, 4, 2, 1]
    assert len(list(scheduler.generate(prompts_of(*range(40, 60)), Sampler()))) == 20
    assert contexts.made[-1].shape.streams == 8


def test_no_memory_for_a_single_stream_is_an_error_at_once() -> None:
    asked: list[Shape] = []

    def none(shape: Shape) -> FakeContext:
        asked.append(shape)
        raise ContextFailed(f"no context for {shape.streams} streams")

    with pytest.raises(UserError, match="no context for 1 streams\nAsk for less"):
        list(Scheduler(none, ContextLimits(9000, 8)).generate(prompts_of(*range(40, 60)), Sampler()))
    assert [shape.streams for shape in asked] == [8, 4, 2, 1]
    with pytest.raises(UserError):
        list(Scheduler(none, ContextLimits(9000, 8)).score([QueuedText(np.arange(9, dtype=np.int32), 3)], score))


def test_what_all_prompts_share_is_computed_once() -> None:
    contexts = FakeContexts()
    shared = list(range(20)) * 10
    rows = [[*shared, *[number % 7] * 40, number] for number in range(50)]
    prompts = [QueuedPrompt(np.array(ids, np.int32), 1) for ids in rows]
    assert len(list(Scheduler(contexts, ContextLimits(20_000, 10)).generate(prompts, Sampler()))) == 50
    (context,) = contexts.made
    assert context.computed <= 200 + 50 * 41


def test_samples_share_one_prompt_even_when_they_outnumber_the_streams() -> None:
    contexts = FakeContexts()
    prompt = QueuedPrompt(np.arange(100, dtype=np.int32) % 9, 1, copies=20)
    assert len(list(Scheduler(contexts, ContextLimits(2000, 4)).generate([prompt], Sampler()))) == 20
    assert contexts.made[0].computed == 100


def test_candidates_about_one_pair_share_it() -> None:
    contexts = FakeContexts()
    texts = [QueuedText(np.array([*([pair] * 200), *([candidate] * 10)], np.int32), 200)
             for candidate in range(5) for pair in range(10, 16)]  # fmt: skip
    assert len(list(Scheduler(contexts, ContextLimits(20_000, 8)).score(texts, score))) == 30
    assert contexts.made[0].computed <= 6 * 200 + 30 * 10


def test_a_long_row_does_not_take_streams_from_the_short_ones_for_ever() -> None:
    contexts = FakeContexts(batch=512)
    answers = list(Scheduler(contexts, ContextLimits(6 * 512, 6)).generate(prompts_of(1500, *[300] * 30), Sampler()))
    assert len(answers) == 31
    assert [context.shape for context in contexts.made] == [Shape(2, 1536), Shape(6, 512)]


def test_requests_are_taken_as_they_are_needed() -> None:
    taken = 0

    def source() -> Iterator[QueuedPrompt]:
        nonlocal taken
        while True:
            taken += 1
            yield prompts_of(50)[0]

    stream = Scheduler(FakeContexts(), ContextLimits(4000, 4)).generate(source(), Sampler())
    for _ in range(1000):
        next(stream)
    assert taken < 1000 + 300


def test_an_error_of_the_source_comes_after_the_answers_to_what_it_gave() -> None:
    def source() -> Iterator[QueuedPrompt]:
        yield from prompts_of(50, 60, 70)
        raise ValueError("no more")

    answers: list[Any] = []
    with pytest.raises(ValueError, match="no more"):
        answers.extend(Scheduler(FakeContexts(), ContextLimits(4000, 4)).generate(source(), Sampler()))
    assert len(answers) == 3


def test_what_shares_much_comes_together_and_the_longest_first() -> None:
    ids = [[1] * 10 + [2] * 50 + [3], [1] * 10 + [4] * 90, [1] * 10 + [2] * 50 + [5, 5], [1] * 10 + [6] * 20]
    ordered = [prompt.ids.tolist() for prompt in in_order(QueuedPrompt(np.array(row, np.int32), 1) for row in ids)]
    assert ordered == [ids[1], ids[0], ids[2], ids[3]]
