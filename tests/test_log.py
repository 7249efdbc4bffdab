"""The log of model calls: what was computed stays, what is damaged is computed again, nothing it holds can do harm."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from submission.backends import model_spec
from submission.calls import log as module
from submission.calls.log import Log, is_log
from submission.calls.models import open_models
from submission.calls.requests import GENERATE, LOGLIKELIHOOD, identity
from submission.errors import PromptRecoveryError, UserError
from submission.types import Chat, Completion, LogLikelihood, Message, Part, Request, Sampling

ANSWERS = {f"{number:032x}": {"answer": f"“{number}” é"} for number in range(8)}


def written(path: Path, answers: dict[str, object] | None = None) -> Path:
    log = Log(path)
    for digest, content in (ANSWERS if answers is None else answers).items():
        log.add(digest, content)
    log.close()
    return path


def known(log: Log) -> dict[str, object]:
    return {digest: found for digest in ANSWERS if (found := log.get(digest, lambda content: content)) is not None}


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path / "l")
    assert known(Log(path)) == ANSWERS
    checksum, digest, content = json.loads(path.read_text().splitlines()[0])
    assert (len(checksum), digest, content) == (16, f"{0:032x}", {"answer": "“0” é"})


def test_a_torn_end_costs_its_own_line(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole").read_bytes()
    for length in range(0, len(whole), 7):
        path = tmp_path / "torn"
        path.write_bytes(whole[:length])
        log = Log(path)
        count = whole[:length].count(b"\n")
        assert len(known(log)) == len(log) == count
        log.add("f" * 32, "new")
        assert log.get("f" * 32, str) == "new"
        log.close()
        assert path.read_bytes().startswith(whole[:length]), "a line was changed"
        again = Log(path)
        assert again.get("f" * 32, str) == "new"
        assert len(again) - count in (1, 2)  # a line that lacked its end only is whole again
        again.close()


def test_answers_that_are_written_together_are_lines_like_others(tmp_path: Path) -> None:
    one_by_one = written(tmp_path / "l").read_bytes()
    for torn in (b"", b'["0123'):
        path = tmp_path / f"together{len(torn)}"
        path.write_bytes(torn)
        log = Log(path)
        log.add_all([])
        assert path.read_bytes() == torn
        log.add_all(list(ANSWERS.items())[:5])
        log.add_all(list(ANSWERS.items())[5:])
        assert known(log) == ANSWERS
        log.close()
        assert path.read_bytes() == (torn + b"\n" if torn else b"") + one_by_one
        again = Log(path)
        assert (known(again), again.damaged) == (ANSWERS, bool(torn))


def test_no_flipped_bit_changes_an_answer(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole").read_bytes()
    draw = random.Random(0)
    for _ in range(3000):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path = tmp_path / "flipped"
        path.write_bytes(content)
        log = Log(path)
        found = known(log)
        log.close()
        assert found.items() <= ANSWERS.items()
        assert len(found) >= len(ANSWERS) - 2  # a line break that goes, or comes, costs two lines
        assert log.damaged or len(found) == len(ANSWERS)


HOSTILE: list[bytes] = [
    b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"7", b"{}", b'["", "", ""]', b"x" * 1_000_000,
    b'["0000000000000000","%s",1]' % (b"0" * 32), b'["' + b"f" * 60 + b"]", b'{"journal": 1, "fingerprint": {}}', b"",
]  # fmt: skip


def test_hostile_lines_are_left_alone(tmp_path: Path) -> None:
    whole = written(tmp_path / "l").read_bytes()
    for lines in ([line] for line in HOSTILE):
        path = tmp_path / "h"
        path.write_bytes(b"\n".join([*lines, whole.rstrip(b"\n"), *lines, b""]))
        log = Log(path)
        assert known(log) == ANSWERS
        assert (log.damaged > 0) == (lines != [b""])
        log.close()


@pytest.mark.parametrize("content", [
    None, 7, "text", [], {}, {"completions": []}, {"completions": 3, "seconds": 1}, {"completions": [{}], "seconds": 1},
    {"completions": [{"text": 7, "logprob": -1.0, "tokens": 1, "finish_reason": "stop", "prompt_tokens": 1,
                      "truncated": False}], "seconds": 1.0},
    {"completions": [{"text": "a", "logprob": -1.0, "tokens": True, "finish_reason": "stop", "prompt_tokens": 1,
                      "truncated": False}], "seconds": 1.0},
    {"completions": [{"text": "a", "logprob": -1.0, "tokens": 1, "finish_reason": "x", "prompt_tokens": 1,
                      "truncated": False}], "seconds": 1.0},
])  # fmt: skip
def test_a_line_that_holds_something_else_is_computed_again(content: object, tmp_path: Path) -> None:
    request = Request("1", Chat((Message("user", (Part("Hello"),)),)), Sampling())
    spec = model_spec("scripted")
    digest = GENERATE.digest(identity(spec.fingerprint()), request, keyed=True)
    written(tmp_path / "l", {digest: content})
    with open_models({"generator": spec}, Log(tmp_path / "l")) as models:
        ((_, found),) = models["generator"].generate([request])
        assert isinstance(found, list)
        assert found[0].text == "Rewrite the text as row 1 asks."
        assert (models.found, models.computed, models.log.damaged) == (0, 1, 1)
    with open_models({"generator": spec}, Log(tmp_path / "l")) as models:
        assert dict(models["generator"].generate([request])) == {"1": found}
        assert (models.found, models.computed) == (1, 0)


def test_a_call_is_what_decides_its_answer() -> None:
    chat = Chat((Message("user", (Part("a"), Part("b", trusted=False))),))
    greedy, drawn = Sampling(), Sampling(temperature=1.0)
    one = GENERATE.digest("m", Request("1", chat, greedy))
    assert GENERATE.digest("m", Request("2", chat, greedy)) == one  # the key names it, and nothing more
    different = [
        GENERATE.digest("n", Request("1", chat, greedy)),
        GENERATE.digest("m", Request("1", Chat(chat.messages, prefix="x"), greedy)),
        GENERATE.digest("m", Request("1", Chat((Message("user", (Part("a"), Part("b"))),)), greedy)),
        GENERATE.digest("m", Request("1", Chat((Message("user", (Part("ab", trusted=False),)),)), greedy)),
        GENERATE.digest("m", Request("1", chat, Sampling(n=2))),
        GENERATE.digest("m", Request("1", chat, drawn)),
        GENERATE.digest("m", Request("2", chat, drawn)),  # the key chooses the random stream
        GENERATE.digest("m", Request("1", chat, Sampling(temperature=1.0, seed=1))),
        LOGLIKELIHOOD.digest("m", ("1", chat, "x")), LOGLIKELIHOOD.digest("m", ("1", chat, "y")),
    ]  # fmt: skip
    assert len({one, *different}) == len(different) + 1


def test_answers_survive_their_way_through_json() -> None:
    drawn = [Completion("a\ud800\n“", float("-inf"), 3, "length", 17, True), Completion("", -0.1, 0, "stop")]
    assert GENERATE.parse(json.loads(json.dumps(GENERATE.content(drawn, 0.5)))) == drawn
    likelihood = LogLikelihood(-1.25, 4, 9)
    assert LOGLIKELIHOOD.parse(json.loads(json.dumps(LOGLIKELIHOOD.content(likelihood, 0.5)))) == likelihood


def test_fresh_forgets_but_only_when_something_is_added(tmp_path: Path) -> None:
    path = written(tmp_path / "l")
    before = path.read_bytes()
    log = Log(path, fresh=True)
    assert known(log) == {}
    log.close()
    assert path.read_bytes() == before
    log = Log(path, fresh=True)
    log.add("f" * 32, 1)
    log.close()
    assert len(Log(path)) == 1


def test_nothing_is_written_before_the_first_answer(tmp_path: Path) -> None:
    said: list[str] = []
    log = Log(tmp_path / "l", before_writing=lambda: said.append("now"))
    assert list(tmp_path.iterdir()) == []
    log.add("f" * 32, 1)
    log.add("e" * 32, 1)
    log.close()
    assert said == ["now"]


def test_two_runs_cannot_write_the_same_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    path = written(tmp_path / "l")
    log = Log(path)
    with pytest.raises(UserError, match="another process is writing"):
        Log(path)
    assert known(Log(path, read_only=True)) == ANSWERS
    log.close()


def test_the_first_call_behind_a_torn_line_of_a_shared_log_is_known(tmp_path: Path) -> None:
    path = written(tmp_path / "l")
    path.write_bytes(path.read_bytes()[:-9])
    log = Log(path, shared=True)
    log.add("ab" * 16, {"answer": "new"})
    assert log.get("ab" * 16, lambda content: content) == {"answer": "new"}


def test_a_shared_log_takes_lines_of_several(tmp_path: Path) -> None:
    path = tmp_path / "l"
    one, two = Log(path, shared=True), Log(path, shared=True)
    for number in range(20):
        (one if number % 2 else two).add(f"{number:032x}", number)
    for log, first in ((one, 1), (two, 0)):
        for number in range(first, 20, 2):
            assert log.get(f"{number:032x}", int) == number
    assert len(Log(path, shared=True)) == 20


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    log = Log(written(tmp_path / "l"))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file)
    with pytest.raises(PromptRecoveryError, match="cannot be written: No space left"):
        log.add("f" * 32, 1)
    assert known(Log(tmp_path / "l", read_only=True)) == ANSWERS


def test_a_shared_log_on_a_full_disk_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = Log(written(tmp_path / "l"), shared=True)
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._file)
    for number in range(3):
        log.add(f"{number:032x}", 1)
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    assert known(Log(tmp_path / "l", read_only=True)) == ANSWERS


def test_what_is_a_log_is_told_by_its_lines(tmp_path: Path) -> None:
    assert is_log(written(tmp_path / "l"))
    (tmp_path / "empty").touch()
    assert is_log(tmp_path / "empty")
    for name, content in (("mine", b"my notes\n"), ("old", b'{"journal": 1}\n'), ("json", b'["a","b",1]\n')):
        (tmp_path / name).write_bytes(content)
        assert not is_log(tmp_path / name)
    assert not is_log(tmp_path / "nothing")
