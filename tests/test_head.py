"""The head: the embedding of a prompt, predicted from those of the texts, and the choices that it makes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ensemble.candidates import Answer, Candidate, CandidateRow, write_candidates
from ensemble.selectors import Tools, entry_of, make_selectors
from eval.head import Head, learn_head, read_head, write_head
from submission.errors import UserError
from submission.types import Pair, Triplet
from tests.conftest import ROOT, read_csv, runner, write_csv

EXAMPLES = ROOT / "examples"


class _Words:
    """Embeds a text as the mean of vectors of its words."""

    name, fingerprint = "words", "f"

    def embed(self, texts: Sequence[str]) -> Any:
        return np.stack([np.mean([self._word(word) for word in text.split()], axis=0) for text in texts])

    def _word(self, word: str) -> Any:
        return np.random.default_rng(list(word.encode())).normal(size=24).astype(np.float32)


def _triplet(number: int, style: str) -> Triplet:
    pair = Pair(str(number), f"topic{number} here", f"topic{number} here {style} {style}")
    return Triplet(pair, f"Rewrite as {style} {style}")


@pytest.fixture(scope="module")
def encoder() -> Any:
    return _Words()


@pytest.fixture(scope="module")
def triplets() -> list[Triplet]:
    return [_triplet(number, f"style{number % 80}") for number in range(240)]


def test_it_learns_what_the_rewrite_tells_of_the_prompt(encoder: Any, triplets: list[Triplet]) -> None:
    head, fit = learn_head(triplets, encoder)
    assert fit.rows == 240
    assert fit.gain.low > 0
    new = [_triplet(number, f"new{number}") for number in range(1000, 1020)]
    told = encoder.embed([one.rewrite_prompt for one in new])
    likeness = head.predict([one.pair for one in new], encoder) @ told.T
    assert (likeness.argmax(1) == np.arange(20)).mean() > 0.9  # styles that it has never seen


def test_where_texts_tell_nothing_it_says_so(encoder: Any, triplets: list[Triplet]) -> None:
    prompts = [one.rewrite_prompt for one in triplets]
    random.Random(0).shuffle(prompts)
    _, fit = learn_head([Triplet(t.pair, p) for t, p in zip(triplets, prompts, strict=True)], encoder)
    assert fit.gain.low <= 0
    for few in ([], triplets[:19], triplets[:1] * 500):
        with pytest.raises(UserError, match="20 are needed"):
            learn_head(few, encoder)


def test_a_choice_weighs_it_against_the_recoverer(encoder: Any, triplets: list[Triplet], tmp_path: Path) -> None:
    head, fit = learn_head(triplets, encoder)
    write_head(tmp_path / "h.safetensors", head, fit)
    name = f"predicted:{tmp_path / 'h.safetensors'}"
    selector = make_selectors([name], Tools(encoder))[name]

    def chosen(logprob: float) -> int:
        wrong = Candidate("Rewrite as other other", (Answer("s", 0, -1.0, 5),))
        right = Candidate("Rewrite as new7 new7", (Answer("s", 1, logprob, 5),))
        return int(np.argmax(selector(_triplet(7, "new7").pair, [wrong, right])))

    assert chosen(-3.0) == 1
    assert chosen(-30.0) == 0


def test_files_that_are_no_head_are_refused(encoder: Any, triplets: list[Triplet], tmp_path: Path) -> None:
    head, fit = learn_head(triplets[:80], encoder)
    path = tmp_path / "h.safetensors"
    write_head(path, head, fit)
    again = read_head(path)
    assert (again.weights == head.weights).all()
    assert again.seen == head.seen
    with pytest.raises(UserError, match="learned with the encoder words, not other"):
        again.predict([triplets[0].pair], type("Other", (_Words,), {"fingerprint": "g", "name": "other"})())
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:100], whole[:-8], whole[:8] + b"x" + whole[9:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no head"):
            read_head(path)
    kept = {"kind": "prompt-recovery head", "encoder": "f", "encoder_name": "words", "seen": "{}"}
    for weights, bias in (
        (np.zeros((3, 2)), np.zeros(2)),
        (np.full((4, 2), np.nan), np.zeros(2)),
        (np.zeros(4), np.zeros(())),
        (np.full((4, 2), 3e38), np.zeros(2)),
        (np.zeros((0, 0)), np.zeros(0)),
        (np.zeros((4, 2)), np.zeros((1, 2))),
    ):
        save_file({"weights": weights.astype(np.float32), "bias": bias.astype(np.float32)}, path, kept)
        with pytest.raises(UserError, match="is no head"):
            read_head(path)
    sound = {"weights": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)}
    save_file(sound, path, kept)
    with pytest.raises(UserError, match="embeddings of 2 numbers, not 24"):
        read_head(path).predict([triplets[0].pair], encoder)
    for other, metadata in ((sound, {**kept, "kind": "other"}), ({"weights": sound["weights"].astype(int)}, kept)):
        save_file({**sound, **other}, path, metadata)
        with pytest.raises(UserError, match="is no head"):
            read_head(path)
    save_file({"other": head.bias}, path)
    with pytest.raises(UserError, match="is no head"):
        read_head(path)
    with pytest.raises(UserError, match="does not exist"):
        read_head(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="needs a head"):
        entry_of("predicted")
    assert isinstance(head, Head)


def test_it_is_learned_and_used_by_commands(tmp_path: Path) -> None:
    train, ensemble, submission = (runner(room, tmp_path) for room in ("train", "ensemble", "submission"))
    header, *rows = read_csv(EXAMPLES / "triplets.csv")
    short = sorted(rows, key=lambda row: len(row[1] + row[2]))[:70]
    write_csv(tmp_path / "seen.csv", [row[:4] for row in short[:60]], header[:4])
    learned = train("head", "seen.csv", "-o", "h.safetensors")
    assert learned.code == 0, learned.err
    assert "over the mean embedding of all prompts" in learned.err
    texts = [row[3] for row in short[:2]]
    candidates = tuple(Candidate(text, (Answer("s", n, -2.0, 5),)) for n, text in enumerate(texts))
    for name, some in (("new", short[60:]), ("old", short[:8])):
        write_candidates(tmp_path / f"{name}.parquet", [CandidateRow(Pair(*row[:3]), candidates) for row in some])
        write_csv(tmp_path / f"{name}.csv", [row[:4] for row in some], header[:4])
    used = ensemble("select", "new.parquet", "--selector", "first+predicted:h.safetensors", "-o", "s.csv")
    assert used.code == 0, used.err
    assert {row[1] for row in read_csv(tmp_path / "s.csv")[1:]} <= set(texts)
    (tmp_path / "n.toml").write_text('train = "seen.csv"\nhead = "h.safetensors"\n')
    nearest = ("--recover", "eval.retrieval:Nearest", "--recover-config", "n.toml")
    bank = submission("predict", "new.csv", "-o", "n.csv", *nearest)
    assert bank.code == 0, bank.err
    assert {row[1] for row in read_csv(tmp_path / "n.csv")[1:]} <= {row[3] for row in short[:60]}
    whole = (tmp_path / "h.safetensors").read_bytes()
    (tmp_path / "b.toml").write_text('selector = "first+predicted:h.safetensors"\n')
    best = ("--recover", "best_of", "--recover-config", "b.toml")
    for over in (
        submission("predict", "new.csv", "-o", "h.safetensors", *best),
        ensemble("select", "new.parquet", "--selector", "predicted:h.safetensors", "-o", "h.safetensors"),
    ):
        assert over.code == 2, over.err
        assert "choose another name" in over.err
    assert (tmp_path / "h.safetensors").read_bytes() == whole
    head = ("-o", "e", "--selectors", "predicted:h.safetensors")
    refused = ensemble("experiment", "old.parquet", "--truth", "old.csv", *head)
    assert refused.code == 2
    assert "was fitted on 8 of the pairs" in refused.err
