"""Every format gives the same rows, and every bad file says where it is bad."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedzo.data.files import read_located, read_rows
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
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a.jsonl:2: a row must be an object .*, got list"),
        ("a.json", '[{"text": 1},\n oops]', r"a.json:2: not valid JSON .*name it .jsonl"),
        ("a.json", '{"text": 1}', r"a.json: must hold a list of objects, got dict"),
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

    with pytest.raises(ConfigError, match=r"a.csv: text must be UTF-8, got .* at byte 8"):
        read_rows(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_missing_file_is_named(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"gone.{suffix}: there is no such file. Check data.path"):
        read_rows(tmp_path / f"gone.{suffix}")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()

    with pytest.raises(ConfigError, match=r"a.jsonl: cannot be read"):
        read_rows(tmp_path / "a.jsonl")
