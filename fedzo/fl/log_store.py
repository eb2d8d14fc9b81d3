"""The run folder's logs: durable, and repaired after a kill at any instant.

``public.jsonl`` rebuilds the model and is what clients download; ``audit.jsonl`` also holds every client's scalars. A
round is committed by its public line, written (fsync) after its audit line and before anything else is done with the
round. Where clients send vectors, the mean of a round's is a file in ``vectors/``, named by its digest, which the
public line names; it is written before that line.

``RunLog`` reads and changes nothing. ``RunStore`` writes: it has the folder to itself before it looks at it, cuts only
what a kill leaves (an unfinished last line, and what was told of the one round after the last), and says what it cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedzo.errors import RunFolderError
from fedzo.fl.config import BestBy
from fedzo.fl.log_files import VECTORS, Explained, Lines, read_vector, write_vector
from fedzo.records.folder import AUDIT, METRICS, PUBLIC, refuse_link
from fedzo.records.lines import RESTORE, read_records
from fedzo.records.log import CommittedLine, Proof, PublicLine, RoundAudit, decode_audit, decode_public
from fedzo.records.metrics import CentralScore, Extension, MetricRecord, Round, Setup, Summary, decode_metric
from fedzo.zo.log import LogRecord, RoundRecord, VectorRecord

_UNCOMMITTED = "a round that was not committed"
M = TypeVar("M")


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a run: the first line of a log is its beginning."""
    files = [folder / name for name in (PUBLIC, AUDIT, METRICS)]
    return any(file.is_symlink() or (file.exists() and file.stat().st_size > 0) for file in files)


class RunLog:
    """The logs of a run as they lie on the disk. Reading makes, locks, repairs and changes nothing.

    A last line that a killed process left unfinished, or that another process is just writing, is no line. One that
    lacks nothing but its newline (an editor took it) is. Audit and metrics are read when they are first asked for.

    Args:
        folder: The run folder.

    Raises:
        RunFolderError: A log is not there or a link, or a line is not what a run writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rounds = read_records(folder, PUBLIC, decode_public)
        self.records = [self._record(line) for line in self._rounds]
        self._told: dict[str, list[Any]] = {}

    @property
    def rounds(self) -> list[CommittedLine]:
        """Public lines of the committed rounds."""
        return self._rounds

    @property
    def audit(self) -> list[RoundAudit]:
        """Audit lines of the committed rounds."""
        if AUDIT not in self._told:
            self._told[AUDIT] = self._of_committed(read_records(self.folder, AUDIT, decode_audit))
        return self._told[AUDIT]

    @property
    def metrics(self) -> list[MetricRecord]:
        """Metric records so far; what a round says of each client is in the file alone, since it fills the memory."""
        if METRICS not in self._told:
            told = read_records(self.folder, METRICS, _decode_light)
            self._told[METRICS] = [line for line in told if belongs(line, len(self.records))]
        return self._told[METRICS]

    def told(self, kind: type[M]) -> list[M]:
        """The metric records of one kind so far."""
        return [record for record in self.metrics if isinstance(record, kind)]

    def _of_committed(self, audit: list[RoundAudit]) -> list[RoundAudit]:
        lines = [line for line in audit if line.round < len(self.records)]
        if len(lines) != len(self.records):
            raise RunFolderError(
                f"{self.folder / AUDIT}: it must hold every one of the {len(self.records)} committed rounds, got "
                f"{len(lines)}. {RESTORE}"
            )
        return lines

    def _record(self, line: CommittedLine) -> LogRecord:
        """What a line says; a vector stays in its file until it is read."""
        if isinstance(line, PublicLine):
            return RoundRecord.from_line(line)
        return VectorRecord.from_line(line, partial(read_vector, self.folder, line.vector, line.round, line.size))


class RunStore(RunLog):
    """Append-only logs of one run, which this process has to itself until they are closed.

    Args:
        folder: The run folder; made if it is not there.

    Raises:
        FolderInUseError: Another process writes to it; nothing was changed.
        RunFolderError: The folder cannot be written or holds a link, a line is not what a run writes, or the logs do
            not belong together; nothing was cut.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with ExitStack() as opened, Explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for each in folder.iterdir():
                refuse_link(each)
            if not (folder / PUBLIC).exists() and has_begun(folder):
                raise self._other_logs("none")
            self._public = opened.enter_context(Lines(folder, PUBLIC, decode_public, lock=True))
            self._audit = opened.enter_context(Lines(folder, AUDIT, decode_audit))
            self._metrics = opened.enter_context(Lines(folder, METRICS, _decode_light))
            self.records = [self._record(line) for line in self._public.lines]
            done = len(self.records)
            self._of_committed(self._audit.lines)
            told = [*self._audit.lines, *(line for line in self._metrics.lines if isinstance(line, Round))]
            if (last := max((line.round for line in told), default=-1)) > done:  # a kill leaves one round more
                raise self._other_logs(f"{done} of {last + 1}")
            for lines in (self._public, self._audit, self._metrics):
                lines.repair()
            for left in (folder / VECTORS).glob(".*.part"):
                left.unlink()
            self._audit.keep(lambda line: line.round < done, dropped=_UNCOMMITTED)
            self._metrics.keep(lambda line: belongs(line, done), dropped=_UNCOMMITTED)
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
        return self._audit.lines

    @property
    def metrics(self) -> list[MetricRecord]:
        """Metric records so far, without what a round says of each client."""
        return self._metrics.lines

    def commit(self, record: LogRecord, *, attendance: Sequence[int], proof: Proof, audit: RoundAudit) -> None:
        """Make a round part of the run.

        Args:
            record: What the round did.
            attendance: The clients that it was made of.
            proof: What holds after it.
            audit: What it was made of.
        """
        line = record.to_line(attendance=attendance, proof=proof)
        with Explained(self.folder):
            if isinstance(record, VectorRecord):
                write_vector(self.folder, record)
            self._audit.append(audit, durable=True)
            self._public.append(line, durable=True)
        self.records.append(self._record(line))

    def write(self, record: MetricRecord) -> None:
        """Append a metric record (a sink); what a resumed run depends on is on the disk then, with all lines before it.

        Which round is best, for example, follows from scores of rounds that are not scored again. What a round measured
        decides nothing, and rounds are many.
        """
        with Explained(self.folder):
            self._metrics.append(record, durable=not isinstance(record, Round))
            self._metrics.lines[-1] = _light(record)

    def take_back(self, record: MetricRecord) -> None:
        """Drop a metric record that came to nothing."""
        with Explained(self.folder):
            self._metrics.keep(lambda line: line != record)

    def close(self) -> None:
        """Close the files; the lock goes with them."""
        self._files.close()

    def _other_logs(self, found: str) -> RunFolderError:
        return RunFolderError(
            f"{self.folder / PUBLIC}: it must hold the rounds that the other logs tell of, got {found}. Nothing was "
            f"changed. {RESTORE}"
        )


def best_round(store: RunLog, *, by: BestBy, evaluator: str | None) -> int:
    """The round with an evaluator's best dev score, of equal ones the earliest; without any the last round."""
    score = best_dev_score(store, by=by, evaluator=evaluator)
    return len(store.records) if score is None else score.round


def best_dev_score(store: RunLog, *, by: BestBy, evaluator: str | None) -> CentralScore | None:
    """An evaluator's best dev score, of equal ones the earliest."""
    told = store.told(CentralScore)
    scores = [score for score in told if score.split == "dev" and score.evaluator == evaluator]

    def rank(score: CentralScore) -> tuple[float, float, int]:
        loss = math.inf if score.loss is None else score.loss
        return (score.merit, -loss, -score.round) if by is BestBy.value else (-loss, score.merit, -score.round)

    return max(scores, key=rank, default=None)


def belongs(record: MetricRecord, done: int) -> bool:
    """Whether a metric record is about the committed part of the run, its first ``done`` rounds."""
    match record:
        case Round():
            return record.round < done
        case Summary():
            return record.rounds <= done
        case Setup() | Extension():
            return True
        case _:  # a step policy is told before its round
            return record.round <= done


def _light(record: MetricRecord) -> MetricRecord:
    return replace(record, clients=()) if isinstance(record, Round) else record


def _decode_light(value: object, **told: Any) -> MetricRecord:
    """A line of the metrics (``decode_metric``), of which what a round says of each client is let go at once."""
    return _light(decode_metric(value, **told))
