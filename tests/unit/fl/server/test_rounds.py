"""The round loop against scripted clients: who counts in a round, what ends a run, and what people are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import make_message
from scripted import Federation, means, reason_for

from fedzo.errors import RunFolderError
from fedzo.fl.config import Weighting
from fedzo.fl.messages import ScalarReply, encode, scalars_to_bytes
from fedzo.fl.server.rounds import FederationError
from fedzo.records.folder import AUDIT
from fedzo.records.presence import Presence
from fedzo.zo.server_optimizer import AdamConfig, MomentumConfig, Schedule, ServerOptimizerConfig, SgdConfig


def test_honest_clients_follow_the_server_round_by_round(federation: Federation) -> None:
    server, clients, _ = federation()

    for _ in range(5):
        server.run_round()

    assert means(server) == [2.0] * 5
    assert [len(client.requests) for client in clients] == [5, 5, 5]
    assert clients[0].replica.position == 4  # it learns of the last round from no later request
    assert [len(request.log) for request in clients[0].requests] == [0, 26, 26, 26, 26]
    assert [bool(request.digest) for request in clients[0].requests] == [True, False, True, False, True]
    assert [request.used for request in clients[0].requests] == [0, 2, 4, 6, 8]
    assert clients[0].pieces == []  # they have the artifact


def test_the_round_closes_at_its_deadline_with_those_who_answered(federation: Federation) -> None:
    server, clients, _ = federation()
    clients[2].bend = lambda reply: None

    server.run_round()

    assert means(server) == [1.5]
    assert server.store.public[0].attendance == (0, 1)
    assert "no reply within 0.2 s" in reason_for(server, 0, 2)


def test_all_replies_bad_ends_the_run_and_keeps_the_log(federation: Federation) -> None:
    server, clients, _ = federation()
    server.run_round()
    for client in clients:
        client.bend = lambda reply: ScalarReply(g=b"1")

    with pytest.raises(FederationError, match=r"round 1: strategy\.min_replies = 1 usable replies are needed, got 0"):
        server.run_round()

    assert len(server.store.records) == 1


def test_an_error_tells_as_many_reasons_as_a_person_reads(federation: Federation) -> None:
    server, clients, _ = federation(20)
    for client in clients:
        client.bend = lambda reply: ScalarReply(g=b"1")

    with pytest.raises(FederationError, match=r"client 7: .*; and 12 more\)\. The log is kept") as caught:
        server.run_round()

    assert "client 8:" not in str(caught.value)


def test_a_client_cannot_fill_the_logs_with_its_words(federation: Federation) -> None:
    server, clients, _ = federation()
    clients[0].bend = lambda reply: RecordDict({"x" * 10**6: ConfigRecord()})

    server.run_round()

    assert len(reason_for(server, 0, 0)) == 400


def test_words_of_a_client_are_quoted_cut_and_on_one_line(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """No forged line, no escape, neither in the log nor in the metrics; they are marked as the client's."""
    server, _, grid = federation()
    pull = grid.pull_messages
    words = 'well\n\x1b[2J\u202e2026-01-01 WARNING round 7: all "done"\u2028\x9b31m' + "x" * 5000

    def failing(names: list[str]) -> list[Message]:
        replies = pull(names)
        for at, reply in enumerate(replies):
            if reply.metadata.src_node_id == 100:
                error = Error(code=1, reason=f"<class 'E'>:<'{words}'>")
                replies[at] = make_message(metadata=reply.metadata, error=error)
        return replies

    grid.pull_messages = failing
    server.run_round()

    told = reason_for(server, 0, 0)
    assert told.startswith("it failed and says \"well  [2J 2026-01-01 WARNING round 7: all 'done'  31mxxx")
    assert told.endswith('..."')
    assert len(told) < 400
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [f"client 0: reply refused: {told}"]
    assert all(each.isprintable() for each in logged)


def test_a_message_that_nobody_asked_for_and_one_that_cannot_be_sent_end_nothing(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, grid = federation()
    server.run_round()
    push, pull = grid.push_messages, grid.pull_messages

    def without_two(messages: list[Message]) -> list[str]:
        names = push(messages)
        nodes = [message.metadata.dst_node_id for message in messages]
        return ["" if node in (100, 101) else name for node, name in zip(nodes, names, strict=True)]

    def with_another(names: list[str]) -> list[Message]:
        replies = pull(names)
        stray = encode(ScalarReply())
        asked = Message(stray, dst_node_id=1, message_type="train")
        asked.metadata.__dict__["_message_id"] = "of somebody else"
        return [make_message(metadata=Message(stray, reply_to=asked).metadata, content=stray), *replies]

    monkeypatch.setattr(grid, "push_messages", without_two)
    monkeypatch.setattr(grid, "pull_messages", with_another)

    server.run_round()

    assert server.store.public[1].attendance == (2,)
    assert [reason_for(server, 1, client) for client in (0, 1)] == ["not connected"] * 2


def drop(reply: ScalarReply) -> ScalarReply:
    """No probe had a finite loss."""
    none = scalars_to_bytes(np.full((2, 1), np.nan, np.float32))
    return dataclasses.replace(reply, g=bytes(8), loss=none, dropped=b"\1\1")


def test_a_run_that_has_diverged_says_so_once(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    server, clients, _ = federation()

    for client in clients[:2]:
        client.bend = drop
    server.run_round()
    assert not caplog.records
    clients[2].bend = drop
    server.run_round()
    server.run_round()
    for client in clients:
        client.bend = lambda reply: reply
    server.run_round()

    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1
    assert "round 1: no client had a finite loss" in warned[0]
    assert means(server)[1:3] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("server_optimizer", "moves"),
    [
        (SgdConfig(lr=0.5), False),
        (SgdConfig(lr=0.5, weight_decay=0.1), True),
        (MomentumConfig(lr=0.5), True),
        (AdamConfig(lr=0.5), True),
    ],
)
def test_moments_and_decay_move_a_model_that_has_diverged_so_no_round_is_said_to_change_nothing(
    federation: Federation, caplog: pytest.LogCaptureFixture, server_optimizer: ServerOptimizerConfig, moves: bool
) -> None:
    server, clients, _ = federation(server_optimizer=server_optimizer)
    server.run_round()
    before = server.replica.space.values()
    for client in clients:
        client.bend = drop

    server.run_round()

    assert "round 1: no client had a finite loss, so the round measured nothing" in caplog.text
    assert bool((server.replica.space.values() != before).any()) is moves


def test_probes_that_change_no_loss_are_not_called_a_divergence(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, clients, _ = federation()
    for client in clients:  # as clients that send signs do, where both sides of a probe have the same loss
        client.bend = lambda reply: dataclasses.replace(reply, g=bytes(8), dropped=b"\1\1")

    server.run_round()

    assert "no probe of any client changed its loss" in caplog.text
    assert "diverged" not in caplog.text


def test_the_schedule_is_in_the_requests_and_in_the_log(federation: Federation) -> None:
    server_optimizer = SgdConfig(lr=0.5, schedule=Schedule.linear, final_lr_share=0.2)
    server, clients, _ = federation(server_optimizer=server_optimizer)

    for _ in range(5):
        server.run_round()

    expected = [float(np.float32(lr)) for lr in (0.5, 0.4, 0.3, 0.2, 0.1)]
    assert [record.lr for record in server.store.records] == expected
    assert [request.lr for request in clients[0].requests] == expected


def test_what_a_client_declares_counts_within_the_cap_and_the_server_says_so(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, _, _ = federation(5, weighting=Weighting.size, size_cap=2.0)
    server.warn_of_cut_sizes()
    assert not caplog.text
    registered = server.client_registry.clients
    registered[4] = replace(registered[4], num_train=2**62)

    server.warn_of_cut_sizes()
    server.run_round()

    assert "strategy.size_cap: the rows of clients [4] count only as 2 times the median" in caplog.text

    weights = [entry.weight for entry in server.store.audit[0].clients]
    assert weights == [10, 20, 30, 40, 60]  # twice the median


def test_presence_within_a_round_says_who_is_waited_for_since_when(federation: Federation, clock: Any) -> None:
    server, clients, _ = federation(deadline_s=60.0)
    shown: list[Presence] = []
    server._state_sync.beside = lambda: shown.append(server.presence())
    answers_at = clock.now + 11.99
    clients[1].bend = lambda reply: reply if clock.now >= answers_at else None

    server.run_round()

    assert {row.state for row in shown[-1].clients} == {"ready"}
    assert [row.why for row in shown[-1].clients] == ["answered in 0.0 s", "asked 12 s ago", "answered in 0.0 s"]
    assert (shown[-1].round, shown[-1].round_seconds, shown[-1].clients[0].last_round) == (0, None, None)
    after = server.presence()
    assert (after.round, after.clients[1].why) == (1, "answered in 12.0 s")
    assert [row.last_round for row in after.clients] == [0, 0, 0]
    assert after.round_seconds is not None


@pytest.mark.parametrize("num_clients", [30, 300])
def test_what_is_handed_over_while_waiting_grows_with_the_clients_and_not_with_their_square(
    federation: Federation, num_clients: int
) -> None:
    """Where replies come one a pull, as in one process. Names of all that are pending would be 45,150 for 300."""
    server, _, grid = federation(num_clients)
    pull, handed = grid.pull_messages, []

    def one_at_a_time(names: list[str]) -> list[Message]:
        handed.append(len(names))
        return pull(names[:1])

    grid.pull_messages = one_at_a_time
    server.config.strategy.deadline_s = 60.0
    server.run_round()

    assert len(server.store.public[0].attendance) == num_clients
    assert sum(handed) <= 64 * num_clients


def test_replies_are_found_wherever_they_stand_among_those_that_wait(federation: Federation) -> None:
    """More messages are under way than one pull asks for, and the first ones are never answered."""
    server, clients, _ = federation(200, deadline_s=1.0)
    for client in clients[:150]:
        client.bend = lambda reply: None

    server.run_round()

    assert server.store.public[0].attendance == tuple(range(150, 200))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c: (b, a, c), r"must hold every one of the 3 committed rounds, got 3 in another order\. Restore"),
        (lambda a, b, c: (a, a, c), r"must hold every one of the 3 committed rounds, got 3 in another order\. Restore"),
        (lambda a, b, c: (a, b.replace("{", '{"more":1,', 1), c), "audit.jsonl, line 2: more must be left out"),
    ],
    ids=["exchanged", "twice", "damaged"],
)
def test_a_resumed_server_refuses_an_audit_log_whose_earlier_lines_are_not_those_of_the_rounds(
    federation: Federation, change: Callable[..., tuple[str, ...]], message: str
) -> None:
    server, _, _ = federation()
    for _ in range(3):
        server.run_round()
    server.store.close()
    log = server.store.folder / AUDIT
    log.write_text("".join(change(*log.read_text().splitlines(keepends=True))))

    with pytest.raises(RunFolderError, match=message):
        federation()
