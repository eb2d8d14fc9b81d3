"""A replica reaches the server's state by log, by values, or says why not."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from fedzo.errors import ProtocolError
from fedzo.fl.messages import Status, Sync
from fedzo.fl.replica import ON_RECORD, Replica
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import SHARED
from fedzo.zo.log import ScalarRecord, pack, unpack
from fedzo.zo.server_optimizer import Adam, Momentum, ServerOptimizer, Sgd

SGD = Sgd()
BASE = np.linspace(-1, 1, 33).astype(np.float32)
LOG = [
    ScalarRecord(round=r, lr=0.5, owners=(SHARED,), coefficients=np.full((2, 1, 1), 0.1 + r, np.float32))
    for r in range(6)
]


RULES = [Momentum(momentum=0.5, nesterov=False), Adam(beta1=0.5, beta2=0.75, eps=1e-3)]


def new_replica(rule: ServerOptimizer = SGD) -> Replica:
    space = VectorSpace(BASE)
    return Replica(space, server_optimizer=rule, reset=lambda: space.load(BASE), run_seed=3)


def server_at(position: int, rule: ServerOptimizer = SGD) -> Replica:
    replica = new_replica(rule)
    replica.advance(LOG[:position])
    return replica


def request(position: int, from_round: int, rule: ServerOptimizer = SGD, **changes: object) -> Sync:
    server = server_at(position, rule)
    fields = {
        "client": 0,
        "round": position,
        "from_round": from_round,
        "log": pack(LOG[from_round:position]),
        "chain": server.chain.hex(),
        "check": server.check(),
        "digest": server.space.digest(),
        **changes,
    }
    return Sync(**fields)


def sync(replica: Replica, asked: Sync) -> Status:
    """What a client does with a request."""
    return replica.sync(asked, [*unpack(asked.log)])


def test_a_late_joiner_with_nothing_but_the_log_gets_the_server_s_bits() -> None:
    late = new_replica()

    assert sync(late, request(6, 0)) is Status.ok
    assert np.array_equal(late.space.values(), server_at(6).space.values())


def test_records_that_were_applied_are_skipped() -> None:
    replica = server_at(4)

    assert sync(replica, request(6, 1)) is Status.ok
    assert replica.position == 6


def test_each_record_that_was_applied_is_told_to_whoever_watches_the_time() -> None:
    told: list[int] = []
    replica, requests = new_replica(), [request(3, 0), request(5, 2)]  # whose server has a replica, too
    before = ON_RECORD.set(lambda: told.append(replica.position))

    try:
        for each in requests:
            sync(replica, each)
    finally:
        ON_RECORD.reset(before)

    assert told == [1, 2, 3, 4, 5]


def test_a_gap_in_the_log_is_behind_and_moves_nothing() -> None:
    replica = server_at(2)
    before = replica.space.digest()

    assert sync(replica, request(6, 3)) is Status.behind
    assert (replica.position, replica.space.digest()) == (2, before)


def test_an_earlier_round_is_reached_from_the_base() -> None:
    replica = server_at(5)

    assert sync(replica, request(3, 2)) is Status.behind  # back at the base, it needs the log from 0
    assert sync(replica, request(3, 0)) is Status.ok
    assert np.array_equal(replica.space.values(), server_at(3).space.values())


@pytest.mark.parametrize("changes", [{"chain": "00"}, {"check": 1}, {"digest": "00"}])
def test_any_hash_that_differs_is_a_mismatch(changes: dict[str, object]) -> None:
    assert sync(server_at(4), request(6, 4, **changes)) is Status.mismatch


def test_a_damaged_client_is_found_out_and_healed_by_values() -> None:
    replica = server_at(5)
    replica.space.theta[7] += np.float32(0.25)

    assert sync(replica, request(6, 5)) is Status.mismatch
    assert sync(replica, request(6, 6, values=server_at(6).space.values().tobytes())) is Status.ok
    assert np.array_equal(replica.space.values(), server_at(6).space.values())


def test_damage_after_a_check_is_found_before_the_next_round() -> None:
    """As by a client's steps that do not come back to the bits that they started from."""
    client, server = server_at(5), server_at(5)
    for replica in (client, server):
        assert sync(replica, request(5, 5)) is Status.ok
        replica.space.theta[7] += np.float32(0.25)

    with pytest.raises(ProtocolError, match=r"round 5: the trained values must come back to their bits"):
        server.advance(LOG[5:6])
    assert sync(client, request(6, 5)) is Status.mismatch
    assert sync(client, request(6, 6, values=server_at(6).space.values().tobytes())) is Status.ok
    assert np.array_equal(client.space.values(), server_at(6).space.values())


def test_values_of_the_wrong_length_and_logs_that_lead_elsewhere_are_refused() -> None:
    with pytest.raises(ProtocolError, match="values must hold 132 bytes, got 4"):
        sync(new_replica(), request(6, 6, values=b"1234"))
    with pytest.raises(ProtocolError, match="must lead to round 6, got 5"):
        sync(server_at(3), request(6, 3, log=pack(LOG[3:5])))
    with pytest.raises(ProtocolError, match="the next record must be round 3, got round 4"):
        sync(server_at(3), request(6, 3, log=pack(LOG[4:6])))


def test_goto_walks_both_ways() -> None:
    replica = server_at(6)

    told: list[tuple[int, int]] = []

    replica.goto(2, LOG, lambda done, total: told.append((done, total)))
    back = replica.space.digest()
    replica.goto(6, LOG, lambda done, total: told.append((done, total)))

    assert told == [(1, 2), (2, 2), (3, 6), (4, 6), (5, 6), (6, 6)]
    assert back == server_at(2).space.digest()
    assert replica.space.digest() == server_at(6).space.digest()


# --- rules that remember ----------------------------------------------------------------------------------------------


def same_state(one: Replica, other: Replica) -> bool:
    return one.snapshot() == other.snapshot() and one.check() == other.check() and one.chain == other.chain


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_log_alone_leads_to_the_same_values_and_moments(rule: ServerOptimizer) -> None:
    late = new_replica(rule)

    assert sync(late, request(6, 0, rule)) is Status.ok
    assert same_state(late, server_at(6, rule))
    assert np.abs(late.moments).min() > 0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_going_back_forgets_the_moments(rule: ServerOptimizer) -> None:
    replica = server_at(6, rule)

    replica.goto(2, LOG)
    early = same_state(replica, server_at(2, rule))
    replica.goto(6, LOG)

    assert early
    assert same_state(replica, server_at(6, rule))
    replica.reset()
    assert same_state(replica, new_replica(rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_wrong_moments_are_found_at_once_and_healed_with_the_values(rule: ServerOptimizer) -> None:
    server, replica = server_at(6, rule), server_at(5, rule)
    replica.moments[-1, 7] += np.float32(0.25)  # theta itself is right
    assert replica.space.digest() == server_at(5, rule).space.digest()

    assert sync(replica, request(5, 5, rule)) is Status.mismatch
    assert sync(replica, request(6, 6, rule, values=server.snapshot())) is Status.ok
    assert same_state(replica, server)

    replica.advance([ScalarRecord(round=6, lr=0.5, owners=(SHARED,), coefficients=np.ones((1, 1, 1), np.float32))])
    server.advance([ScalarRecord(round=6, lr=0.5, owners=(SHARED,), coefficients=np.ones((1, 1, 1), np.float32))])
    assert same_state(replica, server)


@pytest.mark.parametrize(("rule", "length"), [(Sgd(), 132), (RULES[0], 264), (RULES[1], 396)], ids=str)
def test_a_snapshot_is_theta_then_moments_and_no_other_length_is_taken(rule: ServerOptimizer, length: int) -> None:
    server = server_at(4, rule)

    snapshot = server.snapshot()

    assert len(snapshot) == server.snapshot_bytes == length
    assert np.array_equal(np.frombuffer(snapshot, "<f4"), [*server.space.values(), *server.moments.ravel()])
    for wrong in (snapshot[:-4], snapshot + bytes(4), bytes(132 if length != 132 else 264)):
        with pytest.raises(ProtocolError, match=f"values must hold {length} bytes, got {len(wrong)}"):
            sync(new_replica(rule), request(4, 4, rule, values=wrong))


def test_the_check_is_that_of_theta_where_nothing_is_remembered_and_covers_the_whole_state_otherwise() -> None:
    plain, heavy = server_at(4), server_at(4, RULES[0])

    assert plain.check() == plain.space.check()
    assert heavy.check() == zlib.crc32(heavy.snapshot())
