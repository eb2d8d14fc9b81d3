"""The log of a run: the global model is ``base + replay(log)``, always (``fedzo.zo.server_optimizer`` replays it).

A record holds what one round did: scalars along directions (``ScalarRecord``), or the mean of the vectors that clients
sent (``VectorRecord``). Applying records in order to the base weights gives the model of that round, bit for bit, on
any machine; a chain of hashes ties each record to all before it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedzo.errors import ProtocolError
from fedzo.records.fields import MAX_OWNERS
from fedzo.records.log import Proof, ScalarLine, VectorLine
from fedzo.zo.directions import SHARED
from fedzo.zo.keys import OWN, step_keys
from fedzo.zo.spaces.base import Values

Scalars = npt.NDArray[np.float32]
_HEADER = struct.Struct("<IfHHH")  # round, lr, T, P, owners and the flag
_HAS_DIRECTIONS = MAX_OWNERS + 1  # a word that says whose directions they are follows the header
_VECTOR = struct.Struct("<Q32s")  # size and SHA-256 of a vector, after a header without steps, probes and owners
EMPTY_CHAIN = hashlib.sha256(b"fedzo log 1").digest()
"""The chain before the first record."""


@dataclass(frozen=True, slots=True)
class ScalarRecord:
    """What one round did to the model where clients sent scalars: theta moved along their directions.

    Attributes:
        round: Number of the round, from 0.
        lr: Learning rate, a float32 value.
        owners: Owners of the columns: ``(SHARED,)`` for an aggregate, or client indices in ascending order.
        coefficients: c[t, p, o], float32 [T, P, len(owners)]: the aggregate projected gradients, or each client's own.
        directions: Along which directions the columns lie (``fedzo.zo.keys``): the owners' own, those that all share,
            or those of a pool of this size.
    """

    round: int
    lr: float
    owners: tuple[int, ...]
    coefficients: Scalars
    directions: int = OWN

    @property
    def payload_bytes(self) -> int:
        """Bytes of its numbers."""
        return self.coefficients.nbytes

    @property
    def shared(self) -> bool:
        """Whether all clients stepped along the same directions, so that a step and probe has but one."""
        return SHARED in (self.directions, self.owners[0])

    def keys_of(self, run_seed: int, *, step: int, column: int) -> list[int]:
        """Keys of the directions that a column has in a step, one a probe."""
        probes, owner = self.coefficients.shape[1], self.owners[column]
        return step_keys(run_seed, round=self.round, step=step, probes=probes, owner=owner, directions=self.directions)

    def to_bytes(self) -> bytes:
        """The record as it travels: 14 bytes of header, 4 an owner, 4 a scalar, little endian.

        Where the directions are not the owners' own, the number of owners has its highest bit set and a word follows.
        """
        steps, probes, owners = self.coefficients.shape
        if self.directions == OWN:
            head = _HEADER.pack(self.round, self.lr, steps, probes, owners)
        else:
            head = _HEADER.pack(self.round, self.lr, steps, probes, owners | _HAS_DIRECTIONS)
            head += self.directions.to_bytes(4, "little")
        return head + np.asarray(self.owners, "<u4").tobytes() + self.coefficients.astype("<f4").tobytes()

    def chained_bytes(self) -> bytes:
        """What the chain of hashes covers: all of it."""
        return self.to_bytes()

    def to_line(self, *, attendance: Sequence[int], proof: Proof) -> ScalarLine:
        """The record as a line of the public log; decimal floats that read back to the same float32."""
        return ScalarLine(
            round=self.round,
            lr=float(self.lr),
            owners=tuple(_word(owner) for owner in self.owners),
            directions=_word(self.directions),
            c=self.coefficients,
            attendance=tuple(attendance),
            **asdict(proof),
        )

    @classmethod
    def from_line(cls, line: ScalarLine) -> ScalarRecord:
        """The inverse of ``to_line``."""
        return cls(
            round=line.round,
            lr=line.lr,
            owners=tuple(_number(owner) for owner in line.owners),
            coefficients=line.c,
            directions=_number(line.directions),
        )


@dataclass(frozen=True, slots=True)
class VectorRecord:
    """What one round did to the model where clients sent vectors: theta <- theta - change.

    The vector stands for itself by its digest; it is read when it is needed, since a run's vectors do not fit in
    memory together.

    Attributes:
        round: Number of the round, from 0.
        lr: Learning rate of the clients' local steps, a float32 value.
        size: n.
        digest: SHA-256 of the vector as float32, little endian.
        read: Gives the vector, float32 [n]: the round's start minus its end.
    """

    round: int
    lr: float
    size: int
    digest: str
    read: Callable[[], Values] = field(compare=False)

    @classmethod
    def of(cls, change: Values, *, round: int, lr: float) -> VectorRecord:
        """The record of a vector that is at hand."""
        return cls(round=round, lr=lr, size=change.size, digest=vector_digest(change), read=lambda: change)

    @property
    def payload_bytes(self) -> int:
        """Bytes of its numbers."""
        return 4 * self.size

    def to_bytes(self) -> bytes:
        """The record as it travels: 54 bytes, then the vector as float32, little endian."""
        return self.chained_bytes() + self.read().astype("<f4").tobytes()

    def chained_bytes(self) -> bytes:
        """What the chain of hashes covers: the vector by its digest, so that a log is checked without its vectors."""
        return _HEADER.pack(self.round, self.lr, 0, 0, 0) + _VECTOR.pack(self.size, bytes.fromhex(self.digest))

    def to_line(self, *, attendance: Sequence[int], proof: Proof) -> VectorLine:
        """The record as a line of the public log; whoever writes it keeps the vector."""
        return VectorLine(
            round=self.round,
            lr=float(self.lr),
            size=self.size,
            vector=self.digest,
            attendance=tuple(attendance),
            **asdict(proof),
        )

    @classmethod
    def from_line(cls, line: VectorLine, read: Callable[[], Values]) -> VectorRecord:
        """The inverse of ``to_line``; ``read`` finds the vector."""
        return cls(round=line.round, lr=line.lr, size=line.size, digest=line.vector, read=read)


LogRecord = ScalarRecord | VectorRecord
"""What a round did: scalars along directions, or a vector."""


def vector_digest(vector: Values) -> str:
    """SHA-256 of a vector as float32, little endian."""
    return hashlib.sha256(np.ascontiguousarray(vector, "<f4").data).hexdigest()


def checked_vector(data: bytes | memoryview, *, digest: str, what: str) -> Values:
    """The vector of these bytes; ``ProtocolError`` if it is not the one with this digest, or not finite."""
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    if (found := vector_digest(vector)) != digest:
        raise ProtocolError(f"{what} must have the SHA-256 {digest}, got {found}")
    if not np.isfinite(vector).all():
        raise ProtocolError(f"{what} must hold finite numbers only")
    return vector


def _word(owner: int) -> int | Literal["shared"]:
    return "shared" if owner == SHARED else owner


def _number(owner: int | Literal["shared"]) -> int:
    return SHARED if owner == "shared" else owner


def pack(records: Iterable[LogRecord]) -> bytes:
    """Records one after another, for the wire."""
    return b"".join(record.to_bytes() for record in records)


def unpack(data: bytes) -> Iterator[LogRecord]:
    """The inverse of ``pack``; raises ``ProtocolError`` on bytes that are no whole records.

    What a header announces is compared with the bytes that are there before an array is made.
    """
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise _cut(data)
        round, lr, steps, probes, count = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        if not (steps or probes or count):
            record, at = _unpack_vector(data, at, round=round, lr=lr)
            yield record
            continue
        words = int(count > MAX_OWNERS)
        count %= _HAS_DIRECTIONS
        if not (steps and probes and count and np.isfinite(lr) and lr >= 0):
            raise ProtocolError(
                f"log: the record of round {round} must hold at least one step, probe and owner and a learning rate of "
                f"0 or more, got {steps}, {probes}, {count} and {lr:g}"
            )
        num_scalars = steps * probes * count
        if len(data) - at < 4 * (words + count + num_scalars):
            raise _cut(data)
        directions = int.from_bytes(data[at : at + 4], "little") if words else OWN
        owners = np.frombuffer(data, "<u4", count, at + 4 * words)
        scalars = np.frombuffer(data, "<f4", num_scalars, at + 4 * (words + count))
        at += 4 * (words + count + num_scalars)
        if not np.isfinite(scalars).all():
            raise ProtocolError(f"log: the record of round {round} holds a number that is not finite")
        shaped = scalars.reshape(steps, probes, count).astype(np.float32)
        yield ScalarRecord(
            round=round, lr=lr, owners=tuple(owners.tolist()), coefficients=shaped, directions=directions
        )


def _unpack_vector(data: bytes, at: int, *, round: int, lr: float) -> tuple[VectorRecord, int]:
    if len(data) - at < _VECTOR.size:
        raise _cut(data)
    size, digest = _VECTOR.unpack_from(data, at)
    at += _VECTOR.size
    if not (size and np.isfinite(lr) and lr >= 0):
        raise ProtocolError(
            f"log: the vector of round {round} must hold a number and have a learning rate of 0 or more, got "
            f"{size} numbers and {lr:g}"
        )
    if len(data) - at < 4 * size:
        raise _cut(data)
    what = f"log: the vector of round {round}"
    change = checked_vector(memoryview(data)[at : at + 4 * size], digest=digest.hex(), what=what)
    record = VectorRecord(round=round, lr=lr, size=size, digest=digest.hex(), read=lambda: change)
    return record, at + 4 * size


def _cut(data: bytes) -> ProtocolError:
    return ProtocolError(f"log: {len(data)} bytes do not end with a whole record")


def extend_chain(chain: bytes, record: LogRecord) -> bytes:
    """SHA-256 over the chain so far and the next record."""
    return hashlib.sha256(chain + record.chained_bytes()).digest()
