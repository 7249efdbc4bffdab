"""Tables: whatever a cell holds comes back as it was; ids are kept to the letter."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.data.files import atomic_writer
from submission.data.tables import digest_pairs, header_of, read_pairs, read_table, read_triplets, write_table
from submission.data.validation import validate
from submission.errors import UserError
from submission.types import Pair
from tests.conftest import write_csv

cells = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
ids = cells.filter(lambda text: bool(text.strip()))


@given(st.lists(st.tuples(ids, cells, cells), unique_by=lambda row: row[0], max_size=8))
def test_a_csv_that_was_written_reads_back_the_same(rows: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        write_table(path, ("id", "original_text", "rewritten_text"), rows)
        assert read_pairs(path) == [Pair(*row) for row in rows]


@given(st.lists(st.tuples(ids, st.from_regex(r"[A-Z][a-z ,\"']{0,20}[a-z]", fullmatch=True)), unique_by=lambda r: r[0]))
def test_a_written_submission_is_valid_and_reads_back_the_same(rows: list[tuple[str, str]]) -> None:
    rows = [row for row in rows if row[1].lower() not in ("na", "nan", "null", "none")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "submission.csv"
        write_table(path, ("id", "rewrite_prompt"), rows)
        assert validate(path, [row[0] for row in rows]) == []
        assert [row.cells for row in read_table(path, ("id", "rewrite_prompt"))] == rows


def test_ids_are_kept_to_the_letter(tmp_path: Path) -> None:
    kept = ["-1", "007", "1e5", " 3", "a1b2-c3", "NA", "1.0", "TRUE", "ü", "123456789012345678901"]
    path = write_csv(tmp_path / "t.csv", [(row_id, "a", "b") for row_id in kept])
    assert [pair.id for pair in read_pairs(path)] == kept


def test_parquet_and_csv_of_the_same_rows_are_the_same(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["-1", "007"], "original_text": ["a\nb", ""], "rewritten_text": ["é", "c,d"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    assert read_pairs(tmp_path / "t.csv") == read_pairs(tmp_path / "t.parquet")
    assert digest_pairs(read_pairs(tmp_path / "t.csv")) == digest_pairs(read_pairs(tmp_path / "t.parquet"))


def test_parquet_numbers_and_nulls_become_text_and_blanks(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [7, -1], "original_text": ["a", None], "rewritten_text": [None, "b"]})
    frame.to_parquet(tmp_path / "t.parquet")
    assert read_pairs(tmp_path / "t.parquet") == [Pair("7", "a", ""), Pair("-1", "", "b")]


def test_parquet_with_ids_that_are_no_text_is_refused_or_read_exactly(tmp_path: Path) -> None:
    texts = {"original_text": "x", "rewritten_text": "y"}
    pd.DataFrame({"id": [b"\xff\xfe", b"ab"], **texts}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_pairs(tmp_path / "t.parquet")
    pd.DataFrame({"id": [1.5, float("nan")], **texts}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="null id on row 2"):
        read_pairs(tmp_path / "t.parquet")


def test_parquet_with_a_null_or_repeated_id_is_refused_by_row(tmp_path: Path) -> None:
    pd.DataFrame({"id": ["a", None], "original_text": "x", "rewritten_text": "y"}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="null id on row 2"):
        read_pairs(tmp_path / "t.parquet")
    pd.DataFrame({"id": [1, 1], "original_text": "x", "rewritten_text": "y"}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"duplicate id on row 2 \(id '1', first on row 1\)"):
        read_pairs(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfid,original_text,rewritten_text\nx,a,b\n",
        b"id,original_text,rewritten_text\r\nx,a,b\r\n",
        b"id,original_text,rewritten_text\nx,a,b",
        b"rewritten_text,extra,original_text,id\nb,1,a,x\n",
        b'"id","original_text","rewritten_text"\n"x","a","b"\n\n',
    ],
    ids=["byte order mark", "CRLF", "no last line break", "other order and columns", "quoted"],
)
def test_the_usual_forms_of_csv_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert read_pairs(tmp_path / "t.csv") == [Pair("x", "a", "b")]


def test_newlines_nul_and_megabytes_in_a_cell_are_read(tmp_path: Path) -> None:
    long = "word " * 400_000
    path = write_csv(tmp_path / "t.csv", [("1", "a\r\nb\0c", "d\ne"), ("2", long, "x")])
    assert read_pairs(path) == [Pair("1", "a\r\nb\0c", "d\ne"), Pair("2", long, "x")]


def test_latin_1_is_read_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("id,original_text,rewritten_text\n1,café,naïve\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 2, byte offset 37: b'\\xe9' is not valid utf-8(?s:.*)--encoding cp1252"):
        read_pairs(tmp_path / "t.csv")
    assert read_pairs(tmp_path / "t.csv", "latin-1") == [Pair("1", "café", "naïve")]


def test_triplets_without_a_prompt_or_a_rewrite_are_left_out(tmp_path: Path) -> None:
    header = ("id", "original_text", "rewritten_text", "rewrite_prompt")
    path = write_csv(tmp_path / "t.csv", [("1", "a", "b", "p"), ("2", "a", "b", " "), ("3", "a", "", "p")], header)
    assert [triplet.pair.id for triplet in read_triplets(path)] == ["1"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_writer(path) as file:  # noqa: PT012
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["t.csv"]


def test_validate_names_each_fault_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text('id,rewrite_prompt\n1,"Make\nit"\n1,again\n,no id\n9,unknown\n3,\n4,NaN\n')
    problems = validate(path, ["1", "2", "3", "4"])
    assert [problem.removeprefix(f"{path}: ") for problem in problems] == [
        "line 4: id '1' is a duplicate of line 2",
        "line 5: the id is null",
        "line 6: id '9' is not in the input",
        "line 7: rewrite_prompt of id '3' is blank or reads as null",
        "line 8: rewrite_prompt of id '4' is blank or reads as null",
        "id '2' of the input is missing",
    ]


def test_validate_sees_wrong_order_and_wrong_columns(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("id,rewrite_prompt\n2,b\n1,a\n")
    assert "order differs" in validate(path, ["1", "2"])[0]
    path.write_text("id,rewrite_prompt,extra\n1,a,x\n")
    assert "columns must be id,rewrite_prompt and no others" in validate(path, ["1"])[0]
    path.write_text("rewrite_prompt,id\na,1\n")
    assert "columns must be" in validate(path, ["1"])[0]
    path.write_text("id,prompt\n1,a\n")
    assert "missing column rewrite_prompt" in validate(path, ["1"])[0]
    assert "does not exist" in validate(tmp_path / "none.csv", ["1"])[0]
    pd.DataFrame({"id": ["1"], "rewrite_prompt": ["a"]}).to_parquet(path)
    assert "is a Parquet file" in validate(path, ["1"])[0]


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    (folder / "part=1").mkdir(parents=True)
    for place, ids in (("part-0.parquet", ["a", "b"]), ("part=1/part-1.parquet", ["c"])):
        pd.DataFrame({"id": ids, "original_text": ids, "rewritten_text": ids}).to_parquet(folder / place)
    assert [pair.id for pair in read_pairs(folder)] == ["a", "b", "c"]
    assert header_of(folder) == ["id", "original_text", "rewritten_text"]
    pd.DataFrame({"id": ["a"], "original_text": ["x"], "rewritten_text": ["y"]}).to_parquet(folder / "z.parquet")
    with pytest.raises(UserError, match=r"duplicate id on z\.parquet, row 1 .* first on part-0\.parquet, row 1"):
        read_pairs(folder)
