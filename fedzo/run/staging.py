"""Clients' training rows on their way through the stages, which may take hours: beside what else a process does.

A process takes one client after another, since stages share what they keep at the site and what they may spend.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial

from fedzo.config.schema import RunConfig
from fedzo.data.preprocess import STAGES, Progress, Stage, StageContext
from fedzo.data.rows import ClientRows, RowSource, client_rows
from fedzo.errors import FedzoError, PluginError
from fedzo.system import OnProgress, no_progress

log = logging.getLogger(__name__)
PATIENCE_S = 2.0
"""How long the greeting that begins it waits: most stages are done by then, or find what they made before."""
TELL_S = 60.0


class StoppedError(FedzoError):
    """Nobody needs these rows any more."""


class StagingJob(Future[ClientRows]):
    """One client's rows on their way, in a thread that does not outlive the process, as an executor's would.

    Attributes:
        progress: How far they are.

    Args:
        work: Makes them; it is given what takes its progress.
    """

    def __init__(self, work: Callable[[OnProgress], ClientRows]) -> None:
        super().__init__()
        self.progress = Progress(0, 1)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(work,), name="staging", daemon=True).start()

    def stop(self) -> None:
        """End it when it next tells of its progress."""
        self._stopped.set()

    def _run(self, work: Callable[[OnProgress], ClientRows]) -> None:
        try:
            self.set_result(work(self._advanced))
        except Exception as error:  # told to whoever asks for the result
            self.set_exception(error)
        except BaseException as error:  # such as SystemExit, which would end whoever asks
            self.set_exception(PluginError(f"a preprocess stage must return or raise, got {error!r}"))

    def _advanced(self, done: int, total: int) -> None:
        if self._stopped.is_set():
            raise StoppedError("the stages were stopped")
        self.progress = Progress(done, max(total, 1))


@dataclass
class Staging:
    """The rows of all clients that a process plays.

    Attributes:
        config: The run.
        source: Where the clients' rows come from.
        context: What the stages may know.
        asked_again: As of ``Process``.
    """

    config: RunConfig
    source: RowSource
    context: StageContext
    asked_again: bool = True
    _ready: dict[int, ClientRows] = field(default_factory=dict)
    _jobs: dict[int, StagingJob] = field(default_factory=dict)
    _stages: dict[str, Stage] | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def is_known(self, client: int) -> bool:
        """Whether a client's rows are ready or on their way."""
        return client in self._ready or client in self._jobs

    def look(self, client: int) -> Progress | None:
        """Begin with a client's rows, or see how far they are; None where they are ready.

        A failure is told once. Whoever looks again begins again, with what the stages have kept.
        """
        if client in self._ready or not self.config.preprocess:
            return None
        if not self.asked_again:
            self.rows(client)
            return None
        begins = client not in self._jobs
        if begins:
            self._jobs[client] = StagingJob(partial(self._make, client))
        job = self._jobs[client]
        wait([job], PATIENCE_S if begins else 0.0)  # a timeout of ``result`` looks like a stage's own
        if not job.done():
            return job.progress
        self._ready[client] = self._jobs.pop(client).result()
        return None

    def rows(self, client: int) -> ClientRows:
        """A client's rows when they are ready, however long that takes."""
        if client not in self._ready and (job := self._jobs.get(client)):
            wait([job])
            self.look(client)
        if client in self._ready:
            return self._ready[client]
        made = self._make(client, no_progress)
        if self.config.preprocess:  # else they are read again as fast
            self._ready[client] = made
        return made

    def forget(self) -> None:
        """Let rows that are ready be read and staged anew, with what the stages have kept."""
        self._ready.clear()

    def stop(self) -> None:
        """Let what is on its way end."""
        for job in self._jobs.values():
            job.stop()

    def _make(self, client: int, on_progress: OnProgress) -> ClientRows:
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
            return client_rows(
                self.source,
                client,
                share=self.config.partition.holdout,
                seed=self.config.seed,
                stages=self._stages,
                on_progress=advanced,
            )
