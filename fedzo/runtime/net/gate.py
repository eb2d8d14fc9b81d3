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
import json
import logging
import secrets
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedzo.errors import printable
from fedzo.runtime.net.gate_http import (
    FLEET,
    RUNTIME,
    App,
    Asker,
    Event,
    Receive,
    Room,
    Scope,
    Send,
    again_later,
    answer,
    behind_s_of,
    header,
    request_bytes,
    response_bytes,
)
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.runtime.net.turns import Arrivals, Turns, unless_left

log = logging.getLogger(__name__)
POLL, REPLY, SEND = f"{FLEET}pull-messages", f"{FLEET}push-messages", f"{RUNTIME}push-messages"
URGENCY = {f"{FLEET}send-node-heartbeat": 0, POLL: 2}
"""Of the requests that are more urgent or less than the others, whose number is 1."""
WIRE = "/fedzo/wire"
"""Of this machine alone, as JSON: a name of this start of the SuperLink, and the bytes that registered clients sent and
got since then, up and down."""
MAX_BODY_BYTES = 16 << 20
"""Of one request; Flower cuts what is longer into chunks of 5 MB."""
MAX_REPLY_BYTES = 1 << 20
"""Of the list of a reply's parts, some 70 bytes for each of 4 MiB: enough for vectors of 50 GB. The SuperLink takes up
a list as a whole, with several statements of SQL for each part, and stores nothing else meanwhile."""
STRANGER_BODY_BYTES = 64 << 10
"""Of a request of a node that is not registered: only to say who it is."""
MAX_HELD_BYTES, MAX_HELD_OF_ONE = 1 << 30, 64 << 20
"""Of requests that are not answered yet: of all, and of a registered client at one host, whose SuperNode sends at most
2 pieces of 5 MB at once. While there is no room, whoever sends more than a stranger may is told to ask again."""
MAX_HEAR_S = 60.0
"""For the body of one request to arrive; Flower's nodes wait for an answer for half of that."""
REQUESTS_PER_S, BURST = 200.0, 2000.0
"""Of a registered client, whose SuperNode moves each object of a message by a request."""
STRANGER_REQUESTS_PER_S, STRANGER_BURST = 5.0, 50.0
"""Of all other nodes of one host together."""
MAX_AT_ONCE = 2
"""Requests of sites that the SuperLink works on at once; those of the run's server do not wait for a turn."""
MAX_WAIT_S, HOLD_S = 10.0, 15.0
"""For a turn, and of a question for work. Both together must be well below the 30 s that a node waits for an answer."""
MAX_NODES = 100_000
QUIET_S = 60.0
"""How long the gate does not repeat itself about one node."""
STRANGER_LINES = 5
"""About strangers of one host in that time."""
CLOCK_BEHIND_S, CLOCK_AHEAD_S = 305.0, 5.0
"""How old a signature may be, and how far ahead of this clock: Flower's limits."""


class Gate:
    """An ASGI app around the SuperLink's own.

    Args:
        app: The SuperLink's.
        public_port: The port that sites reach; others pass.
        folder: The server's, for the names of clients.
        clock: Seconds, for the rate.
        max_wait_s: How long a request waits for its turn.
        hold_s: How long a question for work waits for something to come.
    """

    def __init__(
        self,
        app: App,
        *,
        public_port: int,
        folder: ServerFolder,
        clock: Callable[[], float] = time.monotonic,
        max_wait_s: float = MAX_WAIT_S,
        hold_s: float = HOLD_S,
    ) -> None:
        self._app = app
        self._port = public_port
        self._folder = folder
        self._clock = clock
        self._budgets: dict[tuple[str | None, str], tuple[float, float]] = {}
        self._told: dict[tuple[str, str], float] = {}
        self._strangers: dict[str, tuple[float, int]] = {}
        self._start = secrets.token_hex(8)
        self._up_bytes = self._down_bytes = 0
        self._room = Room(MAX_HELD_BYTES, MAX_HELD_OF_ONE, always=STRANGER_BODY_BYTES)
        self._turns, self._max_wait_s = Turns(MAX_AT_ONCE), max_wait_s
        self._arrivals, self._hold_s, self._ending = Arrivals(), hold_s, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan" or scope["server"][1] != self._port:
            if scope["type"] == "http" and scope["path"] == WIRE:
                await answer(send, 200, json.dumps([self._start, self._up_bytes, self._down_bytes]))
            elif scope["type"] == "http" and scope["path"] == SEND:
                await self._deliver(scope, receive, send)
            else:
                await self._app(scope, receive, again_later(scope, send))
            return
        if scope["type"] != "http" or not scope["path"].startswith(FLEET):
            await answer(send, 404, "not found")
            return
        asker = self._asker(scope)
        if not self._within_rate(asker):
            self._tell(asker, "it asks too often")
            await answer(send, 429, "too many requests")
            return
        known = MAX_REPLY_BYTES if scope["path"] == REPLY else MAX_BODY_BYTES
        max_bytes = STRANGER_BODY_BYTES if asker.name is None else known
        declared = header(scope, b"content-length") or b"0"
        if not declared.isdigit() or len(declared) > 20 or int(declared) > max_bytes:
            await answer(send, 413, "too large")
            return
        if asker.name is not None:
            self._up_bytes += request_bytes(scope)
        with self._room.of_one((asker.name, asker.network)) as take:
            try:
                async with asyncio.timeout(MAX_HEAR_S):
                    heard = await self._hear(asker, receive, max_bytes, take)
            except TimeoutError:
                self._tell(asker, f"a request of it took longer than {MAX_HEAR_S:.0f} s to arrive")
                await answer(send, 408, "too slow")
                return
            if heard is None:
                await answer(send, 413, "too large")
            elif not heard:
                self._tell(asker, "a request of it had no room beside others, and will be made again")
                await answer(send, 503, "busy", hang_up=False)
            else:
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
            await self._app(scope, tapped, again_later(scope, send))
        finally:  # also what failed may have been stored
            for node in _addressees(bytes(body)):
                self._arrivals.came(node)

    async def _hear(
        self, asker: Asker, receive: Receive, max_bytes: int, take: Callable[[int], bool]
    ) -> list[Event] | None:
        """A request's whole body as one event, since parts of a byte would take more room; none where there is no room.

        None where it breaks off, or is too long, which need not have been declared.
        """
        body = bytearray()
        taken, more, has_room = 0, True, True
        while more:
            event = await receive()
            part = event.get("body", b"")
            taken += len(part)
            if has_room := has_room and take(taken):
                body += part
            else:  # heard out all the same: a node that still sends would not hear the answer
                body.clear()
                take(0)
            if asker.name is not None:
                self._up_bytes += len(part)
            if taken > max_bytes or event["type"] != "http.request":
                return None
            more = bool(event.get("more_body"))
        return [{"type": "http.request", "body": bytes(body)}] if has_room else []

    async def _pass_on(self, asker: Asker, scope: Scope, heard: list[Event], receive: Receive, send: Send) -> None:
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
                elif poll and came is not None:  # it was signed: only the SuperLink knows
                    self._arrivals.ask(*poll, since=came)
            if asker.name is not None:
                self._down_bytes += response_bytes(event)
            if poll and event.get("body"):  # it got something, and there may be more
                self._arrivals.forget(*poll)
            await send(event)

        poll = _poll(asker, scope, heard)
        came: int | None = None
        async with contextlib.AsyncExitStack() as turn:
            if poll and (bell := self._arrivals.bell(*poll)):
                await self._hold(poll, bell, left, watched)
                return
            wait = turn.enter_async_context(self._turns.one(URGENCY.get(scope["path"], 1)))
            try:
                async with asyncio.timeout(0 if self._ending else self._max_wait_s):
                    here = await unless_left(wait, left)
            except TimeoutError:
                await answer(send, 503, "busy", hang_up=False)
                return
            if here:
                if poll:
                    came = self._arrivals.count(poll[1])
                await self._app(scope, told, again_later(scope, watched))

    async def _hold(
        self, poll: tuple[str, int], bell: asyncio.Event, left: Callable[[], Awaitable[None]], send: Send
    ) -> None:
        """Wait until something has come for a node, and answer that there is nothing if the node is still there."""
        here = True
        try:
            async with asyncio.timeout(0 if self._ending else self._hold_s):
                here = await unless_left(bell.wait(), left)
        except TimeoutError:
            self._arrivals.forget(*poll)  # whatever went wrong, the SuperLink itself is asked now and then
        if here:  # no bytes are no message, in Flower's words
            await answer(send, 200, "", kind=b"application/protobuf", hang_up=False)

    def _asker(self, scope: Scope) -> Asker:
        try:
            key = b64decode(header(scope, b"flwr-public-key"), validate=True)[:1000]
        except ValueError:
            key = b""
        client = self._folder.registry.by_key().get(key)
        return Asker((scope.get("client") or ("?",))[0], key, client.name if client else None)

    def _within_rate(self, asker: Asker) -> bool:
        """Take one from the asker's budget, which fills again with time."""
        rate, burst = (STRANGER_REQUESTS_PER_S, STRANGER_BURST) if asker.name is None else (REQUESTS_PER_S, BURST)
        # the name is what it says: it spends at its own host only
        now, who = self._clock(), (asker.name, asker.network if asker.name is None else asker.host)
        left, since = self._budgets.get(who, (burst, now))
        left = min(burst, left + (now - since) * rate)
        if len(self._budgets) >= MAX_NODES and who not in self._budgets:
            self._budgets.clear()
        self._budgets[who] = max(0.0, left - 1.0), now
        return left >= 1.0

    def _explain(self, asker: Asker, scope: Scope, status: int) -> None:
        """Say in the log which node was refused, and why as far as this can be seen here."""
        behind_s = behind_s_of(header(scope, b"flwr-timestamp"))
        if behind_s is not None and not -CLOCK_AHEAD_S < behind_s < CLOCK_BEHIND_S:
            side = "behind" if behind_s > 0 else "ahead of"
            self._tell(
                asker,
                f"its clock is {abs(behind_s):.0f} s {side} this server's, and may be at most {CLOCK_AHEAD_S:.0f} s "
                f"ahead or {CLOCK_BEHIND_S:.0f} s behind. Set its clock, or this server's if several sites are refused "
                "so",
            )
        elif asker.name is None:
            self._tell(asker, "its key is not registered here. `fedzo server add-client` registers it")
        elif scope["path"] == f"{FLEET}activate-node" and status != HTTPStatus.UNAUTHORIZED:
            self._tell(asker, "another node with its key is connected. If that one has ended, wait for a minute")
        else:
            self._tell(asker, f"{scope['path'].removeprefix(FLEET)} was answered with status {status}")

    def _tell(self, asker: Asker, why: str) -> None:
        """Write a line, unless the same was written a short time ago, or many of strangers of the host."""
        now, what = self._clock(), (asker.words, why[:20])
        if now - self._told.get(what, -QUIET_S) < QUIET_S:
            return
        if asker.name is None:  # who has a new key whenever he likes
            begun, lines = self._strangers.get(asker.network, (now, 0))
            begun, lines = (begun, lines) if now - begun < QUIET_S else (now, 0)
            if lines == STRANGER_LINES:
                return
            self._strangers[asker.network] = begun, lines + 1
        for told in (self._told, self._strangers):
            if len(told) >= MAX_NODES:
                told.clear()
        self._told[what] = now
        log.warning("%s", printable(f"refused: {asker.words}: {why}."))


def _poll(asker: Asker, scope: Scope, heard: list[Event]) -> tuple[str, int] | None:
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
