"""What a process needs to answer for clients: the peer's model, the clients' rows and a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from fedzo.data.kept_digests import KeptDigests
from fedzo.data.preprocess import STAGES, StageContext
from fedzo.data.preprocess.rephrase.backend import NoRewriterConfig
from fedzo.data.rows import ClientRows, OwnRows, RowSource, client_rows
from fedzo.fl.client.local_update import Batches, LocalUpdate, Workspace
from fedzo.fl.client.scalar_update import ScalarUpdate
from fedzo.fl.client.vector_update import VectorUpdate
from fedzo.fl.client.worker import ClientData, ClientWorker, parse_absent
from fedzo.fl.config import Aggregation, directions_of
from fedzo.fl.limits import Limits
from fedzo.run.peer import Peer
from fedzo.trainers.artifacts import Artifact, ArtifactStore
from fedzo.zo.estimator import ZerothOrderConfig, build_gradient_estimator
from fedzo.zo.frozen_routing import build_estimator


@dataclass
class ClientContext:
    """The clients that one process plays.

    Attributes:
        peer: The model and the space.
        source: Where the clients' rows come from.
        artifacts: Where what the space needs beside the model is found, or kept when it comes.
        kept: What the site remembers of its rows.
    """

    peer: Peer
    source: RowSource
    artifacts: ArtifactStore
    kept: KeptDigests
    _data: dict[int, ClientData] = field(default_factory=dict)
    _index: int | None = None

    @cached_property
    def worker(self) -> ClientWorker:
        """Answers for the clients."""
        config = self.peer.config
        return ClientWorker(
            self.peer.identity,
            self._local_update(),
            limits=self._limits(),
            task=config.task,
            evaluators=self.peer.evaluators,
            scored_rows=config.evaluation.federated_max_rows,
            data_of=self.data,
            rows_digest=self._rows_digest,
            build=self._workspace,
            artifacts=self.artifacts,
            absent=parse_absent(config.faults.absent),
        )

    def _limits(self) -> Limits:
        config, estimator = self.peer.config, self.peer.config.estimator
        return Limits(
            rounds=config.fl.rounds,
            most_steps=config.step_policy.most_steps(config.fl),
            num_clients=config.fl.num_clients,
            num_probes=estimator.num_probes if isinstance(estimator, ZerothOrderConfig) else 0,
            directions=directions_of(config.fl),
            lr=config.server_optimizer.base_lr,
            max_abs_g=config.strategy.max_abs_g,
            artifact=config.artifact,
            step_rows=config.fl.batch_size,
            site=self.peer.site.limits,
            artifact_max_bytes=self.peer.site.artifact_max_bytes,
            own_client=self._own_client if self._is_one_client else None,
        )

    @property
    def _is_one_client(self) -> bool:
        """Whether its rows are one client's: a site with one set of its own."""
        one_set = isinstance(self.source, OwnRows) and self.source.is_one_set
        return one_set and not self.peer.site.limits.several_clients

    def _own_client(self, client: int) -> int:
        """The first index that the server gave this site in the run; this one, if it is the first."""
        if self._index is None:
            self._index = self.kept.claim(client, run=self.peer.run_id)
        return self._index

    def _local_update(self) -> LocalUpdate:
        config, estimator = self.peer.config, self.peer.config.estimator
        batches = Batches(config.seed, config.fl.batch_size, lambda client: self.data(client).train)
        if not isinstance(estimator, ZerothOrderConfig):
            return VectorUpdate(batches, config.task, build_gradient_estimator(estimator))
        return ScalarUpdate(
            batches=batches,
            task=config.task,
            fl=config.fl,
            estimator=build_estimator(estimator),
            num_probes=estimator.num_probes,
            signs=config.strategy.aggregation is Aggregation.majority_sign,
        )

    def data(self, client: int) -> ClientData:
        """A client's rows as token ids; read once."""
        if client not in self._data:
            rows = self.rows(client)
            counts = rows.label_counts(self.peer.config.task) if self.peer.config.fl.label_counts else {}
            self._data[client] = ClientData(self.peer.encode(rows.train), self.peer.encode(rows.heldout), counts)
        return self._data[client]

    def rows(self, client: int) -> ClientRows:
        """A client's rows, its held-out ones apart, its training rows through all stages."""
        config = self.peer.config
        context = StageContext(config.task, NoRewriterConfig(), self.kept.folder)
        stages = {name: STAGES.build(stage, context=context) for name, stage in config.preprocess.items()}
        return client_rows(self.source, client, share=config.partition.holdout, seed=config.seed, stages=stages)

    def _rows_digest(self, client: int, begun: bool) -> str:
        rows = self.source.rows_for(client)
        return self.kept.register(rows, whose=f"client {client}", run=self.peer.run_id, begun=begun)

    def _workspace(self, artifact: Artifact) -> Workspace:
        """By the first batch of whichever client was asked first, ``model.dtype=auto`` is decided."""

        def first_rows() -> list[dict[str, object]]:
            client = next(iter(self._data), 0)
            return self.rows(client).train[: self.peer.config.fl.batch_size]

        return self.peer.workspace(artifact, trial_rows=first_rows)
