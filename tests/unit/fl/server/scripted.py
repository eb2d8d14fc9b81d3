"""A federation whose clients and grid do what a test tells them: late, broken, behind, damaged, hostile, replaced."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message

from fedzo.fl.messages import (
    ArtifactPiece,
    ArtifactReply,
    Hello,
    HelloReply,
    Identity,
    ScalarReply,
    Status,
    TrainRequest,
    decode,
    encode,
    scalars_to_bytes,
)
from fedzo.fl.replica import Replica
from fedzo.fl.server.rounds import Server
from fedzo.records.metrics import MetricRecord
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.log import unpack
from fedzo.zo.server_optimizer import ServerOptimizer, Sgd

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
        self.bend: Callable[[ScalarReply], Any] = lambda reply: reply
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
            return ScalarReply(status=Status.bare)
        self.replica = self.replica or new_replica(self.rule)
        status = self.replica.sync(request, [*unpack(request.log)])
        if status is not Status.ok:
            return ScalarReply(status=status, position=self.replica.position)
        g = np.asarray(self.g_of(request), np.float32).reshape(request.steps, 1)
        ones = scalars_to_bytes(np.ones_like(g))
        return self.bend(ScalarReply(g=scalars_to_bytes(g), loss=ones, dropped=bytes(len(g))))


@dataclass
class Outage:
    """Nodes that are out of reach for so many seconds from now on: none of them answers.

    Attributes:
        clock: The test's own.
        seconds: Until they can be reached again.
        nodes: Those that are out of reach.
        error_after_s: After so long the grid answers "unavailable" in their place.
        unlisted_after_s: After so long the grid's list of nodes lacks them.
    """

    clock: Any
    seconds: float
    nodes: Collection[int] = (100, 101, 102)
    error_after_s: float = 0.0
    unlisted_after_s: float = 5.0
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock.now

    def hits(self, node: int, *, since_s: float = 0.0) -> bool:
        """Whether a node is out of reach, and has been for so long."""
        return node in self.nodes and self.began + since_s <= self.clock.now < self.began + self.seconds


class Grid:
    """Flower's grid as far as a server sees it; node ids are 100 + index unless a test says otherwise."""

    def __init__(self, clients: list[Client]) -> None:
        self.nodes: dict[int, Client | None] = {100 + client.index: client for client in clients}
        self.indices = {100 + client.index: client.index for client in clients}
        self._waiting: dict[str, Message] = {}
        self._numbers = itertools.count()
        self.hellos: list[int] = []
        self.whys: list[str] = []
        self.wire: tuple[int, int] | None = None
        self.outage: Outage | None = None

    def get_node_ids(self) -> list[int]:
        down = self.outage
        return [node for node in self.nodes if not (down and down.hits(node, since_s=down.unlisted_after_s))]

    def client_of(self, node: int) -> int | None:
        return self.indices.get(node)

    def registered(self, clients: set[int]) -> set[int]:
        return clients

    def wire_bytes(self) -> tuple[int, int] | None:
        return self.wire

    def restarts(self) -> int:
        return 0

    def unreachable(self, reply: Message) -> bool:
        return self.outage is not None and reply.has_error()

    def limit_replies(self, number_bytes: int) -> None: ...

    def lost(self, reply: Message) -> bool:
        return False

    def connect(self, node: int, client: Client | None, *, index: int | None = None) -> None:
        """A node comes that the server has registered; it never answers without a client."""
        self.nodes[node] = client
        self.indices[node] = client.index if client else index

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            self._waiting[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        replies = []
        for message_id in message_ids:
            message = self._waiting[message_id]
            node, down = message.metadata.dst_node_id, self.outage
            if down and down.hits(node):
                if down.hits(node, since_s=down.error_after_s):
                    error = Error(code=5, reason="Error: Node Unavailable")
                    metadata = Message(RecordDict(), reply_to=message).metadata
                    replies.append(make_message(metadata=metadata, error=error))
                continue
            client = self.nodes.get(node)
            if client is None:
                continue  # a node that is listed but does not answer
            if message.metadata.message_type == "query.hello":
                request: Any = decode(Hello, message.content)
                self.hellos.append(node)
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


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[MetricRecord] = []

    def write(self, record: MetricRecord) -> None:
        self.records.append(record)


Federation = Callable[..., tuple[Server, list[Client], Grid]]
"""The fixture of that name: called with the number of clients and settings, it starts a server that they joined."""


def reason_for(server: Server, round: int, client: int) -> str:
    refused = server.store.audit[round].refused
    assert client in refused, f"refused are {refused}"
    return server.sink.records[round].reasons[client]


def means(server: Server) -> list[float]:
    return [float(record.coefficients[0, 0, 0]) for record in server.store.records]
