"""The round loop against scripted clients: late, broken, behind, damaged, hostile, replaced."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import make_message

from fedzo.config.schema import RunSettings
from fedzo.errors import ConfigError, PluginError, ProtocolError, RunFolderError
from fedzo.fl import log_store
from fedzo.fl.clip import announced_bound
from fedzo.fl.config import FlConfig, Seeds, StrategyConfig, Transport, Weighting
from fedzo.fl.log_files import read_vector
from fedzo.fl.log_store import RunStore
from fedzo.fl.messages import (
    RECORD,
    ArtifactPiece,
    ArtifactReply,
    Hello,
    HelloReply,
    Identity,
    Refusal,
    Status,
    TrainReply,
    TrainRequest,
    VectorReply,
    decode,
    encode,
    scalars_to_bytes,
)
from fedzo.fl.replica import Replica
from fedzo.fl.server import client_registry
from fedzo.fl.server.aggregate import sampling_order
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.fl.server.metrics import round_metrics
from fedzo.fl.server.rounds import FederationError, Server
from fedzo.fl.server.scalar_updates import ScalarUpdates
from fedzo.fl.server.step_policy import STEP_POLICIES
from fedzo.fl.server.step_policy.baselines import NoStepPolicyConfig
from fedzo.fl.server.step_policy.cusum import CusumConfig
from fedzo.fl.server.step_policy.plan import Plan, StepPolicyConfig
from fedzo.fl.server.step_policy.vpcs import VpcsConfig
from fedzo.fl.server.vector_updates import VectorUpdates
from fedzo.records.decode import encode as encode_record
from fedzo.records.folder import AUDIT
from fedzo.records.metrics import ClientSetup, ClientVerdict, MetricRecord, Round, StepDecision
from fedzo.records.presence import Presence
from fedzo.testing.vector_space import VectorSpace
from fedzo.trainers.artifacts import ArtifactStore
from fedzo.zo.directions import SHARED, direction, stream_key
from fedzo.zo.log import pack, unpack
from fedzo.zo.server_optimizer import (
    SERVER_OPTIMIZERS,
    AdamConfig,
    Schedule,
    ServerOptimizer,
    ServerOptimizerConfig,
    Sgd,
    SgdConfig,
)

pytestmark = pytest.mark.usefixtures("clock")  # no test waits, or depends on how long anything takes
SGD = Sgd()
BASE = np.linspace(-1, 1, 9).astype(np.float32)
IDENTITY = Identity(
    config_hash="c" * 64, base_digest="b", tokenizer_digest="t", task_digest="k", architecture_digest="a"
)
ARTIFACT = b"mask"


def new_replica(rule: ServerOptimizer = SGD) -> Replica:
    space = VectorSpace(BASE)
    return Replica(space, server_optimizer=rule, reset=lambda: space.load(BASE), run_seed=1)


class Client:
    """An honest client whose g is its index plus one; tests bend it."""

    def __init__(self, index: int, rule: ServerOptimizer = SGD) -> None:
        self.index = index
        self.rule = rule
        self.replica: Replica | None = None
        self.requests: list[TrainRequest] = []
        self.pieces: list[ArtifactPiece] = []
        self.artifact = ARTIFACT
        self.bend: Callable[[TrainReply], Any] = lambda reply: reply
        self.g_of: Callable[[TrainRequest], Any] = lambda request: np.full(request.steps, index + 1)
        self.hello = HelloReply(
            num_train=10 * (index + 1),
            config_hash=IDENTITY.config_hash,
            base_digest="b",
            tokenizer_digest="t",
            task_digest="k",
            architecture_digest="a",
        )

    def receive(self, piece: ArtifactPiece) -> Any:
        self.pieces.append(piece)
        if piece.offset == len(self.artifact):
            self.artifact += piece.data
        return ArtifactReply(held=len(self.artifact))

    def train(self, request: TrainRequest) -> Any:
        self.requests.append(request)
        if request.space_id != hashlib.sha256(self.artifact).hexdigest():
            return TrainReply(status=Status.bare)
        self.replica = self.replica or new_replica(self.rule)
        status = self.replica.sync(request, [*unpack(request.log)])
        if status is not Status.ok:
            return TrainReply(status=status, position=self.replica.position)
        g = np.asarray(self.g_of(request), np.float32).reshape(request.steps, 1)
        ones = scalars_to_bytes(np.ones_like(g))
        return self.bend(TrainReply(g=scalars_to_bytes(g), loss=ones, dropped=bytes(len(g))))


class Grid:
    """Flower's grid as far as a server sees it; node ids are 100 + index unless a test says otherwise."""

    def __init__(self, clients: list[Client]) -> None:
        self.nodes: dict[int, Client | None] = {100 + client.index: client for client in clients}
        self.registered = {100 + client.index: client.index for client in clients}
        self._waiting: dict[str, Message] = {}
        self._numbers = itertools.count()
        self.hellos: list[int] = []
        self.whys: list[str] = []
        self.wire: tuple[int, int] | None = None

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def client_of(self, node: int) -> int | None:
        return self.registered.get(node)

    def wire_bytes(self) -> tuple[int, int] | None:
        return self.wire

    def restarts(self) -> int:
        return 0

    def unreachable(self, reply: Message) -> bool:
        return False

    def limit_replies(self, number_bytes: int) -> None: ...

    def lost(self, reply: Message) -> bool:
        return False

    def connect(self, node: int, client: Client | None, *, index: int | None = None) -> None:
        """A node comes that the server has registered; it never answers without a client."""
        self.nodes[node] = client
        self.registered[node] = client.index if client else index

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            self._waiting[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        replies = []
        for message_id in message_ids:
            message = self._waiting[message_id]
            client = self.nodes.get(message.metadata.dst_node_id)
            if client is None:
                continue  # a node that is listed but does not answer
            if message.metadata.message_type == "query.hello":
                request: Any = decode(Hello, message.content)
                self.hellos.append(message.metadata.dst_node_id)
                self.whys.append(request.why)
                content: Any = client.hello
            elif message.metadata.message_type == "query.artifact":
                request = decode(ArtifactPiece, message.content)
                content = client.receive(request)
            else:
                request = decode(TrainRequest, message.content)
                content = client.train(request)
            assert request.client == client.index, "a request for somebody else"
            if content is None:
                continue
            content = content if isinstance(content, RecordDict) else encode(content)
            metadata = Message(content, reply_to=message).metadata
            replies.append(make_message(metadata=metadata, content=content))
        return replies


@pytest.fixture
def federation(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., tuple[Server, list[Client], Grid]]]:
    stores = []
    artifact = ArtifactStore(tmp_path_factory.mktemp("artifacts")).put(ARTIFACT)

    def make(num_clients: int = 3, **strategy: Any) -> tuple[Server, list[Client], Grid]:
        server_optimizer: ServerOptimizerConfig = strategy.pop("server_optimizer", SgdConfig(lr=0.5))
        rule = SERVER_OPTIMIZERS.build(server_optimizer, local_steps=1)
        clients = [Client(index, rule) for index in range(num_clients)]
        grid = Grid(clients)
        settings = {name: strategy.pop(name) for name in ("transport", "seeds") if name in strategy}
        gradient = strategy.pop("gradient", None)
        step_policy: StepPolicyConfig = strategy.pop("step_policy", NoStepPolicyConfig())
        stores.append(RunStore(tmp_path))
        replica = new_replica(rule)
        config = RunSettings(
            seed=1,
            fl=FlConfig(num_clients=num_clients, rounds=5, local_steps=2, hash_every=2, **settings),
            strategy=StrategyConfig(**{"deadline_s": 0.2, "startup_s": 1.0, **strategy}),
            server_optimizer=server_optimizer,
            step_policy=step_policy,
        )
        server = Server(
            grid=grid,
            client_registry=ClientRegistry(num_clients=num_clients, identity=IDENTITY),
            replica=replica,
            store=stores[-1],
            artifact=artifact,
            config=config,
            updates=ScalarUpdates(replica, config, gradient),
            step_policy=STEP_POLICIES.build(step_policy, num_clients=num_clients, local_steps=2, run_seed=1),
            sink=_Kept(),
            elapsed=lambda: 0.0,
        )
        server.client_registry.wait(grid, timeout_s=1.0)
        return server, clients, grid

    yield make
    for store in stores:
        store.close()


class _Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[MetricRecord] = []

    def write(self, record: MetricRecord) -> None:
        self.records.append(record)

    def close(self) -> None: ...


def reason_for(server: Server, round: int, client: int) -> str:
    assert client in server.store.audit[round].refused
    return server.sink.records[round].reasons[client]


def means(server: Server) -> list[float]:
    return [float(record.coefficients[0, 0, 0]) for record in server.store.records]


def test_honest_clients_follow_the_server_round_by_round(federation: Any) -> None:
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


def test_a_client_without_the_artifact_gets_it_once(federation: Any) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    clients[1].artifact = b""

    for _ in range(3):
        server.run_round()

    assert means(server) == [2.0] * 3
    assert [len(client.requests) for client in clients] == [3, 4, 3]
    assert [[piece.data for piece in client.pieces] for client in clients] == [[], [b"", ARTIFACT], []]
    assert server.sink.records[0].message_down_bytes > server.sink.records[1].message_down_bytes


def test_a_client_that_refuses_the_artifact_is_named_and_the_round_goes_on(federation: Any) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    clients[1].artifact = b""
    clients[1].receive = lambda piece: ArtifactReply(held=0)

    server.run_round()

    assert means(server) == [2.0]
    assert server.store.rounds[0].attendance == (0, 2)
    assert "piece 1 of 1 (bytes 0 to 3) was sent 2 times: it was not taken" in reason_for(server, 0, 1)


def test_a_client_that_falls_silent_amid_its_artifact_holds_up_nobody_else(federation: Any) -> None:
    server, clients, _ = federation()
    clients[0].artifact = clients[1].artifact = b""
    clients[0].receive = lambda piece: None

    server.run_round()

    assert means(server) == [2.5]
    assert server.store.rounds[0].attendance == (1, 2)
    assert reason_for(server, 0, 0) == "not done within 0.2 s"


def test_the_round_closes_at_its_deadline_with_those_who_answered(federation: Any) -> None:
    server, clients, _ = federation()
    clients[2].bend = lambda reply: None

    server.run_round()

    assert means(server) == [1.5]
    assert server.store.rounds[0].attendance == (0, 1)
    assert "no reply within 0.2 s" in reason_for(server, 0, 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (RecordDict({"else": ConfigRecord()}), "expected one record"),
        (RecordDict({RECORD: ConfigRecord({"g": 7})}), "g must be 0 to 1073741824 bytes, got 7"),
        # Flower cannot count these
        (RecordDict({RECORD: ConfigRecord({"g": b""})}), "g must be left out where it is empty"),
        (RecordDict({RECORD: ConfigRecord({"status": ""})}), "status must be left out where it is empty"),
        (RecordDict({RECORD: ConfigRecord({"g": []})}), "g must be 0 to 1073741824 bytes, got []"),
        (TrainReply(g=b"123", loss=b"", dropped=b""), "g must hold 8 bytes"),
        (
            TrainReply(
                g=scalars_to_bytes(np.array([1e9, 0], np.float32)),
                loss=scalars_to_bytes(np.zeros(2, np.float32)),
                dropped=bytes(2),
            ),
            r"|g| must be at most",
        ),
    ],
)
def test_a_reply_that_cannot_be_used_is_excluded_and_named(federation: Any, bad: Any, reason: str) -> None:
    server, clients, _ = federation()
    clients[0].bend = lambda reply: bad

    server.run_round()

    assert means(server) == [2.5]
    assert reason in reason_for(server, 0, 0)


def test_one_clients_extreme_numbers_move_nothing_from_the_first_round_on(federation: Any) -> None:
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


def test_one_clients_extreme_loss_is_in_no_mean(federation: Any) -> None:
    server, clients, _ = federation(4)
    for client, loss in ((clients[2], 3e38), (clients[3], 2e5)):
        told = scalars_to_bytes(np.full((2, 1), loss, np.float32))
        client.bend = lambda reply, told=told: replace(reply, loss=told)

    server.run_round()

    assert server.sink.records[0].loss == 1.0
    assert "|loss| must be at most 1e+06" in reason_for(server, 0, 2)
    assert reason_for(server, 0, 3) == "|loss| must be at most 100, by the round's other clients, got 200000"


def test_clients_without_a_finite_loss_are_in_no_median_of_g(federation: Any) -> None:
    """Four of seven overflow in the first round; of the other three one is hostile."""
    server, clients, _ = federation(7)
    none = scalars_to_bytes(np.full((2, 1), np.nan, np.float32))
    for client in clients[:4]:
        client.bend = lambda reply: replace(reply, g=bytes(8), loss=none, dropped=b"\1\1")
    for client, g in zip(clients[4:], (10.0, 10.0, 9e5), strict=True):
        client.g_of = lambda request, g=g: np.full(request.steps, g)

    server.run_round()

    assert server.store.rounds[0].attendance == (0, 1, 2, 3, 4, 5)
    assert reason_for(server, 0, 6) == "|g| must be at most 1000, by the round's other clients, got 900000"


def test_clients_that_tell_no_loss_are_in_no_median_of_losses(federation: Any) -> None:
    """Three of seven tell 150, which is far from nothing but not from one another."""
    server, clients, _ = federation(7)
    for client, loss in zip(clients, [np.nan] * 4 + [150.0] * 3, strict=True):
        told = scalars_to_bytes(np.full((2, 1), loss, np.float32))
        client.bend = lambda reply, told=told: replace(reply, loss=told)

    server.run_round()

    assert server.store.rounds[0].attendance == tuple(range(7))


def test_losses_of_all_clients_alike_are_no_lie(federation: Any) -> None:
    """A model that has diverged is told of as such."""
    server, clients, _ = federation()
    for client in clients:
        client.bend = lambda reply: replace(reply, loss=scalars_to_bytes(np.full((2, 1), 9e5, np.float32)))

    server.run_round()

    assert server.store.rounds[0].attendance == (0, 1, 2)


@pytest.mark.parametrize("position", [0, 1, 10**9])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_client_that_lies_about_how_far_behind_it_is_costs_itself_the_round(
    federation: Any, position: int, rounds: int
) -> None:
    """No position that it can name reaches the server's own list of records unchecked."""
    server, clients, _ = federation()
    for _ in range(rounds):
        server.run_round()
    clients[1].train = lambda request: TrainReply(status=Status.behind, position=position)

    server.run_round()

    assert server.store.rounds[-1].attendance == (0, 2)
    assert "position: a client that is behind must be before round" in reason_for(server, rounds, 1)


def test_scalars_clipped_to_a_bound_that_float32_rounds_up_are_taken(federation: Any) -> None:
    """0.1 as float32 is more than 0.1: clients clip to what the server announced."""
    server, clients, _ = federation(max_abs_g=0.1, clip_factor=1e6)
    for client in clients:
        client.g_of = lambda request: np.full(request.steps, 0.05 if request.round == 0 else request.max_abs_g)

    for _ in range(2):
        server.run_round()

    assert clients[0].requests[1].max_abs_g == float(np.float32(0.1)) > 0.1
    assert [round.attendance for round in server.store.rounds] == [(0, 1, 2)] * 2


def test_two_clients_cannot_be_told_apart(federation: Any) -> None:
    """No median tells which of two lies: the default bound takes three clients."""
    server, clients, _ = federation(2)
    clients[1].g_of = lambda request: np.full(request.steps, 1e5)

    server.run_round()

    assert server.store.rounds[0].attendance == (0, 1)


def test_vectors_far_beyond_the_others_are_refused(federation: Any) -> None:
    server, clients, _ = federation()
    make_vectors(server, clients)
    honest = clients[2].train
    clients[2].train = lambda request: replace(honest(request), change=scalars_to_bytes(np.full(9, 3e5, np.float32)))

    server.run_round()

    assert server.store.rounds[0].attendance == (0, 1)
    assert "the norm of change over learning rate and steps must be at most" in reason_for(server, 0, 2)


def test_a_client_cannot_fill_the_logs_with_its_words(federation: Any) -> None:
    server, clients, _ = federation()
    clients[0].bend = lambda reply: RecordDict({"x" * 10**6: ConfigRecord()})

    server.run_round()

    assert len(reason_for(server, 0, 0)) == 400


def test_words_of_a_client_are_quoted_cut_and_on_one_line(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
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
    federation: Any, monkeypatch: pytest.MonkeyPatch
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
        stray = encode(TrainReply())
        asked = Message(stray, dst_node_id=1, message_type="train")
        asked.metadata.__dict__["_message_id"] = "of somebody else"
        return [make_message(metadata=Message(stray, reply_to=asked).metadata, content=stray), *replies]

    monkeypatch.setattr(grid, "push_messages", without_two)
    monkeypatch.setattr(grid, "pull_messages", with_another)

    server.run_round()

    assert server.store.rounds[1].attendance == (2,)
    assert [reason_for(server, 1, client) for client in (0, 1)] == ["not connected"] * 2


def test_a_sample_that_fails_or_is_not_there_is_made_up_by_other_clients(federation: Any) -> None:
    """Else the same clients would be drawn again after every resume."""
    server, clients, grid = federation(6, clients_per_round=2, min_replies=2)
    order = sampling_order(run_seed=1, round=0, num_clients=6, connected=range(6))
    clients[order[0]].bend = lambda reply: TrainReply(g=b"1")
    del grid.nodes[100 + order[1]]

    server.run_round()

    assert server.store.rounds[0].attendance == tuple(sorted(order[2:5]))  # 0 and 2 were asked, then 3 and 4
    assert [len(clients[k].requests) for k in order] == [1, 0, 1, 1, 1, 0]


def test_a_client_that_lost_its_space_and_log_gets_both_again(federation: Any) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    for _ in range(3):
        server.run_round()
    clients[1].replica, clients[1].artifact = None, b""

    server.run_round()

    assert means(server) == [2.0] * 4
    assert np.array_equal(clients[1].replica.space.theta, clients[0].replica.space.theta)


def test_a_damaged_client_is_resynchronised_by_values_once(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    for _ in range(2):
        server.run_round()
    clients[0].replica.space.theta[3] += 1

    server.run_round()

    assert means(server) == [2.0] * 3
    assert [bool(request.values) for request in clients[0].requests] == [False, False, False, True]
    assert "its state is not the server's" in caplog.text


def test_a_client_whose_replay_differs_again_is_left_out_until_it_starts_anew(federation: Any) -> None:
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


def test_a_client_that_never_reaches_the_state_is_sent_the_values_once(federation: Any) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    server.run_round()
    clients[0].bend = lambda reply: TrainReply(status=Status.mismatch)

    server.run_round()
    server.run_round()

    assert means(server) == [2.0, 2.5, 2.5]
    assert "must be the server's after the values that it was sent" in reason_for(server, 1, 0)
    assert [bool(request.values) for request in clients[0].requests] == [False, False, True, False]


def test_a_client_that_always_lacks_the_space_is_left_out_after_a_few_tries(federation: Any) -> None:
    server, clients, _ = federation(deadline_s=10.0)
    server.run_round()
    clients[0].bend = lambda reply: TrainReply(status=Status.bare)

    server.run_round()

    assert means(server) == [2.0, 2.5]
    assert "could not reach the server's state" in reason_for(server, 1, 0)
    assert len(clients[0].requests) == 1 + 4


def test_helping_a_slow_client_ends_at_the_rounds_deadline(federation: Any, clock: Any) -> None:
    server, clients, _ = federation(deadline_s=0.3)
    asked: list[TrainRequest] = []

    def slow(request: TrainRequest) -> TrainReply:
        asked.append(request)
        clock.now += 0.2
        return TrainReply(status=Status.bare)

    clients[1].train = slow
    server.run_round()

    assert len(asked) == 2  # the second answer comes after the deadline
    assert reason_for(server, 0, 1) == "not done within 0.3 s"
    assert means(server) == [2.0]


def test_a_run_that_has_diverged_says_so_once(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    server, clients, _ = federation()

    def drop(reply: TrainReply) -> TrainReply:
        none = scalars_to_bytes(np.full((2, 1), np.nan, np.float32))
        return dataclasses.replace(reply, g=bytes(8), loss=none, dropped=b"\1\1")

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


def test_probes_that_change_no_loss_are_not_called_a_divergence(
    federation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, clients, _ = federation()
    for client in clients:  # as clients that send signs do, where both sides of a probe have the same loss
        client.bend = lambda reply: dataclasses.replace(reply, g=bytes(8), dropped=b"\1\1")

    server.run_round()

    assert "no probe of any client changed its loss" in caplog.text
    assert "diverged" not in caplog.text


def test_value_transport_sends_the_values_each_round_and_no_log(federation: Any) -> None:
    server, clients, _ = federation(transport=Transport.values)

    for _ in range(3):
        server.run_round()

    assert [len(request.values) for request in clients[0].requests] == [0, 36, 36]
    assert [len(request.log) for request in clients[0].requests] == [0, 0, 0]


@pytest.mark.parametrize("transport", list(Transport))
def test_clients_at_one_place_are_sent_one_and_the_same_object(federation: Any, transport: Transport) -> None:
    """Logs and values may be as long as the model. The last client has not reached the second round."""
    server, clients, _ = federation(transport=transport)
    server.run_round()
    clients[2].bend = lambda reply: TrainReply(status=Status.behind, position=9)
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


def make_vectors(server: Server, clients: list[Client]) -> None:
    """Let all send vectors: a client moves each value by its index plus one, a step."""

    def train(client: Client, request: TrainRequest) -> Any:
        client.requests.append(request)
        client.replica = client.replica or new_replica()
        status = client.replica.sync(request, [*unpack(request.log)])
        change = np.full(len(BASE), (client.index + 1) * request.steps, np.float32)
        loss = np.ones(request.steps, np.float32)
        return VectorReply(
            status=status,
            position=client.replica.position,
            change=scalars_to_bytes(change),
            loss=scalars_to_bytes(loss),
        )

    server.updates = VectorUpdates(len(BASE), server.config)
    for client in clients:
        client.train = partial(train, client)  # type: ignore[method-assign]


def test_vectors_are_followed_record_by_record_and_a_late_client_gets_the_values(federation: Any) -> None:
    server, clients, grid = federation()
    make_vectors(server, clients)
    node = next(name for name, client in grid.nodes.items() if client is clients[2])
    grid.nodes[node] = None  # listed, but it does not answer
    for _ in range(3):
        server.run_round()
    grid.nodes[node] = clients[2]
    clients[1].replica = None  # a process that was started again, and that the server does not know of

    server.run_round()

    vector = 4 * len(BASE)
    assert [len(request.log) for request in clients[0].requests] == [0, *[54 + vector] * 3]
    assert {len(request.values) for request in clients[0].requests} == {0}
    late = clients[2].requests[-1]
    assert (len(late.log), len(late.values), late.from_round) == (0, vector, 3)
    assert [len(request.values) for request in clients[1].requests[-2:]] == [0, vector]  # first behind, then helped
    expected = BASE - np.float32(3 * 2 * (1 + 2) / 2 + 2 * (1 + 2 + 3) / 3)
    assert server.replica.space.values() == pytest.approx(expected, rel=1e-6)
    rounds = [record for record in server.sink.records if isinstance(record, Round)]
    assert [record.payload_up_bytes for record in rounds] == [2 * vector] * 3 + [3 * vector]
    assert [record.payload_down_bytes for record in rounds] == [2 * vector] * 3 + [(1 + 1 + 2) * vector]


def test_a_round_reads_the_vector_that_it_sends_once(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients are sent it."""
    reads: list[int] = []

    def counted(folder: Path, digest: str, round: int, size: int) -> Any:
        reads.append(round)
        return read_vector(folder, digest, round, size)

    monkeypatch.setattr(log_store, "read_vector", counted)
    server, clients, _ = federation()
    make_vectors(server, clients)

    for _ in range(3):
        server.run_round()

    assert reads == [0, 1]
    assert clients[0].requests[2].log == clients[1].requests[2].log == pack(server.store.records[1:2])


def test_a_vector_that_cannot_be_used_is_excluded_and_named(federation: Any) -> None:
    server, clients, _ = federation()
    make_vectors(server, clients)
    clients[1].train = lambda request: VectorReply(change=b"1234", loss=bytes(8))

    server.run_round()

    assert reason_for(server, 0, 1) == "change must hold 36 bytes (float32 [9]), got 4"
    assert server.replica.space.values() == pytest.approx(BASE - np.float32(2 * (1 + 3) / 2), rel=1e-6)


def test_of_two_nodes_of_one_client_the_first_keeps_it_until_it_leaves(
    federation: Any, caplog: pytest.LogCaptureFixture
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
    federation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, _, grid = federation()
    stranger = Client(0)
    grid.nodes[50], grid.nodes[51] = stranger, Client(7)
    grid.registered[51] = 7

    for _ in range(3):
        server.run_round()

    assert (stranger.requests, grid.hellos) == ([], [100, 101, 102])
    assert [record.getMessage() for record in caplog.records] == [
        "node 50 is not registered with this server: it is ignored",
        "node 51 is client 7, and the run has clients 0 to 2: it is ignored",
    ]
    del grid.nodes[101]
    stranger.index = grid.registered[50] = 1  # the server registers it while the run is under way
    stranger.hello = replace(stranger.hello, num_train=20)
    server.run_round()
    assert server.store.rounds[3].attendance == (0, 1, 2)


def test_a_node_that_the_server_knows_no_longer_is_out_of_the_run(federation: Any) -> None:
    server, clients, grid = federation()
    server.run_round()
    del grid.registered[101]

    server.run_round()

    assert server.store.rounds[1].attendance == (0, 2)
    assert len(clients[1].requests) == 1


def test_a_client_whose_old_node_has_left_comes_back_at_once(federation: Any) -> None:
    server, _, grid = federation()
    server.run_round()
    del grid.nodes[100]
    grid.connect(777, Client(0))

    server.run_round()

    assert means(server) == [2.0] * 2


def test_a_client_that_says_nothing_costs_one_deadline_until_it_answers_a_greeting(
    federation: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Any
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

    assert server.store.rounds[10].attendance == (0, 1, 2)
    assert clients[1].requests[-1].from_round == 1  # no more of the log is sent than it lacks
    assert [record.getMessage() for record in caplog.records] == [
        "client 1: no reply within 0.2 s",
        "client 1 answers again",
    ]


def test_a_new_node_does_not_answer_for_the_silence_of_the_one_before_it(
    federation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, clients, grid = federation(deadline_s=1.5)
    server.run_round()

    def leave(request: TrainRequest) -> None:
        grid.nodes.pop(101, None)
        grid.registered[777] = 1
        grid.nodes.setdefault(777, Client(1))

    clients[1].train = leave
    server.run_round()  # long enough for the new node to be greeted beside it
    assert 777 in grid.hellos
    server.run_round()

    assert [line.attendance for line in server.store.rounds] == [(0, 1, 2), (0, 2), (0, 1, 2)]
    assert [record.getMessage() for record in caplog.records][-1] == "client 1 came back"  # as a new process


def test_a_client_that_answers_greetings_and_no_more_costs_a_deadline_after_1_2_4_rounds_only(
    federation: Any, clock: Any
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


def test_a_client_that_answers_again_is_asked_in_every_round(federation: Any) -> None:
    server, clients, _ = federation()
    clients[1].bend = lambda reply: None
    server.run_round()
    server.run_round()  # silent twice: asked again in round 3
    clients[1].bend = lambda reply: reply

    for _ in range(4):
        server.run_round()

    assert [line.attendance for line in server.store.rounds] == [(0, 2)] * 3 + [(0, 1, 2)] * 3


def test_clients_that_were_silent_are_asked_early_where_the_others_are_too_few(federation: Any) -> None:
    server, clients, _ = federation(min_replies=2)
    clients[0].bend = lambda reply: None
    server.run_round()
    server.run_round()  # silent twice: asked again in round 3
    clients[0].bend = lambda reply: reply
    clients[1].bend = lambda reply: TrainReply(g=b"1")

    server.run_round()

    assert server.store.rounds[2].attendance == (0, 2)


def test_who_answers_again_while_a_round_lacks_replies_is_asked_in_it(federation: Any) -> None:
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

    assert [line.attendance for line in server.store.rounds] == [(0, 1, 2), (0, 2), (0, 1)]


def test_a_client_that_is_heard_again_at_once_misses_one_round(federation: Any) -> None:
    server, clients, _ = federation()
    clients[1].bend = lambda reply: None
    server.run_round()
    clients[1].bend = lambda reply: reply

    server.run_round()

    assert [line.attendance for line in server.store.rounds] == [(0, 2), (0, 1, 2)]


def test_a_node_that_never_answers_its_greeting_holds_up_nobody(federation: Any, clock: Any) -> None:
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
    federation: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Any
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

    assert [line.attendance for line in server.store.rounds] == [(0, 2)] * 2 + [(0, 1, 2)] * 2
    assert grid.hellos.count(101) == 1 + 1 + 2  # how often it looked, in three rounds
    assert [record.getMessage() for record in caplog.records] == ["client 1 came back"]


def test_who_registers_while_a_round_waits_takes_part_in_the_next(federation: Any) -> None:
    server, clients, grid = federation(deadline_s=1.5)
    del grid.nodes[101]
    server.run_round()

    def late(request: TrainRequest) -> Any:
        grid.registered[777] = 1
        grid.nodes.setdefault(777, Client(1))
        return None if request.round == 1 else Client.train(clients[0], request)

    clients[0].train = late  # type: ignore[method-assign]
    server.run_round()

    assert 777 in grid.hellos
    assert [line.attendance for line in server.store.rounds] == [(0, 2), (2,)]
    server.run_round()
    assert server.store.rounds[2].attendance == (0, 1, 2)


def test_too_few_clients_are_waited_for(federation: Any) -> None:
    """All sites may be restarted at the same time."""
    server, _, grid = federation(deadline_s=5.0, min_replies=3)
    server.run_round()
    back = {777 + index: Client(index) for index in range(3)}
    grid.registered |= {node: client.index for node, client in back.items()}
    looks = iter([{}, {}, back])
    grid.get_node_ids = lambda: list(grid.nodes)  # type: ignore[method-assign]
    seen = grid.get_node_ids

    def look() -> list[int]:
        grid.nodes = next(looks, back)
        return seen()

    grid.get_node_ids = look  # type: ignore[method-assign]
    server.run_round()

    assert server.store.rounds[1].attendance == (0, 1, 2)


def cut(
    grid: Grid,
    clock: Any,
    seconds: float,
    *,
    nodes: Collection[int] = (100, 101, 102),
    listed_s: float = 5.0,
    told_s: float = 0.0,
) -> None:
    """Let nodes be out of reach for so long, from now on; when the grid drops them, and says so, are two things."""
    pull, listed, began = grid.pull_messages, grid.get_node_ids, clock.now

    def pull_what_is_reached(names: list[str]) -> list[Message]:
        lost = [
            name for name in names if clock.now < began + seconds and grid._waiting[name].metadata.dst_node_id in nodes
        ]
        silent = clock.now < began + told_s
        told = [Message(RecordDict(), reply_to=grid._waiting[name]).metadata for name in lost if not silent]
        error = Error(code=5, reason="Error: Node Unavailable")
        return [make_message(metadata=each, error=error) for each in told] + pull(
            [name for name in names if name not in lost]
        )

    def list_them() -> list[int]:
        return [node for node in listed() if node not in nodes or not began + listed_s <= clock.now < began + seconds]

    grid.pull_messages = pull_what_is_reached  # type: ignore[method-assign]
    grid.get_node_ids = list_them  # type: ignore[method-assign]
    grid.unreachable = lambda reply: reply.has_error()  # type: ignore[method-assign]


@pytest.mark.parametrize("clients_per_round", [0, 2])
@pytest.mark.parametrize(("listed_s", "told_s"), [(5.0, 0.0), (1.0, 30.0)], ids=["told first", "dropped first"])
def test_a_line_that_is_down_for_two_minutes_ends_no_run(
    federation: Any, clock: Any, clients_per_round: int, listed_s: float, told_s: float
) -> None:
    server, _, grid = federation(deadline_s=600.0, startup_s=300.0, clients_per_round=clients_per_round)
    server.run_round()
    cut(grid, clock, 120.0, listed_s=listed_s, told_s=told_s)

    server.run_round()

    assert [len(line.attendance) for line in server.store.rounds] == [clients_per_round or 3] * 2
    server.run_round()
    assert len(server.store.rounds[2].attendance) == (clients_per_round or 3)


def test_a_round_keeps_the_replies_that_it_has_while_it_waits_for_others(federation: Any, clock: Any) -> None:
    server, clients, grid = federation(deadline_s=600.0, startup_s=300.0, min_replies=3)
    server.run_round()
    cut(grid, clock, 60.0, nodes=[102])

    server.run_round()

    assert server.store.rounds[1].attendance == (0, 1, 2)
    assert [len(client.requests) for client in clients] == [2, 2, 2]


def test_a_line_that_stays_down_ends_the_run_after_startup_s_or_when_it_is_asked_to_stop(
    federation: Any, clock: Any
) -> None:
    server, _, grid = federation(deadline_s=600.0, startup_s=300.0)
    cut(grid, clock, 1e9)
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


def test_presence_within_a_round_says_who_is_waited_for_since_when(federation: Any, clock: Any) -> None:
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


def test_a_client_cannot_come_back_with_another_weight(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
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


def test_what_a_client_declares_counts_within_the_cap_and_the_server_says_so(
    federation: Any, caplog: pytest.LogCaptureFixture
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


def test_a_resumed_run_goes_on_with_the_registrations_of_its_record(
    federation: Any, caplog: pytest.LogCaptureFixture
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


def test_a_client_that_was_not_let_in_may_come_back_mended(federation: Any) -> None:
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

    assert [line.attendance for line in server.store.rounds] == [(0, 2)] * 3 + [(0, 1, 2)]


def test_a_newcomer_of_another_run_is_not_let_in(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
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
    federation: Any, monkeypatch: pytest.MonkeyPatch, clock: Any, hello: dict[str, Any], why: str
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


def test_a_greeting_after_silence_says_since_when(federation: Any) -> None:
    server, clients, grid = federation()
    clients[1].bend = lambda reply: None

    server.run_round()

    assert grid.whys == ["", "", "", "no reply since round 0; it is asked again once it registers"]


@pytest.mark.parametrize(
    "first", [{"base_digest": "x"}, {"refusal": Refusal.rows}], ids=["of another model", "without its rows"]
)
def test_a_client_that_was_mended_while_its_node_stayed_is_let_in(
    federation: Any,
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

    assert [line.attendance for line in server.store.rounds] == [(0, 2)] * 3 + [(0, 1, 2)]
    assert len(grid.hellos) == 3 + 3
    assert len(caplog.records) == 2  # why it is not let in, and that it is back


@pytest.mark.parametrize("num_clients", [30, 300])
def test_what_is_handed_over_while_waiting_grows_with_the_clients_and_not_with_their_square(
    federation: Any, num_clients: int
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

    assert len(server.store.rounds[0].attendance) == num_clients
    assert sum(handed) <= 64 * num_clients


def test_replies_are_found_wherever_they_stand_among_those_that_wait(federation: Any) -> None:
    """More messages are under way than one pull asks for, and the first ones are never answered."""
    server, clients, _ = federation(200, deadline_s=1.0)
    for client in clients[:150]:
        client.bend = lambda reply: None

    server.run_round()

    assert server.store.rounds[0].attendance == tuple(range(150, 200))


def test_all_replies_bad_ends_the_run_and_keeps_the_log(federation: Any) -> None:
    server, clients, _ = federation()
    server.run_round()
    for client in clients:
        client.bend = lambda reply: TrainReply(g=b"1")

    with pytest.raises(FederationError, match=r"round 1: strategy\.min_replies = 1 usable replies are needed, got 0"):
        server.run_round()

    assert len(server.store.records) == 1


def test_an_error_tells_as_many_reasons_as_a_person_reads(federation: Any) -> None:
    server, clients, _ = federation(20)
    for client in clients:
        client.bend = lambda reply: TrainReply(g=b"1")

    with pytest.raises(FederationError, match=r"client 7: .*; and 12 more\)\. The log is kept") as caught:
        server.run_round()

    assert "client 8:" not in str(caught.value)


@pytest.mark.parametrize("seeds", [Seeds.shared, Seeds.per_client])
def test_what_a_client_missed_counts_where_it_is_sent(federation: Any, seeds: Seeds) -> None:
    """One of three a round, a restart in between: the oracle is what the clients were sent."""
    server, clients, _ = federation(seeds=seeds, clients_per_round=1)
    told = []
    for _ in range(2):
        server.run_round()
    told += server.sink.records
    server.store.close()
    server, others, _ = federation(seeds=seeds, clients_per_round=1)
    server.catch_up()
    for _ in range(8):
        server.run_round()
    told += server.sink.records

    sizes = [record.coefficients.nbytes for record in server.store.records]
    last = {client: r for r, line in enumerate(server.store.audit) for client in [line.clients[0].client]}
    received = {
        client: {record.round for one in (clients, others) for q in one[client].requests for record in unpack(q.log)}
        for client in last
    }
    assert len(set(last.values())) == 3, "a test of nothing"
    assert received == {client: set(range(rounds)) for client, rounds in last.items()}
    assert sum(line.payload_down_bytes for line in told) == sum(sum(sizes[: r + 1]) for r in last.values())


# --- server optimizers and the clip ---


@pytest.mark.parametrize("transport", list(Transport))
def test_clients_follow_a_rule_that_remembers_by_log_and_by_values(federation: Any, transport: Transport) -> None:
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
    federation: Any, caplog: pytest.LogCaptureFixture
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


def test_the_schedule_is_in_the_requests_and_in_the_log(federation: Any) -> None:
    server_optimizer = SgdConfig(lr=0.5, schedule=Schedule.linear, final_lr_share=0.2)
    server, clients, _ = federation(server_optimizer=server_optimizer)

    for _ in range(5):
        server.run_round()

    expected = [float(np.float32(lr)) for lr in (0.5, 0.4, 0.3, 0.2, 0.1)]
    assert [record.lr for record in server.store.records] == expected
    assert [request.lr for request in clients[0].requests] == expected


def test_the_bound_is_announced_from_the_second_round_on_and_what_exceeds_it_is_refused(federation: Any) -> None:
    server, clients, _ = federation(clip_factor=1.25, clip_rounds=1)
    for _ in range(2):
        server.run_round()  # g is 1, 2, 3: the third client does not clip
    server.run_round()

    # median 2; then of 1 and 2 alone
    assert [request.max_abs_g for request in clients[0].requests] == [0.0, 2.5, 1.875]
    assert "|g| must be at most the announced bound 2.5, got 3" in reason_for(server, 1, 2)
    assert server.store.rounds[1].attendance == (0, 1)
    assert server.store.rounds[2].attendance == (0,)
    assert [record.clip_bound for record in server.sink.records] == [None, 2.5, 1.875]


def test_a_resumed_server_announces_the_bound_of_an_unbroken_one(federation: Any) -> None:
    server, clients, _ = federation(clip_factor=2.0, clip_rounds=3)
    for _ in range(2):
        server.run_round()
    server.store.close()

    again, others, _ = federation(clip_factor=2.0, clip_rounds=3)
    again.catch_up()
    again.run_round()

    assert clients[0].requests[-1].max_abs_g == others[0].requests[0].max_abs_g == 4.0


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
    federation: Any, change: Callable[..., tuple[str, ...]], message: str
) -> None:
    server, _, _ = federation()
    for _ in range(3):
        server.run_round()
    server.store.close()
    log = server.store.folder / AUDIT
    log.write_text("".join(change(*log.read_text().splitlines(keepends=True))))

    with pytest.raises(RunFolderError, match=message):
        federation()


def test_what_is_told_of_the_clients_decides_no_bound(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_clients(*round: Any, **told: Any) -> Round:
        return replace(round_metrics(*round, **told), clients=(), loss=None, mean_abs_g=None)

    monkeypatch.setattr("fedzo.fl.server.rounds.round_metrics", without_clients)
    server, clients, _ = federation(clip_factor=2.0, clip_rounds=3)

    for _ in range(2):
        server.run_round()  # g is 1, 2, 3

    assert [request.max_abs_g for request in clients[0].requests] == [0.0, 4.0]
    assert [record.clients for record in server.sink.records] == [(), ()]


def test_the_bound_needs_the_last_rounds_alone(federation: Any) -> None:
    server, clients, _ = federation(clip_factor=100.0, clip_rounds=2)
    for factor in (1, 5, 3, 2):  # g of the clients is so many times 1, 2 and 3
        for client in clients:
            client.g_of = lambda request, g=factor * (client.index + 1): np.full(request.steps, g)
        server.run_round()
    server.store.close()

    again, _, _ = federation(clip_factor=100.0, clip_rounds=2)

    # of 3, 6, 9, 2, 4, 6, twice each
    assert server.updates.bound() == again.updates.bound() == 500.0
    audit, records = list(again.store.audit), again.store.records
    assert announced_bound(audit, records, factor=100.0, rounds=2) == 500.0


# --- what the audit log keeps of the local steps ----------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [Seeds.shared, Seeds.per_client])
def test_the_audit_line_holds_the_gradient_along_every_direction_and_the_lr(federation: Any, seeds: Seeds) -> None:
    gradient = np.linspace(-2, 3, len(BASE)).astype(np.float32)
    server, clients, _ = federation(seeds=seeds, gradient=torch.from_numpy(gradient))
    clients[1].bend = lambda reply: None
    owners = {Seeds.shared: [SHARED], Seeds.per_client: [0, 2]}[seeds]

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


def test_without_a_gradient_the_audit_line_says_so(federation: Any) -> None:
    server, _, _ = federation()

    server.run_round()

    assert server.store.audit[0].xi is None


# --- step policies ---

VPCS = VpcsConfig(calibration_steps=9, initial_steps=3, later_steps=3)


def falling(request: TrainRequest) -> np.ndarray:
    """Dies away along the client's own path, and is 4 in a first step."""
    return 4.0 * 0.25 ** np.arange(request.steps)


def calibrated(federation: Any, **settings: Any) -> Any:
    server, clients, grid = federation(4, step_policy=VPCS, **settings)
    clients[3].g_of = falling
    return server, clients, grid


@pytest.mark.parametrize("transport", list(Transport))
@pytest.mark.parametrize(
    "server_optimizer", [SgdConfig(lr=0.5, weight_decay=0.1), AdamConfig(lr=0.5)], ids=["sgd", "adam"]
)
def test_the_calibration_round_measures_and_leaves_the_model_where_it_was(
    federation: Any, server_optimizer: ServerOptimizerConfig, transport: Transport
) -> None:
    server, clients, _ = calibrated(
        federation, server_optimizer=server_optimizer, transport=transport, clients_per_round=2
    )

    record = server.run_round()

    assert (record.lr, record.coefficients.shape) == (0.0, (9, 1, 1))
    assert not record.coefficients.any()
    assert server.replica.space.theta.tobytes() == BASE.tobytes()
    assert not server.replica.moments.any()
    (line,) = server.store.audit
    assert line.lr == 0.5
    assert [entry.client for entry in line.clients] == [0, 1, 2, 3]  # all of them, whoever a round samples
    assert line.clients[3].g[:, 0].tolist() == falling(clients[3].requests[0]).tolist()
    assert [(request.steps, request.lr) for request in clients[0].requests] == [(9, 0.5)]
    server.run_round()
    assert server.store.audit[1].refused == ()  # clients arrive at the same state by the log and by values


def test_a_calibration_steps_at_the_full_learning_rate_whatever_the_warm_up(federation: Any) -> None:
    server, clients, _ = calibrated(federation, server_optimizer=SgdConfig(lr=0.5, warmup_rounds=4))

    server.run_round()
    server.run_round()

    assert [request.lr for request in clients[0].requests] == [0.5, pytest.approx(0.2)]


def test_a_flagged_client_stops_early_and_goes_on_in_its_own_rows(federation: Any) -> None:
    server, clients, _ = calibrated(federation)

    for _ in range(4):
        server.run_round()

    assert [request.steps for request in clients[0].requests] == [9, 2, 2, 2]
    assert [request.steps for request in clients[3].requests] == [9, 1, 1, 1]
    assert [request.used for request in clients[0].requests] == [0, 9, 11, 13]
    assert [request.used for request in clients[3].requests] == [0, 9, 10, 11]
    record = server.store.records[1]
    assert record.coefficients[:, 0, 0].tolist() == [(1 + 2 + 3 + 4) / 4, (1 + 2 + 3) / 4]
    rounds = [record for record in server.sink.records if isinstance(record, Round)]
    assert [row.steps for row in rounds[1].clients] == [2, 2, 2, 1]
    assert rounds[1].payload_up_bytes == 4 * 7


def test_a_decision_is_told_once_with_what_it_rests_on(federation: Any) -> None:
    server, _, _ = calibrated(federation)

    for _ in range(5):
        server.run_round()

    (told,) = [record for record in server.sink.records if isinstance(record, StepDecision)]
    assert (told.round, told.fallback, told.windows) == (1, False, {"initial": (0, 3), "later": (6, 9)})
    assert [row.flagged for row in told.clients] == [False, False, False, True]
    assert [row.steps for row in told.clients] == [2, 2, 2, 1]
    assert [row.statistics["ratio"] for row in told.clients] == [1.0, 1.0, 1.0, 4.0**6]
    later = 4 * (4.0**-6 + 4.0**-7 + 4.0**-8) / 3
    assert told.clients[3].statistics["level"] == pytest.approx(2 / later)


def test_where_too_many_are_flagged_all_take_fewer_steps(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    server, clients, _ = federation(4, step_policy=VPCS)
    for client in clients[1:]:
        client.g_of = falling

    server.run_round()
    server.run_round()

    assert [client.requests[1].steps for client in clients] == [1, 1, 1, 1]
    assert [record.fallback for record in server.sink.records if isinstance(record, StepDecision)] == [True]
    assert "flagged: 1, 2, 3; this is more than step_policy.max_share, so all clients take 1 of 2 steps" in caplog.text


def test_a_client_that_was_absent_from_the_calibration_is_not_judged(federation: Any) -> None:
    server, clients, _ = calibrated(federation)
    clients[3].bend = lambda reply: None
    server.run_round()
    clients[3].bend = lambda reply: reply

    server.run_round()

    assert clients[3].requests[-1].steps == 2
    (told,) = [record for record in server.sink.records if isinstance(record, StepDecision)]
    assert told.clients[3] == ClientVerdict(client=3, flagged=False, steps=2, statistics={})


@pytest.mark.parametrize("step_policy", [VPCS, CusumConfig(threshold=2.0)], ids=["vpcs", "cusum"])
@pytest.mark.parametrize("after", range(1, 5))
def test_a_resumed_server_selects_as_an_unbroken_one(
    federation: Any, tmp_path: Path, step_policy: StepPolicyConfig, after: int
) -> None:
    def play(rounds: int) -> tuple[Any, list[Client]]:
        server, clients, _ = federation(4, step_policy=step_policy)
        clients[3].g_of = falling if step_policy is VPCS else lambda request: np.full(request.steps, 0.1)
        server.catch_up()
        for _ in range(rounds):
            server.run_round()
        return server, clients

    unbroken, asked = play(5)
    expected = [request.steps for request in asked[3].requests]
    assert expected == ([9, 1, 1, 1, 1] if step_policy is VPCS else [2, 2, 1, 1, 1])
    lines, digest = list(map(encode_record, unbroken.store.rounds)), unbroken.replica.space.digest()
    unbroken.store.close()
    for file in tmp_path.iterdir():
        file.unlink()
    before, first = play(after)
    before.store.close()

    resumed, then = play(5 - after)

    assert [request.steps for client in (first, then) for request in client[3].requests] == expected
    assert list(map(encode_record, resumed.store.rounds)) == lines
    assert resumed.replica.space.digest() == digest


def test_wire_bytes_of_a_round_are_those_since_the_round_before(federation: Any) -> None:
    server, _, grid = federation()
    server.run_round()
    grid.wire = (1000, 5000)
    server.run_round()  # the count begins here
    grid.wire = (1700, 5100)
    server.run_round()

    told = [(line.wire_up_bytes, line.wire_down_bytes) for line in server.sink.records]
    assert told == [(None, None), (None, None), (700, 100)]
    assert "wire_up_bytes" not in encode_record(server.sink.records[0])


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        ({0: 1, 1: 1, 2: 1}, "must give a fedzo.fl.server.step_policy.plan.Plan, got"),
        (Plan({0: 1, 1: 1}), r"must give steps of each of the clients 0 to 2, got \{0: 1, 1: 1\}"),
        (Plan({0: 1, 1: 0, 2: 1}), "must give whole numbers of steps from 1 to 2, got"),
        (Plan({0: 1, 1: 3, 2: 1}), "must give whole numbers of steps from 1 to 2, got"),
        (Plan({0: 1, 1: 1.5, 2: 1}), "must give whole numbers of steps from 1 to 2, got"),  # type: ignore[dict-item]
    ],
)
def test_a_step_policy_is_held_to_the_clients_and_steps_of_the_run(federation: Any, plan: Any, rule: str) -> None:
    server, clients, _ = federation()
    server.step_policy = _Planned(plan)

    with pytest.raises(PluginError, match=rf"_Planned\.plan {rule}"):
        server.run_round()

    assert not any(client.requests for client in clients)


def test_steps_that_a_step_policy_computes_are_sent_as_whole_numbers(federation: Any) -> None:
    server, clients, _ = federation()
    server.step_policy = _Planned(Plan(dict(zip(range(3), np.array([1, 2, 1]), strict=True))))

    server.run_round()

    assert [[type(request.steps) for request in client.requests] for client in clients] == [[int]] * 3
    assert [client.requests[0].steps for client in clients] == [1, 2, 1]


class _Planned:
    """A step policy that gives whatever it is told to."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def plan(self, audit: Any, label_counts: Any) -> Any:
        return self.given
