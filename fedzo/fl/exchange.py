"""Talking to clients and waiting for them: push, short polls, a deadline. Bad answers are named, never fatal."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from flwr.app import Message, RecordDict

from fedzo.errors import ProtocolError
from fedzo.fl.messages import decode, encode, message_bytes

log = logging.getLogger(__name__)
R = TypeVar("R")
POLL_S = 0.05
LONGEST_REASON = 400  # characters


class Grid(Protocol):
    """The part of Flower's Grid that a federation needs."""

    def get_node_ids(self) -> object: ...
    def push_messages(self, messages: list[Message]) -> object: ...
    def pull_messages(self, message_ids: list[str]) -> object: ...


@dataclass(slots=True)
class Traffic:
    """Bytes of message contents between server and clients, as Flower counts them."""

    up_bytes: int = 0
    down_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One message to a client, and the class of a good reply. The type is ``train``, ``evaluate`` or ``query.NAME``."""

    message_type: str
    request: object
    reply_type: type[Any]


Talk = Generator[Question, Any, R]
"""All that the server says to one client: it yields questions, is sent their replies, and returns what came of it.

``ProtocolError`` ends it without a result."""


@dataclass(slots=True)
class Answers(Generic[R]):
    """What came of the talks by client index, and why the others have nothing."""

    replies: dict[int, R] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)


def ask(
    grid: Grid,
    questions: Mapping[int, Question],
    *,
    nodes: Mapping[int, int],
    deadline_s: float,
    traffic: Traffic,
) -> Answers[Any]:
    """Ask each client one question and collect the replies that come before the deadline; arguments as ``converse``."""

    def talk(question: Question) -> Talk[Any]:
        return (yield question)

    talks = {client: talk(question) for client, question in questions.items()}
    return converse(grid, talks, nodes=nodes, deadline_s=deadline_s, traffic=traffic)


def converse(
    grid: Grid, talks: Mapping[int, Talk[R]], *, nodes: Mapping[int, int], deadline_s: float, traffic: Traffic
) -> Answers[R]:
    """Talk to all clients at once, until each talk has ended or time is up. No talk waits for another client's reply.

    Args:
        grid: Flower's grid.
        talks: By client index.
        nodes: Flower node id by client index.
        deadline_s: Seconds that all of it may take.
        traffic: Where bytes are counted.
    """
    answers: Answers[R] = Answers()
    pending: dict[str, tuple[int, type[Any]]] = {}  # client and class of its reply, by the message's name
    heard: set[int] = set()
    ends = time.monotonic() + deadline_s

    def push(questions: Mapping[int, Question]) -> None:
        messages = []
        for client, question in questions.items():
            content = encode(question.request)
            traffic.down_bytes += message_bytes(content)
            messages.append(Message(content, dst_node_id=nodes[client], message_type=question.message_type))
        names = grid.push_messages(messages) if messages else ()
        for name, client in zip(names, questions, strict=True):  # type: ignore[call-overload]
            if name:
                pending[str(name)] = (client, questions[client].reply_type)
            else:  # Flower gives no name to a message that it cannot deliver
                answers.refused[client] = "not connected"

    answers.refused.update(dict.fromkeys(set(talks) - set(nodes), "not connected"))
    push({client: next(talk) for client, talk in talks.items() if client in nodes})
    while pending and time.monotonic() < ends:
        further: dict[int, Question] = {}
        got = list(grid.pull_messages(list(pending)))  # type: ignore[call-overload]
        for message in got:
            if message.metadata.reply_to_message_id not in pending:
                continue  # nobody was asked for it
            client, reply_type = pending.pop(message.metadata.reply_to_message_id)
            heard.add(client)
            try:
                further[client] = talks[client].send(_read(message, reply_type, traffic))
            except StopIteration as done:
                answers.replies[client] = done.value
            except ProtocolError as error:
                answers.refused[client] = why = _shortened(str(error))
                log.warning("client %d: reply refused: %s", client, why)
        if time.monotonic() < ends:
            push(further)
        if not got:
            time.sleep(POLL_S)
    for client in sorted(set(talks) - set(answers.replies) - set(answers.refused)):
        answers.refused[client] = f"{'not done' if client in heard else 'no reply'} within {deadline_s:.3g} s"
        log.warning("client %d: %s", client, answers.refused[client])
    return answers


def _read(message: Message, reply_type: type[R], traffic: Traffic) -> R:
    if message.has_error():
        reason = str(message.error.reason or message.error.code)
        own_words = re.fullmatch(r"<class '[^']*'>:<'(.*)'>", reason, re.DOTALL)  # Flower's form of an exception
        raise ProtocolError(f"client failed: {own_words[1] if own_words else reason}")
    content: RecordDict = message.content
    reply = decode(reply_type, content)
    traffic.up_bytes += message_bytes(content)
    return reply


def _shortened(text: str) -> str:
    """A client's own words may be long, and go into every log."""
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
