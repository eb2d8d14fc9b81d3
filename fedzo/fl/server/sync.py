"""Clients follow the server's log: every request brings along what its client lacks to reach the server's state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from fedzo.errors import ProtocolError
from fedzo.fl.artifact_transfer import deliver
from fedzo.fl.config import Transport
from fedzo.fl.exchange import Answers, Grid, Question, Talk, converse
from fedzo.fl.log_store import RunStore
from fedzo.fl.messages import Status, Sync
from fedzo.fl.replica import Replica
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.trainers.artifacts import Artifact
from fedzo.zo.directions import PURPOSE_SAMPLING, permutation, stream_key
from fedzo.zo.log import ScalarRecord, pack

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

log = logging.getLogger(__name__)
ATTEMPTS = 4  # a first request, and one each for a missing space, a gap in the log and a wrong hash


class Answer(Protocol):
    """A reply to a request that names the server's state."""

    @property
    def status(self) -> Status: ...
    @property
    def position(self) -> int: ...


Request = TypeVar("Request", bound=Sync)
Reply = TypeVar("Reply", bound=Answer)


@dataclass(kw_only=True, slots=True)
class StateSync:
    """What the server knows of the state of each client.

    Attributes:
        artifact: What clients need beside the model to build the space.
        acked: By client, the round at whose start it was last. A new process says itself that it is behind that.
        beside: Called again and again while replies are awaited.
    """

    grid: Grid
    client_registry: ClientRegistry
    replica: Replica
    store: RunStore
    artifact: Artifact
    config: RunSettings
    acked: dict[int, int] = field(default_factory=dict)
    beside: Callable[[], None] = lambda: None
    _given_values: set[int] = field(default_factory=set)
    _packed: bytearray = field(default_factory=bytearray)
    _ends: list[int] = field(default_factory=lambda: [0])  # of the first so many records in _packed

    def ask(self, requests: Mapping[int, Request], reply_type: type[Reply]) -> Answers[Reply]:
        """Ask clients at the present state; help those that cannot reach it, at most once for each kind of trouble.

        All of it ends at the deadline. Replies come in the order of the clients, unless ``faults`` shuffle them.
        """
        registry = self.client_registry
        fields = cache(partial(self._fields, self._state()))  # clients at one place are sent one object, not copies
        registry.pace.asked(requests)
        answers = converse(
            self.grid,
            {client: self._talk(client, request, fields, reply_type) for client, request in requests.items()},
            nodes=registry.nodes,
            deadline_s=self.config.strategy.deadline_s,
            beside=self._beside,
        )
        replies = answers.replies
        registry.pace.answered(answers.seconds)
        registry.note(requests, mute=answers.mute, gone=answers.gone, round=self._round)
        if answers.mute or answers.gone:
            registry.beside(self.grid)  # so that a greeting may be answered before the next round
        ordered = sorted(replies)
        if self.config.faults.shuffle_replies:
            key = stream_key(self.config.seed, round=self._round, owner=0)
            ordered = [ordered[i] for i in permutation(key, len(ordered), purpose=PURPOSE_SAMPLING)]
        return replace(answers, replies={client: replies[client] for client in ordered})

    def _beside(self, seconds: Mapping[int, float]) -> None:
        """While replies are awaited: greet who is new, and keep in mind who has answered, after how many seconds."""
        self.client_registry.beside(self.grid)
        self.client_registry.pace.answered(seconds)
        self.beside()

    def _talk(
        self, client: int, request: Request, fields: Callable[[int, bool], Mapping[str, Any]], reply_type: type[Reply]
    ) -> Talk[Reply]:
        """Ask one client, and help it to the server's state until it can answer. Nothing that was sent is kept."""
        start, values, was_told = self.acked.get(client, 0), False, False
        for _ in range(ATTEMPTS):
            by_values = values or self._sends_values(start)
            from_round = self._round if by_values else start
            reply = yield Question(replace(request, **fields(from_round, by_values)), reply_type)
            match reply.status:
                case Status.ok:
                    self.acked[client] = self._round
                    if from_round < self._round:  # its replay is the server's
                        self._given_values.discard(client)
                    return cast(Reply, reply)
                case Status.bare:
                    yield from deliver(self.artifact, client=client)
                    start, was_told = 0, True
                case Status.behind:
                    if reply.position >= from_round:
                        raise ProtocolError(
                            f"position: a client that is behind must be before round {from_round}, where the "
                            f"log that it was sent begins, got {reply.position}"
                        )
                    self._given_values.discard(client)  # behind what it acknowledged: a new process
                    start, was_told = 0 if was_told else reply.position, True
                case Status.mismatch:
                    if client in self._given_values:  # whose directions may be others, too: its scalars must not count
                        raise ProtocolError(
                            "state: a client's hash must be the server's after the values that it was sent, got "
                            "another again. Start its site anew; if that does not help, it does not compute as the "
                            "others do (`fedzo doctor`)."
                        )
                    told = "round %d, client %d: its state is not the server's; sending it the values"
                    log.warning(told, self._round, client)
                    self._given_values.add(client)
                    values = True
        raise ProtocolError("could not reach the server's state")

    def forget(self, client: int) -> None:
        """A client came back, perhaps as a new process: what values it was sent counts no more."""
        self._given_values.discard(client)

    @property
    def _round(self) -> int:
        return len(self.store.records)

    def _sends_values(self, start: int) -> bool:
        """Whether a client that was last at a round is sent the values, unasked, and not the log."""
        always = self.config.fl.transport is Transport.values and self._round > 0
        return always or self.replica.is_shorter_than(self.store.records[start:])

    def _fields(self, state: Mapping[str, Any], from_round: int, by_values: bool) -> Mapping[str, Any]:
        """What requests say of the state that clients must reach, and how: the log from a round on, or the values."""
        way = {"values": self.replica.snapshot()} if by_values else {"log": self._log_from(from_round)}
        return {**state, "from_round": from_round, **way}

    def _log_from(self, start: int) -> bytes:
        """The records from a round on, as they travel; those of scalars are packed once for all clients."""
        records = self.store.records
        if records and not isinstance(records[0], ScalarRecord):
            return pack(records[start:])  # of vectors, which stay in their files
        for record in records[len(self._ends) - 1 :]:
            self._packed += record.to_bytes()
            self._ends.append(len(self._packed))
        return bytes(self._packed[self._ends[start] :])

    def _state(self) -> dict[str, Any]:
        """What every request of the round says of the state that it is about."""
        return {
            "config_hash": self.client_registry.identity.config_hash,
            "space_id": self.artifact.digest,
            "round": self._round,
            "chain": self.replica.chain.hex(),
            "check": self.replica.check(),
            "digest": self.replica.digest() if self._round % self.config.fl.hash_every == 0 else "",
        }
