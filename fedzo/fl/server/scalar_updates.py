"""The server's half of local updates that are scalars: checked, averaged, and told of in log and metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch

from fedzo.fl.clip import NO_BOUND, announced_bound, far_off, largest_of
from fedzo.fl.config import Aggregation, directions_of
from fedzo.fl.messages import TrainReply, TrainRequest
from fedzo.fl.replica import Replica
from fedzo.fl.server.aggregate import ClientResult, aggregate, check_reply, losses_far_off, unmoved
from fedzo.fl.server.signals import Signals
from fedzo.fl.server.updates import Replies
from fedzo.records.log import AuditLine, ClientAudit, RoundAudit
from fedzo.records.metrics import StepSignals
from fedzo.zo.log import LogRecord, RoundRecord

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(slots=True)
class ScalarUpdates:
    """Scalars along directions that all peers know.

    Attributes:
        replica: The server's model.
        config: How replies are bounded and become one.
        gradient: With which every local step is compared (GradIP), float32 [n] in wire order; None where there is none.
    """

    reply_type: ClassVar[type[TrainReply]] = TrainReply
    replica: Replica
    config: RunSettings
    gradient: torch.Tensor | None = None
    _signals: Signals = field(init=False)
    _recent: deque[tuple[RoundRecord, AuditLine]] = field(init=False)  # the rounds that decide the bound

    def __post_init__(self) -> None:
        law, strategy = self.replica.space.distribution, self.config.strategy
        self._signals = Signals(self.gradient, run_seed=self.config.seed, distribution=law)
        self._recent = deque(maxlen=strategy.clip_rounds if strategy.clip_factor else 0)

    def note(self, record: LogRecord, audit: RoundAudit) -> None:
        line = cast(AuditLine, audit)  # of a run of scalars
        self._signals.note(line)
        self._recent.append((cast(RoundRecord, record), line))

    def bound(self) -> float:
        strategy = self.config.strategy
        if strategy.aggregation is Aggregation.majority_sign:
            return NO_BOUND  # a sign has no length
        bound = announced_bound(
            [audit for _, audit in self._recent],
            [record for record, _ in self._recent],
            factor=strategy.clip_factor,
            rounds=strategy.clip_rounds,
        )
        return min(bound, strategy.scalar_bound)

    def far_off(self, results: Mapping[int, ClientResult]) -> dict[int, str]:
        reasons = losses_far_off(results)
        if self.bound() == NO_BOUND:  # with one a reply has been compared with it
            largest = {client: largest_of(result.g[~result.dropped]) for client, result in results.items()}
            for client, most in far_off(largest, factor=self.config.strategy.clip_factor).items():
                reasons[client] = f"|g| must be at most {most:g}, by the round's other clients, got {largest[client]:g}"
        return reasons

    def reply_bytes(self, steps: int) -> int:
        return (4 + 4 + 1) * steps * self.config.estimator.probes_per_step  # g, loss and dropped

    def check(self, reply: TrainReply, request: TrainRequest) -> ClientResult:
        return check_reply(
            reply,
            request,
            probes=self.config.estimator.probes_per_step,
            strategy=self.config.strategy,
            all_may_drop=not self.replica.walks_clients,
        )

    def combine(self, replies: Replies[ClientResult]) -> RoundRecord:
        record = aggregate(
            replies.results,
            replies.weights,
            round=replies.round,
            lr=replies.lr,
            directions=directions_of(self.config.fl),
            strategy=self.config.strategy,
            own_columns=self.replica.walks_clients,
            normalise=self.config.step_policy.normalises,
        )
        return unmoved(record) if replies.measures_only else record

    def audit(self, record: LogRecord, replies: Replies[ClientResult]) -> AuditLine:
        return AuditLine(
            round=record.round,
            lr=replies.lr,
            xi=self._signals.products(cast(RoundRecord, record)),
            clients=tuple(
                ClientAudit(
                    client=client,
                    g=result.g,
                    loss=result.loss,
                    dropped=result.dropped,
                    steps=len(result.g),
                    used=replies.used[client],
                    weight=replies.weights[client],
                    end_check=result.end_check,
                )
                for client, result in sorted(replies.results.items())
            ),
            refused=tuple(sorted(replies.refused)),
        )

    def signals(self, record: LogRecord, audit: RoundAudit) -> dict[int, StepSignals]:
        return self._signals.of_round(cast(RoundRecord, record), cast(AuditLine, audit))

    def num_clipped(self, replies: Replies[ClientResult]) -> int:
        strategy = self.config.strategy
        if strategy.aggregation is Aggregation.majority_sign:
            return 0
        most = strategy.scalar_bound if replies.bound == NO_BOUND else replies.bound
        return int(sum((np.abs(result.g) == most).sum() for result in replies.results.values()))
