"""Logs of a run folder as files of records, one a line of JSON: which lines are whole, and what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedzo.errors import RunFolderError
from fedzo.records.decode import parse_json
from fedzo.records.folder import read_file

L = TypeVar("L")
RESTORE = "Restore the file from a copy."


def read_records(folder: Path, name: str, decode: Callable[..., L]) -> list[L]:
    """The records of a log as it lies on the disk, less an unfinished last line; nothing is changed.

    Args:
        folder: The run folder.
        name: Of the file.
        decode: Makes a record of a line's plain values.

    Raises:
        RunFolderError: It is not there, cannot be read or is a link, or a line is not what a run writes.
    """
    return decoded(folder / name, read_whole_lines(folder, name), decode)


def read_whole_lines(folder: Path, name: str) -> list[bytes]:
    """The lines of a log as it lies on the disk, less an unfinished last one; ``RunFolderError`` as above."""
    try:
        return whole_lines(read_file(folder, name))
    except OSError as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(
            f"{folder / name}: it must be there and readable, got {error.strerror!r}. {RESTORE}"
        ) from error


def whole_lines(data: bytes) -> list[bytes]:
    """The lines of a log file, less an unfinished last one. No beginning of a JSON object is one itself."""
    lines = data.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        try:
            json.loads(lines[-1])
        except (ValueError, RecursionError):
            lines.pop()
    return lines


def decoded(path: Path, lines: list[bytes], decode: Callable[..., L]) -> list[L]:
    """The records of a log file's lines; ``RunFolderError`` names the line that is none."""
    records = []
    for number, line in enumerate(lines, start=1):
        told: dict[str, Any] = {
            "where": f"{path}, line {number}",
            "error": RunFolderError,
            "remedy": f"It was edited, or another version of fedzo wrote it. {RESTORE}",
        }
        records.append(decode(parse_json(line, **told), **told))
    return records
