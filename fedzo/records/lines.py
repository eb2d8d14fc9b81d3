"""Logs of a run folder as files of records, one a line of JSON: which lines are whole, and what they say.

A log is long: what each client measured in each round of a run does not fit in memory. So a record is read from its
line whenever it is asked for, and what is kept is where the lines end.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

from fedzo.errors import RunFolderError
from fedzo.records.decode import parse_json
from fedzo.records.folder import open_file, raised_as

L = TypeVar("L")
RESTORE = "Restore the file from a copy."
_BLOCK = 1 << 16  # bytes that are read at least, from the end of a log


class LogLines(Sequence[L]):
    """The lines of a log as it lies on the disk, as records, less an unfinished last one; nothing is changed.

    They are those that are there when it is made. Each is read from the file when it is asked for, and let go; a loop
    over them holds one at a time, a slice all that it names.

    Args:
        folder: The run folder.
        name: Of the file.
        decode: Makes a record of a line's plain values.

    Raises:
        RunFolderError: It is not there, cannot be read or is a link; when a record is read: its line is not what a run
            writes.
    """

    def __init__(self, folder: Path, name: str, decode: Callable[..., L]) -> None:
        self._folder = folder
        self._name = name
        self._decode = decode
        with _opened(folder, name) as file:
            self._ends = _line_ends(file)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[L]:
        return self._read(range(len(self)))

    @overload
    def __getitem__(self, index: int) -> L: ...
    @overload
    def __getitem__(self, index: slice) -> list[L]: ...
    def __getitem__(self, index: int | slice) -> L | list[L]:
        if isinstance(index, slice):
            return list(self._read(range(len(self))[index]))
        number = range(len(self))[index]
        return next(self._read(range(number, number + 1)))

    @property
    def num_bytes(self) -> int:
        """Bytes of these lines."""
        return self._start(len(self))

    def leave_out_from(self, number: int) -> None:
        """Have no lines from this one on; in the file they stay."""
        del self._ends[number:]

    def _read(self, numbers: range) -> Iterator[L]:
        with _opened(self._folder, self._name) as file:
            for number in numbers:
                yield _decoded(self._line(file, number), self._decode, where=f"{self._path}, line {number + 1}")

    def _line(self, file: BinaryIO, number: int) -> bytes:
        start = self._start(number)
        file.seek(start)
        return file.read(self._ends[number] - start)

    def _start(self, number: int) -> int:
        """Where a line begins; where the next one would, if it is the number of lines."""
        return self._ends[number - 1] if number else 0

    @property
    def _path(self) -> Path:
        return self._folder / self._name


def from_end(folder: Path, name: str, decode: Callable[..., L]) -> Iterator[L]:
    """The records of a log from the last to the first: of a long one no more is read than what is asked for.

    Args and errors are those of ``LogLines``.
    """
    with _opened(folder, name) as file:
        start, begun, is_last = file.seek(0, os.SEEK_END), b"", True
        while start:
            size = min(start, max(_BLOCK, len(begun)))
            start -= size
            file.seek(start)
            lines = (file.read(size) + begun).splitlines(keepends=True)
            begun = lines.pop(0) if start else b""  # it may begin further up
            for line in reversed(lines):
                if not is_last or _is_whole(line):
                    yield _decoded(line, decode, where=f"{folder / name}, near its end")
                is_last = False


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A log for reading; ``RunFolderError`` where it is not there, cannot be read or is a link."""
    with (
        raised_as(RunFolderError, f"{folder / name}: it must be there and readable", RESTORE),
        os.fdopen(open_file(folder, name), "rb") as file,
    ):
        yield file


def _line_ends(file: BinaryIO) -> array[int]:
    """Where each line of a log ends, less an unfinished last one."""
    ends, end, line = array("Q"), 0, b""
    for line in file:
        end += len(line)
        ends.append(end)
        if not line.endswith(b"\n"):
            break  # its writer goes on, and what comes next is no line of its own
    if line and not _is_whole(line):
        ends.pop()
    return ends


def _is_whole(line: bytes) -> bool:
    """Whether a log's last line is finished, with its newline or without: no beginning of a JSON object is one."""
    if not line.endswith(b"\n"):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return False
    return True


def _decoded(line: bytes, decode: Callable[..., L], *, where: str) -> L:
    told: dict[str, Any] = {
        "where": where,
        "error": RunFolderError,
        "remedy": f"It was edited, or another version of fedzo wrote it. {RESTORE}",
    }
    return decode(parse_json(line, **told), **told)
