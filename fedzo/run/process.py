"""What one process holds of a run, once, however many parts it plays and however many messages come."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedzo.config.schema import RunConfig
from fedzo.config.travel import from_json
from fedzo.data.rows import OwnRows, RowSource, SimulatedRows
from fedzo.run.client_context import ClientContext
from fedzo.run.peer import Peer, open_peer
from fedzo.run.server_context import ServerContext
from fedzo.trainers.artifacts import ArtifactStore


@dataclass
class Process:
    """One process's model and rows, shared by the parts that it plays.

    Attributes:
        peer: The model.
        source: Where rows of clients come from.
        artifacts: Folder of artifacts that clients have or receive; None for one that ends with the process.
    """

    peer: Peer
    source: RowSource
    artifacts: Path | None = None

    @cached_property
    def client(self) -> ClientContext:
        """For the clients of this process."""
        folder = self.artifacts
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="fedzo-artifacts-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return ClientContext(self.peer, self.source, ArtifactStore(folder))

    @cached_property
    def server(self) -> ServerContext:
        """For the server, if this process plays it. Clients' own rows are no business of it."""
        return ServerContext(self.peer, self.source if isinstance(self.source, SimulatedRows) else None)


def open_process(config: RunConfig, *, artifacts: Path | None = None) -> Process:
    """Load the model of a run; rows are read when they are first asked for."""
    return Process(open_peer(config), row_source(config), artifacts)


def row_source(config: RunConfig) -> RowSource:
    """Where this machine's clients have their rows from."""
    if config.partition.traits.own_rows:
        return OwnRows(config.data.path or "", config.task)
    return SimulatedRows(config.data, config.task, config.partition, config.fl.num_clients, config.seed)


_open: list[tuple[str, Process]] = []


def this_process(config_json: str, *, artifacts: Path | None = None) -> Process:
    """What this process holds of the run with this configuration; the run before it is let go."""
    if not _open or _open[0][0] != config_json:
        _open.clear()  # let the old model go before a new one is loaded
        _open.append((config_json, open_process(from_json(config_json), artifacts=artifacts)))
    return _open[0][1]


def forget_process() -> None:
    """Let the process's model go, for example between the jobs of a sweep."""
    _open.clear()
