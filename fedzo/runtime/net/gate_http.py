"""Requests and answers as a SuperLink's gate sees them: who asks, how long they are, and answers of its own."""

from __future__ import annotations

import datetime
import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fedzo.runtime.net.credentials import fingerprint

FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Asker:
    """Who makes a request, as far as he says it; the SuperLink checks the signature."""

    host: str
    key: bytes
    name: str | None

    @property
    def network(self) -> str:
        """What counts as one host: of IPv6 the network of 64 bits, in which a host takes what addresses it likes."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host
        if address.version == 4 or address.ipv4_mapped is not None:
            return str(address if address.version == 4 else address.ipv4_mapped)
        return str(ipaddress.IPv6Address(int(address) >> 64 << 64))

    @property
    def words(self) -> str:
        who = f"client {self.name}" if self.name else f"a node with the key {fingerprint(self.key)}"
        return f"{who} at {self.host}"


class Room:
    """For bytes of requests that are not over.

    Args:
        max_of_all: Of all of them.
        max_of_one: Of those of one asker.
        always: Of one request, for which there always is room.
    """

    def __init__(self, max_of_all: int, max_of_one: int, *, always: int) -> None:
        self._max_of_all, self._max_of_one, self._always = max_of_all, max_of_one, always
        self._all, self._of = 0, Counter[Hashable]()

    @contextmanager
    def of_one(self, who: Hashable) -> Iterator[Callable[[int], bool]]:
        """A function that takes as much room as a request needs by now, and says whether it was there.

        In the end all of it is free again.
        """
        taken = 0

        def take(size: int) -> bool:
            nonlocal taken
            more = size - taken
            is_full = self._all + more > self._max_of_all or self._of[who] + more > self._max_of_one
            if is_full and size > self._always:
                return False
            taken = size
            self._all += more
            self._of[who] += more
            return True

        try:
            yield take
        finally:
            take(0)
            if not self._of[who]:
                del self._of[who]


def again_later(scope: Scope, send: Send) -> Send:
    """Answers "not now" (503) where the SuperLink failed at a message (500), as where its database was locked.

    To Flower's nodes and servers 503 means to ask again, and 500 to give up: a node leaves, or stays and does not say
    any more that it lives; a run ends.
    """
    if not (scope["type"] == "http" and scope["path"].startswith((FLEET, RUNTIME))):
        return send

    async def translated(event: Event) -> None:
        await send({**event, "status": 503} if event.get("status") == 500 else event)

    return translated


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of a name (lower case), empty where there is none."""
    return next((bytes(value) for key, value in scope["headers"] if key.lower() == name), b"")


def request_bytes(scope: Scope) -> int:
    """Length of a request's line and headers."""
    line = len(f"{scope['method']} {scope['path']} HTTP/1.1\r\n\r\n")
    return line + sum(len(key) + len(value) + len(": \r\n") for key, value in scope["headers"])


def response_bytes(event: Event) -> int:
    """Length of a part of an answer: its line and headers, the web server's date among them, or some of its body."""
    if event["type"] != "http.response.start":
        return len(event.get("body", b""))
    said = f"{event['status']} {HTTPStatus(event['status']).phrase}"
    line = len(f"HTTP/1.1 {said}\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n")
    return line + sum(len(key) + len(value) + len(": \r\n") for key, value in event.get("headers", ()))


def behind_s_of(timestamp: bytes) -> float | None:
    """Seconds from when a request was signed, by its node's clock, to now by this one."""
    try:
        signed = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
        return (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
    except (ValueError, TypeError):
        return None


async def answer(send: Send, status: int, text: str, *, kind: bytes = b"text/plain", hang_up: bool = True) -> None:
    """Answer a request without the SuperLink."""
    body = text.encode()
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    headers += [(b"connection", b"close")] if hang_up else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
