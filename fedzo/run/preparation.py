"""Clients' training rows on their way through the stages, which may take hours: beside what else a process does.

A process prepares one client after another, since stages share what they keep at the site and what they may spend.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from fedzo.config.schema import RunConfig
from fedzo.data.preprocess import STAGES, Progress, Stage, StageContext, summaries
from fedzo.data.rows import ClientRows, RowSource, client_rows
from fedzo.errors import FedzoError
from fedzo.system import OnProgress

log = logging.getLogger(__name__)
PATIENCE_S = 2.0
"""How long the greeting that begins it waits: most stages are done by then, or find what they made before."""
TELL_S = 60.0


class StoppedError(FedzoError):
    """Nobody needs these rows any more."""


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """A client's rows after all stages, and what these tell of them."""

    rows: ClientRows
    figures: Mapping[str, float]


class Preparation:
    """One client's rows, in a thread that does not outlive the process.

    Args:
        work: Makes them; it is given what takes its progress.
    """

    def __init__(self, work: Callable[[OnProgress], PreparedRows]) -> None:
        self._work = work
        self._progress = Progress(0, 1)
        self._made: PreparedRows | Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> Progress | None:
        """How far it is, after so many seconds at most; None where it has ended."""
        self._thread.join(timeout_s)
        return self._progress if self._thread.is_alive() else None

    def result(self) -> PreparedRows:
        """What it made, once it has ended; raises what made it fail."""
        if isinstance(self._made, Exception):
            raise self._made
        assert self._made is not None
        return self._made

    def stop(self) -> None:
        """End it when it next tells of its progress."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            self._made = self._work(self._advanced)
        except Exception as error:  # told to whoever asks for the result
            self._made = error

    def _advanced(self, done: int, total: int) -> None:
        if self._stopped.is_set():
            raise StoppedError("the preparation was stopped")
        self._progress = Progress(done, max(total, 1))


@dataclass
class Preparations:
    """The rows of all clients that a process plays.

    Attributes:
        config: The run.
        source: Where the clients' rows come from.
        context: What the stages may know.
        to_the_end: Whether whoever asks waits until they are ready: where nobody could ask this process again.
    """

    config: RunConfig
    source: RowSource
    context: StageContext
    to_the_end: bool = False
    _ready: dict[int, PreparedRows] = field(default_factory=dict)
    _jobs: dict[int, Preparation] = field(default_factory=dict)
    _stages: dict[str, Stage] | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def is_known(self, client: int) -> bool:
        """Whether a client's rows are ready or on their way."""
        return client in self._ready or client in self._jobs

    def look(self, client: int) -> Progress | None:
        """Begin to prepare a client's rows, or see how far that is; None where they are ready.

        A failure is told once. Whoever looks again begins again, with what the stages have kept.
        """
        if client in self._ready or not self.config.preprocess:
            return None
        if self.to_the_end:
            self.rows(client)
            return None
        begins = client not in self._jobs
        if begins:
            self._jobs[client] = Preparation(partial(self._prepare, client))
        if progress := self._jobs[client].wait(PATIENCE_S if begins else 0.0):
            return progress
        self._ready[client] = self._jobs.pop(client).result()
        return None

    def rows(self, client: int) -> PreparedRows:
        """A client's rows when they are ready, however long that takes."""
        if client not in self._ready and (job := self._jobs.get(client)):
            while job.wait(1.0):
                pass
            self.look(client)
        if client in self._ready:
            return self._ready[client]
        made = self._prepare(client, lambda done, total: None)
        if self.config.preprocess:  # else they are read again as fast
            self._ready[client] = made
        return made

    def forget(self) -> None:
        """Let rows that are ready be read and prepared anew, with what the stages have kept."""
        self._ready.clear()

    def stop(self) -> None:
        """Let what is on its way end."""
        for job in self._jobs.values():
            job.stop()

    def _prepare(self, client: int, on_progress: OnProgress) -> PreparedRows:
        next_line = time.monotonic() + TELL_S

        def advanced(done: int, total: int) -> None:
            nonlocal next_line
            on_progress(done, total)
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + TELL_S
                log.warning("client %d: preparing, %d of %d rows", client, done, total)

        with self._turn:
            on_progress(0, 0)
            if self._stages is None:
                chosen = self.config.preprocess
                self._stages = {name: STAGES.build(stage, context=self.context) for name, stage in chosen.items()}
            rows = client_rows(
                self.source,
                client,
                share=self.config.partition.holdout,
                seed=self.config.seed,
                stages=self._stages,
                on_progress=advanced,
            )
            return PreparedRows(rows, summaries(self._stages, client=client))
