"""Logs as they lie on the disk: which of their lines count, and that no more of them is read or kept than is needed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.errors import RunFolderError
from fedzo.records import lines
from fedzo.records.lines import LogLines, from_end

NAME = "log.jsonl"
Numbers = Callable[..., list[int]]


def number(value: object, **told: Any) -> int:
    """A line's record: the number under ``n``."""
    if not isinstance(value, dict) or "n" not in value:
        raise RunFolderError(f"{told['where']}: no number")
    return int(value["n"])


def write(folder: Path, count: int, *, end: str = "\n") -> list[int]:
    """So many lines, each longer than the one before; returns their numbers."""
    text = "\n".join(json.dumps({"n": n, "more": "x" * 7 * n}) for n in range(count))
    (folder / NAME).write_text(text + end)
    return list(range(count))


def forwards(folder: Path) -> list[int]:
    return list(LogLines(folder, NAME, number))


def backwards(folder: Path) -> list[int]:
    return list(from_end(folder, NAME, number))[::-1]


@pytest.fixture(params=[1, 20, 1 << 16], ids="in blocks of {}".format)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("read", [forwards, backwards])
def test_every_whole_line_is_a_record(tmp_path: Path, read: Numbers) -> None:
    for count in (1, 2, 9):
        expected = write(tmp_path, count)
        assert read(tmp_path) == expected
        expected = write(tmp_path, count, end="")  # an editor took the newline
        assert read(tmp_path) == expected
    (tmp_path / NAME).write_text("")
    assert read(tmp_path) == []


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("read", [forwards, backwards])
@pytest.mark.parametrize("torn", ['\n{"n": 3, "mo', '\n{"n": 3', "\nx"])
def test_an_unfinished_last_line_is_none(tmp_path: Path, read: Numbers, torn: str) -> None:
    expected = write(tmp_path, 3, end=torn)

    assert read(tmp_path) == expected


def test_the_end_of_a_line_that_is_written_while_it_is_read_is_no_line_of_its_own() -> None:
    reads = iter([b'{"n": 0}\n{"n": 1, "mo', b"", b're": 2}\n'])  # the second finds the end of the file

    class Growing(io.RawIOBase):
        """A file whose writer goes on."""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            read = next(reads, b"")
            buffer[: len(read)] = read
            return len(read)

    assert list(lines._line_ends(io.BufferedReader(Growing()))) == [len(b'{"n": 0}\n')]


def test_a_record_is_found_by_its_number_as_in_a_list(tmp_path: Path) -> None:
    whole = write(tmp_path, 9)
    records = LogLines(tmp_path, NAME, number)

    assert len(records) == 9
    for place in range(-9, 9):
        assert records[place] == whole[place]
    for part in (slice(None), slice(3, 5), slice(-2, None), slice(None, None, -2), slice(5, 3)):
        assert records[part] == whole[part]
    assert list(reversed(records)) == whole[::-1]
    for place in (9, -10):
        with pytest.raises(IndexError):
            records[place]


def test_what_is_written_later_is_no_line_and_what_is_left_out_stays_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, 4)
    records = LogLines(tmp_path, NAME, number)
    before = (tmp_path / NAME).read_bytes()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"n": 4}\n')

    records.leave_out_from(3)

    assert (len(records), list(records)) == (3, [0, 1, 2])
    assert records.num_bytes == len(b"".join(before.splitlines(keepends=True)[:3]))
    assert (tmp_path / NAME).read_bytes() == before + b'{"n": 4}\n'


def test_a_line_is_read_and_judged_when_it_is_asked_for_and_not_before(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"n": 0}\nwhat nobody reads\n{"n": 2}\n')
    records = LogLines(tmp_path, NAME, number)

    assert (len(records), records[0], records[2]) == (3, 0, 2)
    assert next(from_end(tmp_path, NAME, number)) == 2
    with pytest.raises(RunFolderError, match=r"log\.jsonl, line 2: must be JSON.*Restore the file from a copy"):
        records[1]
    with pytest.raises(RunFolderError, match=r"log\.jsonl, line 2: must be JSON"):
        list(records)
    with pytest.raises(RunFolderError, match=r"log\.jsonl, near its end: must be JSON"):
        list(from_end(tmp_path, NAME, number))


def test_of_a_long_log_the_end_alone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 400)  # half a megabyte
    reads: list[int] = []

    class Spied(io.FileIO):
        """A file that notes how much is read of it."""

        def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            reads.append(size or 0)
            return super().read(size) or b""

    monkeypatch.setattr(lines.os, "fdopen", lambda number, mode: Spied(number, mode))

    assert next(from_end(tmp_path, NAME, number)) == 399
    assert reads == [1 << 16]
    assert (tmp_path / NAME).stat().st_size > 8 * (1 << 16)


@pytest.mark.parametrize("read", [forwards, backwards])
def test_a_log_that_is_not_there_or_a_link_is_named(tmp_path: Path, read: Numbers) -> None:
    with pytest.raises(RunFolderError, match=r"log\.jsonl: it must be there and readable, got 'No such file"):
        read(tmp_path)
    (tmp_path / "elsewhere").write_text('{"n": 0}\n')
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match=r"log\.jsonl: it must lie in its folder itself, got a link"):
        read(tmp_path)
