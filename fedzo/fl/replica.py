"""A process's copy of the global model as a log position: ``base + replay(log[:position])``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedzo.errors import ProtocolError
from fedzo.fl.wire import Status, Sync
from fedzo.zo.path import EMPTY_CHAIN, RoundRecord, apply_record, extend_chain, unpack
from fedzo.zo.space import Space


class Replica:
    """The model of one process, moved along the log. Every client that the process plays shares it.

    Args:
        space: At the base weights.
        reset: Brings the space back to the base weights.
        run_seed: Seed of the run's directions.
    """

    def __init__(self, space: Space, *, reset: Callable[[], None], run_seed: int) -> None:
        self.space = space
        self.position = 0
        self.chain = EMPTY_CHAIN
        self._reset = reset
        self._run_seed = run_seed

    def advance(self, records: Sequence[RoundRecord]) -> None:
        """Apply the records that come next; those already applied are skipped."""
        for record in records:
            if record.round < self.position:
                continue
            if record.round > self.position:
                raise ProtocolError(f"log: the next record must be round {self.position}, got round {record.round}")
            apply_record(self.space, record, run_seed=self._run_seed)
            self.chain = extend_chain(self.chain, record)
            self.position += 1

    def reset(self) -> None:
        """Back to the base weights."""
        self._reset()
        self.position, self.chain = 0, EMPTY_CHAIN

    def goto(self, position: int, records: Sequence[RoundRecord]) -> None:
        """The state after the first ``position`` records of the whole log."""
        if position < self.position:
            self.reset()
        self.advance(records[:position])

    def sync(self, request: Sync) -> Status:
        """Reach the state that a request names, by its values or by its part of the log, and prove it by the hash."""
        if request.values:
            if len(request.values) != 4 * self.space.size:
                raise ProtocolError(f"values must hold {4 * self.space.size} bytes, got {len(request.values)}")
            self.space.load(np.frombuffer(request.values, "<f4").astype(np.float32))
            self.position, self.chain = request.round, bytes.fromhex(request.chain)
        else:
            if request.round < self.position:
                self.reset()
            if request.from_round > self.position:
                return Status.behind
            self.advance(list(unpack(request.log)))
            if self.position != request.round:
                raise ProtocolError(f"log: the records must lead to round {request.round}, got {self.position}")
        agrees = (
            self.chain.hex() == request.chain
            and self.space.check() == request.check
            and (not request.digest or self.space.digest() == request.digest)
        )
        return Status.ok if agrees else Status.mismatch
