"""The server's halves of the two kinds of local update: from the replies of a round to its record in the log.

``ScalarUpdates`` belongs to ``fedzo.fl.client.scalar_update``, ``VectorUpdates`` (``fedzo.fl.server.vectors``) to
``fedzo.fl.client.vector_update``. The round loop asks, samples, refuses, commits and reports alike for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, cast

import numpy as np
import torch

from fedzo.fl.clip import NO_BOUND, announced_bound, far_off, largest_of
from fedzo.fl.config import Aggregation, FlConfig, StrategyConfig, directions_of
from fedzo.fl.log_store import RunStore
from fedzo.fl.messages import TrainReply, TrainRequest
from fedzo.fl.replica import Replica
from fedzo.fl.server.aggregate import ClientResult, aggregate, check_reply, losses_far_off, unmoved
from fedzo.fl.server.metrics import audit_line, client_rounds
from fedzo.fl.server.signals import Signals
from fedzo.records.log import AuditLine, RoundAudit
from fedzo.records.metrics import ClientRound
from fedzo.zo.log import LogRecord, RoundRecord


class Result(Protocol):
    """A client's checked reply, as far as the round loop reads it."""

    @property
    def loss(self) -> np.ndarray:
        """Of each step (and probe); nan where it was not finite."""
        ...

    @property
    def dropped(self) -> np.ndarray:
        """Of the same shape: what was measured in vain, and moves nothing."""
        ...

    @property
    def payload_bytes(self) -> int:
        """Length of its numbers on the wire."""
        ...


R = TypeVar("R", bound=Result)


class Updates(Protocol[R]):
    """What the server does with the replies of a round; the results of one call are given to the next.

    Attributes:
        reply_type: The class of a good reply.
    """

    reply_type: ClassVar[type[Any]]

    def bound(self) -> float:
        """The clip that the coming round's requests announce; 0 = none."""
        ...

    def reply_bytes(self, steps: int) -> int:
        """Length of the numbers of a good reply of so many steps, at most."""
        ...

    def check(self, reply: Any, request: TrainRequest) -> R:
        """A reply as numbers, or ``ProtocolError`` saying why it cannot be used."""
        ...

    def far_off(self, results: Mapping[int, R]) -> dict[int, str]:
        """Whose numbers lie so far beyond those of the round's other clients that they cannot be used, and why."""
        ...

    def combine(
        self, results: Mapping[int, R], weights: Mapping[int, float], *, round: int, lr: float, measures_only: bool
    ) -> LogRecord:
        """What the round does to the model; nothing where it only measures."""
        ...

    def audit(
        self,
        record: LogRecord,
        results: Mapping[int, R],
        *,
        lr: float,
        used: Mapping[int, int],
        weights: Mapping[int, float],
        refused: Mapping[int, str],
    ) -> RoundAudit:
        """What the record was made of; arguments as in ``fedzo.fl.server.metrics.audit_line``."""
        ...

    def clients(self, record: LogRecord, results: Mapping[int, R], audit: RoundAudit) -> tuple[ClientRound, ...]:
        """What each client measured, for the metrics; each round once, in their order."""
        ...

    def num_clipped(self, results: Mapping[int, R], bound: float) -> int:
        """How many numbers lie on the announced bound."""
        ...


@dataclass(slots=True)
class ScalarUpdates:
    """Scalars along directions that all peers know.

    Attributes:
        store: The logs so far.
        replica: The server's model.
        run_seed: Seed of the run's directions.
        fl: The federation's settings.
        strategy: How replies are bounded and become one.
        num_probes: P.
        normalise: Whether the mean makes up for unequal steps (``step_policy.normalise``).
        gradient: With which every local step is compared (GradIP), float32 [n] in wire order; None where there is none.
    """

    reply_type: ClassVar[type[TrainReply]] = TrainReply
    store: RunStore
    replica: Replica
    run_seed: int
    fl: FlConfig
    strategy: StrategyConfig
    num_probes: int
    normalise: bool = False
    gradient: torch.Tensor | None = None
    _signals: Signals = field(init=False)

    def __post_init__(self) -> None:
        law = self.replica.space.distribution
        self._signals = Signals(self.gradient, self._audit, run_seed=self.run_seed, distribution=law)

    @property
    def _audit(self) -> Sequence[AuditLine]:
        return cast(Sequence[AuditLine], self.store.audit)  # of a run of scalars

    def bound(self) -> float:
        if self.strategy.aggregation is Aggregation.majority_sign:
            return NO_BOUND  # a sign has no length
        bound = announced_bound(
            self._audit,
            cast(Sequence[RoundRecord], self.store.records),
            factor=self.strategy.clip_factor,
            rounds=self.strategy.clip_rounds,
        )
        return min(bound, self.strategy.scalar_bound)

    def far_off(self, results: Mapping[int, ClientResult]) -> dict[int, str]:
        reasons = losses_far_off(results)
        if self.bound() == NO_BOUND:  # with one a reply has been compared with it
            largest = {client: largest_of(result.g[~result.dropped]) for client, result in results.items()}
            for client, most in far_off(largest, factor=self.strategy.clip_factor).items():
                reasons[client] = f"|g| must be at most {most:g}, by the round's other clients, got {largest[client]:g}"
        return reasons

    def reply_bytes(self, steps: int) -> int:
        return (4 + 4 + 1) * steps * self.num_probes  # g, loss and dropped

    def check(self, reply: TrainReply, request: TrainRequest) -> ClientResult:
        return check_reply(
            reply,
            steps=request.steps,
            probes=self.num_probes,
            max_abs_g=self.strategy.scalar_bound,
            announced=request.max_abs_g,
            signs=self.strategy.aggregation is Aggregation.majority_sign,
            all_may_drop=not self.replica.walks_clients,
        )

    def combine(
        self,
        results: Mapping[int, ClientResult],
        weights: Mapping[int, float],
        *,
        round: int,
        lr: float,
        measures_only: bool,
    ) -> RoundRecord:
        record = aggregate(
            results,
            weights,
            round=round,
            lr=lr,
            steps=max(len(result.g) for result in results.values()),
            probes=self.num_probes,
            directions=directions_of(self.fl),
            own_columns=self.replica.walks_clients,
            aggregation=self.strategy.aggregation,
            trim_share=self.strategy.trim_share,
            normalise=self.normalise,
        )
        return unmoved(record) if measures_only else record

    def audit(
        self,
        record: LogRecord,
        results: Mapping[int, ClientResult],
        *,
        lr: float,
        used: Mapping[int, int],
        weights: Mapping[int, float],
        refused: Mapping[int, str],
    ) -> AuditLine:
        record = cast(RoundRecord, record)
        xi = self._signals.products(record)
        return audit_line(record, results, lr=lr, xi=xi, used=used, weights=weights, refused=refused)

    def clients(
        self, record: LogRecord, results: Mapping[int, ClientResult], audit: RoundAudit
    ) -> tuple[ClientRound, ...]:
        signals = self._signals.of_round(cast(RoundRecord, record), results, cast(AuditLine, audit))
        return client_rounds(results, signals)

    def num_clipped(self, results: Mapping[int, ClientResult], bound: float) -> int:
        if self.strategy.aggregation is Aggregation.majority_sign:
            return 0
        most = self.strategy.scalar_bound if bound == NO_BOUND else bound
        return int(sum((np.abs(result.g) == most).sum() for result in results.values()))
