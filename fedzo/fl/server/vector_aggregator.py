"""The aggregator of local updates that are vectors: checked, averaged, and told of in log and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedzo.errors import ProtocolError
from fedzo.fl.clip import NO_BOUND, far_off
from fedzo.fl.config import Aggregation
from fedzo.fl.messages import TrainRequest, VectorReply, scalars_from_bytes
from fedzo.fl.server.aggregator import Replies
from fedzo.fl.server.shares import checked_losses, losses_far_off, shares, trimming
from fedzo.fl.server.signals import short
from fedzo.records.log import AuditLine, VectorAudit, VectorAuditLine
from fedzo.records.metrics import StepSignals
from fedzo.zo.log import LogRecord, Scalars, VectorRecord, vector_digest
from fedzo.zo.spaces.base import Values

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

_PIECE = 1 << 16  # coordinates whose robust mean is taken at a time


@dataclass(frozen=True, slots=True)
class VectorResult:
    """A client's checked vector.

    Attributes:
        change: The round's start minus the client's end, float32 [n].
        loss: Before each step, float32 [T]; nan for a step that was not taken.
        norm: Euclidean norm of ``change`` over lr and steps; 0 where lr is 0.
    """

    change: Values
    loss: Scalars
    norm: float

    @property
    def dropped(self) -> np.ndarray:
        return ~np.isfinite(self.loss)

    @property
    def payload_bytes(self) -> int:
        return self.change.nbytes


@dataclass(frozen=True, slots=True)
class VectorAggregator:
    """Vectors of clients that compute gradients. Single ones are not kept: the audit log holds their digests.

    Attributes:
        size: n.
        config: How vectors are bounded and become one.
    """

    reply_type: ClassVar[type[VectorReply]] = VectorReply
    size: int
    config: RunSettings

    def note(self, record: LogRecord, audit: AuditLine) -> None:
        """No round depends on what an earlier one measured."""

    def bound(self) -> float:
        return NO_BOUND

    def reply_bytes(self, steps: int) -> int:
        return 4 * (self.size + steps)

    def check(self, reply: VectorReply, request: TrainRequest) -> VectorResult:
        change = scalars_from_bytes(reply.change, shape=(self.size,), what="change")
        loss = checked_losses(reply.loss, shape=(request.steps,))
        if not np.isfinite(change).all():
            raise ProtocolError("change must be finite; has the client's model diverged?")
        reach, length = request.lr * request.steps, float(np.linalg.norm(change.astype(np.float64)))
        most = self.config.strategy.max_abs_g
        if length > most * reach:
            raise ProtocolError(
                f"the norm of change must be at most strategy.max_abs_g = {most:g} times the learning rate and the "
                f"steps, {most * reach:g}, got {length:g}"
            )
        if length and not np.isfinite(loss).any():
            raise ProtocolError("a client that took no step must send a change of zeros")
        return VectorResult(change=change, loss=loss, norm=length / reach if reach else 0.0)

    def far_off(self, results: Mapping[int, VectorResult]) -> dict[int, str]:
        reasons = losses_far_off(results)
        norms = {client: math.nan if result.dropped.all() else result.norm for client, result in results.items()}
        for client, most in far_off(norms, factor=self.config.strategy.clip_factor).items():
            reasons[client] = (
                f"the norm of change over learning rate and steps must be at most {most:g}, by the round's other "
                f"clients, got {norms[client]:g}"
            )
        return reasons

    def combine(self, replies: Replies[VectorResult]) -> VectorRecord:
        """The mean (or robust mean, coordinate by coordinate) of the changes: float64 in the order of client index."""
        assert not replies.measures_only, "validation refuses step policies that calibrate"
        results, clients = replies.results, sorted(replies.results)
        changes = [results[client].change for client in clients]
        strategy, normalise = self.config.strategy, self.config.step_policy.normalises
        match strategy.aggregation:
            case Aggregation.mean:
                steps = {client: len(results[client].loss) for client in clients}
                share, mean = shares(replies.weights, steps, normalise=normalise), np.zeros(self.size)
                for client, change in zip(clients, changes, strict=True):
                    mean += share[client] * change.astype(np.float64)
            case Aggregation.median:
                mean = _by_coordinate(changes, partial(np.median, axis=1))
            case Aggregation.trimmed_mean:
                mean = _by_coordinate(changes, trimming(strategy.trim_share, len(clients)))
            case other:
                raise AssertionError(f"validation refuses {other} of vectors")
        return VectorRecord.of(mean.astype(np.float32), round=replies.round, lr=replies.lr)

    def audit(self, record: LogRecord, replies: Replies[VectorResult]) -> VectorAuditLine:
        return VectorAuditLine(
            round=record.round,
            lr=replies.lr,
            clients=tuple(
                VectorAudit(
                    client=client,
                    vector=vector_digest(result.change),
                    norm=result.norm,
                    loss=result.loss,
                    steps=len(result.loss),
                    used=replies.used[client],
                    weight=replies.weights[client],
                )
                for client, result in sorted(replies.results.items())
            ),
            refused=tuple(sorted(replies.refused)),
        )

    def signals(self, record: LogRecord, audit: AuditLine) -> dict[int, StepSignals]:
        return {entry.client: _signals(entry.loss) for entry in audit.clients}

    def num_clipped(self, replies: Replies[VectorResult]) -> int:
        return 0


def _by_coordinate(changes: list[Values], middle: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``middle`` of [coordinates, clients] in float64, piece by piece."""
    mean = np.empty(changes[0].size)
    for first in range(0, mean.size, _PIECE):
        part = slice(first, first + _PIECE)
        mean[part] = middle(np.stack([change[part].astype(np.float64) for change in changes], axis=1))
    return mean


def _signals(loss: Scalars) -> StepSignals:
    """Losses alone: there is no scalar g, and no direction to compare with a gradient of the server's."""
    unknown = (None,) * len(loss)
    losses = tuple(short(value) for value in loss)
    return StepSignals(
        grad_ip=unknown, abs_g=unknown, loss=losses, cosine=unknown, mean_abs_grad_ip=None, mean_abs_g=None
    )
