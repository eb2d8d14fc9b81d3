"""Vector records: round trips, the chain, what is refused, and what they do to a model."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.fl.messages import Status, Sync
from fedzo.fl.replica import Replica
from fedzo.records.decode import parse_json, to_json
from fedzo.records.log import Proof, VectorLine, decode_public
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import SHARED
from fedzo.zo.log import EMPTY_CHAIN, ScalarRecord, VectorRecord, extend_chain, pack, unpack
from fedzo.zo.server_optimizer import Momentum, ServerOptimizer, Sgd

CHANGE = np.array([0.5, -1.25, 3.0], np.float32)
RECORD = VectorRecord.of(CHANGE, round=7, lr=0.25)
HEADER = 14


@given(
    round=st.integers(0, 2**32 - 1),
    lr=st.floats(0, width=32, allow_infinity=False),
    change=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
)
def test_a_vector_record_survives_bytes_and_json_bit_for_bit(round: int, lr: float, change: list[float]) -> None:
    vector = np.array(change, np.float32)
    original = VectorRecord.of(vector, round=round, lr=lr)

    (by_wire,) = unpack(original.to_bytes())
    told = parse_json(
        to_json(original.to_line(attendance=[0, 2], proof=Proof(chain="a" * 64, check=1, digest=None))),
        where="line",
        error=RunFolderError,
    )
    line = decode_public(told, where="line", error=RunFolderError)

    assert isinstance(line, VectorLine)
    assert isinstance(by_wire, VectorRecord)
    assert by_wire.read().tobytes() == vector.tobytes()
    assert VectorRecord.from_line(line, lambda: vector) == by_wire == original
    assert original.digest == hashlib.sha256(struct.pack(f"<{len(change)}f", *change)).hexdigest()


def test_the_chain_covers_the_vector_by_its_digest_and_needs_no_vector() -> None:
    unread = replace(RECORD, read=lambda: pytest.fail("it was read"))

    chain = extend_chain(EMPTY_CHAIN, unread)

    digest = hashlib.sha256(CHANGE.tobytes()).digest()
    expected = struct.pack("<IfHHHQ", 7, 0.25, 0, 0, 0, 3) + digest
    assert chain == hashlib.sha256(EMPTY_CHAIN + expected).digest()
    changed = [
        VectorRecord.of(CHANGE[::-1].copy(), round=7, lr=0.25),
        replace(RECORD, lr=0.5),
        replace(RECORD, round=8),
    ]
    assert len({chain, *(extend_chain(EMPTY_CHAIN, each) for each in changed)}) == 4


def test_scalars_and_vectors_travel_in_one_log() -> None:
    scalars = ScalarRecord(round=0, lr=0.5, owners=(SHARED,), coefficients=np.ones((1, 1, 1), np.float32))

    first, second, third = unpack(pack([scalars, RECORD, scalars]))

    assert isinstance(first, ScalarRecord)
    assert second == RECORD
    assert isinstance(third, ScalarRecord)


def bytes_of(**changes: Any) -> bytes:
    data = bytearray(RECORD.to_bytes())
    for place, part in changes.values():
        data[place : place + len(part)] = part
    return bytes(data)


def nonfinite() -> bytes:
    return VectorRecord.of(np.array([1, np.nan, 2], np.float32), round=7, lr=0.25).to_bytes()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (RECORD.to_bytes()[:-1], "do not end with a whole record"),
        (RECORD.to_bytes()[: HEADER + 20], "do not end with a whole record"),
        (bytes_of(a=(HEADER, struct.pack("<Q", 2**60))), "do not end with a whole record"),
        (bytes_of(a=(HEADER, struct.pack("<Q", 0))), "must hold a number"),
        (bytes_of(a=(4, struct.pack("<f", -1.0))), "a learning rate of 0 or more, got 3 numbers and -1"),
        (bytes_of(a=(4, struct.pack("<f", np.nan))), "a learning rate of 0 or more"),
        (bytes_of(a=(-4 % len(RECORD.to_bytes()), b"\1")), "the vector of round 7 must have the SHA-256 "),
        (nonfinite(), "the vector of round 7 must hold finite numbers only"),
    ],
)
def test_bytes_that_are_no_vector_record_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        list(unpack(data))


def replica_with(rule: ServerOptimizer, start: np.ndarray) -> Replica:
    space = VectorSpace(start)
    return Replica(space, server_optimizer=rule, reset=lambda: space.load(start), run_seed=3)


def test_a_vector_moves_theta_by_itself_after_the_decay() -> None:
    start = np.array([1, 2, 4], np.float32)
    plain, decayed = replica_with(Sgd(), start), replica_with(Sgd(weight_decay=2.0), start)
    record = replace(RECORD, round=0)

    plain.advance([record])
    decayed.advance([record])

    assert plain.space.values().tolist() == [0.5, 3.25, 1.0]
    assert decayed.space.values().tolist() == [0.0, 2.25, -1.0]  # 1 - 0.25 * 2 of theta first


@pytest.mark.parametrize(
    ("rule", "size"), [(Momentum(momentum=0.5, nesterov=False), 3), (Sgd(), 4)], ids=["moments", "another size"]
)
def test_a_vector_that_the_run_cannot_take_is_refused(rule: ServerOptimizer, size: int) -> None:
    replica = replica_with(rule, np.zeros(size, np.float32))

    with pytest.raises(ProtocolError, match=f"round 0 must hold what this run's .* its {size} trained values take"):
        replica.advance([replace(RECORD, round=0)])
    assert replica.position == 0


def test_a_late_client_reaches_the_state_by_records_or_by_values() -> None:
    start = np.zeros(3, np.float32)
    log = [VectorRecord.of(CHANGE * np.float32(r + 1), round=r, lr=0.5) for r in range(3)]
    server = replica_with(Sgd(), start)
    server.advance(log)
    named: dict[str, Any] = {
        "client": 0,
        "round": 3,
        "chain": server.chain.hex(),
        "check": server.check(),
        "digest": server.space.digest(),
    }
    by_log, by_values, damaged = (replica_with(Sgd(), start) for _ in range(3))
    wrong = bytearray(pack(log))
    wrong[-1] ^= 1

    def sync(replica: Replica, data: bytes) -> Status:
        return replica.sync(Sync(log=data, **named), [*unpack(data)])

    assert sync(by_log, pack(log)) is Status.ok
    assert by_values.sync(Sync(from_round=3, values=server.snapshot(), **named), []) is Status.ok
    with pytest.raises(ProtocolError, match="the vector of round 2 must have the SHA-256"):
        sync(damaged, bytes(wrong))

    assert by_log.snapshot() == by_values.snapshot() == server.snapshot()
    assert by_log.chain == by_values.chain == server.chain
    assert not server.is_shorter_than(log[:1])
    assert server.is_shorter_than(log[:2])
