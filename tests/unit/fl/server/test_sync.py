"""What a request brings to clients that lack the artifact, are behind, or were damaged: by what they were sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scripted import ARTIFACT, Client, Federation, means, reason_for

from fedzo.fl.config import Transport
from fedzo.fl.messages import ArtifactReply, ScalarReply, Status, TrainRequest
from fedzo.zo.log import pack
from fedzo.zo.server_optimizer import AdamConfig


def test_a_client_without_the_artifact_gets_it_once(federation: Federation) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    clients[1].artifact = b""

    for _ in range(3):
        server.run_round()

    assert means(server) == [2.0] * 3
    assert [len(client.requests) for client in clients] == [3, 4, 3]
    assert [[piece.data for piece in client.pieces] for client in clients] == [[], [b"", ARTIFACT], []]
    assert server.sink.records[0].message_down_bytes > server.sink.records[1].message_down_bytes


def test_a_client_that_refuses_the_artifact_is_named_and_the_round_goes_on(federation: Federation) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    clients[1].artifact = b""
    clients[1].receive = lambda piece: ArtifactReply(held=0)

    server.run_round()

    assert means(server) == [2.0]
    assert server.store.public[0].attendance == (0, 2)
    assert "piece 1 of 1 (bytes 0 to 3) was sent 2 times: it was not taken" in reason_for(server, 0, 1)


def test_a_client_that_falls_silent_amid_its_artifact_holds_up_nobody_else(federation: Federation) -> None:
    server, clients, _ = federation()
    clients[0].artifact = clients[1].artifact = b""
    clients[0].receive = lambda piece: None

    server.run_round()

    assert means(server) == [2.5]
    assert server.store.public[0].attendance == (1, 2)
    assert reason_for(server, 0, 0) == "not done within 0.2 s"


@pytest.mark.parametrize("position", [0, 1, 10**9])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_client_that_lies_about_how_far_behind_it_is_costs_itself_the_round(
    federation: Federation, position: int, rounds: int
) -> None:
    """No position that it can name reaches the server's own list of records unchecked."""
    server, clients, _ = federation()
    for _ in range(rounds):
        server.run_round()
    clients[1].train = lambda request: ScalarReply(status=Status.behind, position=position)

    server.run_round()

    assert server.store.public[-1].attendance == (0, 2)
    assert "position: a client that is behind must be before round" in reason_for(server, rounds, 1)


def test_a_client_that_lost_its_space_and_log_gets_both_again(federation: Federation) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    for _ in range(3):
        server.run_round()
    clients[1].replica, clients[1].artifact = None, b""

    server.run_round()

    assert means(server) == [2.0] * 4
    assert np.array_equal(clients[1].replica.space.theta, clients[0].replica.space.theta)


@pytest.mark.parametrize("is_new", [False, True], ids=["the same process", "a new process"])
def test_a_client_that_comes_back_is_sent_what_it_lacks_and_no_more(federation: Federation, is_new: bool) -> None:
    """Its line may have been down for a moment. A new process says that it has nothing."""
    server, clients, grid = federation()
    for _ in range(3):
        server.run_round()
    client = Client(0) if is_new else clients[0]
    del grid.nodes[100]
    grid.connect(777, client)

    server.run_round()

    assert server.store.public[3].attendance == (0, 1, 2)
    helped = [(0, pack(server.store.records[:3]))] if is_new else []
    asked = [(request.from_round, request.log) for request in client.requests]
    assert asked[-1 - len(helped) :] == [(2, pack(server.store.records[2:3])), *helped]


def test_a_server_that_goes_on_with_a_run_sends_clients_what_they_lack_by_its_log(federation: Federation) -> None:
    """Sites outlive it; one of them took part in the first round alone."""
    server, clients, _ = federation()
    server.run_round()
    clients[1].bend = lambda reply: ScalarReply(g=b"1")
    for _ in range(2):
        server.run_round()
    clients[1].bend = lambda reply: reply
    server.store.close()
    server, _, grid = federation()
    grid.nodes = {100 + client.index: client for client in clients}
    server.catch_up()

    server.run_round()

    assert server.store.public[3].attendance == (0, 1, 2)
    assert [client.requests[-1].from_round for client in clients] == [2, 0, 2]
    assert [client.requests[-1].log for client in clients] == [pack(server.store.records[at:3]) for at in (2, 0, 2)]
    assert [len(client.requests) for client in clients] == [4, 4, 4]


def test_a_damaged_client_is_resynchronised_by_values_once(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    for _ in range(2):
        server.run_round()
    clients[0].replica.space.theta[3] += 1

    server.run_round()

    assert means(server) == [2.0] * 3
    assert [bool(request.values) for request in clients[0].requests] == [False, False, False, True]
    assert "its state is not the server's" in caplog.text


def test_a_client_whose_replay_differs_again_is_left_out_until_it_starts_anew(federation: Federation) -> None:
    """Its directions may be others as well, so that its scalars would say nothing."""
    server, clients, _ = federation(deadline_s=10.0)
    for _ in range(2):
        server.run_round()
        clients[0].replica.space.theta[3] += 1

    for _ in range(2):
        server.run_round()
        clients[0].replica.space.theta[3] += 1

    assert means(server) == [2.0, 2.0, 2.5, 2.5]
    assert "must be the server's after the values that it was sent" in reason_for(server, 3, 0)
    assert [bool(request.values) for request in clients[0].requests] == [False, False, True, False, False]


def test_a_client_that_never_reaches_the_state_is_sent_the_values_once(federation: Federation) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    server.run_round()
    clients[0].bend = lambda reply: ScalarReply(status=Status.mismatch)

    server.run_round()
    server.run_round()

    assert means(server) == [2.0, 2.5, 2.5]
    assert "must be the server's after the values that it was sent" in reason_for(server, 1, 0)
    assert [bool(request.values) for request in clients[0].requests] == [False, False, True, False]


def test_a_client_that_always_lacks_the_space_is_left_out_after_a_few_tries(federation: Federation) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    server.run_round()
    clients[0].bend = lambda reply: ScalarReply(status=Status.bare)

    server.run_round()

    assert means(server) == [2.0, 2.5]
    assert "could not reach the server's state" in reason_for(server, 1, 0)
    assert len(clients[0].requests) == 1 + 4


def test_helping_a_slow_client_ends_at_the_rounds_deadline(federation: Federation, clock: Any) -> None:
    server, clients, _ = federation(deadline_s=0.3)
    asked: list[TrainRequest] = []

    def slow(request: TrainRequest) -> ScalarReply:
        asked.append(request)
        clock.now += 0.2
        return ScalarReply(status=Status.bare)

    clients[1].train = slow
    server.run_round()

    assert len(asked) == 2  # the second answer comes after the deadline
    assert reason_for(server, 0, 1) == "not done within 0.3 s"
    assert means(server) == [2.0]


def test_value_transport_sends_the_values_each_round_and_no_log(federation: Federation) -> None:
    server, clients, _ = federation(transport=Transport.values)

    for _ in range(3):
        server.run_round()

    assert [len(request.values) for request in clients[0].requests] == [0, 36, 36]
    assert [len(request.log) for request in clients[0].requests] == [0, 0, 0]


@pytest.mark.parametrize("transport", list(Transport))
def test_clients_at_one_place_are_sent_one_and_the_same_object(federation: Federation, transport: Transport) -> None:
    """Logs and values may be as long as the model. The last client has not reached the second round."""
    server, clients, _ = federation(transport=transport)
    server.run_round()
    clients[2].bend = lambda reply: ScalarReply(status=Status.behind, position=9)
    server.run_round()
    clients[2].bend = lambda reply: reply
    server.run_round()

    one, other, late = (client.requests[2] for client in clients)
    assert means(server) == [2.0, 1.5, 2.0]
    if transport is Transport.values:
        assert len(one.values) == 36
        assert one.values is other.values
        assert one.values is late.values
    else:
        assert one.log == pack(server.store.records[1:2])
        assert one.log is other.log
        assert late.log == pack(server.store.records[:2])


@pytest.mark.parametrize("transport", list(Transport))
def test_clients_follow_a_rule_that_remembers_by_log_and_by_values(
    federation: Federation, transport: Transport
) -> None:
    server, clients, _ = federation(server_optimizer=AdamConfig(lr=0.5), transport=transport)

    for _ in range(4):
        server.run_round()

    assert means(server) == [2.0] * 4
    assert [len(request.values) for request in clients[0].requests] == (
        [0] * 4 if transport is Transport.scalars else [0, 108, 108, 108]
    )
    assert server.sink.records[1].payload_down_bytes == 3 * (108 if transport is Transport.values else 4 * 2)
    clients[0].replica.goto(0, [])
    clients[0].replica.goto(4, server.store.records)
    assert clients[0].replica.snapshot() == server.replica.snapshot()


def test_a_client_whose_moments_are_wrong_is_found_in_the_next_round_and_healed(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, clients, _ = federation(deadline_s=10.0, server_optimizer=AdamConfig(lr=0.5))
    for _ in range(2):
        server.run_round()
    clients[0].replica.moments[1, 3] *= 2

    server.run_round()
    server.run_round()

    assert means(server) == [2.0] * 4
    assert [len(request.values) for request in clients[0].requests] == [0, 0, 0, 108, 0]
    assert "its state is not the server's" in caplog.text
