"""The files behind the run folder's logs: lines of JSON that only grow, and vectors named by their digest."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.records.decode import to_json
from fedzo.records.folder import lock_file, make_folder, open_file, read_file, replace_file
from fedzo.records.lines import RESTORE, decoded, whole_lines
from fedzo.zo.log import VectorRecord, checked_vector
from fedzo.zo.spaces.base import Values

log = logging.getLogger(__name__)
L = TypeVar("L")
VECTORS = "vectors"


class Explained:
    """Turns an OSError on the run folder into one that says what to do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, RunFolderError):
            raise RunFolderError(
                f"run folder {self._folder}: cannot write ({error.strerror or error}). Committed rounds are safe. "
                "Free space or correct permissions, then `fedzo resume` it, or choose another with hydra.run.dir=..."
            ) from error


class Lines(Generic[L]):
    """A file of records, one a line, open for appending.

    Args:
        folder: The run folder.
        name: Of the file.
        decode: Makes a record of a line's plain values.
        lock: Whether the file is this process's alone before it is read: a line that its writer is just writing is not
            unfinished.
    """

    def __init__(self, folder: Path, name: str, decode: Callable[..., L], *, lock: bool = False) -> None:
        self._path = folder / name
        opened = open_file(folder, name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._file = os.fdopen(opened, "a+b", buffering=0)  # a failed write must not come back at close
        try:
            if lock:
                lock_file(opened, folder)
            if os.fstat(opened).st_nlink > 1:
                raise RunFolderError(
                    f"{self._path}: it must be this folder's alone, but other folders hold the same file (hard links). "
                    "Put a copy of it in its place."
                )
            self._file.seek(0)
            self._data = self._file.read()
            lines = whole_lines(self._data)
            self._whole = sum(map(len, lines))
            self.lines = decoded(self._path, lines, decode)
        except BaseException:
            self._file.close()
            raise

    def repair(self) -> None:
        """Cut off an unfinished last line, or give a whole one the newline that it lacks."""
        if cut := len(self._data) - self._whole:
            log.warning("%s: its last line was unfinished; %d bytes are cut off", self._path, cut)
            self._file.truncate(self._whole)
        elif self._data and not self._data.endswith(b"\n"):
            log.warning("%s: its last line had no newline; it is added", self._path)
            self._file.write(b"\n")
        self._data = b""

    def fileno(self) -> int:
        return self._file.fileno()

    def append(self, line: L, *, durable: bool) -> None:
        self._write(to_json(line).encode() + b"\n")
        if durable:
            os.fsync(self._file.fileno())
        self.lines.append(line)

    def keep(self, wanted: Callable[[L], bool], *, dropped: str = "") -> None:
        """Drop the lines that are not wanted; those before the first of them are not touched, so no kill loses them.

        The others keep their bytes: a record in memory may be lighter than its line.

        Args:
            wanted: Says which lines stay.
            dropped: For the warning, what the others tell of; without it there is none.
        """
        first = next((number for number, line in enumerate(self.lines) if not wanted(line)), None)
        if first is None:
            return
        kept = [number for number in range(first, len(self.lines)) if wanted(self.lines[number])]
        if dropped:
            count = len(self.lines) - first - len(kept)
            log.warning("%s: %d lines of %s are dropped", self._path, count, dropped)
        self._file.seek(0)
        held = self._file.read().splitlines(keepends=True)
        self._file.truncate(sum(map(len, held[:first])))
        self._write(b"".join(held[number] for number in kept))
        self.lines = [*self.lines[:first], *(self.lines[number] for number in kept)]

    def _write(self, rest: bytes) -> None:
        while rest:
            rest = rest[self._file.write(rest) :]

    def __enter__(self) -> Lines[L]:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def write_vector(folder: Path, record: VectorRecord) -> None:
    """Keep a round's vector: float32, little endian, named by its SHA-256. When this returns it is on the disk."""
    replace_file(make_folder(folder / VECTORS) / record.digest, record.read().astype("<f4").tobytes(), durable=True)


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
