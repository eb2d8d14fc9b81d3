"""The run folder's logs: durable, and repaired after a kill at any instant.

``public.jsonl`` rebuilds the model and is what clients download; ``audit.jsonl`` also holds every client's scalars. A
round is committed by its public line, written (fsync) after its audit line and before anything else is done with the
round. Where clients send vectors, the mean of a round's is a file in ``vectors/``, named by its digest, which the
public line names; it is written before that line.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.fl.config import BestBy
from fedzo.records.decode import parse_json, to_json
from fedzo.records.log import CommittedLine, Proof, PublicLine, RoundAudit, decode_audit, decode_public
from fedzo.records.metrics import CentralScore, MetricRecord, Round, Setup, Summary, decode_metric
from fedzo.zo.log import LogRecord, RoundRecord, VectorRecord, checked_vector
from fedzo.zo.spaces.base import Values

L = TypeVar("L")
M = TypeVar("M")
PUBLIC, AUDIT, METRICS, VECTORS = "public.jsonl", "audit.jsonl", "metrics.jsonl", "vectors"


class RunStore:
    """Append-only logs of one run. Opening it drops what a killed process left half written.

    Args:
        folder: The run folder; made if it is not there.

    Raises:
        RunFolderError: The folder cannot be written, another process is using it, or a line is not what a run writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with ExitStack() as opened, _Explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._public = opened.enter_context(_Lines(folder / PUBLIC, decode_public, lock=True))
            self._audit = opened.enter_context(_Lines(folder / AUDIT, decode_audit))
            self._metrics = opened.enter_context(_Lines(folder / METRICS, decode_metric))
            self._vectors = _Vectors(folder / VECTORS)
            self.records = [self._record(line) for line in self._public.lines]
            done = len(self.records)
            self._audit.keep(lambda line: line.round < done)
            self._metrics.keep(lambda line: _belongs(line, done))
            self._metrics.lines = [_light(line) for line in self._metrics.lines]
            self._files = opened.pop_all()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def rounds(self) -> list[CommittedLine]:
        """Public lines of the committed rounds."""
        return self._public.lines

    @property
    def audit(self) -> list[RoundAudit]:
        """Audit lines of the committed rounds."""
        if len(self._audit.lines) != len(self.records):
            raise RunFolderError(
                f"{self.folder / AUDIT}: it must hold every one of the {len(self.records)} committed rounds, got "
                f"{len(self._audit.lines)}. Restore the file from a copy."
            )
        return self._audit.lines

    @property
    def metrics(self) -> list[MetricRecord]:
        """Metric records so far; what a round says of each client is in the file alone, since it fills the memory."""
        return self._metrics.lines

    def told(self, kind: type[M]) -> list[M]:
        """The metric records of one kind so far."""
        return [record for record in self._metrics.lines if isinstance(record, kind)]

    def commit(self, record: LogRecord, *, attendance: Sequence[int], proof: Proof, audit: RoundAudit) -> None:
        """Make a round part of the run.

        Args:
            record: What the round did.
            attendance: The clients that it was made of.
            proof: What holds after it.
            audit: What it was made of.
        """
        line = record.to_line(attendance=attendance, proof=proof)
        with _Explained(self.folder):
            if isinstance(record, VectorRecord):
                self._vectors.write(record)
            self._audit.append(audit, durable=True)
            self._public.append(line, durable=True)
        self.records.append(self._record(line))

    def _record(self, line: CommittedLine) -> LogRecord:
        """What a line says; a vector stays in its file until it is read."""
        if isinstance(line, PublicLine):
            return RoundRecord.from_line(line)
        return VectorRecord.from_line(line, partial(self._vectors.read, line.vector, round=line.round, size=line.size))

    def write(self, record: MetricRecord) -> None:
        """Append a metric record (a sink)."""
        with _Explained(self.folder):
            self._metrics.append(record, durable=False)
            self._metrics.lines[-1] = _light(record)

    def close(self) -> None:
        """Close the files; the lock goes with them."""
        self._files.close()


def best_round(store: RunStore, *, by: BestBy, evaluator: str | None) -> int:
    """The round with an evaluator's best dev score, of equal ones the earliest; without any the last round."""
    told = store.told(CentralScore)
    scores = [score for score in told if score.split == "dev" and score.evaluator == evaluator]
    if not scores:
        return len(store.records)

    def rank(score: CentralScore) -> tuple[float, float, int]:
        loss = math.inf if score.loss is None else score.loss
        return (score.merit, -loss, -score.round) if by is BestBy.value else (-loss, score.merit, -score.round)

    return max(scores, key=rank).round


class _Vectors:
    """Files of float32 numbers, little endian, each named by its SHA-256."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: VectorRecord) -> None:
        """Keep a round's vector; when this returns it is on the disk."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / record.digest
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(record.read().astype("<f4").data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)

    def read(self, digest: str, *, round: int, size: int) -> Values:
        """A round's vector.

        Raises:
            RunFolderError: Its file is not there, or is not what its name says.
        """
        path = self._folder / digest
        try:
            if (found := path.stat().st_size) != 4 * size:
                raise ProtocolError(f"it must hold {4 * size} bytes, got {found}")
            return checked_vector(path.read_bytes(), digest=digest, what="it")
        except (OSError, ProtocolError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise RunFolderError(
                f"{path}: the vector of round {round} must be there and whole: {what}. Restore the file from a copy."
            ) from error


class _Explained:
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


class _Lines(Generic[L]):
    """A file of records, one a line, open for appending; an unfinished last line is cut off when it is opened.

    Args:
        path: The file.
        decode: Makes a record of a line's plain values.
        lock: Whether the file is this process's alone before it is read: a line that its writer is just writing is not
            unfinished.
    """

    def __init__(self, path: Path, decode: Callable[..., L], *, lock: bool = False) -> None:
        self._path = path
        self._file = path.open("a+b", buffering=0)  # a failed write must not come back at close
        if lock:
            self._lock()
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self._file.truncate(len(whole))
        try:
            self.lines = [self._read(decode, line, number) for number, line in enumerate(whole.splitlines(), start=1)]
        except RunFolderError:
            self._file.close()
            raise

    def _read(self, decode: Callable[..., L], line: bytes, number: int) -> L:
        told: dict[str, Any] = {
            "where": f"{self._path}, line {number}",
            "error": RunFolderError,
            "remedy": "It was edited, or another version of fedzo wrote it. Restore the file from a copy.",
        }
        return decode(parse_json(line, **told), **told)

    def fileno(self) -> int:
        return self._file.fileno()

    def _lock(self) -> None:
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise RunFolderError(
                f"run folder {self._path.parent}: another process is using it. Wait for it, or end it."
            ) from error

    def append(self, line: L, *, durable: bool) -> None:
        rest = to_json(line).encode() + b"\n"
        while rest:
            rest = rest[self._file.write(rest) :]
        if durable:
            os.fsync(self._file.fileno())
        self.lines.append(line)

    def keep(self, wanted: Callable[[L], bool]) -> None:
        """Drop the lines that are not wanted; those before the first of them are not touched, so no kill loses them."""
        first = next((number for number, line in enumerate(self.lines) if not wanted(line)), None)
        if first is None:
            return
        self._file.seek(0)
        self._file.truncate(sum(len(line) for line in self._file.read().splitlines(keepends=True)[:first]))
        rest, self.lines = self.lines[first:], self.lines[:first]
        for line in filter(wanted, rest):
            self.append(line, durable=False)

    def __enter__(self) -> _Lines[L]:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _belongs(record: MetricRecord, done: int) -> bool:
    """Whether a metric record is about the committed part of the run."""
    match record:
        case Round():
            return record.round < done
        case Summary():
            return record.rounds == done
        case Setup():
            return True
        case _:  # a step policy is told before its round
            return record.round <= done


def _light(record: MetricRecord) -> MetricRecord:
    return replace(record, clients=()) if isinstance(record, Round) else record
