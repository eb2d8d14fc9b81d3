"""The files behind the run folder's logs: lines of JSON that only grow, and vectors named by their digest."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.records.decode import to_json
from fedzo.records.folder import lock_file, make_folder, open_file, raised_as, read_file, replace_file
from fedzo.records.lines import RESTORE, LogLines
from fedzo.zo.log import LogRecord, VectorRecord, checked_vector
from fedzo.zo.spaces.base import Values

log = logging.getLogger(__name__)
L = TypeVar("L")
VECTORS = "vectors"


def writing_logs(folder: Path) -> AbstractContextManager[None]:
    """Tells of a run folder that cannot be written, and what to do."""
    remedy = (
        "Committed rounds are safe. Free space or correct permissions, then `fedzo resume` it, or choose another with "
        "hydra.run.dir=..."
    )
    return raised_as(RunFolderError, f"run folder {folder}: it must be writable", remedy)


class OpenLog(LogLines[L]):
    """A log that is open for appending.

    Args:
        folder: The run folder.
        name: Of the file.
        decode: Makes a record of a line's plain values.
        lock: Whether the file is this process's alone before it is read: a line that its writer is just writing is not
            unfinished.
    """

    def __init__(self, folder: Path, name: str, decode: Callable[..., L], *, lock: bool = False) -> None:
        opened = open_file(folder, name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._file = os.fdopen(opened, "a+b", buffering=0)  # a failed write must not come back at close
        try:
            if lock:
                lock_file(opened, folder)
            if os.fstat(opened).st_nlink > 1:
                raise RunFolderError(
                    f"{folder / name}: it must be this folder's alone, but other folders hold the same file (hard "
                    "links). Put a copy of it in its place."
                )
            super().__init__(folder, name, decode)
        except BaseException:
            self._file.close()
            raise

    def repair(self) -> None:
        """Cut off an unfinished last line, or give a whole one the newline that it lacks."""
        size, whole = os.fstat(self.fileno()).st_size, self.num_bytes
        if cut := size - whole:
            log.warning("%s: its last line was unfinished; %d bytes are cut off", self._path, cut)
            self._file.truncate(whole)
        elif size and os.pread(self.fileno(), 1, size - 1) != b"\n":
            log.warning("%s: its last line had no newline; it is added", self._path)
            self._file.write(b"\n")
            self._ends[-1] += 1

    def fileno(self) -> int:
        return self._file.fileno()

    def append(self, line: L, *, durable: bool) -> None:
        rest = data = to_json(line).encode() + b"\n"
        while rest:
            rest = rest[self._file.write(rest) :]
        self._ends.append(self.num_bytes + len(data))
        if durable:
            os.fsync(self.fileno())

    def cut(self, number: int, *, dropped: str = "") -> None:
        """Drop the lines from this one on, in one step: no kill loses any other.

        Args:
            number: Of the first line that goes; if there is none, nothing happens.
            dropped: For the warning, what the lines tell of; without it there is none.
        """
        if number < len(self):
            if dropped:
                log.warning("%s: %d lines of %s are dropped", self._path, len(self) - number, dropped)
            self._file.truncate(self._start(number))
            self.leave_out_from(number)

    def __enter__(self) -> OpenLog[L]:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def write_vector(folder: Path, record: VectorRecord) -> None:
    """Keep a round's vector: float32, little endian, named by its SHA-256. When this returns it is on the disk."""
    replace_file(make_folder(folder / VECTORS) / record.digest, record.read().astype("<f4").tobytes(), durable=True)


def drop_stray_vector(folder: Path, records: Iterable[LogRecord]) -> None:
    """Remove the vector that a kill leaves which prevents its round. No kill leaves more than one: others stay."""
    named = {record.digest for record in records if isinstance(record, VectorRecord)}
    stray = [file for file in (folder / VECTORS).glob("[0-9a-f]" * 64) if file.name not in named]
    if len(stray) == 1:
        log.warning("%s: the vector of a round that was not committed is dropped", stray[0])
        stray[0].unlink()


def read_vector(folder: Path, digest: str, round: int, size: int) -> Values:
    """A round's vector.

    Raises:
        RunFolderError: Its file is not there, or is not what its name says.
    """
    try:
        data = read_file(folder, f"{VECTORS}/{digest}")
        if len(data) != 4 * size:
            raise ProtocolError(f"it must hold {4 * size} bytes, got {len(data)}")
        return checked_vector(data, digest=digest, what="it")
    except (OSError, ProtocolError) as error:
        what = error.strerror or error if isinstance(error, OSError) else error
        raise RunFolderError(
            f"{folder / VECTORS / digest}: the vector of round {round} must be there and whole: {what}. {RESTORE}"
        ) from error
