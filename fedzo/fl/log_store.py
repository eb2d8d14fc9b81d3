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
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedzo.errors import RunFolderError
from fedzo.fl.config import BestBy
from fedzo.fl.log_files import VECTORS, OpenLog, drop_stray_vector, read_vector, write_vector, writing_logs
from fedzo.records.decode import decode
from fedzo.records.fields import RoundNumber
from fedzo.records.folder import AUDIT, METRICS, PUBLIC, refuse_link
from fedzo.records.lines import RESTORE, LogLines
from fedzo.records.log import AuditLine, Proof, PublicLine, ScalarLine, decode_audit, decode_public
from fedzo.records.metrics import (
    CentralScore,
    Extension,
    FederatedScore,
    MetricRecord,
    Round,
    Setup,
    Summary,
    decode_metric,
)
from fedzo.zo.log import LogRecord, ScalarRecord, VectorRecord

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

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

    Memory holds what each round did, since that is the model; and what a metric record says, but for what it says of
    each client. Lines are read from their files when they are asked for: all rounds and clients together would not fit.

    Args:
        folder: The run folder.

    Attributes:
        records: What each committed round did.
        public: Their lines in the public log, in the file.

    Raises:
        RunFolderError: A log is not there or a link, or a line is not what a run writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.public: LogLines[PublicLine] = LogLines(folder, PUBLIC, decode_public)
        self.records = [self._record(line) for line in self.public]

    @cached_property
    def audit(self) -> LogLines[AuditLine]:
        """Audit lines of the committed rounds, in the file."""
        lines = LogLines(self.folder, AUDIT, decode_audit)
        self.check_audit([*LogLines(self.folder, AUDIT, _round_of)])
        lines.leave_out_from(len(self.records))
        return lines

    @cached_property
    def metrics(self) -> list[MetricRecord]:
        """Metric records so far, without what they say of each client."""
        lines = LogLines(self.folder, METRICS, _skim)
        return [line for line in lines if belongs(line, len(self.records))]

    def metrics_of(self, kind: type[M]) -> list[M]:
        """The metric records of one kind so far."""
        return [record for record in self.metrics if isinstance(record, kind)]

    def check_audit(self, rounds: list[int]) -> None:
        """Refuse an audit log whose lines, of these rounds, are not those of the committed rounds."""
        done = len(self.records)
        if rounds[:done] != [*range(done)]:
            found = len([number for number in rounds if number < done])
            raise RunFolderError(
                f"{self.folder / AUDIT}: it must hold every one of the {done} committed rounds, got {found}"
                f"{' in another order' if found == done else ''}. {RESTORE}"
            )

    def _record(self, line: PublicLine) -> LogRecord:
        """What a line says; a vector stays in its file until it is read."""
        if isinstance(line, ScalarLine):
            return ScalarRecord.from_line(line)
        return VectorRecord.from_line(line, partial(read_vector, self.folder, line.vector, line.round, line.size))


class RunStore(RunLog):
    """Append-only logs of one run, which this process has to itself until they are closed.

    Args:
        folder: The run folder; made if it is not there.

    Raises:
        FolderInUseError: Another process writes to it; nothing was changed.
        RunFolderError: The folder cannot be written or holds a link, a line is not what a run writes, or the logs do
            not belong together; nothing was cut. Of the audit log this looks at the number of lines and at the last
            ones: to read them all takes minutes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with ExitStack() as opened, writing_logs(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for each in folder.iterdir():
                refuse_link(each)
            if not (folder / PUBLIC).exists() and has_begun(folder):
                raise self._other_logs("none")
            self._public = opened.enter_context(OpenLog(folder, PUBLIC, decode_public, lock=True))
            self.records = [self._record(line) for line in self._public]
            done = len(self.records)
            self._audit = opened.enter_context(OpenLog(folder, AUDIT, decode_audit))
            unread = min(max(done - 1, 0), len(self._audit))  # the server reads these before its first new round
            rounds = [*range(unread), *(line.round for line in self._audit[unread:])]
            self.check_audit(rounds)
            self._metrics = opened.enter_context(OpenLog(folder, METRICS, _decode_light))
            metrics = [*self._metrics]
            rounds += [line.round for line in metrics if isinstance(line, Round)]
            if (last := max(rounds, default=-1)) > done:  # a kill leaves one round more
                raise self._other_logs(f"{done} of {last + 1}")
            files: list[OpenLog[Any]] = [self._public, self._audit, self._metrics]
            for lines in files:
                lines.repair()
            for left in (folder / VECTORS).glob(".*.part"):
                left.unlink()
            drop_stray_vector(folder, self.records)
            self._audit.cut(done, dropped=_UNCOMMITTED)
            # In the order of rounds, but for a run that was made longer after its public log was put back by one.
            kept = [*takewhile(lambda line: belongs(line, done), metrics)]
            self._metrics.cut(len(kept), dropped=_UNCOMMITTED)
            self.public, self.audit, self.metrics = self._public, self._audit, kept
            self._files = opened.pop_all()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def commit(self, record: LogRecord, *, attendance: Sequence[int], proof: Proof, audit: AuditLine) -> None:
        """Make a round part of the run.

        Args:
            record: What the round did.
            attendance: The clients that it was made of.
            proof: What holds after it.
            audit: What it was made of.
        """
        line = record.to_line(attendance=attendance, proof=proof)
        with writing_logs(self.folder):
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
        with writing_logs(self.folder):
            self._metrics.append(record, durable=not isinstance(record, Round))
        self.metrics.append(_without_clients(record))

    def take_back(self, record: Extension) -> None:
        """Drop the record of an extension that came to nothing, and what its start told, which the next tells again."""
        number = self.metrics.index(record)
        with writing_logs(self.folder):
            self._metrics.cut(number)
        del self.metrics[number:]

    def close(self) -> None:
        """Close the files; the lock goes with them."""
        self._files.close()

    def _other_logs(self, found: str) -> RunFolderError:
        return RunFolderError(
            f"{self.folder / PUBLIC}: it must hold the rounds that the other logs tell of, got {found}. Nothing was "
            f"changed. {RESTORE}"
        )


def best_round(store: RunLog, config: RunSettings) -> int:
    """The round with the best dev score; without any the last round."""
    score = best_dev_score(store, config)
    return len(store.records) if score is None else score.round


def best_dev_score(store: RunLog, config: RunSettings) -> CentralScore | None:
    """The best dev score by ``evaluation.best_by`` and the first evaluator, of equal ones the earliest."""
    taken, by = store.metrics_of(CentralScore), config.evaluation.best_by
    scores = [score for score in taken if score.split == "dev" and score.evaluator == config.first_evaluator]

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


def _without_clients(record: MetricRecord) -> MetricRecord:
    """A record without what it says of each client; of scores the worst client's stays, which the summary names."""
    match record:
        case Round():
            return replace(record, clients=(), reasons={})
        case FederatedScore():
            worst = [client for client, _ in record.worst_first[:1]]
            return replace(record, clients=tuple(score for score in record.clients if score.client in worst))
        case _:
            return record


def _decode_light(value: object, **told: Any) -> MetricRecord:
    """A line of the metrics (``decode_metric``), of which what it says of each client is let go at once."""
    return _without_clients(decode_metric(value, **told))


def _skim(value: object, **told: Any) -> MetricRecord:
    """The same for readers, who need not judge what a round says of each client: of a long run that takes minutes."""
    if isinstance(value, dict) and value.get("kind") == Round.kind:
        value = {**value, "clients": [], "reasons": {}}
    return _decode_light(value, **told)


@dataclass(frozen=True, slots=True)
class _OfRound:
    round: RoundNumber


def _round_of(value: object, **told: Any) -> int:
    """The round of a line of the audit log, and nothing else of it."""
    return decode(_OfRound, {"round": value.get("round")} if isinstance(value, dict) else value, **told).round
