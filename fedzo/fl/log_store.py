"""The run folder's logs: durable, and repaired after a kill at any instant.

``public.jsonl`` rebuilds the model and is what clients download; ``audit.jsonl`` also holds every client's scalars. A
round is committed by its public line, written (fsync) after its audit line and before anything else is done with the
round.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedzo.errors import RunFolderError
from fedzo.fl.config import BestBy
from fedzo.zo.log import RoundRecord

PUBLIC, AUDIT, METRICS = "public.jsonl", "audit.jsonl", "metrics.jsonl"


class RunStore:
    """Append-only logs of one run. Opening it drops what a killed process left half written.

    Args:
        folder: The run folder; made if it is not there.

    Raises:
        RunFolderError: The folder cannot be written, or another process is using it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with ExitStack() as opened, _Explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._public = opened.enter_context(_Lines(folder / PUBLIC, lock=True))
            self._audit = opened.enter_context(_Lines(folder / AUDIT))
            self._metrics = opened.enter_context(_Lines(folder / METRICS))
            self.records = [RoundRecord.from_json(line) for line in self._public.lines]
            done = len(self.records)
            self._audit.keep(lambda line: line["round"] < done)
            self._metrics.keep(lambda line: _belongs(line, done))
            self._metrics.lines = [_light(line) for line in self._metrics.lines]
            self._files = opened.pop_all()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Public lines of the committed rounds."""
        return self._public.lines

    @property
    def audit(self) -> list[dict[str, Any]]:
        """Audit lines of the committed rounds."""
        if len(self._audit.lines) != len(self.records):
            raise RunFolderError(
                f"{self.folder / AUDIT}: it must hold every one of the {len(self.records)} committed rounds, got "
                f"{len(self._audit.lines)}. Restore the file from a copy."
            )
        return self._audit.lines

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Metric records so far; what a round says of each client is in the file alone, since it fills the memory."""
        return self._metrics.lines

    def commit(self, record: RoundRecord, *, proof: dict[str, Any], audit: dict[str, Any]) -> None:
        """Make a round part of the run. ``proof`` joins the public line (check, digest, chain, attendance)."""
        line = {**record.to_json(), **proof}
        with _Explained(self.folder):
            self._audit.append(audit, durable=True)
            self._public.append(line, durable=True)
        self.records.append(record)

    def write(self, record: dict[str, Any]) -> None:
        """Append a metric record (a sink)."""
        with _Explained(self.folder):
            self._metrics.append(record, durable=False)
            self._metrics.lines[-1] = _light(record)

    def close(self) -> None:
        """Close the files; the lock goes with them."""
        self._files.close()


def best_round(store: RunStore, *, by: BestBy) -> int:
    """The round with the best dev score, of equal ones the earliest; without dev scores the last round."""
    scores = [line for line in store.metrics if line["kind"] == "score" and line["split"] == "dev"]
    if not scores:
        return len(store.records)

    def rank(line: dict[str, Any]) -> tuple[float, float, int]:
        value, loss = line["value"] or 0.0, math.inf if line["loss"] is None else line["loss"]
        return (value, -loss, -line["round"]) if by is BestBy.value else (-loss, value, -line["round"])

    best = max(scores, key=rank)
    return int(best["round"])


class _Explained:
    """Turns an OSError on the run folder into one that says what to do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, RunFolderError):
            raise RunFolderError(
                f"run folder {self._folder}: cannot write ({error.strerror or error}). What was committed is kept: "
                "free space or mend the permissions, then `fedzo resume` it, or choose another with hydra.run.dir=..."
            ) from error


class _Lines:
    """A JSON-lines file open for appending; an unfinished last line is cut off when it is opened.

    With ``lock`` the file is this process's alone before it is read: a line that its writer is just writing is not
    unfinished.
    """

    def __init__(self, path: Path, *, lock: bool = False) -> None:
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
            self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            self._file.close()
            raise RunFolderError(f"{path}: not a log of JSON lines ({error}). Restore the file from a copy.") from error

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

    def append(self, line: dict[str, Any], *, durable: bool) -> None:
        text = json.dumps(_without_nan(line), allow_nan=False, separators=(",", ":"))
        rest = text.encode() + b"\n"
        while rest:
            rest = rest[self._file.write(rest) :]
        if durable:
            os.fsync(self._file.fileno())
        self.lines.append(line)

    def keep(self, wanted: Any) -> None:
        """Drop the lines that are not wanted; those before the first of them are not touched, so no kill loses them."""
        first = next((number for number, line in enumerate(self.lines) if not wanted(line)), None)
        if first is None:
            return
        self._file.seek(0)
        self._file.truncate(sum(len(line) for line in self._file.read().splitlines(keepends=True)[:first]))
        rest, self.lines = self.lines[first:], self.lines[:first]
        for line in filter(wanted, rest):
            self.append(line, durable=False)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _belongs(line: dict[str, Any], done: int) -> bool:
    """Whether a metric record is about the committed part of the run."""
    kind = line.get("kind")
    if kind == "round":
        return bool(line["round"] < done)
    if kind in ("score", "federated_score", "step_policy"):  # a step policy is told before its round
        return bool(line["round"] <= done)
    return kind != "summary" or bool(line["rounds"] == done)


def _light(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "clients"} if record["kind"] == "round" else record


def _without_nan(value: Any) -> Any:
    """JSON has no nan: it becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
