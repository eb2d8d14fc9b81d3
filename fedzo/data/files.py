"""Rows from files (jsonl, json, csv, tsv, parquet), and unlabelled documents."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fedzo.errors import ConfigError
from fedzo.system import warn_once

log = logging.getLogger(__name__)

Row = dict[str, Any]
Located = tuple[str, Row]
"""Where a row stands (``path:line``, or ``path, row n`` where there are no lines), and the row."""
MARK = "fedzo_status"
"""Column that marks the rows of a whole file of rewritten text (``fedzo rephrase --out``)."""
MAX_CELL_CHARS = 1 << 24
"""Longest cell of a csv or tsv; a quote that nobody closes would swallow the rest of any file."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in order. Values of csv and tsv are text; empty lines are skipped.

    A tsv has no quoting (as GLUE's files), a csv has the usual double quotes; both begin with a line of column names.

    Raises:
        ConfigError: The file is missing, unreadable, of another kind, or a line is malformed.
    """
    return [row for _, row in read_located(path)]


def read_located(path: Path) -> list[Located]:
    """The rows of a file with the place of each, for messages; errors as ``read_rows``."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: a data file must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}.")
    return list(reader(path, _bytes_of(path)))


def _bytes_of(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file. Check the path.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if data.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path}: must hold data, got a pointer of git-lfs. Run `git lfs pull` in its repository.")
    return data


def text_of(path: Path, data: bytes) -> str:
    """A file's bytes as text without a byte order mark.

    Raises:
        ConfigError: They are no UTF-8; the message has the place and how to convert the file.
    """
    try:
        if not _is_utf16(data):
            return data.decode("utf-8-sig")
        at, name = 0, "UTF-16"
        got = f"0x{data[0]:02x} at byte 0, as in UTF-16"
    except UnicodeDecodeError:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:  # that of utf-8-sig counts without the mark
            at = error.start
        name = "WINDOWS-1252"
        got = f"0x{data[at]:02x} at byte {at}, perhaps Windows-1252"
    line = data.count(b"\n", 0, at) + 1
    raise ConfigError(
        f"{path}:{line}: text must be UTF-8, got {got}. Convert the file, as with `iconv -f {name} -t UTF-8`."
    )


def _is_utf16(data: bytes) -> bool:
    return data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:64]


def _lines(path: Path, data: bytes, *, newline: str | None = None) -> io.TextIOWrapper:
    """Its lines, decoded one by one: the whole text, of 4 bytes a character for one emoji, is never held."""
    # not str.splitlines: it also breaks at characters that JSON text may hold
    lines = partial(io.TextIOWrapper, encoding="utf-8-sig", newline=newline)
    try:
        is_text = not _is_utf16(data)
        deque(lines(io.BytesIO(data)) if is_text else (), maxlen=0)  # all of them, before a row is looked at
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        text_of(path, data)  # says where, and how to convert it
    return lines(io.BytesIO(data))


def _jsonl(path: Path, data: bytes) -> Iterator[Located]:
    for number, line in enumerate(_lines(path, data), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _parsed(line, where)
        except json.JSONDecodeError as error:
            what = line.strip()
            if what[0] == "[":
                advice = "If the file is one list of rows, name it .json."
            elif what == "{":
                advice = "A row must be an object on one line."
            else:
                advice = 'A row must be an object on one line, as in {"text": ..., "label": ...}.'
            raise ConfigError(
                f"{where}: not valid JSON ({error.msg} at character {error.pos + 1}). {advice}"
            ) from error
        if isinstance(row, list):
            raise ConfigError(f"{where}: a row must be an object on its line, got list. Name one list of rows .json.")
        yield where, _checked(row, where)


def _json(path: Path, data: bytes) -> Iterator[Located]:
    try:
        rows = _parsed(text_of(path, data), str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). If the file has one object a line, name it .jsonl."
        ) from error
    if isinstance(rows, dict):
        keys = ", ".join(map(repr, list(rows)[:10])) or "no keys"
        raise ConfigError(
            f"{path}: must hold a list of objects, got dict with {keys}. "
            "Save its list of rows alone, or name a file of one row .jsonl."
        )
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: must hold a list of objects, got {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _checked(row, where)


def _parsed(text: str, where: str) -> Any:
    """JSON in which no object has a key twice: which of two values counts, nobody could tell."""

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            raise ConfigError(f"{where}: a key must stand once in an object, got {twice!r} twice. Remove one.")
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ConfigError, json.JSONDecodeError):
        raise
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise ConfigError(f"{where}: not valid JSON ({error}). Correct the file.") from error


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(
            f'{where}: a row must be an object like {{"text": ..., "label": ...}}, got {type(row).__name__}.'
        )
    return row


def _delimited(path: Path, data: bytes, *, delimiter: str, quoting: Any) -> Iterator[Located]:
    lines = csv.reader(_lines(path, data, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    before = csv.field_size_limit(MAX_CELL_CHARS)  # of the whole process
    began, columns = 1, list[str]()
    try:
        while True:
            began = lines.line_num + 1
            if (values := next(lines, None)) is None:
                return
            if not values:
                continue
            where = f"{path}:{began}"
            if not columns:
                columns = values
                _check_columns(where, columns)
                if delimiter == ",":
                    _check_commas(where, columns)
                continue
            if len(values) != len(columns):
                is_csv = delimiter == ","
                raise ConfigError(
                    f"{where}: must have {len(columns)} fields ({', '.join(columns)}), got {len(values)}. "
                    f"{'Quote fields that hold a comma.' if is_csv else 'Fields must not hold a tab or a line end.'}"
                )
            yield where, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        if "field limit" in str(error):
            size = sum(map(len, text_of(path, data).split("\n")[began - 1 :]))
            raise ConfigError(
                f"{path}:{began}: a field must have at most {MAX_CELL_CHARS:,} characters, the row that begins here "
                f"has more (up to {size:,}). Close its quotes, or shorten it."
            ) from error
        advice = f"Correct it or its quotes{'' if columns else ', and part columns by commas'}."
        raise ConfigError(f"{path}:{began}: malformed line ({error}). {advice}") from error
    finally:
        csv.field_size_limit(before)


def _check_columns(where: str, columns: Sequence[str]) -> None:
    if len(set(columns)) < len(columns):
        raise ConfigError(f"{where}: column names must differ, got {list(columns)}. Rename or remove one of two.")


def _check_commas(where: str, columns: Sequence[str]) -> None:
    found = next((sign for sign in ";\t|" if sign in columns[0]), None)
    if found and len(columns) == 1:
        raise ConfigError(
            f"{where}: columns must be parted by commas, got {found!r}. Save it with commas, or as .tsv with tabs."
        )


def _tsv(path: Path, data: bytes) -> list[Located]:
    located = list(_delimited(path, data, delimiter="\t", quoting=csv.QUOTE_NONE))
    if quoted := next((where for where, row in located if any(map(_is_quoted, row.values()))), None):
        warn_once(
            log,
            f"{quoted}: a cell has quotes around it and doubled ones inside. A tsv is read without quoting, so all of "
            "them are kept. If they are not part of the text, save the file as csv or jsonl.",
        )
    return located


def _is_quoted(cell: str) -> bool:
    return cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1]


def _parquet(path: Path, data: bytes) -> Iterator[Located]:
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        _check_columns(str(path), table.schema_arrow.names)
        rows = table.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, KeyError) as error:  # the last two: of a date
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path}: not a parquet file that can be read ({reason}). Save it again, without the columns that no "
            "prompt reads."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path, bytes], Iterable[Located]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": partial(_delimited, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    ".tsv": _tsv,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
"""The file endings that can be read."""


def read_texts(path: Path) -> list[str]:
    """The documents of a ``.txt`` file (one a line), or the ``text`` column of any data file.

    Raises:
        ConfigError: The file cannot be read, or a row has no text.
    """
    if _is_plain(path):
        return [line.rstrip("\n") for line in _lines(path, _bytes_of(path)) if line.strip()]
    located = read_located(path)
    for where, row in located:
        if "text" not in row:
            raise ConfigError(
                f"{where}: a column 'text' is needed, got columns {sorted(row)}. Rename the one that holds the text."
            )
        if not isinstance(row["text"], str):
            raise ConfigError(f"{where}: column 'text' must hold text, got {row['text']!r}. Correct or remove the row.")
    return [row["text"] for _, row in located]


def read_running_text(path: Path) -> list[str]:
    """Documents that are read on end: a ``.txt`` file as it stands, as one, or the ``text`` column of any data file.

    Raises:
        ConfigError: As ``read_texts``.
    """
    return [text_of(path, _bytes_of(path))] if _is_plain(path) else read_texts(path)


def _is_plain(path: Path) -> bool:
    return path.suffix.lower() == ".txt"


def refuse_marked(rows: Iterable[Row], *, what: str) -> None:
    """Raise ``ConfigError`` where rows that are to be scored may hold rewritten text."""
    if any(MARK in row for row in rows):
        raise ConfigError(
            f"{what} must hold original text, got rows with the column {MARK!r}: they come from fedzo rephrase --out. "
            "Give dev and test files of their own, or train on the original file with preprocess=[oat_rephrase]."
        )
