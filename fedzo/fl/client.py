"""A client's work: (state, request) -> reply. One worker a process plays any number of clients on one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

import fedzo
from fedzo.data.config import TaskConfig
from fedzo.data.example import Example
from fedzo.data.order import batch_rows
from fedzo.errors import FedzoError, ProtocolError
from fedzo.fl.clip import clip
from fedzo.fl.config import FlConfig, Seeds
from fedzo.fl.replica import Replica
from fedzo.fl.wire import (
    EvaluateReply,
    EvaluateRequest,
    Hello,
    HelloReply,
    Status,
    Sync,
    TrainReply,
    TrainRequest,
    scalars_to_bytes,
)
from fedzo.models.evaluate import evaluate
from fedzo.models.load import LoadedModel
from fedzo.models.scoring import example_losses
from fedzo.zo.directions import SHARED
from fedzo.zo.estimator import Estimator, Losses, Projection, estimate_together
from fedzo.zo.path import Scalars, apply_local_step, step_keys
from fedzo.zo.space import Space


class PlannedAbsence(FedzoError):
    """A rehearsed fault: the client does not answer this round."""


@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's rows, encoded."""

    train: list[Example]
    heldout: list[Example]
    label_counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Identity:
    """What all peers of a run must hold alike, as digests."""

    config_hash: str
    base_digest: str
    tokenizer_digest: str
    task_digest: str


class ClientWorker:
    """Answers requests for the clients that this process plays.

    Args:
        loaded: The model.
        identity: Digests of what this process holds.
        run_seed: Seed of the run.
        task: How examples are judged.
        fl: The federation's settings.
        estimator: Turns losses into scalars.
        num_probes: Probes a step.
        tokens_per_batch: Most tokens in one forward.
        forward_cost_tokens: What one more forward costs, in tokens (``example_losses``).
        data_of: Rows of a client, by its index.
        build: Makes the replica from the artifact that the server sends.
        absent: Planned faults: (client, round) pairs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        identity: Identity,
        *,
        run_seed: int,
        task: TaskConfig,
        fl: FlConfig,
        estimator: Estimator,
        num_probes: int,
        tokens_per_batch: int,
        forward_cost_tokens: int,
        data_of: Callable[[int], ClientData],
        build: Callable[[bytes], Replica],
        absent: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        self.loaded = loaded
        self.identity = identity
        self._replica: Replica | None = None
        self.space_id = ""
        self.tokens_per_batch = tokens_per_batch
        self.forward_cost_tokens = forward_cost_tokens
        self._run_seed = run_seed
        self._task = task
        self._fl = fl
        self._estimator = estimator
        self._num_probes = num_probes
        self._data_of = data_of
        self._build = build
        self._absent = absent
        self._ahead: dict[tuple[int, int], list[Projection]] = {}

    def hello(self, request: Hello, *, client: int) -> HelloReply:
        """Register: digests, sizes and label counts of this client."""
        data = self._data_of(client)
        return HelloReply(
            version=fedzo.__version__,
            client=client,
            num_train=len(data.train),
            num_heldout=len(data.heldout),
            label_counts=json.dumps(dict(data.label_counts)),
            config_hash=self.identity.config_hash,
            base_digest=self.identity.base_digest,
            tokenizer_digest=self.identity.tokenizer_digest,
            task_digest=self.identity.task_digest,
        )

    def build(self, artifact: bytes) -> Replica:
        """The replica for this artifact; built once a process."""
        if self._replica is None or self.space_id != space_id(artifact):
            self._replica, self.space_id = self._build(artifact), space_id(artifact)
        return self._replica

    def train(self, request: TrainRequest, *, client: int) -> TrainReply:
        """Take ``steps`` local steps and answer with their scalars; the model is left at the round's start."""
        if (client, request.round) in self._absent:
            raise PlannedAbsence(f"client {client} is absent in round {request.round}, as faults.absent asks")
        replica, status = self._reach(request)
        if replica is None or status is not Status.ok:
            return TrainReply(status=status, position=replica.position if replica else 0)
        g = np.zeros((request.steps, self._num_probes), np.float32)
        loss = np.zeros_like(g)
        dropped = np.zeros(g.shape, np.uint8)
        end_check = 0
        walks = request.steps > 1
        if walks:
            replica.space.mark()
        try:
            for t in range(request.steps):
                projections = self._estimate(replica.space, request, client=client, step=t)
                for p, projection in enumerate(projections):
                    g[t, p], loss[t, p], dropped[t, p] = projection.g, projection.loss, projection.dropped
                g[t] = clip(g[t], request.max_abs_g)
                if walks:
                    self._local_step(replica.space, request, g[t], client=client, step=t)
            end_check = replica.space.check() if walks else 0
        finally:
            if walks:
                replica.space.rewind()
        return TrainReply(
            position=replica.position,
            g=scalars_to_bytes(g),
            loss=scalars_to_bytes(loss),
            dropped=dropped.tobytes(),
            num_examples=len(self._data_of(client).train),
            end_check=end_check,
        )

    def look_ahead(self, requests: Mapping[int, TrainRequest]) -> None:
        """Evaluate the first step of these clients in joint forwards; ``train`` then takes the results from here.

        Clients that share seeds are at the same theta with the same directions in a round's first step, so their rows
        can share forwards. Later steps (T > 1) are each client's own. The losses differ from those of separate
        forwards in their last bits only: a matrix product's rounding depends on the number of its rows.

        Args:
            requests: Requests of one round, by client; those that cannot be met are left for ``train`` to answer.
        """
        self._ahead.clear()
        able: dict[int, TrainRequest] = {}
        for client, request in requests.items():
            with suppress(ProtocolError):
                if (client, request.round) not in self._absent and self._reach(request)[1] is Status.ok:
                    able[client] = request
        if not able:
            return
        assert self._replica is not None
        batches = {client: self._batch(request, client=client, step=0) for client, request in able.items()}
        rows = [example for batch in batches.values() for example in batch]
        ends = np.cumsum([len(batch) for batch in batches.values()])[:-1]

        def losses_fn() -> Losses:
            return np.array([part.mean() for part in np.split(self._losses(rows), ends)])

        keys = self._keys(next(iter(able.values())), client=next(iter(able)), step=0)
        estimates = estimate_together(self._estimator, self._replica.space, losses_fn, keys, count=len(able))
        for (client, request), projections in zip(able.items(), estimates, strict=True):
            self._ahead[client, request.round] = projections

    def evaluate(self, request: EvaluateRequest, *, client: int) -> EvaluateReply:
        """Score the model of the request's round on the client's held-out rows."""
        replica, status = self._reach(request)
        if replica is None or status is not Status.ok:
            return EvaluateReply(status=status, position=replica.position if replica else 0)
        rows = self._data_of(client).heldout[: request.max_rows]
        if not rows:
            return EvaluateReply(position=replica.position)
        score = evaluate(self.loaded, rows, self._task, tokens_per_batch=self.tokens_per_batch)
        record = {name: value for name, value in score.to_record().items() if _is_count_or_loss(name)}
        return EvaluateReply(position=replica.position, score=json.dumps(record))

    def _reach(self, request: Sync) -> tuple[Replica | None, Status]:
        """Bring this process to the state that the request names."""
        if request.config_hash != self.identity.config_hash:
            raise ProtocolError(
                f"config hash must be {self.identity.config_hash[:12]}, got {request.config_hash[:12]}. "
                "Start server and clients with the same configuration."
            )
        if request.space_id != self.space_id:
            if request.space_id != space_id(request.artifact):
                return None, Status.bare
            self.build(request.artifact)
        assert self._replica is not None
        return self._replica, self._replica.sync(request)

    def _keys(self, request: TrainRequest, *, client: int, step: int) -> list[int]:
        owner = SHARED if self._fl.seeds is Seeds.shared else client
        return step_keys(self._run_seed, round=request.round, step=step, probes=self._num_probes, owner=owner)

    def _estimate(self, space: Space, request: TrainRequest, *, client: int, step: int) -> list[Projection]:
        if step == 0 and (client, request.round) in self._ahead:
            return self._ahead.pop((client, request.round))
        batch = self._batch(request, client=client, step=step)
        keys = self._keys(request, client=client, step=step)
        return self._estimator.estimate(space, lambda: float(self._losses(batch).mean()), keys)

    def _batch(self, request: TrainRequest, *, client: int, step: int) -> list[Example]:
        train = self._data_of(client).train
        rows = batch_rows(
            run_seed=self._run_seed,
            client=client,
            used=request.used + step,
            batch_size=self._fl.batch_size,
            num_rows=len(train),
        )
        return [train[row] for row in rows]

    def _losses(self, rows: list[Example]) -> Losses:
        return example_losses(
            self.loaded,
            rows,
            loss=self._task.loss,
            tokens_per_batch=self.tokens_per_batch,
            forward_cost_tokens=self.forward_cost_tokens,
        )

    def _local_step(self, space: Space, request: TrainRequest, g: Scalars, *, client: int, step: int) -> None:
        """One step of plain SGD with exactly the scalars that are sent."""
        apply_local_step(space, g, lr=request.lr, keys=self._keys(request, client=client, step=step))


def space_id(artifact: bytes) -> str:
    """Names a space by what builds it; an empty artifact is a space that the model alone defines."""
    return hashlib.sha256(b"fedzo space 1" + artifact).hexdigest()


def _is_count_or_loss(name: str) -> bool:
    return name in {"metric", "value", "loss", "num_examples", "per_class"}


def parse_absent(entries: list[str]) -> frozenset[tuple[int, int]]:
    """``["3@2"]`` -> {(3, 2)}: client 3 in round 2."""
    pairs = (entry.split("@") for entry in entries)
    return frozenset((int(client), int(round)) for client, round in pairs)
