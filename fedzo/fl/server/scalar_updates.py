"""The server's half of local updates that are scalars: checked, averaged, and told of in log and metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np
import torch

from fedzo.fl.clip import NO_BOUND, announced_bound, far_off, largest_of
from fedzo.fl.config import Aggregation, FlConfig, StrategyConfig, directions_of
from fedzo.fl.messages import TrainReply, TrainRequest
from fedzo.fl.replica import Replica
from fedzo.fl.server.aggregate import ClientResult, aggregate, check_reply, losses_far_off, unmoved
from fedzo.fl.server.metrics import finite_mean
from fedzo.fl.server.signals import Signals
from fedzo.fl.server.updates import Replies
from fedzo.records.log import AuditLine, ClientAudit, RoundAudit
from fedzo.records.metrics import ClientRound
from fedzo.records.scores import known
from fedzo.zo.log import LogRecord, RoundRecord


@dataclass(slots=True)
class ScalarUpdates:
    """Scalars along directions that all peers know.

    Attributes:
        replica: The server's model.
        run_seed: Seed of the run's directions.
        fl: The federation's settings.
        strategy: How replies are bounded and become one.
        num_probes: P.
        normalise: Whether the mean makes up for unequal steps (``step_policy.normalise``).
        gradient: With which every local step is compared (GradIP), float32 [n] in wire order; None where there is none.
    """

    reply_type: ClassVar[type[TrainReply]] = TrainReply
    replica: Replica
    run_seed: int
    fl: FlConfig
    strategy: StrategyConfig
    num_probes: int
    normalise: bool = False
    gradient: torch.Tensor | None = None
    _signals: Signals = field(init=False)
    _recent: deque[tuple[RoundRecord, AuditLine]] = field(init=False)  # the rounds that decide the bound

    def __post_init__(self) -> None:
        law = self.replica.space.distribution
        self._signals = Signals(self.gradient, run_seed=self.run_seed, distribution=law)
        self._recent = deque(maxlen=self.strategy.clip_rounds if self.strategy.clip_factor else 0)

    def note(self, record: LogRecord, audit: RoundAudit) -> None:
        line = cast(AuditLine, audit)  # of a run of scalars
        self._signals.note(line)
        self._recent.append((cast(RoundRecord, record), line))

    def bound(self) -> float:
        if self.strategy.aggregation is Aggregation.majority_sign:
            return NO_BOUND  # a sign has no length
        bound = announced_bound(
            [audit for _, audit in self._recent],
            [record for record, _ in self._recent],
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

    def combine(self, replies: Replies[ClientResult]) -> RoundRecord:
        record = aggregate(
            replies.results,
            replies.weights,
            round=replies.round,
            lr=replies.lr,
            steps=max(len(result.g) for result in replies.results.values()),
            probes=self.num_probes,
            directions=directions_of(self.fl),
            own_columns=self.replica.walks_clients,
            aggregation=self.strategy.aggregation,
            trim_share=self.strategy.trim_share,
            normalise=self.normalise,
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

    def clients(self, record: LogRecord, replies: Replies[ClientResult], audit: RoundAudit) -> tuple[ClientRound, ...]:
        signals = self._signals.of_round(cast(RoundRecord, record), replies.results, cast(AuditLine, audit))
        return tuple(
            ClientRound(
                client=client,
                loss=known(finite_mean(result.loss)),
                abs_g=known(float(np.abs(result.g).mean())),
                steps=len(result.g),
                signals=signals[client],
            )
            for client, result in sorted(replies.results.items())
        )

    def num_clipped(self, replies: Replies[ClientResult]) -> int:
        if self.strategy.aggregation is Aggregation.majority_sign:
            return 0
        most = self.strategy.scalar_bound if replies.bound == NO_BOUND else replies.bound
        return int(sum((np.abs(result.g) == most).sum() for result in replies.results.values()))
