"""Talking to clients and waiting for them: push, short polls, a deadline. Bad answers are named, never fatal.

Words of a client (the reason of a failure, names of fields) reach logs and records only as ``printable`` leaves them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from flwr.app import DEFAULT_TTL, ConfigRecord, Message, RecordDict

from fedzo.errors import ProtocolError, printable, quoted
from fedzo.fl.content import in_pieces, salt_anew
from fedzo.fl.messages import ArtifactPiece, EvaluateRequest, Hello, TrainRequest, decode, encode

log = logging.getLogger(__name__)
R = TypeVar("R")
K = TypeVar("K")
NOT_CONNECTED = "not connected"
MESSAGE_TYPES: dict[type[Any], str] = {
    Hello: "query.hello",
    ArtifactPiece: "query.artifact",
    TrainRequest: "train",
    EvaluateRequest: "evaluate",
}
"""By which of Flower's message types each request travels."""
POLL_S = 0.05
POLL_PAUSE, MAX_PAUSE_S = 4, 1.0
"""A look that found no reply is followed by a pause of so many times its length, since one for hundreds takes long, but
not longer than that: it takes longer still while a carrier is started again."""
NAMES_A_PULL = 64  # handed over at most: waiting for n messages then costs n, not n * n, where they come one by one
MAX_LOST = 3
"""How often a question is asked again after it, or its reply, was lost: a client can see to it that its replies are."""


class Grid(Protocol):
    """The part of Flower's Grid that a federation needs, and who its nodes are."""

    def get_node_ids(self) -> object: ...
    def push_messages(self, messages: list[Message]) -> object: ...
    def pull_messages(self, message_ids: list[str]) -> object: ...
    def client_of(self, node: int) -> int | None:
        """Index of the client that a node plays, as the server registered it; None for a node it does not know."""
        ...

    def registered(self, clients: set[int]) -> set[int]:
        """Those of these clients that the server knows at the moment; no node of another can come."""
        ...

    def wire_bytes(self) -> tuple[int, int] | None:
        """Bytes that clients have sent and got so far, HTTP and all; None where nothing goes over a network."""
        ...

    def restarts(self) -> int:
        """How often what carries messages was started again so far; what was under way then may be lost."""
        ...

    def lost(self, reply: Message) -> bool:
        """Whether a reply is no client's, but says that a question, or the reply to it, was lost."""
        ...

    def unreachable(self, reply: Message) -> bool:
        """Whether a reply is no client's, but says that the node which was asked is not connected any more."""
        ...

    def limit_replies(self, number_bytes: int) -> None:
        """Expect at most so many bytes of numbers in a reply; a longer one may be taken for an error of its client."""
        ...


@dataclass(slots=True)
class Traffic:
    """Bytes of message contents between server and clients, as Flower counts them."""

    up_bytes: int = 0
    down_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up_bytes + other.up_bytes, self.down_bytes + other.down_bytes)


@dataclass(frozen=True, slots=True)
class Question:
    """One request to a client, and the class of a good reply."""

    request: object
    reply_type: type[Any]


Talk = Generator[Question, Any, R]
"""All that the server says to one client: it yields questions, is sent their replies, and returns what came of it.

``ProtocolError`` ends it without a result."""


@dataclass(slots=True)
class Answers(Generic[R]):
    """What came of the talks by client index, and why the others have nothing.

    Attributes:
        replies: What each talk returned.
        refused: Why a client has none.
        mute: Those among ``refused`` that let the deadline pass.
        gone: Those among ``refused`` that were asked, and whose node is not connected any more.
        seconds: After how long a client's talk ended by its own answer.
        traffic: What all of it took.
    """

    replies: dict[int, R] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    mute: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(slots=True)
class Outbox(Generic[K]):
    """Messages that were sent and have no reply yet, each known by whom it was sent for.

    Flower hands a message over once: a SuperLink that dies at a bad instant takes it, or the reply, with it. So after a
    restart all that is under way is sent again, and the first reply counts. Clients answer by what a request says
    alone, so being asked twice costs one of them time and nothing else.
    """

    _sent: dict[str, tuple[K, Message, int]] = field(default_factory=dict)  # by Flower's name; how often it was lost
    _repeated: set[K] = field(default_factory=set)
    _restarts: int = 0

    def __len__(self) -> int:
        return len(self._sent)

    def push(self, grid: Grid, messages: Mapping[K, Message]) -> list[K]:
        """Send messages; returns the keys of those that Flower did not accept."""
        self._repeat(grid)
        return self._push(grid, messages)

    def pull(self, grid: Grid) -> list[tuple[K, Message]]:
        """The replies that are there, of the oldest messages that have any; none where there are no replies at all."""
        self._repeat(grid)
        for _ in range(-(-len(self._sent) // NAMES_A_PULL)):
            asked = list(islice(self._sent, NAMES_A_PULL))
            got: list[Message] = list(grid.pull_messages(asked))  # type: ignore[call-overload]
            replies: dict[K, Message] = {}
            for message in got:
                sent = self._sent.pop(message.metadata.reply_to_message_id, None)
                if sent is None:
                    continue  # it replies to what nobody was asked
                key, question, lost = sent
                if not grid.lost(message) or lost >= MAX_LOST or self._again(grid, {key: question}, lost=lost + 1):
                    replies.setdefault(key, message)
            if replies:
                if not self._repeated.isdisjoint(replies):
                    self.forget(replies.__contains__)
                return [*replies.items()]
            for name in asked:  # to the end: the others come first in the next pull
                if name in self._sent:
                    self._sent[name] = self._sent.pop(name)
        return []

    def forget(self, gone: Callable[[K], bool]) -> None:
        """Wait no longer for these."""
        self._sent = {name: sent for name, sent in self._sent.items() if not gone(sent[0])}
        self._repeated = {key for key in self._repeated if not gone(key)}

    def _push(self, grid: Grid, messages: Mapping[K, Message], *, lost: int = 0) -> list[K]:
        names = grid.push_messages([*messages.values()]) if messages else ()
        told = dict(zip(messages, names, strict=True))  # type: ignore[call-overload]
        self._sent.update({str(name): (key, messages[key], lost) for key, name in told.items() if name})
        return [key for key, name in told.items() if not name]

    def _repeat(self, grid: Grid) -> None:
        if (restarts := grid.restarts()) != self._restarts:
            self._restarts = restarts
            self._again(grid, {key: message for key, message, _ in self._sent.values()})

    def _again(self, grid: Grid, messages: Mapping[K, Message], *, lost: int = 0) -> list[K]:
        self._repeated.update(messages)
        for message in messages.values():
            salt_anew(message.content)
        return self._push(grid, {key: _copy(message) for key, message in messages.items()}, lost=lost)


def _copy(message: Message) -> Message:
    told = message.metadata
    return Message(message.content, dst_node_id=told.dst_node_id, message_type=told.message_type, ttl=told.ttl)


def converse(
    grid: Grid,
    talks: Mapping[int, Talk[R]],
    *,
    nodes: Mapping[int, int],
    deadline_s: float,
    beside: Callable[[Mapping[int, float]], None] = lambda seconds: None,
) -> Answers[R]:
    """Talk to all clients at once, until each talk has ended or time is up. No talk waits for another client's reply.

    Args:
        grid: Flower's grid.
        talks: By client index.
        nodes: Flower node id by client index.
        deadline_s: Seconds that all of it may take.
        beside: Called again and again while no reply is there, with ``Answers.seconds`` so far.
    """
    answers: Answers[R] = Answers()
    outbox: Outbox[int] = Outbox()
    reply_types: dict[int, type[Any]] = {}
    heard: set[int] = set()
    cut = cache(in_pieces)  # what many are sent, once for all of them
    started = time.monotonic()
    ends = started + deadline_s

    def leave(clients: Collection[int]) -> None:
        answers.gone.update(clients)
        answers.refused.update(dict.fromkeys(clients, NOT_CONNECTED))

    def push(questions: Mapping[int, Question]) -> None:
        messages = {}
        for client, question in questions.items():
            messages[client] = message_of(question, node=nodes[client], cut=cut, ttl_s=max(DEFAULT_TTL, deadline_s))
            salt_anew(messages[client].content)  # some may have been sent its pieces before
            answers.traffic.down_bytes += message_bytes(messages[client].content)
            reply_types[client] = question.reply_type
        leave(outbox.push(grid, messages))

    answers.refused.update(dict.fromkeys(set(talks) - set(nodes), NOT_CONNECTED))
    push({client: next(talk) for client, talk in talks.items() if client in nodes})
    while outbox and time.monotonic() < ends:
        further: dict[int, Question] = {}
        began = time.monotonic()
        got = outbox.pull(grid)
        looked_s = time.monotonic() - began
        for client, message in got:
            heard.add(client)
            if grid.unreachable(message):
                leave([client])
                log.warning("client %d: its node is not connected any more", client)
                continue
            try:
                reply = read(message, reply_types[client])
                answers.traffic.up_bytes += message_bytes(message.content)
                further[client] = talks[client].send(reply)
            except StopIteration as done:
                answers.replies[client] = done.value
                answers.seconds[client] = time.monotonic() - started
            except ProtocolError as error:
                answers.refused[client] = why = printable(str(error))
                answers.seconds[client] = time.monotonic() - started
                log.warning("client %d: reply refused: %s", client, why)
        if time.monotonic() < ends:
            push(further)
        if not got:
            beside(answers.seconds)
            time.sleep(min(max(POLL_S, POLL_PAUSE * looked_s), MAX_PAUSE_S))
    for client in sorted(set(talks) - set(answers.replies) - set(answers.refused)):
        answers.mute.add(client)
        answers.refused[client] = f"{'not done' if client in heard else 'no reply'} within {deadline_s:.3g} s"
        log.warning("client %d: %s", client, answers.refused[client])
    return answers


def message_of(
    question: Question,
    *,
    node: int,
    cut: Callable[[bytes], list[ConfigRecord]] = in_pieces,
    ttl_s: float = DEFAULT_TTL,
) -> Message:
    """A question as Flower's message to a node.

    Args:
        question: What is asked.
        node: Who is asked.
        cut: Makes records of long bytes.
        ttl_s: After so long Flower forgets the question, and takes no reply to it.
    """
    message_type = MESSAGE_TYPES[type(question.request)]
    return Message(encode(question.request, cut=cut), dst_node_id=node, message_type=message_type, ttl=ttl_s)


def read(message: Message, reply_type: type[R]) -> R:
    """The reply in a message.

    Raises:
        ProtocolError: It tells of a failure, or is not such a reply.
    """
    if message.has_error():
        reason = str(message.error.reason or message.error.code)
        own_words = re.fullmatch(r"<class '[^']*'>:<'(.*)'>", reason, re.DOTALL)  # Flower's form of an exception
        raise ProtocolError(f"it failed and says {quoted(own_words[1] if own_words else reason)}")
    return decode(reply_type, message.content)


def message_bytes(content: RecordDict) -> int:
    """Size of a message's content (``encode``'s, or what ``decode`` let pass) as Flower counts it, with its names."""
    return sum(record.count_bytes() for record in content.values())
