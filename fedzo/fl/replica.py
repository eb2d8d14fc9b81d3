"""A process's copy of the global model as a log position: ``base + replay(log[:position])``.

A ``Workspace`` is that copy on its model, with what else a process needs to measure losses.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fedzo.errors import ProtocolError
from fedzo.fl.messages import Status, Sync
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import LowerLayers
from fedzo.models.products import RoundedProducts
from fedzo.records.log import Proof, PublicLine
from fedzo.records.metrics import Forwards
from fedzo.system import OnProgress, no_progress
from fedzo.zo.log import EMPTY_CHAIN, LogRecord, ScalarRecord, extend_chain
from fedzo.zo.server_optimizer import ControlVariates, ServerOptimizer, VectorOptimizer
from fedzo.zo.spaces.base import Space
from fedzo.zo.steps import Drift

ON_RECORD: ContextVar[Callable[[], None]] = ContextVar("on_record", default=lambda: None)
"""Called for each record that a replica has applied: a client that catches up takes long and goes on all the same."""


class Replica:
    """The model of one process, moved along the log. Every client that the process plays shares it.

    Attributes:
        space: theta.
        moments: What the server optimizer remembers, float32 [num_moments, n]; like theta a function of the log.
        position: Rounds applied.
        chain: Hash chain of the log up to there.

    Args:
        space: At the base weights.
        server_optimizer: Moves the space by a round.
        reset: Brings the space back to the base weights.
        run_seed: Seed of the run's directions.
        num_clients: Clients of the run; a server optimizer may remember each of them.
    """

    def __init__(
        self,
        space: Space,
        *,
        server_optimizer: ServerOptimizer,
        reset: Callable[[], None],
        run_seed: int,
        num_clients: int = 0,
    ) -> None:
        self.space = space
        self.moments = np.zeros((server_optimizer.num_moments(num_clients), space.size), np.float32)
        self.position = 0
        self.chain = EMPTY_CHAIN
        self._optimizer = server_optimizer
        self._reset = reset
        self._run_seed = run_seed
        self._check: int | None = None  # of this position, as far as somebody has asked
        self._digest: str | None = None

    def drift(self, client: int, *, lr: float) -> Drift | None:
        """The correction of a client's local steps in the coming round, of this lr; None where they are plain SGD."""
        if isinstance(self._optimizer, ControlVariates):
            return self._optimizer.drift(self.space.values(), self.moments, client, lr=lr)
        return None

    def advance(self, records: Sequence[LogRecord]) -> None:
        """Apply the records that come next; those already applied are skipped."""
        for record in records:
            if record.round < self.position:
                continue
            if record.round > self.position:
                raise ProtocolError(f"log: the next record must be round {self.position}, got round {record.round}")
            self._apply(record)
            self.chain = extend_chain(self.chain, record)
            self.position += 1
            ON_RECORD.get()()

    def _apply(self, record: LogRecord) -> None:
        if self._is_damaged():
            raise ProtocolError(
                f"round {self.position}: the trained values must come back to their bits after every client's local "
                "steps, but have changed. A space's rewind or probe is at fault."
            )
        self._check = self._digest = None
        if isinstance(record, ScalarRecord):
            self._optimizer.apply(self.space, self.moments, record, run_seed=self._run_seed)
            return
        if not isinstance(self._optimizer, VectorOptimizer) or record.size != self.space.size:
            raise ProtocolError(
                f"log: round {record.round} must hold what this run's server optimizer and its {self.space.size} "
                f"trained values take, got a vector of {record.size} numbers. Is the log of another run?"
            )
        self._optimizer.displace(self.space, self.moments, record)

    def reset(self) -> None:
        """Back to the base weights."""
        self._check = self._digest = None
        self._reset()
        self.moments.fill(0)
        self.position, self.chain = 0, EMPTY_CHAIN

    def goto(self, position: int, records: Sequence[LogRecord], advance: OnProgress = no_progress) -> None:
        """The state after the first ``position`` records of the whole log; ``advance`` is told (records, position)."""
        if position < self.position:
            self.reset()
        for record in records[self.position : position]:
            self.advance([record])
            advance(self.position, position)

    def check(self) -> int:
        """A 32-bit check of theta and of the moments; that of theta alone where there are none.

        Theta is read when it has come to a position and before it leaves it, however many clients ask in between.
        """
        if self._check is None:
            self._check = self._read_check()
        return self._check

    def digest(self) -> str:
        """The SHA-256 of theta, made once a position."""
        if self._digest is None:
            self._digest = self.space.digest()
        return self._digest

    def _read_check(self) -> int:
        return zlib.crc32(self.moments.data, self.space.check())

    def _is_damaged(self) -> bool:
        """Whether theta has changed since it was checked at this position."""
        return self._check is not None and self._check != self._read_check()

    def proof(self, *, digest: bool) -> Proof:
        """What a line of the log says of the state after it; the SHA-256 of theta only where ``digest`` asks for it."""
        return Proof(chain=self.chain.hex(), check=self.check(), digest=self.digest() if digest else None)

    def verify(self, line: PublicLine) -> None:
        """Compare the state with the proof in the line of the log that was applied last.

        Raises:
            ProtocolError: The log does not lead to the state that it claims.
        """
        for what, value in asdict(self.proof(digest=line.digest is not None)).items():
            if (claimed := getattr(line, what)) != value:
                raise ProtocolError(
                    f"log, round {line.round}: {what} must be {claimed}, but replaying gives {value}. "
                    "The base model, the mask or the log is from another run."
                )

    @property
    def snapshot_bytes(self) -> int:
        """Length of ``snapshot``."""
        return 4 * (self.space.size + self.moments.size)

    def is_shorter_than(self, records: Sequence[LogRecord]) -> bool:
        """Whether a snapshot is fewer bytes than these records' vectors; logs of scalars are always replayed."""
        if not records or isinstance(records[-1], ScalarRecord):  # a log holds one kind
            return False
        return sum(each.payload_bytes for each in records) > self.snapshot_bytes

    def snapshot(self) -> bytes:
        """The whole state, for a peer that cannot replay: theta, then the moments, float32, little endian."""
        return self.space.values().astype("<f4").tobytes() + self.moments.astype("<f4").tobytes()

    def sync(self, request: Sync, records: Sequence[LogRecord]) -> Status:
        """Reach the state that a request names, by its values or the records of its log, and prove it by the hash."""
        if request.values:
            self._restore(request.values)
            self.position, self.chain = request.round, bytes.fromhex(request.chain)
        else:
            if request.round > self.position and self._is_damaged():
                return Status.mismatch
            if request.round < self.position:
                self.reset()
            if request.from_round > self.position:
                return Status.behind
            self.advance(records)
            if self.position != request.round:
                raise ProtocolError(f"log: the records must lead to round {request.round}, got {self.position}")
        agrees = (
            self.chain.hex() == request.chain
            and self.check() == request.check
            and (not request.digest or self.digest() == request.digest)
        )
        return Status.ok if agrees else Status.mismatch

    def _restore(self, snapshot: bytes) -> None:
        if len(snapshot) != self.snapshot_bytes:
            raise ProtocolError(f"values must hold {self.snapshot_bytes} bytes, got {len(snapshot)}")
        self._check = self._digest = None
        numbers = np.frombuffer(snapshot, "<f4").astype(np.float32)
        self.space.load(numbers[: self.space.size])
        self.moments[:] = numbers[self.space.size :].reshape(self.moments.shape)


@dataclass(slots=True)
class Workspace:
    """A model with the run's space on it, and the size of forwards that fit: what a process measures with.

    Attributes:
        loaded: The model.
        replica: The space, moved along the log.
        tokens_per_batch: Most tokens in one forward.
        forward_cost_tokens: What one more forward costs, in tokens (``Planning``).
        lower: The blocks that no trained value lies in or below, where a step runs them once.
        products: How its steps multiply float32 matrices, if they may round (``fedzo.models.products``).
    """

    loaded: LoadedModel
    replica: Replica
    tokens_per_batch: int
    forward_cost_tokens: int
    lower: LowerLayers | None = None
    products: RoundedProducts | None = None

    @property
    def forwards(self) -> Forwards:
        """What it measures in."""
        held = (each.dtype for each in self.loaded.model.parameters() if each.is_floating_point())
        return Forwards(
            dtype=str(next(held, torch.float32)).removeprefix("torch."),
            products=self.products.name if self.products else "",
            tokens_per_batch=self.tokens_per_batch,
        )
