"""Rows from files (jsonl, json, csv, tsv, parquet), and unlabelled documents."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fedzo.errors import ConfigError

Row = dict[str, Any]
Located = tuple[str, Row]
"""Where a row stands (``path:line``, or ``path, row n`` where there are no lines), and the row."""


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
    try:
        return list(reader(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file. Check data.path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: text must be UTF-8, got {error.reason} at byte {error.start}. Convert the file."
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _jsonl(path: Path) -> Iterator[Located]:
    # not str.splitlines: it also breaks at characters that JSON text may hold
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: not valid JSON ({error.msg} at character {error.pos + 1}).") from error
            yield where, _checked(row, where)


def _json(path: Path) -> Iterator[Located]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). If the file has one object a line, name it .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: must hold a list of objects, got {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _checked(row, where)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(
            f'{where}: a row must be an object like {{"text": ..., "label": ...}}, got {type(row).__name__}.'
        )
    return row


def _csv(path: Path) -> Iterator[Located]:
    return _delimited(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _tsv(path: Path) -> Iterator[Located]:
    return _delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(path: Path, *, delimiter: str, quoting: Any) -> Iterator[Located]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            columns = next(lines, [])
            if len(set(columns)) < len(columns):
                raise ConfigError(f"{path}:1: column names must differ, got {columns}.")
            for values in lines:
                where = f"{path}:{lines.line_num}"
                if not values:
                    continue
                if len(values) != len(columns):
                    raise ConfigError(
                        f"{where}: must have {len(columns)} fields ({', '.join(columns)}), got {len(values)}. "
                        f"{'Quote fields that hold a comma.' if delimiter == ',' else 'Fields must not hold a tab.'}"
                    )
                yield where, dict(zip(columns, values, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{path}:{lines.line_num}: malformed line ({error}).") from error


def _parquet(path: Path) -> Iterator[Located]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path}: not a parquet file ({error}).") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
"""The file endings that can be read."""


def read_texts(path: Path) -> list[str]:
    """The documents of a ``.txt`` file (one a line), or the ``text`` column of any data file."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"inputs.calibration: cannot read {path} ({error.strerror}).") from error
        return [line for line in lines if line.strip()]
    rows = read_rows(path)
    if rows and "text" not in rows[0]:
        raise ConfigError(f"{path}: a column 'text' is needed for calibration, got columns {sorted(rows[0])}.")
    return [str(row["text"]) for row in rows]
