"""Scalars at the server: what is refused, the bounds worked out by hand, and what the audit log keeps of the steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from scripted import BASE, Federation, means, reason_for

from fedzo.fl.clip import announced_bound
from fedzo.fl.config import Directions
from fedzo.fl.content import RECORD
from fedzo.fl.messages import ScalarReply, scalars_to_bytes
from fedzo.fl.server.metrics import round_metrics
from fedzo.records.metrics import Round
from fedzo.zo.directions import SHARED, direction, stream_key


def sent(**fields: Any) -> RecordDict:
    """What a client may send."""
    return RecordDict({RECORD: ConfigRecord({"salt": b"8 bytes.", **fields})})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (RecordDict({"else": ConfigRecord()}), "expected one record"),
        (sent(g=7), "g must be 0 to 1073741824 bytes, got 7"),
        # Flower cannot count these
        (sent(g=b""), "g must be left out where it is empty"),
        (sent(status=""), "status must be left out where it is empty"),
        (sent(g=[]), "g must be 0 to 1073741824 bytes, got []"),
        (sent(salt=b""), "salt must be left out where it is empty"),
        (sent(salt=[]), "each record must have a salt of 8 bytes, got []"),
        (ScalarReply(g=b"123", loss=b"", dropped=b""), "g must hold 8 bytes"),
        (
            ScalarReply(
                g=scalars_to_bytes(np.array([1e9, 0], np.float32)),
                loss=scalars_to_bytes(np.zeros(2, np.float32)),
                dropped=bytes(2),
            ),
            r"|g| must be at most",
        ),
    ],
)
def test_a_reply_that_cannot_be_used_is_excluded_and_named(federation: Federation, bad: Any, reason: str) -> None:
    server, clients, _ = federation()
    clients[0].bend = lambda reply: bad

    server.run_round()

    assert means(server) == [2.5]
    assert reason in reason_for(server, 0, 0)


def test_one_clients_extreme_numbers_move_nothing_from_the_first_round_on(federation: Federation) -> None:
    """Under the defaults; what it measures is in no mean either."""
    server, clients, _ = federation(4)
    clients[3].g_of = lambda request: np.full(request.steps, 1e6 if request.round % 2 == 0 else -3e5)

    for _ in range(3):
        server.run_round()

    assert means(server) == [2.0] * 3
    assert reason_for(server, 0, 3) == "|g| must be at most 250, by the round's other clients, got 1e+06"
    assert reason_for(server, 1, 3) == "|g| must be at most the announced bound 200, got 300000"
    assert [request.max_abs_g for request in clients[0].requests] == [0.0, 200.0, 200.0]
    assert all(line.mean_abs_g == 2.0 for line in server.sink.records)


def test_one_clients_extreme_loss_is_in_no_mean(federation: Federation) -> None:
    server, clients, _ = federation(4)
    for client, loss in ((clients[2], 3e38), (clients[3], 2e5)):
        told = scalars_to_bytes(np.full((2, 1), loss, np.float32))
        client.bend = lambda reply, told=told: replace(reply, loss=told)

    server.run_round()

    assert server.sink.records[0].loss == 1.0
    assert "|loss| must be at most 1e+06" in reason_for(server, 0, 2)
    assert reason_for(server, 0, 3) == "|loss| must be at most 100, by the round's other clients, got 200000"


def test_clients_without_a_finite_loss_are_in_no_median_of_g(federation: Federation) -> None:
    """Four of seven overflow in the first round; of the other three one is hostile."""
    server, clients, _ = federation(7)
    none = scalars_to_bytes(np.full((2, 1), np.nan, np.float32))
    for client in clients[:4]:
        client.bend = lambda reply: replace(reply, g=bytes(8), loss=none, dropped=b"\1\1")
    for client, g in zip(clients[4:], (10.0, 10.0, 9e5), strict=True):
        client.g_of = lambda request, g=g: np.full(request.steps, g)

    server.run_round()

    assert server.store.public[0].attendance == (0, 1, 2, 3, 4, 5)
    assert reason_for(server, 0, 6) == "|g| must be at most 1000, by the round's other clients, got 900000"


def test_clients_that_tell_no_loss_are_in_no_median_of_losses(federation: Federation) -> None:
    """Three of seven tell 150, which is far from nothing but not from one another."""
    server, clients, _ = federation(7)
    for client, loss in zip(clients, [np.nan] * 4 + [150.0] * 3, strict=True):
        told = scalars_to_bytes(np.full((2, 1), loss, np.float32))
        client.bend = lambda reply, told=told: replace(reply, loss=told)

    server.run_round()

    assert server.store.public[0].attendance == tuple(range(7))


def test_losses_of_all_clients_alike_are_no_lie(federation: Federation) -> None:
    """A model that has diverged is told of as such."""
    server, clients, _ = federation()
    for client in clients:
        client.bend = lambda reply: replace(reply, loss=scalars_to_bytes(np.full((2, 1), 9e5, np.float32)))

    server.run_round()

    assert server.store.public[0].attendance == (0, 1, 2)


def test_scalars_clipped_to_a_bound_that_float32_rounds_up_are_taken(federation: Federation) -> None:
    """0.1 as float32 is more than 0.1: clients clip to what the server announced."""
    server, clients, _ = federation(max_abs_g=0.1, clip_factor=1e6)
    for client in clients:
        client.g_of = lambda request: np.full(request.steps, 0.05 if request.round == 0 else request.max_abs_g)

    for _ in range(2):
        server.run_round()

    assert clients[0].requests[1].max_abs_g == float(np.float32(0.1)) > 0.1
    assert [round.attendance for round in server.store.public] == [(0, 1, 2)] * 2


def test_two_clients_cannot_be_told_apart(federation: Federation) -> None:
    """No median tells which of two lies: the default bound takes three clients."""
    server, clients, _ = federation(2)
    clients[1].g_of = lambda request: np.full(request.steps, 1e5)

    server.run_round()

    assert server.store.public[0].attendance == (0, 1)


def test_the_bound_is_announced_from_the_second_round_on_and_what_exceeds_it_is_refused(federation: Federation) -> None:
    server, clients, _ = federation(clip_factor=1.25, clip_rounds=1)
    for _ in range(2):
        server.run_round()  # g is 1, 2, 3: the third client does not clip
    server.run_round()

    # median 2; then of 1 and 2 alone
    assert [request.max_abs_g for request in clients[0].requests] == [0.0, 2.5, 1.875]
    assert "|g| must be at most the announced bound 2.5, got 3" in reason_for(server, 1, 2)
    assert server.store.public[1].attendance == (0, 1)
    assert server.store.public[2].attendance == (0,)
    assert [record.clip_bound for record in server.sink.records] == [None, 2.5, 1.875]


def test_a_resumed_server_announces_the_bound_of_an_unbroken_one(federation: Federation) -> None:
    server, clients, _ = federation(clip_factor=2.0, clip_rounds=3)
    for _ in range(2):
        server.run_round()
    server.store.close()

    again, others, _ = federation(clip_factor=2.0, clip_rounds=3)
    again.catch_up()
    again.run_round()

    assert clients[0].requests[-1].max_abs_g == others[0].requests[0].max_abs_g == 4.0


def test_what_is_told_of_the_clients_decides_no_bound(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_clients(*round: Any, **told: Any) -> Round:
        return replace(round_metrics(*round, **told), clients=(), loss=None, mean_abs_g=None)

    monkeypatch.setattr("fedzo.fl.server.rounds.round_metrics", without_clients)
    server, clients, _ = federation(clip_factor=2.0, clip_rounds=3)

    for _ in range(2):
        server.run_round()  # g is 1, 2, 3

    assert [request.max_abs_g for request in clients[0].requests] == [0.0, 4.0]
    assert [record.clients for record in server.sink.records] == [(), ()]


def test_the_bound_needs_the_last_rounds_alone(federation: Federation) -> None:
    server, clients, _ = federation(clip_factor=100.0, clip_rounds=2)
    for factor in (1, 5, 3, 2):  # g of the clients is so many times 1, 2 and 3
        for client in clients:
            client.g_of = lambda request, g=factor * (client.index + 1): np.full(request.steps, g)
        server.run_round()
    server.store.close()

    again, _, _ = federation(clip_factor=100.0, clip_rounds=2)

    # of 3, 6, 9, 2, 4, 6, twice each
    assert server.aggregator.bound() == again.aggregator.bound() == 500.0
    audit, records = list(again.store.audit), again.store.records
    assert announced_bound(audit, records, factor=100.0, rounds=2) == 500.0


@pytest.mark.parametrize("directions", [Directions.shared, Directions.per_client])
def test_the_audit_line_holds_the_gradient_along_every_direction_and_the_lr(
    federation: Federation, directions: Directions
) -> None:
    gradient = np.linspace(-2, 3, len(BASE)).astype(np.float32)
    server, clients, _ = federation(directions=directions, gradient=torch.from_numpy(gradient))
    clients[1].bend = lambda reply: None
    owners = {Directions.shared: [SHARED], Directions.per_client: [0, 2]}[directions]

    for _ in range(2):
        server.run_round()

    for round, line in enumerate(server.store.audit):
        keys = [[[stream_key(1, round=round, step=t, owner=owner) for owner in owners]] for t in range(2)]
        expected = [
            [[float(gradient.astype(float) @ direction(key, len(BASE)).astype(float)) for key in p] for p in step]
            for step in keys
        ]
        assert line.xi.shape == server.store.records[round].coefficients.shape
        assert np.allclose(line.xi, expected, rtol=1e-14)
        assert line.lr == server.store.records[round].lr == 0.5


def test_without_a_gradient_the_audit_line_says_so(federation: Federation) -> None:
    server, _, _ = federation()

    server.run_round()

    assert server.store.audit[0].xi is None
