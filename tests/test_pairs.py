"""Tables that are read once, row by row: the same rows, the same errors, and no memory for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from submission.data.pairs import Pairs
from submission.data.tables import digest_pairs, read_pairs, read_table, write_table
from submission.errors import UserError
from tests.bench.driver_memory import measure
from tests.conftest import PAIR_HEADER, ROOT, Cli, command, environment, small_disk, write_csv

TABLE = ROOT / "examples" / "test.csv"
MIB = 1 << 20


def test_pairs_can_be_gone_through_again_when_their_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(TABLE.read_bytes())
    expected = read_pairs(path)
    whole, first = Pairs(path), Pairs(path, limit=3)
    path.unlink()
    assert list(whole) == list(whole) == expected
    assert [list(whole.ids), len(whole)] == [[pair.id for pair in expected], len(expected)]
    assert [list(first), list(first.ids), len(first)] == [expected[:3], [p.id for p in expected[:3]], 3]
    assert whole.digest == first.digest == digest_pairs(expected)


def test_two_readers_of_one_table_do_not_disturb_each_other() -> None:
    table = Pairs(TABLE)
    assert [pair.id for pair, row_id in zip(table, table.ids, strict=True) if pair.id == row_id] == list(table.ids)


def test_ids_are_kept_to_the_letter(tmp_path: Path) -> None:
    ids = ["a", "A", " a", "a\0b", "é", "e\u0301", "-1", "007", "7", "1e3"]
    path = write_csv(tmp_path / "t.csv", [(row_id, "x", "y") for row_id in ids])
    assert list(Pairs(path).ids) == ids


def test_a_table_can_come_through_a_pipe(tmp_path: Path) -> None:
    arguments = command("predict", "/dev/stdin", "-o", tmp_path / "out.csv", "--backend", "scripted")
    done = subprocess.run(arguments, input=TABLE.read_bytes(), env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read_table(tmp_path / "out.csv", ("id",))) == len(read_pairs(TABLE))


@pytest.mark.parametrize("before", [10, MIB - 1, MIB, MIB + 1, 3 * MIB + 7])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xe2\x82"])
def test_what_is_not_utf8_is_named_by_line_and_offset_wherever_it_is(
    tmp_path: Path, before: int, start: bytes, bad: bytes
) -> None:
    header = start + b"id,original_text,rewritten_text\n1,"
    content = header + ("é\n" * before).encode()[: before // 3 * 3]
    content = header + b'"' + content[len(header) :] + bad
    path = tmp_path / "t.csv"
    path.write_bytes(content + (b"" if bad == b"\xe2\x82" else b'",x\n'))
    with pytest.raises(UnicodeDecodeError) as naive:
        path.read_bytes().decode("utf-8")
    offset = naive.value.start
    with pytest.raises(UserError, match="is not valid utf-8") as told:
        read_pairs(path)
    assert f"byte offset {offset}:" in str(told.value)
    assert f"line {path.read_bytes().count(chr(10).encode(), 0, offset) + 1}," in str(told.value)


def test_a_row_that_is_wrong_far_down_is_named(tmp_path: Path) -> None:
    rows = [(str(number), "x" * 40, "y") for number in range(60_000)]
    rows[50_000] = ("17", "x", "y")
    rows[50_001] = ("18", "x", "y")
    rows[50_002] = (" ", "x", "y")
    write_table(tmp_path / "t.parquet", PAIR_HEADER, rows)
    with pytest.raises(UserError, match="null id on row 50003"):
        Pairs(tmp_path / "t.parquet")
    rows[50_002] = ("z", "x", "y")
    write_table(tmp_path / "t.csv", PAIR_HEADER, rows)
    with pytest.raises(UserError, match=r"line 50002 \(id '17', first on line 19\), line 50003 \(id '18'"):
        Pairs(tmp_path / "t.csv")


def test_a_submission_may_be_parquet(cli: Cli, tmp_path: Path) -> None:
    done = cli("predict", TABLE, "-o", "out.parquet", "--backend", "scripted", "--json")
    assert done.code == 0, done.err
    assert cli("predict", TABLE, "-o", "out.csv", "--backend", "scripted").code == 0
    cells = [[row.cells for row in read_table(tmp_path / f"out.{kind}", ("id", "rewrite_prompt"))]
             for kind in ("csv", "parquet")]  # fmt: skip
    assert cells[0] == cells[1]
    assert cli("validate", "out.parquet", TABLE).code == 0
    assert cli("validate", "out.parquet", TABLE, "--limit", 3).code == 1


@pytest.mark.slow
def test_the_driver_keeps_no_rows(tmp_path: Path) -> None:
    """A driver that kept the texts would take more than 1,500 bytes a row, one that kept answers some 500."""
    peaks = []
    for rows in (2_000, 40_000):
        table = ((str(number), f"original {number} " * 30, f"rewritten {number} " * 30) for number in range(rows))
        write_table(tmp_path / "pairs.csv", PAIR_HEADER, table)
        peaks.append(measure(tmp_path / "pairs.csv", tmp_path / f"out-{rows}.csv", [])[2])
    assert (peaks[1] - peaks[0]) / 38_000 < 400


def test_a_full_disk_of_temporary_files_is_said(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ((str(number), "original " * 200, "rewritten " * 200) for number in range(6_000))
    write_table(tmp_path / "t.csv", PAIR_HEADER, rows)
    (tmp_path / "small").mkdir()
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path / "small"))
    with small_disk(tmp_path / "small", "64k"):
        done = cli("predict", "t.csv", "-o", "out.csv", "--recover", "constant")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "database or disk is full" in done.err
    assert "SQLITE_TMPDIR" in done.err
    assert not (tmp_path / "out.csv").exists()
