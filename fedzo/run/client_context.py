"""What a process needs to answer for clients: the peer's model, the clients' rows and a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from fedzo.config.travel import config_hash
from fedzo.data.files import Row
from fedzo.data.preprocess import Progress, StageContext
from fedzo.data.rows import OwnRows, client_rows
from fedzo.data.tasks import num_labels
from fedzo.evaluate.base import trained
from fedzo.fl.client.local_update import Batches, LocalUpdate
from fedzo.fl.client.scalar_update import ScalarUpdate
from fedzo.fl.client.vector_update import VectorUpdate
from fedzo.fl.client.worker import ClientData, ClientWorker
from fedzo.fl.config import Transport
from fedzo.fl.limits import Limits
from fedzo.fl.messages import Identity
from fedzo.fl.replica import Workspace
from fedzo.fl.site_limits import check_rows
from fedzo.run.peer import Peer
from fedzo.run.staging import Staging
from fedzo.trainers.artifacts import Artifact, ArtifactStore
from fedzo.zo.estimator import ZerothOrderConfig, build_estimator, build_gradient_estimator

if TYPE_CHECKING:
    from fedzo.run.process import Process

STAGE_FOLDER = "rephrase"
"""Where stages keep what they made, unless ``rewriter.store`` says otherwise: a folder beside a site's file, or in the
folder where a simulation is started."""


@dataclass
class ClientContext:
    """The clients that a process plays."""

    process: Process
    _registered: dict[int, str] = field(default_factory=dict)  # by client, the digest of the rows that it goes on with
    _staged_digests: dict[int, str] = field(default_factory=dict)
    _data: dict[int, ClientData] = field(default_factory=dict)
    _first_rows: list[Row] = field(default_factory=list)

    @property
    def peer(self) -> Peer:
        """The model and the space."""
        return self.process.peer

    @property
    def identity(self) -> Identity:
        """What the process has of the run in common with its peers."""
        return self.process.identity

    @cached_property
    def worker(self) -> ClientWorker:
        """Answers for the clients."""
        peer, process, run = self.peer, self.process, self.peer.config
        limits = Limits(
            run=run,
            site=peer.site,
            # of actors, another one may have asked for them
            takes_values=run.fl.transport is Transport.values or run.estimator.sends_vectors or not process.asked_again,
            kept=process.kept if self._is_one_client else None,
        )
        return ClientWorker(
            config_hash(run),
            self._local_update(),
            self,
            limits=limits,
            evaluators=peer.evaluators,
            artifacts=ArtifactStore(process.artifacts),
        )

    @property
    def _is_one_client(self) -> bool:
        """Whether its rows are one client's: a site with one set of its own."""
        source = self.process.source
        return isinstance(source, OwnRows) and source.is_one_set and not self.peer.site.limits.several_clients

    def _local_update(self) -> LocalUpdate:
        config, estimator = self.peer.config, self.peer.config.estimator
        batches = Batches(config.seed, config.fl.batch_size, lambda client: self.data(client).train)
        if not isinstance(estimator, ZerothOrderConfig):
            return VectorUpdate(batches, config.task, build_gradient_estimator(estimator))
        return ScalarUpdate(config, batches, build_estimator(estimator), trained(config.task, self.peer.evaluators))

    def data(self, client: int) -> ClientData:
        """A client's rows as token ids; read once."""
        if client not in self._data:
            config, rows = self.peer.config, self.staging.rows(client)
            train, heldout = self.peer.encode(rows.train), self.peer.encode(rows.heldout)
            counts = rows.label_counts(config.task) if config.fl.label_counts else {}
            if not self._data:
                self._first_rows = rows.train[: config.fl.batch_size]
            self._data[client] = ClientData(train, heldout, counts, rows.figures)
        return self._data[client]

    def forget_rows(self) -> None:
        """Let rows be read anew and compared with those that are registered; what stages have spent stays spent.

        Those that stages work on stay as they are, and registered.
        """
        self._data.clear()
        self._staged_digests.clear()
        self.staging.forget()
        self._registered = {k: each for k, each in self._registered.items() if self.staging.is_known(k)}

    @cached_property
    def staging(self) -> Staging:
        """What brings the clients' rows through the stages."""
        config, rewriter, process = self.peer.config, self.peer.site.rewriter, self.process
        folder = Path(rewriter.store) if rewriter.store else process.site_folder / STAGE_FOLDER
        context = StageContext(config.task, rewriter, folder)
        return Staging(config, process.source, context, asked_again=process.asked_again)

    def stop(self) -> None:
        """Let stages that work on clients' rows end, and let go of the worker, which holds this in its turn."""
        if "staging" in vars(self):
            self.staging.stop()
        vars(self).pop("worker", None)

    def register(self, client: int, *, begun: bool) -> str | Progress:
        """The digest of a client's rows, those that its stages made among them, or how far these are."""
        if not self.peer.config.preprocess:
            is_held = client in self._data and client in self._registered
            return self._registered[client] if is_held else self._rows_digest(client, begun)
        if not self.staging.is_known(client):
            self._rows_digest(client, begun)  # no hours are spent on rows that are not the run's,
            self._check_rows(client)  # and no progress is told of rows that the site does not tell of
        if progress := self.progress(client, begun=begun):
            return progress
        both = self._registered[client] + self._staged_digests[client]
        return blake2b(both.encode(), digest_size=32).hexdigest()

    def _check_rows(self, client: int) -> None:
        """Refuse a client whose rows are too few for the site (``SiteError``), before stages work on them."""
        config = self.peer.config
        rows = client_rows(self.process.source, client, share=config.partition.holdout, seed=config.seed)
        check_rows(
            self.peer.site.limits,
            num_train=len(rows.train),
            label_counts=rows.label_counts(config.task) if config.fl.label_counts else {},
            num_labels=num_labels(config.task),
        )

    def progress(self, client: int, *, begun: bool = True) -> Progress | None:
        """How far the stages are; rows, and what stages make of them, must be those with which the run began."""
        if client not in self._registered:  # a process that was started again within a run
            self._rows_digest(client, begun)
        if progress := self.staging.look(client):
            return progress
        if (stages := [*self.peer.config.preprocess]) and client not in self._staged_digests:
            self._staged_digests[client] = self._rows_digest(client, begun, stages=stages)
        return None

    def _rows_digest(self, client: int, begun: bool, *, stages: Sequence[str] = ()) -> str:
        rows = self.staging.rows(client).train if stages else self.process.source.rows_for(client)
        digest = self.process.kept.register(rows, whose=f"client {client}", begun=begun, stages=stages)
        if not stages:
            self._registered[client] = digest
        return digest

    def workspace(self, artifact: Artifact, *, asked: int) -> Workspace:
        """The model with the space on it.

        By the first batch of whichever client was greeted first, ``model.dtype=auto`` is decided.

        A process that was started again within a run has greeted nobody: it goes by the client that is asked.
        """

        def first_rows() -> list[Row]:
            if not self._data:
                self.data(asked)
            return self._first_rows

        return self.peer.workspace(artifact, trial_rows=first_rows)
