"""Which nodes a run lets in, at its start and while it goes on, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from scripted import IDENTITY, Client, Federation, Grid, means

from fedzo.errors import ConfigError, ProtocolError
from fedzo.fl.config import Weighting
from fedzo.fl.messages import HelloReply, Refusal, TrainRequest
from fedzo.fl.server import client_registry
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.records.metrics import ClientSetup

pytestmark = pytest.mark.usefixtures("clock")  # no test waits, or depends on how long anything takes


def test_of_two_nodes_of_one_client_the_first_keeps_it_until_it_leaves(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it falls silent, and where the other has the lower id; the other is named once and asked nothing."""
    server, clients, grid = federation()
    server.run_round()
    grid.connect(50, again := Client(0))
    server.run_round()
    grid.nodes[100] = None
    server.run_round()

    assert means(server) == [2.0, 2.0, 2.5]
    assert grid.hellos == [100, 101, 102]
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "node 50 is ignored until node 100 leaves: both are client 0"
    assert [words for words in told if "node 50" in words] == told[:1]
    del grid.nodes[100]
    server.run_round()

    assert means(server)[3:] == [2.0]
    assert grid.hellos == [100, 101, 102, 50]
    assert np.array_equal(again.replica.space.theta, clients[1].replica.space.theta)


def test_a_node_that_the_server_does_not_know_is_named_once_and_asked_nothing_until_it_does(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, _, grid = federation()
    stranger = Client(0)
    grid.nodes[50], grid.nodes[51] = stranger, Client(7)
    grid.indices[51] = 7

    for _ in range(3):
        server.run_round()

    assert (stranger.requests, grid.hellos) == ([], [100, 101, 102])
    assert [record.getMessage() for record in caplog.records] == [
        "node 50 is not registered with this server: it is ignored",
        "node 51 is client 7, and the run has clients 0 to 2: it is ignored",
    ]
    del grid.nodes[101]
    stranger.index = grid.indices[50] = 1  # the server registers it while the run is under way
    stranger.hello = replace(stranger.hello, num_train=20)
    server.run_round()
    assert server.store.public[3].attendance == (0, 1, 2)


def test_a_node_that_the_server_knows_no_longer_is_out_of_the_run(federation: Federation) -> None:
    server, clients, grid = federation()
    server.run_round()
    del grid.indices[101]

    server.run_round()

    assert server.store.public[1].attendance == (0, 2)
    assert len(clients[1].requests) == 1


def test_a_client_whose_old_node_has_left_comes_back_at_once(federation: Federation) -> None:
    server, _, grid = federation()
    server.run_round()
    del grid.nodes[100]
    grid.connect(777, Client(0))

    server.run_round()

    assert means(server) == [2.0] * 2


def test_a_new_node_does_not_answer_for_the_silence_of_the_one_before_it(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, clients, grid = federation(deadline_s=1.5)
    server.run_round()

    def leave(request: TrainRequest) -> None:
        grid.nodes.pop(101, None)
        grid.indices[777] = 1
        grid.nodes.setdefault(777, Client(1))

    clients[1].train = leave
    server.run_round()  # long enough for the new node to be greeted beside it
    assert 777 in grid.hellos
    server.run_round()

    assert [line.attendance for line in server.store.public] == [(0, 1, 2), (0, 2), (0, 1, 2)]
    assert [record.getMessage() for record in caplog.records][-1] == "client 1 came back"  # as a new process


def test_a_node_that_never_answers_its_greeting_holds_up_nobody(federation: Federation, clock: Any) -> None:
    """Also one that comes as a new node in every round."""
    server, _, grid = federation(deadline_s=5.0)
    began = clock.now

    del grid.nodes[101]
    for number in range(5):
        grid.nodes.pop(599 + number, None)
        grid.connect(600 + number, None, index=1)
        server.run_round()

    assert means(server) == [2.0] * 5
    assert clock.now - began < 4.0  # no deadline was waited for


def test_a_node_that_lost_its_greeting_is_greeted_again_and_registers_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Any
) -> None:
    """A node that is started again between two looks has the same id, and knows nothing of what it was asked before."""
    monkeypatch.setattr(client_registry, "SILENT_S", 0.05)
    server, clients, grid = federation()
    clients[1].hello, hello = None, clients[1].hello
    del grid.nodes[101]
    server.run_round()
    grid.nodes[101] = clients[1]
    server.run_round()
    clients[1].hello = hello
    clock.now += 0.06

    server.run_round()  # both greetings are answered, the old one too
    server.run_round()

    assert [line.attendance for line in server.store.public] == [(0, 2)] * 2 + [(0, 1, 2)] * 2
    assert grid.hellos.count(101) == 1 + 1 + 2  # how often it looked, in three rounds
    assert [record.getMessage() for record in caplog.records] == ["client 1 came back"]


def test_a_client_cannot_come_back_with_another_weight(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, _, grid = federation(weighting=Weighting.size)
    server.run_round()
    heavy = Client(0)
    fields = {name: getattr(heavy.hello, name) for name in HelloReply.__dataclass_fields__}
    heavy.hello = HelloReply(**{**fields, "num_train": 10**9})
    del grid.nodes[100]
    grid.connect(777, heavy)

    server.run_round()

    first, second = ({entry.client: entry.weight for entry in line.clients} for line in server.store.audit)
    assert second == {client: first[client] for client in (1, 2)}
    assert "client 0: it must hold the rows that it registered with" in caplog.text


def test_a_resumed_run_goes_on_with_the_registrations_of_its_record(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    _, clients, _ = federation()
    rows = [10, 20, 30]
    record = [ClientSetup(client=k, num_train=n, num_heldout=0, label_counts={"0": n}) for k, n in enumerate(rows)]
    again = ClientRegistry(num_clients=3, identity=IDENTITY)
    again.recall(record)
    clients[1].hello = replace(clients[1].hello, num_train=7)  # its rows are others now
    grid = Grid(clients[:2])
    grid.nodes[555] = Client(2)  # a node that nobody registered

    again.wait(grid, timeout_s=1.0, fewest=1)

    assert sorted(again.nodes) == [0]
    assert [again.clients[k].num_train for k in range(3)] == rows
    assert [row.version for row in again.presence(0).clients] == [clients[0].hello.version, "", ""]
    assert "client 1: it must hold the rows that it registered with (20 to train), got 7" in caplog.text
    assert "the run continues although clients [1, 2] did not register within 1 s" in caplog.text
    assert "came back" not in caplog.text  # it was not here before
    with pytest.raises(ProtocolError, match=r"clients \[0, 1, 2\] did not\. Start them\.$"):
        ClientRegistry(num_clients=3, identity=IDENTITY).wait(Grid([]), timeout_s=0.2, fewest=1)


def test_a_client_cannot_come_back_to_a_resumed_run_with_other_label_counts() -> None:
    client, registry = Client(0), ClientRegistry(num_clients=1, identity=IDENTITY, num_labels=2)
    client.hello = replace(client.hello, label_counts='{"0": 5, "1": 5}')
    registry.recall([ClientSetup(client=0, num_train=10, num_heldout=0, label_counts={"0": 4, "1": 6})])

    with pytest.raises(ProtocolError, match="it must hold the rows that it registered with"):
        registry.wait(Grid([client]), timeout_s=0.2)
    registry.recall([ClientSetup(client=0, num_train=10, num_heldout=0, label_counts={"0": 5, "1": 5})])
    registry.wait(Grid([client]), timeout_s=60.0)  # who was refused is greeted again after some seconds

    assert registry.nodes == {0: 100}


def test_a_client_that_was_not_let_in_may_come_back_mended(federation: Federation) -> None:
    server, clients, grid = federation()
    good, client = clients[1].hello, clients[1]
    del grid.nodes[101]
    server.run_round()
    client.hello, grid.nodes[101] = replace(good, num_train=7), client
    server.run_round()
    del grid.nodes[101]
    server.run_round()
    client.hello, grid.nodes[101] = good, client

    server.run_round()

    assert [line.attendance for line in server.store.public] == [(0, 2)] * 3 + [(0, 1, 2)]


def test_a_newcomer_of_another_run_is_not_let_in(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    server, _, grid = federation()
    stranger = Client(1)
    stranger.hello = HelloReply(num_train=5, config_hash="d" * 64)
    del grid.nodes[101]
    grid.connect(888, stranger)

    server.run_round()

    assert means(server) == [2.0]
    told = "node 888 is refused: client 1: its configuration must be the server's (cccccccccccc), got dddddddddddd"
    assert told in caplog.text


@pytest.mark.parametrize(
    ("hello", "match"),
    [
        ({"base_digest": "x"}, r"client 0: its base weights must be the server's \(b\), got x"),
        ({"tokenizer_digest": "x"}, "its tokenizer must be"),
        ({"architecture_digest": "x"}, r"its config\.json must be the server's \(a\), got x"),
        ({"task_digest": "x"}, "its task must be"),
        (
            {"partition_digest": "x"},
            r"client 0: its partition of the rows must be the server's \(none\), got x\. Give both sides the same rows",
        ),
        ({"num_train": 0}, "at least one training row, got 0"),
        ({"num_train_cut": 11}, "no more of its rows can be cut than it has"),
        ({"label_counts": "[1"}, "label_counts: must be JSON, got Expecting ',' delimiter"),
        ({"label_counts": '{"0": Infinity}'}, "label_counts: must be JSON, got Infinity"),
        ({"label_counts": '{"0": -1}'}, r"label_counts: \['0'\] must be a whole number of 0 to \d+, got -1"),
        ({"label_counts": '{"0": 9}'}, r"label_counts must count its 10 training rows by label \(0 to 1\)"),
        ({"label_counts": '{"2": 10}'}, "label_counts must count its 10 training rows by label"),
        ({"label_counts": '{"\\ud800": 10}'}, "label_counts: must have keys that are text that UTF-8 can hold, got"),
    ],
)
def test_a_node_that_does_not_belong_to_the_run_is_named_and_ends_nothing(
    hello: dict[str, Any], match: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At its start, too; when time is up its reason is told."""
    stranger = Client(0)
    stranger.hello = replace(stranger.hello, **hello)
    grid = Grid([stranger])
    registry = ClientRegistry(num_clients=1, identity=IDENTITY, num_labels=2)
    with pytest.raises(ProtocolError, match=rf"clients \[0\] did not \(node 100 is refused: .*{match}"):
        registry.wait(grid, timeout_s=0.2)
    assert grid.hellos == [100]
    assert len(caplog.records) == 1

    honest = Client(0)
    honest.hello = replace(honest.hello, label_counts='{"0": 4, "1": 6}')
    del grid.nodes[100]
    grid.connect(101, honest)
    registry.wait(grid, timeout_s=5.0)

    assert registry.nodes == {0: 101}


def test_two_clients_of_one_index_and_missing_clients_are_named() -> None:
    grid = Grid([Client(0)])
    grid.connect(555, Client(0))

    with pytest.raises(
        ProtocolError, match=r"clients \[1\] did not \(node 555 is ignored until node 100 leaves: both are"
    ):
        ClientRegistry(num_clients=2, identity=IDENTITY).wait(grid, timeout_s=0.5)
    with pytest.raises(ProtocolError, match=r"clients \[1, 2\] did not. Start them"):
        ClientRegistry(num_clients=3, identity=IDENTITY).wait(Grid([Client(0)]), timeout_s=0.3)


def test_reasons_without_end_are_cut() -> None:
    clients = [Client(index) for index in range(30)]
    for stranger in clients:
        stranger.hello = replace(stranger.hello, base_digest="x" * 128)

    with pytest.raises(ProtocolError, match=r"and 22 more\)\. Start them") as caught:
        ClientRegistry(num_clients=30, identity=IDENTITY).wait(Grid(clients), timeout_s=0.2)

    assert len(str(caught.value)) < 2500


def test_a_client_that_cannot_take_part_ends_the_start_at_once_and_a_run_goes_on_without_it(
    caplog: pytest.LogCaptureFixture,
    clock: Any,
) -> None:
    """Nobody waits for what no retry can mend."""
    clients = [Client(0), Client(1)]
    clients[1].hello = HelloReply(config_hash=IDENTITY.config_hash, refusal=Refusal.rows)
    why = "client 1 cannot take part: refusal 1, its rows cannot be read or encoded. Its own log says why"
    began = clock.now

    with pytest.raises(ConfigError, match=why):
        ClientRegistry(num_clients=2, identity=IDENTITY).wait(Grid(clients), timeout_s=60.0)
    again = ClientRegistry(num_clients=2, identity=IDENTITY)
    again.wait(Grid(clients), timeout_s=60.0, fewest=1)

    assert clock.now - began < 5.0
    assert sorted(again.nodes) == [0]
    assert why in caplog.text


def test_a_client_that_cannot_register_is_asked_now_and_then_and_its_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_registry, "RETRY_S", 0.2)
    client = Client(0)
    client.hello = RecordDict()  # type: ignore[assignment]
    grid = Grid([client])

    with pytest.raises(
        ProtocolError,
        match=r"clients \[0\] did not \(node 100 did not register: HelloReply: expected one record .*\)\. Start them",
    ):
        ClientRegistry(num_clients=1, identity=IDENTITY).wait(grid, timeout_s=1.0)

    assert len(grid.hellos) == 3  # at once, after 0.2 s and after 0.4 s more


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        ({"tokenizer_digest": "x"}, "node 100 is refused: client 0: its tokenizer must be the server's (t), got x."),
        ({"refusal": Refusal.rows}, ""),  # it knows what it has said
    ],
)
def test_a_greeting_says_why_the_one_before_it_did_not_let_the_client_in(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, clock: Any, hello: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(client_registry, "RETRY_S", 0.05)
    server, clients, grid = federation()
    clients[0].hello = replace(clients[0].hello, **hello)
    del grid.nodes[100]
    server.run_round()
    grid.nodes[100] = clients[0]
    for _ in range(2):
        clock.now += 0.06
        server.run_round()

    assert grid.hellos[3:] == [100, 100]
    assert grid.whys[:4] == [""] * 4
    assert grid.whys[4].startswith(why)
    assert bool(grid.whys[4]) == bool(why)


def test_a_greeting_after_silence_says_since_when(federation: Federation) -> None:
    server, clients, grid = federation()
    clients[1].bend = lambda reply: None

    server.run_round()

    assert grid.whys == ["", "", "", "no reply since round 0; it is asked again once it registers"]


@pytest.mark.parametrize(
    "first", [{"base_digest": "x"}, {"refusal": Refusal.rows}], ids=["of another model", "without its rows"]
)
def test_a_client_that_was_mended_while_its_node_stayed_is_let_in(
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    first: dict[str, Any],
    clock: Any,
) -> None:
    """A node that is registered by its key has the same id when it is started again, perhaps between two looks."""
    monkeypatch.setattr(client_registry, "RETRY_S", 0.05)
    server, clients, grid = federation(min_replies=2)
    del grid.nodes[101]
    server.run_round()
    good, clients[1].hello = clients[1].hello, replace(clients[1].hello, **first)
    grid.nodes[101] = clients[1]
    server.run_round()
    clock.now += 0.06
    server.run_round()
    clients[1].hello = good
    clock.now += 0.11

    server.run_round()

    assert [line.attendance for line in server.store.public] == [(0, 2)] * 3 + [(0, 1, 2)]
    assert len(grid.hellos) == 3 + 3
    assert len(caplog.records) == 2  # why it is not let in, and that it is back
