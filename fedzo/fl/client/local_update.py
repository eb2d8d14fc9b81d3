"""What a client measures and does between a request to train and its reply.

A local update is of one of two kinds: ``ScalarUpdate`` (``fedzo.fl.client.scalar_update``) or ``VectorUpdate``
(``fedzo.fl.client.vector_update``). Their other halves at the server are ``fedzo.fl.server.aggregator``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from fedzo.data.encode import Example
from fedzo.data.rows import batch_rows
from fedzo.fl.messages import TrainRequest
from fedzo.fl.replica import Workspace


@dataclass(frozen=True, slots=True)
class Batches:
    """The rows of every local step, a function of (run seed, client, steps used).

    Attributes:
        run_seed: Seed of the run.
        batch_size: Rows of a step.
        train_rows: Training rows of a client, by its index.
    """

    run_seed: int
    batch_size: int
    train_rows: Callable[[int], list[Example]]

    def of(self, request: TrainRequest, *, step: int) -> list[Example]:
        """The rows of one local step of a request."""
        train = self.train_rows(request.client)
        rows = batch_rows(
            run_seed=self.run_seed,
            client=request.client,
            used=request.used + step,
            batch_size=self.batch_size,
            num_rows=len(train),
        )
        return [train[row] for row in rows]


class LocalUpdate(Protocol):
    """Takes the local steps of the clients that a process plays, on one model.

    Attributes:
        reply_type: Class of its replies, which also say that a client could not reach the server's state.
    """

    reply_type: ClassVar[type[Any]]

    def make(self, workspace: Workspace, request: TrainRequest) -> Any:
        """Take the steps of a request from the round's start; the model is left there. Returns the reply."""
        ...

    def look_ahead(self, workspace: Workspace, requests: Mapping[int, TrainRequest]) -> None:
        """Compute ahead what clients of one round can share (joint forwards); ``make`` then finds it."""
        ...
