"""What a SuperLink's port for sites lets through: the Fleet API, in pieces of bounded size, at a bounded rate a node.

Flower serves three APIs on one port, and asks nobody who he is on the one that starts and stops runs. So fedzo's
SuperLink listens twice: on the loopback interface with all of them, and for sites behind this gate. The gate also names
the nodes that the SuperLink refuses, with the likely reason, since Flower itself does not. And it counts the bytes of
registered clients: request lines, headers and bodies, as they are within TLS.

Requests of sites take turns. A SuperLink answers some hundred requests a second, and hundreds of nodes ask for more. So
each request would be as slow as all of them together: a node would count as gone, since it waits for no longer than 5 s
to say that it lives, and the run's server, which asks one thing after the other, would wait as long each time. So the
most urgent is next: to say that a node lives, then what belongs to a message that is under way, then to ask for work.
Who hangs up while he waits is not asked for any more, and who waited for long is told to ask again, before he hangs up:
a SuperLink would hand out his message, and to nobody.

A node's question for work is held here until the run's server has sent something for it, or for ``HOLD_S``. The answer
is that there is nothing, and the node asks again at once, which is passed on: what was held may be of a node that has
died meanwhile. So a node has its message soon, and nodes that wait are little work for the SuperLink.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import secrets
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedzo.errors import printable
from fedzo.runtime.net.credentials import fingerprint
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.runtime.net.turns import Arrivals, Turns, unless_left

log = logging.getLogger(__name__)
FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
POLL, SEND = f"{FLEET}pull-messages", f"{RUNTIME}push-messages"
URGENCY = {f"{FLEET}send-node-heartbeat": 0, POLL: 2}
"""Of the requests that are more urgent or less than the others, whose number is 1."""
WIRE = "/fedzo/wire"
"""Of this machine alone, as JSON: a name of this start of the SuperLink, and the bytes that registered clients sent and
got since then, up and down."""
MAX_BODY_BYTES = 16 << 20
"""Of one request; Flower cuts what is longer into chunks of 5 MB."""
REQUESTS_PER_S, BURST = 200.0, 2000.0
"""Of a registered client, whose SuperNode moves each object of a message by a request."""
STRANGER_REQUESTS_PER_S, STRANGER_BURST = 5.0, 50.0
"""Of all other nodes of one host together."""
MOST_AT_ONCE = 2
"""Requests of sites that the SuperLink works on at once; those of the run's server do not wait for a turn."""
MOST_WAIT_S, HOLD_S = 10.0, 15.0
"""For a turn, and of a question for work. Both together must be well below the 30 s that a node waits for an answer."""
MOST_NODES = 100_000
QUIET_S = 60.0
"""How long the gate does not repeat itself about one node."""
CLOCK_BEHIND_S, CLOCK_AHEAD_S = 305.0, 5.0
"""How old a signature may be, and how far ahead of this clock: Flower's limits."""

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """An ASGI app around the SuperLink's own.

    Args:
        app: The SuperLink's.
        public_port: The port that sites reach; others pass.
        folder: The server's, for the names of clients.
        clock: Seconds, for the rate.
        most_wait_s: How long a request waits for its turn.
        hold_s: How long a question for work waits for something to come.
    """

    def __init__(
        self,
        app: App,
        *,
        public_port: int,
        folder: ServerFolder,
        clock: Callable[[], float] = time.monotonic,
        most_wait_s: float = MOST_WAIT_S,
        hold_s: float = HOLD_S,
    ) -> None:
        self._app = app
        self._port = public_port
        self._folder = folder
        self._clock = clock
        self._budgets: dict[str, tuple[float, float]] = {}
        self._told: dict[tuple[str, str], float] = {}
        self._start = secrets.token_hex(8)
        self._up_bytes = self._down_bytes = 0
        self._turns, self._most_wait_s = Turns(MOST_AT_ONCE), most_wait_s
        self._arrivals, self._hold_s, self._ending = Arrivals(), hold_s, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan" or scope["server"][1] != self._port:
            if scope["type"] == "http" and scope["path"] == WIRE:
                await _answer(send, 200, json.dumps([self._start, self._up_bytes, self._down_bytes]))
            elif scope["type"] == "http" and scope["path"] == SEND:
                await self._deliver(scope, receive, send)
            else:
                await self._app(scope, receive, _again_later(scope, send))
            return
        if scope["type"] != "http" or not scope["path"].startswith(FLEET):
            await _answer(send, 404, "not found")
            return
        asker = self._asker(scope)
        if not self._within_rate(asker):
            self._tell(asker, "it asks too often")
            await _answer(send, 429, "too many requests")
            return
        declared = _header(scope, b"content-length") or b"0"
        if not declared.isdigit() or len(declared) > 20 or int(declared) > MAX_BODY_BYTES:
            await _answer(send, 413, "too large")
            return
        if asker.name is not None:
            self._up_bytes += _request_bytes(scope)
        heard = await self._hear(asker, receive)
        if heard is None:
            await _answer(send, 413, "too large")
            return
        await self._pass_on(asker, scope, heard, receive, send)

    def end(self) -> None:
        """Answer what is held, so that the server can end."""
        self._ending = True
        self._arrivals.end()

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass messages for nodes on, and then the questions of these nodes for them."""
        body = bytearray()

        async def tapped() -> Event:
            event = await receive()
            body.extend(event.get("body", b""))
            return event

        try:
            await self._app(scope, tapped, _again_later(scope, send))
        finally:  # also what failed may have been stored
            for node in _addressees(bytes(body)):
                self._arrivals.came(node)

    async def _hear(self, asker: _Asker, receive: Receive) -> list[Event] | None:
        """A request's whole body; None where it breaks off, or is too long, which need not have been declared."""
        heard: list[Event] = []
        taken, more = 0, True
        while more:
            event = await receive()
            heard.append(event)
            taken += len(event.get("body", b""))
            if asker.name is not None:
                self._up_bytes += len(event.get("body", b""))
            if taken > MAX_BODY_BYTES or event["type"] != "http.request":
                return None
            more = bool(event.get("more_body"))
        return heard

    async def _pass_on(self, asker: _Asker, scope: Scope, heard: list[Event], receive: Receive, send: Send) -> None:
        """Have the SuperLink answer in turn. A turn is over when the answer begins: a slow line costs nobody else."""

        async def told() -> Event:
            return heard.pop(0) if heard else await receive()

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def watched(event: Event) -> None:
            if event["type"] == "http.response.start":
                await turn.aclose()
                if event["status"] >= 400:
                    self._explain(asker, scope, event["status"])
            if asker.name is not None:
                self._down_bytes += _response_bytes(event)
            if poll and event.get("body"):  # it got something, and there may be more
                self._arrivals.forget(poll[0])
            await send(event)

        poll = _poll(asker, scope, heard)
        async with contextlib.AsyncExitStack() as turn:
            if poll and (bell := self._arrivals.bell(*poll)):
                await self._hold(poll[0], bell, left, watched)
                return
            wait = turn.enter_async_context(self._turns.one(URGENCY.get(scope["path"], 1)))
            try:
                async with asyncio.timeout(0 if self._ending else self._most_wait_s):
                    here = await unless_left(wait, left)
            except TimeoutError:
                await _answer(send, 503, "busy", hang_up=False)
                return
            if here:
                if poll:
                    self._arrivals.ask(*poll)
                await self._app(scope, told, _again_later(scope, watched))

    async def _hold(self, name: str, bell: asyncio.Event, left: Callable[[], Awaitable[None]], send: Send) -> None:
        """Wait until something has come for a node, and answer that there is nothing if the node is still there."""
        here = True
        try:
            async with asyncio.timeout(0 if self._ending else self._hold_s):
                here = await unless_left(bell.wait(), left)
        except TimeoutError:
            self._arrivals.forget(name)  # whatever went wrong, the SuperLink itself is asked now and then
        if here:  # no bytes are no message, in Flower's words
            await _answer(send, 200, "", kind=b"application/protobuf", hang_up=False)

    def _asker(self, scope: Scope) -> _Asker:
        try:
            key = b64decode(_header(scope, b"flwr-public-key"), validate=True)[:1000]
        except ValueError:
            key = b""
        client = self._folder.by_key().get(key)
        return _Asker((scope.get("client") or ("?",))[0], key, client.name if client else None)

    def _within_rate(self, asker: _Asker) -> bool:
        """Take one from the asker's budget, which fills again with time."""
        rate, burst = (STRANGER_REQUESTS_PER_S, STRANGER_BURST) if asker.name is None else (REQUESTS_PER_S, BURST)
        now, who = self._clock(), asker.name or asker.host
        left, since = self._budgets.get(who, (burst, now))
        left = min(burst, left + (now - since) * rate)
        if len(self._budgets) >= MOST_NODES and who not in self._budgets:
            self._budgets.clear()
        self._budgets[who] = max(0.0, left - 1.0), now
        return left >= 1.0

    def _explain(self, asker: _Asker, scope: Scope, status: int) -> None:
        """Say in the log which node was refused, and why as far as this can be seen here."""
        behind_s = _behind_s(_header(scope, b"flwr-timestamp"))
        if behind_s is not None and not -CLOCK_AHEAD_S < behind_s < CLOCK_BEHIND_S:
            side = "behind" if behind_s > 0 else "ahead of"
            self._tell(
                asker,
                f"its clock is {abs(behind_s):.0f} s {side} this server's, and may be at most {CLOCK_AHEAD_S:.0f} s "
                f"ahead or {CLOCK_BEHIND_S:.0f} s behind. Set its clock",
            )
        elif asker.name is None:
            self._tell(asker, "its key is not registered here. `fedzo server add-client` registers it")
        elif scope["path"] == f"{FLEET}activate-node" and status != HTTPStatus.UNAUTHORIZED:
            self._tell(asker, "another node with its key is connected. If that one has ended, wait for a minute")
        else:
            self._tell(asker, f"{scope['path'].removeprefix(FLEET)} was answered with status {status}")

    def _tell(self, asker: _Asker, why: str) -> None:
        """Write a line, unless the same was written a short time ago."""
        now, what = self._clock(), (asker.words, why[:20])
        if now - self._told.get(what, -QUIET_S) < QUIET_S:
            return
        if len(self._told) >= MOST_NODES:
            self._told.clear()
        self._told[what] = now
        log.warning("%s", printable(f"refused: {asker.words}: {why}."))


@dataclass(frozen=True, slots=True)
class _Asker:
    """Who makes a request, as far as he says it; the SuperLink checks the signature."""

    host: str
    key: bytes
    name: str | None

    @property
    def words(self) -> str:
        who = f"client {self.name}" if self.name else f"a node with the key {fingerprint(self.key)}"
        return f"{who} at {self.host}"


def _poll(asker: _Asker, scope: Scope, heard: list[Event]) -> tuple[str, int] | None:
    """Who asks for work, and by its own words for which node; None for another request."""
    if scope["path"] != POLL or asker.name is None:
        return None
    try:
        node = PullMessagesRequest.FromString(b"".join(event.get("body", b"") for event in heard)).node.node_id
    except DecodeError:
        return None
    return (asker.name, node) if node else None


def _addressees(body: bytes) -> list[int]:
    """The nodes that messages of the run's server are for."""
    try:
        return [each.metadata.dst_node_id for each in PushAppMessagesRequest.FromString(body).messages_list]
    except DecodeError:
        return []


def _again_later(scope: Scope, send: Send) -> Send:
    """Answers "not now" (503) where the SuperLink failed at a message (500), as where its database was locked.

    To Flower's nodes and servers 503 means to ask again, and 500 to give up: a node leaves, or stays and does not say
    any more that it lives; a run ends.
    """
    if not (scope["type"] == "http" and scope["path"].startswith((FLEET, RUNTIME))):
        return send

    async def translated(event: Event) -> None:
        await send({**event, "status": 503} if event.get("status") == 500 else event)

    return translated


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key.lower() == name), b"")


def _request_bytes(scope: Scope) -> int:
    """Length of a request's line and headers."""
    line = len(f"{scope['method']} {scope['path']} HTTP/1.1\r\n\r\n")
    return line + sum(len(key) + len(value) + len(": \r\n") for key, value in scope["headers"])


def _response_bytes(event: Event) -> int:
    """Length of a part of an answer: its line and headers, the web server's date among them, or some of its body."""
    if event["type"] != "http.response.start":
        return len(event.get("body", b""))
    said = f"{event['status']} {HTTPStatus(event['status']).phrase}"
    line = len(f"HTTP/1.1 {said}\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n")
    return line + sum(len(key) + len(value) + len(": \r\n") for key, value in event.get("headers", ()))


def _behind_s(timestamp: bytes) -> float | None:
    """Seconds from when a request was signed, by its node's clock, to now by this one."""
    try:
        signed = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
        return (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
    except (ValueError, TypeError):
        return None


async def _answer(send: Send, status: int, text: str, *, kind: bytes = b"text/plain", hang_up: bool = True) -> None:
    body = text.encode()
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    headers += [(b"connection", b"close")] if hang_up else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
