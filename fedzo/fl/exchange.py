"""Asking clients and waiting for them: push, short polls, a deadline. Bad answers are named, never fatal."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

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


@dataclass(slots=True)
class Answers(Generic[R]):
    """Replies by client index, and why the others have none."""

    replies: dict[int, R] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)


def ask(
    grid: Grid,
    requests: Mapping[int, object],
    *,
    nodes: Mapping[int, int],
    message_type: str,
    reply_type: type[R],
    deadline_s: float,
    traffic: Traffic,
) -> Answers[R]:
    """Send each client its request and collect the replies that come before the deadline.

    Args:
        grid: Flower's grid.
        requests: Message by client index.
        nodes: Flower node id by client index.
        message_type: ``train``, ``evaluate`` or ``query.hello``.
        reply_type: Class of a good reply.
        deadline_s: Seconds to wait.
        traffic: Where bytes are counted.
    """
    answers: Answers[R] = Answers()
    messages, clients = [], []
    for client, request in requests.items():
        if client not in nodes:
            answers.refused[client] = "not connected"
            continue
        content = encode(request)
        traffic.down_bytes += message_bytes(content)
        messages.append(Message(content, dst_node_id=nodes[client], message_type=message_type))
        clients.append(client)
    pending: dict[str, int] = {}
    for name, client in zip(grid.push_messages(messages) if messages else (), clients, strict=True):  # type: ignore[call-overload]
        if name:
            pending[str(name)] = client
        else:  # Flower gives no name to a message that it cannot deliver
            answers.refused[client] = "not connected"
    ends = time.monotonic() + deadline_s
    while pending and time.monotonic() < ends:
        got = list(grid.pull_messages(list(pending)))  # type: ignore[call-overload]
        for message in got:
            if message.metadata.reply_to_message_id not in pending:
                continue  # nobody was asked for it
            client = pending.pop(message.metadata.reply_to_message_id)
            try:
                answers.replies[client] = _read(message, reply_type, traffic)
            except ProtocolError as error:
                answers.refused[client] = why = _shortened(str(error))
                log.warning("client %d: reply refused: %s", client, why)
        if not got:
            time.sleep(POLL_S)
    for client in pending.values():
        answers.refused[client] = f"no reply within {deadline_s:.3g} s"
        log.warning("client %d: no reply within %.3g s", client, deadline_s)
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
