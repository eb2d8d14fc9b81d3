"""The aggregator of local updates that are scalars: checked, averaged, and told of in log and metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch

from fedzo.errors import ProtocolError
from fedzo.fl.clip import NO_BOUND, announced_bound, far_off, largest_of
from fedzo.fl.config import Aggregation, StrategyConfig, directions_of, keeps_columns
from fedzo.fl.messages import ScalarReply, TrainRequest, scalars_from_bytes, signs_from_bytes
from fedzo.fl.server.aggregator import Replies
from fedzo.fl.server.shares import checked_losses, losses_far_off, shares, trimming
from fedzo.fl.server.signals import Signals
from fedzo.records.log import AuditLine, ScalarAudit, ScalarAuditLine
from fedzo.records.metrics import StepSignals
from fedzo.zo.config import Distribution
from fedzo.zo.directions import SHARED
from fedzo.zo.log import LogRecord, ScalarRecord, Scalars

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(frozen=True, slots=True)
class ScalarResult:
    """A client's checked answer for a round of T steps with P probes.

    Attributes:
        g: Projected gradients, float32 [T, P]; 0 where dropped. Their signs where only these are sent.
        loss: Each probe's view of the loss at theta, float32 [T, P]; nan where dropped.
        dropped: Probes without a finite loss, bool [T, P].
        end_check: Check of the client's theta after its local steps (T > 1), for its virtual path.
        payload_bytes: Length of its scalars, or of its signs, on the wire.
    """

    g: Scalars
    loss: Scalars
    dropped: np.ndarray
    end_check: int
    payload_bytes: int = 0


@dataclass(slots=True)
class ScalarAggregator:
    """Scalars along directions that all peers know.

    Attributes:
        distribution: Law of the directions.
        config: How replies are bounded and become one.
        gradient: With which every local step is compared (GradIP), float32 [n] in wire order; None where there is none.
    """

    reply_type: ClassVar[type[ScalarReply]] = ScalarReply
    distribution: Distribution
    config: RunSettings
    gradient: torch.Tensor | None = None
    _signals: Signals = field(init=False)
    _recent: deque[tuple[ScalarRecord, ScalarAuditLine]] = field(init=False)  # the rounds that decide the bound

    def __post_init__(self) -> None:
        strategy = self.config.strategy
        self._signals = Signals(self.gradient, run_seed=self.config.seed, distribution=self.distribution)
        self._recent = deque(maxlen=strategy.clip_rounds if strategy.clip_factor else 0)

    def note(self, record: LogRecord, audit: AuditLine) -> None:
        line = cast(ScalarAuditLine, audit)  # of a run of scalars
        self._signals.note(line)
        self._recent.append((cast(ScalarRecord, record), line))

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

    def far_off(self, results: Mapping[int, ScalarResult]) -> dict[int, str]:
        reasons = losses_far_off(results)
        if self.bound() == NO_BOUND:  # with one a reply has been compared with it
            largest = {client: largest_of(result.g[~result.dropped]) for client, result in results.items()}
            for client, most in far_off(largest, factor=self.config.strategy.clip_factor).items():
                reasons[client] = f"|g| must be at most {most:g}, by the round's other clients, got {largest[client]:g}"
        return reasons

    def reply_bytes(self, steps: int) -> int:
        return (4 + 4 + 1) * steps * self.config.estimator.probes_per_step  # g, loss and dropped

    def check(self, reply: ScalarReply, request: TrainRequest) -> ScalarResult:
        return check_reply(
            reply,
            request,
            probes=self.config.estimator.probes_per_step,
            strategy=self.config.strategy,
            all_may_drop=not self.config.server_optimizer.traits.walks_clients,
        )

    def combine(self, replies: Replies[ScalarResult]) -> ScalarRecord:
        g = {client: result.g for client, result in replies.results.items()}
        record = aggregate(g, replies.weights, self.config, round=replies.round, lr=replies.lr)
        return unmoved(record) if replies.measures_only else record

    def audit(self, record: LogRecord, replies: Replies[ScalarResult]) -> ScalarAuditLine:
        return ScalarAuditLine(
            round=record.round,
            lr=replies.lr,
            xi=self._signals.products(cast(ScalarRecord, record)),
            clients=tuple(
                ScalarAudit(
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

    def signals(self, record: LogRecord, audit: AuditLine) -> dict[int, StepSignals]:
        return self._signals.of_round(cast(ScalarRecord, record), cast(ScalarAuditLine, audit))

    def num_clipped(self, replies: Replies[ScalarResult]) -> int:
        strategy = self.config.strategy
        if strategy.aggregation is Aggregation.majority_sign:
            return 0
        most = strategy.scalar_bound if replies.bound == NO_BOUND else replies.bound
        return int(sum((np.abs(result.g) == most).sum() for result in replies.results.values()))


def check_reply(
    reply: ScalarReply, request: TrainRequest, *, probes: int, strategy: StrategyConfig, all_may_drop: bool = True
) -> ScalarResult:
    """The reply as numbers, or ``ProtocolError`` saying why it cannot be used.

    Args:
        reply: What the client sent.
        request: What it was asked: T steps, clipped to a bound.
        probes: P.
        strategy: Its aggregation says whether ``g`` holds signs, a bit a probe, of which a dropped one counts as 0.
            Other scalars are held to the request's bound.
        all_may_drop: Whether a reply without any finite loss counts as one of zeros.
    """
    shape, signs = (request.steps, probes), strategy.aggregation is Aggregation.majority_sign
    g = (signs_from_bytes if signs else scalars_from_bytes)(reply.g, shape=shape, what="g")
    loss = checked_losses(reply.loss, shape=shape)
    if len(reply.dropped) != g.size:
        raise ProtocolError(f"dropped must hold {g.size} flags, got {len(reply.dropped)}")
    dropped = np.frombuffer(reply.dropped, np.uint8).reshape(shape) != 0
    if signs:
        g[dropped] = 0
    if not np.isfinite(g).all():
        raise ProtocolError("g must be finite; a probe without a finite loss is sent as 0 with its flag")
    if (worst := float(np.abs(g).max())) > strategy.scalar_bound and not signs:
        raise ProtocolError(f"|g| must be at most strategy.max_abs_g = {strategy.scalar_bound:g}, got {worst:g}")
    if request.max_abs_g != NO_BOUND and worst > request.max_abs_g:
        raise ProtocolError(f"|g| must be at most the announced bound {request.max_abs_g:g}, got {worst:g}")
    if dropped.all() and not all_may_drop:
        raise ProtocolError("no probe had a finite loss, which this server optimizer cannot use")
    if (g[dropped] != 0).any():
        raise ProtocolError("a dropped probe must carry g = 0")
    return ScalarResult(
        g=g,
        loss=loss,
        dropped=dropped,
        end_check=reply.end_check,
        payload_bytes=len(reply.g),
    )


def aggregate(
    g: Mapping[int, Scalars], weights: Mapping[int, float], config: RunSettings, *, round: int, lr: float
) -> ScalarRecord:
    """A round's scalars c[t, p] from those of its responders; the mean is sum s_k g_k[t, p] / P (``shares``).

    Evaluated in float64 in the order of client index and rounded to float32 once, so the order of arrival changes
    nothing and N identical clients equal one. A client past its last step counts as 0, and so does a dropped probe.
    A median of many such zeros would stand still, so all but the mean are of the clients that took the step, times
    their share of the round's clients: the length that the mean's step has.

    Where directions are not shared each client keeps its own column instead of being summed: only scalars along the
    same direction can be compared. A server optimizer that walks each client's path gets its own g_k[t, p] / P.

    Args:
        g: Checked scalars [T_k, P] of each client, 0 where dropped.
        weights: w of every client; the mean alone reads them.
        config: Its ``strategy.aggregation`` says how the scalars of a probe become one: median, trimmed mean (arXiv
            1803.01498) and majority of signs (FeedSign, arXiv 2501.17610) are taken of g_k[t, p] over the clients and
            divided by P.
        round: Number of the round.
        lr: Its learning rate.
    """
    clients, aggregation = sorted(g), config.strategy.aggregation
    steps = {client: len(g[client]) for client in clients}
    (probes,) = {own.shape[1] for own in g.values()}
    share = dict.fromkeys(clients, 1.0)
    if aggregation is Aggregation.mean and not config.server_optimizer.traits.walks_clients:
        share = shares(weights, steps, normalise=config.step_policy.normalises)
    columns = np.zeros((max(steps.values()), probes, len(clients)), np.float64)
    for column, client in enumerate(clients):
        columns[: steps[client], :, column] = share[client] * g[client].astype(np.float64) / probes
    if keeps_columns(config):
        assert aggregation is Aggregation.mean, "validation refuses to compare scalars along unlike directions"
        directions = directions_of(config.fl)
        return ScalarRecord(
            round=round, lr=lr, owners=tuple(clients), coefficients=columns.astype(np.float32), directions=directions
        )
    taken = np.array([*steps.values()])
    match aggregation:
        case Aggregation.mean:
            c = np.zeros(columns.shape[:2], np.float64)
            for column in range(len(clients)):
                c += columns[:, :, column]
        case Aggregation.median:
            c = _of_takers(columns, taken, lambda part: np.median(part, axis=1))
        case Aggregation.trimmed_mean:
            c = _of_takers(columns, taken, trimming(config.strategy.trim_share, len(clients)))
        case Aggregation.majority_sign:  # where a tie moves nothing
            c = _of_takers(np.sign(columns), taken, lambda part: np.sign(part.sum(axis=1))) / probes
    return ScalarRecord(round=round, lr=lr, owners=(SHARED,), coefficients=c.astype(np.float32)[:, :, None])


def _of_takers(columns: np.ndarray, taken: np.ndarray, middle: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[T, P]: each step's ``middle`` of those who took it, times their share; of columns [T, P, clients]."""
    takers = [np.flatnonzero(taken > step) for step in range(len(columns))]
    return np.stack([middle(columns[step][:, who]) * len(who) / len(taken) for step, who in enumerate(takers)])


def unmoved(record: ScalarRecord) -> ScalarRecord:
    """The record of a round that only measures: as long as its steps, but nothing moves theta along it in round 0.

    lr = 0 stops every step and the decay; c = 0 leaves the moments at zero.
    """
    return replace(record, lr=0.0, coefficients=np.zeros_like(record.coefficients))
