"""Every format gives the same rows, and every bad file says where it is bad."""

from __future__ import annotations

import csv
import json
import logging
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedzo.data import files
from fedzo.data.files import read_located, read_rows, read_running_text, read_texts
from fedzo.errors import ConfigError

ROWS = [
    {"text": "plain words", "label": "0"},
    {"text": 'a "quoted" word, and a comma', "label": "1"},
    {"text": "accents: \u00e9\u00fc\u4e2d \u2028 line separator", "label": "0"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / f"rows.{suffix}", ROWS)) == ROWS


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"open quote\t1\n', encoding="utf-8")

    assert read_rows(path) == [{"text": '"open quote', "label": "1"}]


def test_quotes_of_a_tsv_that_are_no_text_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, quoted = tmp_path / "plain.tsv", tmp_path / "quoted.tsv"
    plain.write_text('text\tlabel\n"quoted" word\t1\n"a" and "b"\t0\n"\t0\nsome ""\t1\n', encoding="utf-8")
    quoted.write_text("text\tlabel\nx\t0\n" + '"He said ""ouch"" twice"\t1\n' * 2, encoding="utf-8")

    with caplog.at_level(logging.WARNING):
        read_rows(plain)
        assert read_rows(quoted)[1]["text"] == '"He said ""ouch"" twice"'

    (said,) = caplog.messages
    assert said.startswith(f"{quoted}:3: a cell has quotes around it and doubled ones inside. A tsv is read without")


@pytest.mark.parametrize(("suffix", "sign"), [("csv", ","), ("tsv", "\t")])
def test_empty_lines_may_stand_before_the_columns(suffix: str, sign: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(f"\n\ntext{sign}label\n\nx{sign}1\n", encoding="utf-8")

    assert read_located(path) == [(f"{path}:5", {"text": "x", "label": "1"})]


def test_a_quoted_field_of_a_csv_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",1\nnext,0\n', encoding="utf-8")

    assert read_rows(path) == [{"text": "two\nlines", "label": "1"}, {"text": "next", "label": "0"}]


@pytest.mark.parametrize(("suffix", "text"), [("csv", "text\nx\n"), ("tsv", "text\nx\n"), ("jsonl", '{"text": "x"}\n')])
def test_a_byte_order_mark_and_empty_lines_are_skipped(suffix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(text + "\n", encoding="utf-8-sig")

    assert read_rows(path) == [{"text": "x"}]


def test_numbers_keep_their_type_where_the_format_has_types(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")

    assert read_rows(tmp_path / "a.jsonl") == read_rows(tmp_path / "b.parquet") == rows


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        ("jsonl", [":1", ":2", ":3"]),
        ("json", [", row 1", ", row 2", ", row 3"]),
        ("csv", [":2", ":3", ":4"]),
        ("tsv", [":2", ":3", ":4"]),
        ("parquet", [", row 1", ", row 2", ", row 3"]),
    ],
)
def test_a_row_knows_its_place(suffix: str, places: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{suffix}", ROWS)

    assert [where for where, _ in read_located(path)] == [f"{path}{place}" for place in places]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a.jsonl:2: not valid JSON"),
        (
            "a.jsonl",
            '{"text": "x"}\n[1]\n',
            r"a.jsonl:2: a row must be an object .*, got list. Name one list of rows .json",
        ),
        ("a.json", '[{"text": 1},\n oops]', r"a.json:2: not valid JSON .*name it .jsonl"),
        (
            "a.json",
            '{"text": 1}',
            r"a.json: must hold a list of objects, got dict with 'text'. Save its list of rows alone",
        ),
        ("a.json", "[1]", r"a.json, row 1: a row must be an object"),
        ("a.csv", "text,label\nx,1\nhello, world,1\n", r"a.csv:3: must have 2 fields \(text, label\), got 3. Quote"),
        ("a.csv", 'text,label\n"x" y,1\n', r"a.csv:2: malformed line"),
        ("a.csv", "text,text\nx,1\n", r"a.csv:1: column names must differ, got \['text', 'text'\]"),
        (
            "a.tsv",
            "text\tlabel\nx\n",
            r"a.tsv:2: must have 2 fields \(text, label\), got 1. Fields must not hold a tab",
        ),
        ("a.parquet", "no parquet at all", r"a.parquet: not a parquet file"),
        ("a.xlsx", "", r"must end in .jsonl, .json, .csv, .tsv, .parquet, got '.xlsx'"),
        ("rows", "", r"must end in .*, got 'no ending'"),
    ],
)
def test_a_malformed_file_names_path_line_and_rule(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")

    with pytest.raises(ConfigError, match=message):
        read_rows(path)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text\ncaf\u00e9\n".encode("latin-1"))

    with pytest.raises(
        ConfigError,
        match=r"a.csv:2: text must be UTF-8, got 0xe9 at byte 8, perhaps Windows-1252. .*-f WINDOWS-1252 -t UTF-8`",
    ):
        read_rows(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_missing_file_is_named(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"gone.{suffix}: there is no such file. Check the path"):
        read_rows(tmp_path / f"gone.{suffix}")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()

    with pytest.raises(ConfigError, match=r"a.jsonl: cannot be read"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '[{"text": "x"},\n{"text": "y"}]', r"a.jsonl:1: .*If the file is one list of rows, name it .json"),
        ("a.jsonl", '[{"text": "x"}]', r"a.jsonl:1: .*got list. Name one list of rows .json"),
        ("a.jsonl", '{\n "text": "x"\n}', r"a.jsonl:1: not valid JSON .*A row must be an object on one line"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', r"a.json:2: .*If the file has one object a line, name it .jsonl"),
        ("a.jsonl", '{"a": 1}\n{"text": "x", "label": 0, "text": "y"}', r"a.jsonl:2: .*got 'text' twice. Remove one"),
        ("a.json", '[{"text": "x", "more": {"b": 1, "b": 2}}]', r"a.json: a key must stand once .*got 'b' twice"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl:1: not valid JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", r"a.jsonl:1: not valid JSON"),
        ("a.csv", 'text,label\n"x\n\ny",1\n"open,1\nz,0\n', r"a.csv:5: malformed line"),
        ("a.csv", "text;label\nloud, hot;0\n", r"a.csv:1: columns must be parted by commas, got ';'. Save it with"),
        ("a.csv", "sep=;\ntext;label\nx;0\n", r"a.csv:1: columns must be parted by commas, got ';'"),
        ("a.csv", "\n\ntext\tlabel\nx\t0\n", r"a.csv:3: columns must be parted by commas, got '\\t'.*or as .tsv"),
        ("a.csv", '"text";"label"\n"x";0\n', r"a.csv:1: malformed line .*its quotes, and part columns by commas"),
        ("a.csv", "\ntext,label\nx\n", r"a.csv:3: must have 2 fields \(text, label\), got 1"),
        ("a.csv", "\ntext,text\nx,y\n", r"a.csv:2: column names must differ"),
        (
            "a.csv",
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            r"a.csv: .*pointer of git-lfs. Run `git",
        ),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", r"a.parquet: .*pointer of git-lfs"),
    ],
)
def test_an_unlucky_file_says_what_to_do(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")

    with pytest.raises(ConfigError, match=message):
        read_rows(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text\nx\nit\x92s\n", r":3: text must be UTF-8, got 0x92 at byte 9, perhaps Windows-1252. .*-f WINDOWS-1252"),
        (b"\xef\xbb\xbftext\ncaf\xe9\n", r":2: text must be UTF-8, got 0xe9 at byte 11,"),
        (b"text\n" + b"x" * 20_000 + b"\n\x92\n", r":3: .*got 0x92 at byte 20006,"),
        ("text\nx\n".encode("utf-16"), r":1: text must be UTF-8, got 0xff at byte 0, as in UTF-16. .*-f UTF-16 "),
        ("text\nx\n".encode("utf-16-le"), r":1: text must be UTF-8, got .*, as in UTF-16"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "txt"])
def test_another_encoding_is_named_with_its_place_and_a_remedy(
    data: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)

    with pytest.raises(ConfigError, match=message):
        read_texts(path) if suffix == "txt" else read_rows(path)


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")

    with pytest.raises(ConfigError, match=r"a.parquet: column names must differ, got \['text', 'text'\]"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("kind", "value"), [(pyarrow.timestamp("ms"), 10**15), (pyarrow.date32(), 2**31 - 1)], ids=["time", "date"]
)
def test_a_date_that_python_cannot_hold_is_refused(kind: pyarrow.DataType, value: int, tmp_path: Path) -> None:
    dates = pyarrow.array([value], pyarrow.int32() if kind == pyarrow.date32() else pyarrow.int64()).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "born": dates}), tmp_path / "a.parquet")

    with pytest.raises(
        ConfigError, match=r"a.parquet: not a parquet .*Save it again, without the columns that no prompt"
    ):
        read_rows(tmp_path / "a.parquet")


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(ConfigError, match=r"a.parquet: not a parquet file that can be read"):
        read_rows(path)


def test_a_cell_may_be_longer_than_the_limit_of_csv_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, long = csv.field_size_limit(), "x" * 200_000
    path = write(tmp_path / "a.csv", [ROWS[0], {"text": long, "label": "1"}])

    assert before < len(long)
    assert read_rows(path)[1]["text"] == long
    monkeypatch.setattr(files, "MAX_CELL_CHARS", 150_000)
    with pytest.raises(ConfigError, match=r"a.csv:3: a field must have at most 150,000 characters, .*up to 200,0"):
        read_rows(path)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "txt"])
def test_a_file_is_held_once_beside_its_rows(suffix: str, tmp_path: Path) -> None:
    text, path = "x" * 1000, tmp_path / f"a.{suffix}"
    line = f'{{"text": "{text}"}}\n' if suffix == "jsonl" else f"{text}\n"
    head, wide = "text\n" if suffix in ("csv", "tsv") else "", line.replace("xx", "\N{GRINNING FACE}", 1)
    path.write_text(head + line * 1999 + wide, encoding="utf-8")

    tracemalloc.start()
    try:
        num_rows = len(read_texts(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert num_rows == 2000
    assert peak < 3 * path.stat().st_size


def test_a_document_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"body": "y"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a.jsonl:2: a column 'text' is needed, got columns \['body'"):
        read_texts(path)
    path.write_text('{"text": null}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a.jsonl:1: column 'text' must hold text, got None"):
        read_texts(path)


@pytest.mark.parametrize("name", ["a.txt", "A.TXT"])
def test_a_document_of_a_text_file_ends_with_its_line_and_nowhere_else(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("a\u2028b\u0085c\x0cd\r\n\n e \n".encode())

    assert read_texts(tmp_path / name) == ["a\u2028b\u0085c\x0cd", " e "]
    assert len(read_running_text(tmp_path / name)) == 1


def test_running_text_keeps_the_lines_of_a_text_file_and_the_documents_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one\n\n two \r\n")
    (tmp_path / "a.jsonl").write_text('{"text": " one\\n"}\n{"text": "two"}\n', encoding="utf-8")

    assert read_running_text(tmp_path / "a.txt") == [" one\n\n two \r\n"]
    assert read_running_text(tmp_path / "a.jsonl") == [" one\n", "two"]
