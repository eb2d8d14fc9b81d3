"""Who is waited for, and how long, while clients prepare their rows: on a clock of the test's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
from flwr.app import Message
from flwr.app.message.message import make_message

from fedzo.errors import ConfigError, ProtocolError
from fedzo.fl.config import StrategyConfig
from fedzo.fl.messages import HelloReply, Identity, Refusal, encode
from fedzo.fl.server import client_registry
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.records.metrics import ClientSetup

IDENTITY = Identity(config_hash="c" * 64, base_digest="b", tokenizer_digest="t", task_digest="k")
READY = HelloReply(num_train=9, rows_digest="d" * 64, stages='{"marks.marked": 9.0}', **asdict(IDENTITY))
STARTUP_S = 300.0


def preparing(done: int, total: int = 1000) -> HelloReply:
    return HelloReply(preparing=total, prepared=done, **asdict(IDENTITY))


@dataclass
class Grid:
    """Nodes 100, 101, ... of clients 0, 1, ..., which answer by the time; None is no answer."""

    clock: Any
    answers: list[Callable[[float], HelloReply | None]]
    greeted: dict[int, list[float]] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    _asked: dict[str, Message] = field(default_factory=dict)

    def get_node_ids(self) -> list[int]:
        return [100 + client for client in range(len(self.answers))]

    def client_of(self, node: int) -> int:
        return node - 100

    def registered(self, clients: set[int]) -> set[int]:
        return clients - self.removed

    def restarts(self) -> int:
        return 0

    def unreachable(self, reply: Message) -> bool:
        return False

    def limit_replies(self, number_bytes: int) -> None: ...

    def lost(self, reply: Message) -> bool:
        return False

    def wire_bytes(self) -> None:
        return None

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            self.greeted.setdefault(message.metadata.dst_node_id - 100, []).append(self.clock.now)
            message.metadata.__dict__["_message_id"] = str(len(self._asked))
            self._asked[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, names: list[str]) -> list[Message]:
        replies = []
        for name in names:
            message = self._asked[name]
            answer = self.answers[message.metadata.dst_node_id - 100](self.clock.now)
            if answer is not None:
                content = encode(answer)
                metadata = Message(content, reply_to=message).metadata
                replies.append(make_message(metadata=metadata, content=content))
        return replies


def works(clock: Any, *, until: float, rows_a_second: float) -> Callable[[float], HelloReply]:
    """A client that is ready after so many seconds."""
    began = clock.now
    return lambda now: READY if now - began >= until else preparing(int(rows_a_second * (now - began)))


def test_a_run_begins_when_the_slowest_client_is_ready_however_long_it_prepares(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid = Grid(clock, [lambda now: READY, works(clock, until=3000.0, rows_a_second=0.3)])
    registry, began = ClientRegistry(num_clients=2, identity=IDENTITY), clock.now

    registry.wait(grid, timeout_s=STARTUP_S)

    assert 3000 <= clock.now - began < 3000 + client_registry.PREPARING_S + 1
    assert sorted(registry.nodes) == [0, 1]
    assert registry.clients[1].stages == {"marks.marked": 9.0}
    gaps = [after - before for before, after in zip(grid.greeted[1], grid.greeted[1][1:], strict=False)]
    assert min(gaps) >= 4.9  # every few seconds, and not less often from time to time
    assert max(gaps) <= 5.5
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert 9 <= len(told) <= 11  # every 300 s
    assert told[0] == "client 1 is preparing, 0 of 1000 rows"


@pytest.mark.parametrize("of", ["stuck", "counting down", "of another connection each time"])
def test_a_client_whose_count_stands_still_holds_the_run_no_longer_than_twice_the_time(clock: Any, of: str) -> None:
    began = clock.now
    grid = Grid(clock, [lambda now: preparing(900 if of == "stuck" else 900 - int(now - began) % 900)])
    if of == "of another connection each time":
        grid.get_node_ids = lambda: [] if int(clock.now - began) % 100 == 99 else [100]  # type: ignore[method-assign]

    with pytest.raises(ProtocolError, match=r"clients \[0\] did not \(client 0 is preparing, \d+ of 1000 rows\)"):
        ClientRegistry(num_clients=1, identity=IDENTITY).wait(grid, timeout_s=STARTUP_S)

    assert 2 * STARTUP_S - 10 <= clock.now - began < 2 * STARTUP_S + 2  # an absent one is not waited for


def test_it_that_gets_on_too_slowly_holds_the_run_no_longer_either(clock: Any) -> None:
    """A row in 290 s is in time, and a row in 310 s is not: each row then costs 10 s of the 300."""
    began = clock.now
    grid = Grid(clock, [lambda now: preparing(int((now - began) // 310))])

    with pytest.raises(ProtocolError, match="preparing"):
        ClientRegistry(num_clients=1, identity=IDENTITY).wait(grid, timeout_s=STARTUP_S)

    assert clock.now - began > 10 * STARTUP_S
    clock.now, began = 10_000.0, 10_000.0
    fast = Grid(clock, [lambda now: READY if now - began > 5_000 else preparing(int((now - began) // 290))])
    ClientRegistry(num_clients=1, identity=IDENTITY).wait(fast, timeout_s=STARTUP_S)


def test_a_run_that_has_begun_goes_on_without_a_client_that_prepares_and_lets_it_in_later(clock: Any) -> None:
    began = clock.now
    grid = Grid(clock, [lambda now: READY, works(clock, until=1000.0, rows_a_second=0.9)])
    registry = ClientRegistry(num_clients=2, identity=IDENTITY)
    registry.recall(setups(2))

    registry.wait(grid, timeout_s=STARTUP_S, fewest=1)
    assert sorted(registry.nodes) == [0]
    assert clock.now - began < STARTUP_S + 1  # it does not hold what others can do
    for _ in range(100):
        before = clock.now
        assert registry.refresh(grid) == []
        assert clock.now == before
        registry.beside(grid)  # a round
        clock.now += 6.0
    (told,) = (row for row in registry.presence(7).clients if row.client == 1)
    assert (told.state, told.version) == ("preparing", READY.version)
    counted = re.fullmatch(r"preparing, (\d+) of 1000 rows", told.why)
    assert counted
    assert 0 <= 0.9 * (clock.now - began) - int(counted[1]) < 0.9 * (6.0 + client_registry.PREPARING_S + 6.0)

    clock.now = began + 1001
    registry.beside(grid)
    registry.beside(grid)

    assert registry.refresh(grid) == [1]
    assert {row.state for row in registry.presence(7).clients} == {"ready"}


@pytest.mark.parametrize("fewest", [None, 2], ids=["that begins", "that goes on"])
def test_a_run_waits_for_a_client_that_it_needs_and_that_still_works_for_the_start_before(
    clock: Any, fewest: int | None
) -> None:
    """A node takes the next message when it has answered the last one, and nobody tells it that its round was lost."""
    began = clock.now
    busy = 1.5 * STARTUP_S
    grid = Grid(clock, [lambda now: READY, lambda now: READY if now - began > busy else None])
    registry = ClientRegistry(num_clients=2, identity=IDENTITY)

    registry.wait(grid, timeout_s=STARTUP_S, fewest=fewest, busy_s=600.0)

    assert sorted(registry.nodes) == [0, 1]
    assert busy < clock.now - began < busy + 1


@pytest.mark.parametrize(("busy_s", "waited"), [(600.0, 600), (100.0, 300)], ids=["longer", "shorter"])
def test_a_client_that_says_nothing_holds_the_start_no_longer_than_a_request_or_a_start_may_take(
    clock: Any, busy_s: float, waited: int
) -> None:
    grid, began = Grid(clock, [lambda now: READY, lambda now: None]), clock.now
    told = rf"but within {waited} s clients \[1\] did not \(client 1 has not answered, and may still work on an "

    with pytest.raises(ProtocolError, match=told + r"earlier request\)\. Wait for them"):
        ClientRegistry(num_clients=2, identity=IDENTITY).wait(grid, timeout_s=STARTUP_S, busy_s=busy_s)

    assert waited <= clock.now - began < waited + 1


def test_a_run_that_has_begun_goes_on_without_a_client_that_says_nothing_if_others_are_enough(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid, began = Grid(clock, [lambda now: READY, lambda now: None]), clock.now

    ClientRegistry(num_clients=2, identity=IDENTITY).wait(grid, timeout_s=STARTUP_S, fewest=1, busy_s=600.0)

    assert STARTUP_S <= clock.now - began < STARTUP_S + 1
    assert caplog.messages == [
        "waiting for client 1 (no answer yet)",
        "the run continues although clients [1] did not register within 300 s",
    ]


def test_where_no_client_outlives_a_start_none_still_works_for_an_earlier_one(clock: Any) -> None:
    grid, began = Grid(clock, [lambda now: READY, lambda now: None]), clock.now

    with pytest.raises(ProtocolError, match=r"clients \[1\] did not\. Start them"):
        ClientRegistry(num_clients=2, identity=IDENTITY).wait(grid, timeout_s=STARTUP_S)

    assert STARTUP_S <= clock.now - began < STARTUP_S + 1


def test_a_client_that_is_not_connected_is_no_busy_one(clock: Any) -> None:
    grid, began = Grid(clock, [lambda now: READY]), clock.now

    with pytest.raises(ProtocolError, match=r"clients \[1\] did not\. Start them"):
        ClientRegistry(num_clients=2, identity=IDENTITY).wait(grid, timeout_s=STARTUP_S, busy_s=600.0)

    assert clock.now - began < STARTUP_S + 1


def setups(num_clients: int) -> list[ClientSetup]:
    return [
        ClientSetup(client=k, num_train=9, num_heldout=0, label_counts={}, rows_digest="d" * 64)
        for k in range(num_clients)
    ]


def test_a_run_that_goes_on_does_not_wait_for_a_client_whose_key_was_revoked(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid, began = Grid(clock, [lambda now: READY], removed={1}), clock.now
    registry = ClientRegistry(num_clients=2, identity=IDENTITY)
    registry.recall(setups(2))

    registry.wait(grid, timeout_s=60.0, fewest=1)

    assert clock.now - began < 1.0
    assert sorted(registry.nodes) == [0]
    assert caplog.messages == ["the run continues although client 1 is not registered with this server any more"]


def test_it_waits_for_the_others_as_before_and_for_one_that_is_registered_again(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid, began = Grid(clock, [lambda now: READY if now - began > 30 else None], removed={1}), clock.now
    registry = ClientRegistry(num_clients=3, identity=IDENTITY)
    registry.recall(setups(3))

    registry.wait(grid, timeout_s=60.0, fewest=1)

    assert 60.0 <= clock.now - began < 61.0  # client 2 is registered, and might come
    late = "clients [2] did not register within 60 s; client 1 is not registered with this server any more"
    assert caplog.messages[-1] == f"the run continues although {late}"
    grid.answers += [lambda now: READY, lambda now: READY]
    grid.removed.clear()
    registry.wait(grid, timeout_s=60.0, fewest=1)
    assert sorted(registry.nodes) == [0, 1, 2]


def test_a_run_that_too_few_registered_clients_are_left_for_ends_at_once_and_says_who_has_gone(clock: Any) -> None:
    grid, began = Grid(clock, [lambda now: READY], removed={1}), clock.now
    registry = ClientRegistry(num_clients=2, identity=IDENTITY)
    registry.recall(setups(2))

    with pytest.raises(ConfigError) as told:
        registry.wait(grid, timeout_s=60.0, fewest=2)

    assert clock.now - began < 1.0
    assert str(told.value) == (
        "strategy.min_replies: of 2 clients at least 2 must take part, but clients [1] cannot (client 1 is not "
        "registered with this server any more). Register the keys of clients [1] again (`fedzo server add-client`), "
        "and restart `fedzo server up`."
    )


def test_who_cannot_take_part_is_told_of_beside_who_has_gone(clock: Any) -> None:
    refused = HelloReply(config_hash=IDENTITY.config_hash, refusal=Refusal.rows)
    grid = Grid(clock, [lambda now: READY, lambda now: None, lambda now: refused], removed={1})
    grid.get_node_ids = lambda: [100, 102]  # type: ignore[method-assign]
    registry = ClientRegistry(num_clients=3, identity=IDENTITY)
    registry.recall(setups(3))

    with pytest.raises(ConfigError) as told:
        registry.wait(grid, timeout_s=60.0, fewest=2)

    assert str(told.value) == (
        "strategy.min_replies: of 3 clients at least 2 must take part, but clients [1, 2] cannot (client 2 cannot take "
        f"part: {Refusal.rows.text}. Its own log says why; client 1 is not registered with this server any more). "
        "Register the keys of clients [1] again (`fedzo server add-client`), and restart `fedzo server up`."
    )


def test_nobody_is_told_to_start_a_client_that_could_not_come(clock: Any) -> None:
    """Client 1 has gone, client 2 refuses, client 3 is not up."""
    refused = HelloReply(config_hash=IDENTITY.config_hash, refusal=Refusal.rows)
    grid = Grid(clock, [lambda now: READY, lambda now: None, lambda now: refused], removed={1})
    grid.get_node_ids = lambda: [100, 102]  # type: ignore[method-assign]
    registry = ClientRegistry(num_clients=4, identity=IDENTITY)
    registry.recall(setups(4))

    with pytest.raises(ProtocolError) as told:
        registry.wait(grid, timeout_s=60.0, fewest=2)

    assert str(told.value) == (
        "strategy.startup_s: at least 2 of 4 clients (strategy.min_replies) must register, but within 60 s clients "
        "[1, 2, 3] did not (client 1 is not registered with this server any more; client 2 cannot take part: "
        f"{Refusal.rows.text}. Its own log says why). Start clients [3]. Register the keys of clients [1] again "
        "(`fedzo server add-client`), and restart `fedzo server up`."
    )


def test_a_start_says_whom_it_waits_for_once_each_time_that_it_changes(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 1 connects after 25 s and says nothing, client 2 is not up at all, client 3 prepares its rows."""
    began = clock.now
    grid = Grid(clock, [lambda now: READY, lambda now: None, lambda now: READY, lambda now: preparing(3)])
    grid.get_node_ids = lambda: [100, 103] if clock.now - began < 25 else [100, 101, 103]  # type: ignore[method-assign]

    with pytest.raises(ProtocolError, match=r"within 9 s clients \[1, 2, 3\] did not"):
        ClientRegistry(num_clients=4, identity=IDENTITY).wait(grid, timeout_s=4.5)
    assert [line for line in caplog.messages if line.startswith("waiting")] == []
    clock.now = began
    with pytest.raises(ProtocolError, match=r"clients \[1, 2, 3\] did not"):
        ClientRegistry(num_clients=4, identity=IDENTITY).wait(grid, timeout_s=60.0)

    assert [line for line in caplog.messages if line.startswith("waiting")] == [
        "waiting for client 1 (not connected); client 2 (not connected)",
        "waiting for client 1 (no answer yet); client 2 (not connected)",
    ]


def test_clients_that_come_one_by_one_do_not_fill_the_log(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    began = clock.now
    grid = Grid(clock, [lambda now: READY] * 100)
    everybody = grid.get_node_ids()
    grid.get_node_ids = lambda: everybody[: int(clock.now - began)]  # type: ignore[method-assign]

    ClientRegistry(num_clients=100, identity=IDENTITY).wait(grid, timeout_s=STARTUP_S)

    assert clock.now - began >= 99
    assert 8 <= len(caplog.messages) <= 10  # one in 10 s
    named = "; ".join(f"client {k} (not connected)" for k in range(10, 18))
    assert caplog.messages[0] == f"waiting for {named}; and 82 more"


class Losing(Grid):
    """The first greeting is lost on its way, and an answer takes a second."""

    def pull_messages(self, names: list[str]) -> list[Message]:
        sent = self.greeted[0]
        return super().pull_messages([n for n in names if n != "0" and self.clock.now >= sent[int(n)] + 1.0])


def test_a_greeting_that_was_lost_is_repeated_within_the_start(clock: Any) -> None:
    registry, began = ClientRegistry(num_clients=1, identity=IDENTITY), clock.now

    registry.wait(Losing(clock, [lambda now: READY]), timeout_s=StrategyConfig().startup_s)

    assert registry.nodes == {0: 100}
    assert clock.now - began < StrategyConfig().startup_s / 2


def test_preparing_is_no_failure_and_an_error_of_a_stage_is_asked_after_again(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator mends a key while another client still prepares."""
    began = clock.now
    refused = HelloReply(config_hash=IDENTITY.config_hash, refusal=Refusal.rows)

    def mended(now: float) -> HelloReply:
        return preparing(3) if now - began < 20 else refused if now - began < 100 else READY

    registry = ClientRegistry(num_clients=2, identity=IDENTITY)
    registry.wait(Grid(clock, [mended, works(clock, until=400.0, rows_a_second=2.0)]), timeout_s=STARTUP_S)

    assert sorted(registry.nodes) == [0, 1]
    told = [text for text in (record.getMessage() for record in caplog.records) if "cannot take part" in text]
    assert told == [f"client 0 cannot take part: {Refusal.rows.text}. Its own log says why"]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (replace(preparing(3), prepared=1001), "no more rows can be prepared than the 1000 that it prepares, got 1001"),
        (replace(preparing(3), base_digest="x"), r"its base weights must be the server's \(b\), got x"),
        (replace(preparing(3), partition_digest="x"), r"its partition of the rows must be the server's \(none\)"),
        (replace(READY, stages="[1]"), r"stages: must be an object of 0 to 64 entries, got \[1\]"),
        (replace(READY, stages='{"a.b": NaN}'), "stages: must be JSON, got NaN"),
        (replace(READY, stages='{"<b>": 1.0}'), "stages: must have keys that are letters, digits, .*, got '<b>'"),
    ],
)
def test_what_cannot_be_meant_is_named(clock: Any, answer: HelloReply, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        ClientRegistry(num_clients=1, identity=IDENTITY).wait(Grid(clock, [lambda now: answer]), timeout_s=1.0)


def test_another_result_of_its_stages_is_not_let_in_again(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    registry: Any = ClientRegistry(num_clients=1, identity=IDENTITY)
    registry.recall([ClientSetup(client=0, num_train=9, num_heldout=0, label_counts={}, rows_digest="e" * 64)])

    with pytest.raises(ProtocolError, match="what its stages made of them"):
        registry.wait(Grid(clock, [lambda now: READY]), timeout_s=1.0)


@pytest.mark.parametrize(
    ("answer", "pauses", "looks"),
    [
        (HelloReply(config_hash=IDENTITY.config_hash, refusal=Refusal.rows), [10, 20, 40, 80, 160, 320], 1300),
        (None, [60, 120, 240, 480], 150),
    ],
    ids=["refuses", "says nothing"],
)
def test_a_client_that_is_mended_after_days_is_asked_within_minutes(
    clock: Any, answer: HelloReply | None, pauses: list[float], looks: int
) -> None:
    """A refusal every ten minutes for a week, and there are more of them than a float has powers of two."""
    grid, registry = Grid(clock, [lambda now: answer]), ClientRegistry(num_clients=1, identity=IDENTITY)

    for _ in range(looks):
        registry.refresh(grid)
        clock.now += 10.0 if len(grid.greeted[0]) <= len(pauses) else 600.0

    gaps = [after - before for before, after in zip(grid.greeted[0], grid.greeted[0][1:], strict=False)]
    assert len(gaps) == len(pauses) + looks - 1 - sum(pauses) / 10
    assert gaps == pauses + [600.0] * (len(gaps) - len(pauses))
