"""Whom a round asks and how long it waits, where clients are silent and lines are down: on a clock of its own."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import pytest
from scripted import Client, Federation, Outage, reason_for

from fedzo.fl.messages import ScalarReply, TrainRequest
from fedzo.fl.server import client_registry
from fedzo.fl.server.rounds import FederationError
from fedzo.fl.server.turnout import sampling_order


def sampled(round: int, *, connected: Container[int] = range(10)) -> list[int]:
    return sampling_order(run_seed=4, round=round, num_clients=10, connected=connected)


def test_sampling_is_seeded_fair_and_without_repeats() -> None:
    rounds = [sampled(r)[:3] for r in range(1000)]

    assert rounds == [sampled(r)[:3] for r in range(1000)]
    assert all(sorted(sampled(r)) == list(range(10)) for r in range(20))
    counts = np.bincount(np.concatenate(rounds), minlength=10)
    standard_error = np.sqrt(1000 * 0.3 * 0.7)
    assert (np.abs(counts - 300) < 5 * standard_error).all()


def test_a_client_that_is_not_connected_gives_its_place_to_the_next() -> None:
    everyone = sampled(7)
    gone = everyone[1]

    assert sampled(7, connected=set(range(10)) - {gone}) == [*(k for k in everyone if k != gone), gone]


def test_a_sample_that_fails_or_is_not_there_is_made_up_by_other_clients(federation: Federation) -> None:
    """Else the same clients would be drawn again after every resume."""
    server, clients, grid = federation(6, clients_per_round=2, min_replies=2)
    order = sampling_order(run_seed=1, round=0, num_clients=6, connected=range(6))
    clients[order[0]].bend = lambda reply: ScalarReply(g=b"1")
    del grid.nodes[100 + order[1]]

    server.run_round()

    assert server.store.public[0].attendance == tuple(sorted(order[2:5]))  # 0 and 2 were asked, then 3 and 4
    assert [len(clients[k].requests) for k in order] == [1, 0, 1, 1, 1, 0]


def test_a_client_that_says_nothing_costs_one_deadline_until_it_answers_a_greeting(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Any
) -> None:
    monkeypatch.setattr(client_registry, "SILENT_S", 0.0)
    server, clients, grid = federation()
    server.run_round()
    server.run_round()
    grid.nodes[101] = None
    took = []
    for _ in range(8):
        began = clock.now
        server.run_round()
        took.append(clock.now - began >= server.config.strategy.deadline_s)
    assert took == [True] + [False] * 7
    assert len(clients[1].requests) == 2
    assert reason_for(server, 5, 1) == "no reply since round 2; it is asked again once it registers"
    assert server.client_registry.presence(5).clients[1].state == "silent"

    grid.nodes[101] = clients[1]
    server.run_round()

    assert server.store.public[10].attendance == (0, 1, 2)
    assert clients[1].requests[-1].from_round == 1  # no more of the log is sent than it lacks
    assert [record.getMessage() for record in caplog.records] == [
        "client 1: no reply within 0.2 s",
        "client 1 answers again",
    ]


def test_a_client_that_answers_greetings_and_no_more_costs_a_deadline_after_1_2_4_rounds_only(
    federation: Federation, clock: Any
) -> None:
    server, clients, _ = federation()
    asked: list[int] = []
    clients[1].train = lambda request: asked.append(request.round)

    took = []
    for _ in range(9):
        began = clock.now
        server.run_round()
        took.append(clock.now - began >= server.config.strategy.deadline_s)

    assert sorted(set(asked)) == [0, 1, 3, 7]
    assert [number for number, late in enumerate(took) if late] == [0, 1, 3, 7]
    assert {line.refused for line in server.store.audit} == {(1,)}
    assert reason_for(server, 4, 1) == "no reply since round 0; it is asked again in round 7"


def test_a_client_that_answers_again_is_asked_in_every_round(federation: Federation) -> None:
    server, clients, _ = federation()
    clients[1].bend = lambda reply: None
    server.run_round()
    server.run_round()  # silent twice: asked again in round 3
    clients[1].bend = lambda reply: reply

    for _ in range(4):
        server.run_round()

    assert [line.attendance for line in server.store.public] == [(0, 2)] * 3 + [(0, 1, 2)] * 3


def test_a_client_that_is_heard_again_at_once_misses_one_round(federation: Federation) -> None:
    server, clients, _ = federation()
    clients[1].bend = lambda reply: None
    server.run_round()
    clients[1].bend = lambda reply: reply

    server.run_round()

    assert [line.attendance for line in server.store.public] == [(0, 2), (0, 1, 2)]


def test_clients_that_were_silent_are_asked_early_where_the_others_are_too_few(federation: Federation) -> None:
    server, clients, _ = federation(min_replies=2)
    clients[0].bend = lambda reply: None
    server.run_round()
    server.run_round()  # silent twice: asked again in round 3
    clients[0].bend = lambda reply: reply
    clients[1].bend = lambda reply: ScalarReply(g=b"1")

    server.run_round()

    assert server.store.public[2].attendance == (0, 2)


def test_who_answers_again_while_a_round_lacks_replies_is_asked_in_it(federation: Federation) -> None:
    server, clients, grid = federation(min_replies=2)
    server.run_round()
    grid.nodes[101] = None
    server.run_round()  # client 1 says nothing
    honest = clients[0].train

    def back(request: TrainRequest) -> Any:
        grid.nodes[101] = clients[1]  # the round is under way
        return honest(request)

    clients[0].train = back
    grid.nodes[102] = None

    server.run_round()

    assert [line.attendance for line in server.store.public] == [(0, 1, 2), (0, 2), (0, 1)]


def test_who_registers_while_a_round_waits_takes_part_in_the_next(federation: Federation) -> None:
    server, clients, grid = federation(deadline_s=1.5)
    del grid.nodes[101]
    server.run_round()

    def late(request: TrainRequest) -> Any:
        grid.indices[777] = 1
        grid.nodes.setdefault(777, Client(1))
        return None if request.round == 1 else Client.train(clients[0], request)

    clients[0].train = late  # type: ignore[method-assign]
    server.run_round()

    assert 777 in grid.hellos
    assert [line.attendance for line in server.store.public] == [(0, 2), (2,)]
    server.run_round()
    assert server.store.public[2].attendance == (0, 1, 2)


def test_too_few_clients_are_waited_for(federation: Federation) -> None:
    """All sites may be restarted at the same time."""
    server, _, grid = federation(deadline_s=5.0, min_replies=3)
    server.run_round()
    back = {777 + index: Client(index) for index in range(3)}
    grid.indices |= {node: client.index for node, client in back.items()}
    looks = iter([{}, {}, back])
    grid.get_node_ids = lambda: list(grid.nodes)  # type: ignore[method-assign]
    seen = grid.get_node_ids

    def look() -> list[int]:
        grid.nodes = next(looks, back)
        return seen()

    grid.get_node_ids = look  # type: ignore[method-assign]
    server.run_round()

    assert server.store.public[1].attendance == (0, 1, 2)


@pytest.mark.parametrize("clients_per_round", [0, 2])
@pytest.mark.parametrize(
    ("error_after_s", "unlisted_after_s"), [(0.0, 5.0), (30.0, 1.0)], ids=["error-first", "unlisted-first"]
)
def test_a_line_that_is_down_for_two_minutes_ends_no_run(
    federation: Federation, clock: Any, clients_per_round: int, error_after_s: float, unlisted_after_s: float
) -> None:
    server, _, grid = federation(deadline_s=600.0, startup_s=300.0, clients_per_round=clients_per_round)
    server.run_round()
    grid.outage = Outage(clock, 120.0, error_after_s=error_after_s, unlisted_after_s=unlisted_after_s)

    server.run_round()

    assert [len(line.attendance) for line in server.store.public] == [clients_per_round or 3] * 2
    server.run_round()
    assert len(server.store.public[2].attendance) == (clients_per_round or 3)


def test_a_round_keeps_the_replies_that_it_has_while_it_waits_for_others(federation: Federation, clock: Any) -> None:
    server, clients, grid = federation(deadline_s=600.0, startup_s=300.0, min_replies=3)
    server.run_round()
    grid.outage = Outage(clock, 60.0, nodes=[102])

    server.run_round()

    assert server.store.public[1].attendance == (0, 1, 2)
    assert [len(client.requests) for client in clients] == [2, 2, 2]


def test_a_line_that_stays_down_ends_the_run_after_startup_s_or_when_it_is_asked_to_stop(
    federation: Federation, clock: Any
) -> None:
    server, _, grid = federation(deadline_s=600.0, startup_s=300.0)
    grid.outage = Outage(clock, 1e9)
    looks: list[float] = []
    server._turnout.while_waiting = lambda: looks.append(clock.now)
    began = clock.now

    with pytest.raises(FederationError, match=r"got 0 \(client 0: not connected; client 1: not connected"):
        server.run_round()

    assert 300 <= clock.now - began < 301
    assert looks[-1] - looks[0] > 290

    def stop() -> None:
        raise KeyboardInterrupt

    server._turnout.while_waiting = stop
    with pytest.raises(KeyboardInterrupt):
        server.run_round()
