"""What the server does with the replies of a round: from these to its record in the log.

An aggregator is the server's half of a local update, and of one of two kinds: ``ScalarAggregator``
(``fedzo.fl.server.scalar_aggregator``) belongs to ``fedzo.fl.client.scalar_update``, ``VectorAggregator``
(``fedzo.fl.server.vector_aggregator``) to ``fedzo.fl.client.vector_update``. The round loop asks, samples, refuses,
commits and reports alike for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from fedzo.fl.exchange import Traffic
from fedzo.fl.messages import TrainRequest
from fedzo.records.log import AuditLine
from fedzo.records.metrics import StepSignals
from fedzo.zo.log import LogRecord


class Result(Protocol):
    """A client's checked reply, as far as it is read alike of scalars and vectors."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Replies(Generic[R]):
    """What a round asked of its clients, and what it got.

    Attributes:
        round: Its number.
        lr: Learning rate of the local steps; that of the record is 0 where the round only measures.
        bound: The announced clip; 0 = none.
        measures_only: Whether the model is to stay where it is.
        weights: w of every client.
        results: The usable replies, by client.
        used: Steps that each of these clients had used before the round.
        refused: Why the other clients that were asked have none. The words are for the metrics: they differ between
            runtimes, the log may not.
        traffic: Bytes of the round's messages as Flower counts them.
    """

    round: int
    lr: float
    bound: float
    measures_only: bool
    weights: Mapping[int, float]
    results: Mapping[int, R]
    used: Mapping[int, int]
    refused: Mapping[int, str]
    traffic: Traffic


class Aggregator(Protocol[R]):
    """What the server does with the replies of a round.

    Attributes:
        reply_type: The class of a good reply.
    """

    reply_type: ClassVar[type[Any]]

    def note(self, record: LogRecord, audit: AuditLine) -> None:
        """Take up a round, new or of a run that is resumed: each once, in their order. Bound and metrics follow."""
        ...

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

    def combine(self, replies: Replies[R]) -> LogRecord:
        """What the round does to the model; nothing where it only measures."""
        ...

    def audit(self, record: LogRecord, replies: Replies[R]) -> AuditLine:
        """The audit line of a round: whatever its record was made of."""
        ...

    def signals(self, record: LogRecord, audit: AuditLine) -> dict[int, StepSignals]:
        """What each client's steps measured in the round that was noted last, for the metrics."""
        ...

    def num_clipped(self, replies: Replies[R]) -> int:
        """How many numbers lie on the announced bound."""
        ...
