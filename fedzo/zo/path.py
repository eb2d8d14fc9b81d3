"""The log of a run: the global model is ``base + replay(log)``, always (``fedzo.zo.update_rule`` replays it).

A record holds one round's aggregate scalars. Applying records in order to the base weights gives the model of that
round, bit for bit, on any machine; a chain of hashes ties each record to all before it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzo.errors import ProtocolError
from fedzo.zo.directions import SHARED, stream_key
from fedzo.zo.space import Space

Scalars = npt.NDArray[np.float32]
_HEADER = struct.Struct("<IfHHH")  # round, lr, T, P, owners
EMPTY_CHAIN = hashlib.sha256(b"fedzo log 1").digest()
"""The chain before the first record."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What one round did to the model.

    Attributes:
        round: Number of the round, from 0.
        lr: Learning rate, a float32 value.
        owners: Owners of the directions: ``(SHARED,)``, or client indices in ascending order with per-client seeds.
        coefficients: c[t, p, o], float32 [T, P, len(owners)]: the aggregate projected gradients.
    """

    round: int
    lr: float
    owners: tuple[int, ...]
    coefficients: Scalars

    def to_bytes(self) -> bytes:
        """The record as it travels: 14 bytes of header, 4 an owner, 4 a scalar, little endian."""
        steps, probes, owners = self.coefficients.shape
        head = _HEADER.pack(self.round, self.lr, steps, probes, owners)
        return head + np.asarray(self.owners, "<u4").tobytes() + self.coefficients.astype("<f4").tobytes()

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; decimal floats that read back to the same float32."""
        return {
            "round": self.round,
            "lr": float(self.lr),
            "owners": ["shared" if owner == SHARED else owner for owner in self.owners],
            "c": self.coefficients.astype(float).tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RoundRecord:
        """The inverse of ``to_json``."""
        owners = tuple(SHARED if owner == "shared" else int(owner) for owner in data["owners"])
        scalars = np.asarray(data["c"], np.float64).astype(np.float32)
        return cls(round=int(data["round"]), lr=float(data["lr"]), owners=owners, coefficients=scalars)


def pack(records: Iterable[RoundRecord]) -> bytes:
    """Records one after another, for the wire."""
    return b"".join(record.to_bytes() for record in records)


def unpack(data: bytes) -> Iterator[RoundRecord]:
    """The inverse of ``pack``; raises ``ProtocolError`` on bytes that are no whole records."""
    at = 0
    while at < len(data):
        try:
            round, lr, steps, probes, count = _HEADER.unpack_from(data, at)
            at += _HEADER.size
            owners = np.frombuffer(data, "<u4", count, at)
            at += 4 * count
            scalars = np.frombuffer(data, "<f4", steps * probes * count, at)
            at += 4 * scalars.size
        except (struct.error, ValueError) as error:
            raise ProtocolError(f"log: {len(data)} bytes do not end with a whole record ({error})") from error
        if not np.isfinite(scalars).all() or not np.isfinite(lr):
            raise ProtocolError(f"log: the record of round {round} holds a number that is not finite")
        shaped = scalars.reshape(steps, probes, count).astype(np.float32)
        yield RoundRecord(round=round, lr=lr, owners=tuple(owners.tolist()), coefficients=shaped)


def extend_chain(chain: bytes, record: RoundRecord) -> bytes:
    """SHA-256 over the chain so far and the next record."""
    return hashlib.sha256(chain + record.to_bytes()).digest()


def apply_step(space: Space, *, lr: float, c: np.float32, key: int) -> None:
    """theta <- theta - (lr * c) * z(key), plain SGD's one update; lr * c is rounded to float32 once.

    A zero (a dropped probe, lr = 0) moves nothing and is skipped, so that even a negative zero keeps its bits.
    """
    s = np.float32(lr) * np.float32(c)
    if s != 0:
        space.step(float(s), key)


def step_keys(run_seed: int, *, round: int, step: int, probes: int, owner: int) -> list[int]:
    """Keys of the directions of one local step, one a probe."""
    return [stream_key(run_seed, round=round, step=step, probe=probe, owner=owner) for probe in range(probes)]


def apply_local_step(space: Space, g: Scalars, *, lr: float, keys: Sequence[int]) -> None:
    """A client's local step of plain SGD: ``apply_step`` with g / P for each of its P probes, one after another.

    The quotient is taken in float64 and rounded to float32 once.
    """
    for scalar, key in zip(g, keys, strict=True):
        apply_step(space, lr=lr, c=np.float32(float(scalar) / len(g)), key=key)


def scalars_and_keys(record: RoundRecord, *, run_seed: int) -> Iterator[tuple[np.float32, int]]:
    """A round's scalars c with the keys of their directions, in the log's order: (step, probe, owner)."""
    steps, probes, _ = record.coefficients.shape
    for t in range(steps):
        for p in range(probes):
            for o, owner in enumerate(record.owners):
                key = stream_key(run_seed, round=record.round, step=t, probe=p, owner=owner)
                yield record.coefficients[t, p, o], key


def apply_record(space: Space, record: RoundRecord, *, run_seed: int) -> None:
    """Apply a round's steps by plain SGD, one after another in the log's order."""
    for c, key in scalars_and_keys(record, run_seed=run_seed):
        apply_step(space, lr=record.lr, c=c, key=key)
