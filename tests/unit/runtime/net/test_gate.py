"""What the port for sites lets through, request by request, without a network."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import re
import socket
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from fedzo.runtime.net.credentials import make_key, pem_of
from fedzo.runtime.net.daemons import web_config
from fedzo.runtime.net.gate import (
    BURST,
    MAX_AT_ONCE,
    MAX_BODY_BYTES,
    MAX_HELD_OF_ONE,
    MAX_REPLY_BYTES,
    MAX_WAIT_S,
    QUIET_S,
    REPLY,
    STRANGER_BODY_BYTES,
    STRANGER_BURST,
    STRANGER_LINES,
    WIRE,
    Gate,
)
from fedzo.runtime.net.server_folder import Listening, ServerFolder

PUBLIC, CONTROL = 8443, 8444
PULL, PUSH, ACTIVATE = "/v1/fleet/pull-messages", "/v1/fleet/push-object", "/v1/fleet/activate-node"
BEAT = "/v1/fleet/send-node-heartbeat"


class Place:
    """A gate before an app that reads the whole body and answers with a status."""

    def __init__(self, tmp_path: Path) -> None:
        listening = Listening(address="h:1", listen="0.0.0.0:8443", control="127.0.0.1:8444")
        folder = ServerFolder.make(tmp_path / "s", listening, names=["h"], days=30)
        self.key = pem_of(make_key(tmp_path / "key"))
        folder.registry.add("hospital", index=0, key=make_key(tmp_path / "key"))
        self.key = next(iter(folder.registry.by_key()))
        self.folder = folder
        self.stranger = pem_of(make_key(tmp_path / "other"))
        self.seen: list[str] = []
        self.status = 200
        self.now = 0.0
        self.gate = Gate(self._app, public_port=PUBLIC, folder=folder, clock=lambda: self.now)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        self.seen.append(scope["path"])
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def ask(
        self, path: str, *, port: int = PUBLIC, key: bytes | None = None, parts: list[bytes] | None = None,
        headers: dict[bytes, bytes] | None = None, behind_s: float = 0.0, host: str = "10.0.0.9",
    ) -> int:  # fmt: skip
        signed = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=behind_s)
        given = {b"flwr-timestamp": signed.isoformat().encode(), **(headers or {})}
        if key is not None:
            given[b"flwr-public-key"] = b64encode(key)
        scope = {"type": "http", "server": ("10.0.0.1", port), "client": (host, 5), "path": path, "method": "POST"}
        scope["headers"] = list(given.items())
        events = [{"type": "http.request", "body": part, "more_body": True} for part in parts or []]
        events.append({"type": "http.request", "body": b"", "more_body": False})
        sent: list[Any] = []

        async def receive() -> Any:
            return events.pop(0) if events else await asyncio.Event().wait()  # the asker stays

        async def send(event: Any) -> None:
            sent.append(event)

        asyncio.run(self.gate(scope, receive, send))
        return int(sent[0]["status"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_sites_reach_the_fleet_api_and_nothing_else(place: Place) -> None:
    assert place.ask(PULL, key=place.key) == 200
    shut = [
        "/", "/docs", "/openapi.json", "/health", "/v1/control/start-run", "/v1/control/list-nodes",
        "/v1/runtime/acquire-task", "/v1/runtime/pull-messages", "//v1/control/start-run", "/V1/FLEET/pull-messages",
        "/v1/fleet", "/x/v1/fleet/pull-messages",
    ]  # fmt: skip
    assert {place.ask(path, key=place.key) for path in shut} == {404}
    assert place.seen == [PULL]


def test_this_machine_reaches_every_api_at_its_own_port(place: Place) -> None:
    assert [place.ask(path, port=CONTROL) for path in ("/v1/control/start-run", PULL)] == [200, 200]


def test_a_long_body_is_refused_whether_its_length_is_declared_or_not(place: Place) -> None:
    long = str(MAX_BODY_BYTES + 1).encode()
    assert place.ask(PULL, key=place.key, headers={b"content-length": long}) == 413
    assert place.ask(PULL, key=place.key, headers={b"content-length": b"-1"}) == 413
    assert place.ask(PULL, key=place.key, parts=[bytes(MAX_BODY_BYTES), b"x"]) == 413
    assert place.seen == []
    assert place.ask(PULL, key=place.key, parts=[bytes(MAX_BODY_BYTES)]) == 200


def test_the_list_of_a_replys_parts_is_shorter_than_a_part_may_be(place: Place) -> None:
    """The SuperLink would be busy with one of 16 MiB for a long time, and answer nobody else."""
    assert place.ask(REPLY, key=place.key, headers={b"content-length": str(MAX_REPLY_BYTES + 1).encode()}) == 413
    assert place.ask(REPLY, key=place.key, parts=[bytes(MAX_REPLY_BYTES), b"x"]) == 413
    assert place.ask(REPLY, parts=[bytes(STRANGER_BODY_BYTES), b"x"]) == 413
    assert place.seen == []
    assert place.ask(REPLY, key=place.key, parts=[bytes(MAX_REPLY_BYTES)]) == 200
    assert place.ask(PUSH, key=place.key, parts=[bytes(MAX_REPLY_BYTES), b"x"]) == 200


def test_of_a_stranger_little_is_heard_and_of_nobody_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = str(STRANGER_BODY_BYTES + 1).encode()
    assert place.ask(PULL, headers={b"content-length": long}) == 413
    assert place.ask(PULL, parts=[bytes(STRANGER_BODY_BYTES), b"x"]) == 413
    assert place.ask(PULL, parts=[bytes(STRANGER_BODY_BYTES)]) == 200
    monkeypatch.setattr("fedzo.runtime.net.gate.MAX_HEAR_S", 0.01)
    slow = Slow(place)

    async def never_heard() -> None:
        await asyncio.wait_for(slow.ask(heard=asyncio.Event()), 5)

    asyncio.run(never_heard())
    assert slow.answers == [408]
    assert slow.asked == []
    assert "refused: client hospital at c: a request of it took longer than" in caplog.text


def test_bodies_on_their_way_have_a_bound_of_bytes_and_small_ones_always_room(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a client at one host, and of all: else a client could have the server hold 2,000 bodies of 16 MiB."""
    monkeypatch.setattr("fedzo.runtime.net.gate.MAX_HELD_BYTES", MAX_HELD_OF_ONE + MAX_BODY_BYTES)
    gate = Gate(place._app, public_port=PUBLIC, folder=place.folder)
    long, small = bytes(MAX_BODY_BYTES - 1), bytes(STRANGER_BODY_BYTES - 1)

    async def send(begin: bytes, rest: asyncio.Event, *, host: str = "10.0.0.9") -> int:
        scope = {"type": "http", "server": ("h", PUBLIC), "client": (host, 5), "path": PUSH, "method": "POST"}
        scope["headers"] = [(b"flwr-public-key", b64encode(place.key))]
        parts, sent = [begin, b"x"], list[Any]()

        async def receive() -> Any:
            if len(parts) == 1:
                await rest.wait()
            if not parts:
                return await asyncio.Event().wait()
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def keep(event: Any) -> None:
            sent.append(event)

        await gate(scope, receive, keep)
        return int(sent[0]["status"])

    async def play() -> list[list[int]]:
        rest, now = asyncio.Event(), asyncio.Event()
        now.set()
        own = [asyncio.ensure_future(send(long, rest)) for _ in range(6)]
        other = [asyncio.ensure_future(send(long, rest, host="10.0.0.8")) for _ in range(3)]
        await _settle()
        meanwhile = [await send(long, now), await send(small, now)]
        rest.set()
        ends = [await asyncio.gather(*own), await asyncio.gather(*other)]
        return [*ends, meanwhile, [await send(long, now) for _ in range(6)]]

    fit = MAX_HELD_OF_ONE // MAX_BODY_BYTES
    assert asyncio.run(play()) == [
        [200] * fit + [503] * (6 - fit),
        [200, 503, 503],
        [503, 200],
        [200] * 6,  # what is over takes no room
    ]


def test_a_superlink_that_failed_at_a_message_is_asked_again(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Flower's nodes and servers ask again after 502, 503 and 504 alone."""
    place.status = 500

    with caplog.at_level(logging.WARNING, logger="fedzo"):
        assert place.ask(PULL, key=place.key) == 503

    assert place.ask("/v1/runtime/push-messages", port=CONTROL) == 503
    assert place.ask("/v1/control/start-run", port=CONTROL) == 500
    assert "client hospital at 10.0.0.9: pull-messages was answered with status 503" in caplog.text


class Slow:
    """Requests to a gate whose app, and whose askers' lines, go on only when they are told."""

    def __init__(self, place: Place, *, max_wait_s: float = MAX_WAIT_S) -> None:
        self.gate = Gate(self._app, public_port=PUBLIC, folder=place.folder, max_wait_s=max_wait_s)
        self.answers = list[int]()
        self.working, self.asked = 0, list[str]()
        self.done = asyncio.Event()
        self._key = b64encode(place.key)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.working += 1
        self.asked.append(scope["path"])
        await self.done.wait()
        self.working -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def ask(
        self,
        path: str = PUSH,
        *,
        port: int = PUBLIC,
        heard: asyncio.Event | None = None,
        taken: asyncio.Event | None = None,
        left: asyncio.Event | None = None,
    ) -> Any:
        """A request: its body comes when ``heard`` is set, its answer goes when ``taken`` is, and ``left`` ends it."""
        scope = {"type": "http", "server": ("h", port), "client": ("c", 5), "path": path, "method": "POST"}
        scope["headers"] = [(b"flwr-public-key", self._key)]

        events = [{"type": "http.request", "body": b""}]

        async def receive() -> Any:
            if heard:
                await heard.wait()
            if events:
                return events.pop()
            await (left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            if taken:
                await taken.wait()
            if "status" in event:
                self.answers.append(event["status"])

        return asyncio.ensure_future(self.gate(scope, receive, send))


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_requests_of_sites_take_turns_and_those_of_this_machine_do_not_wait(place: Place) -> None:
    async def play() -> list[int]:
        slow = Slow(place)
        tasks = [slow.ask() for _ in range(3 * MAX_AT_ONCE)]
        await _settle()
        sites = slow.working
        tasks.append(slow.ask(port=CONTROL))
        await _settle()
        both = slow.working
        slow.done.set()
        await asyncio.gather(*tasks)
        return [sites, both, slow.working]

    assert asyncio.run(play()) == [MAX_AT_ONCE, MAX_AT_ONCE + 1, 0]


def test_a_sign_of_life_is_next_and_a_question_for_work_is_last(place: Place) -> None:
    async def play() -> list[str]:
        slow = Slow(place)
        tasks = [slow.ask(path) for path in [PULL] * MAX_AT_ONCE]
        await _settle()
        tasks += [slow.ask(path) for path in (PULL, PUSH, BEAT, PULL, PUSH, BEAT)]
        await _settle()
        slow.done.set()
        await asyncio.gather(*tasks)
        return slow.asked

    assert asyncio.run(play()) == [PULL] * MAX_AT_ONCE + [BEAT, BEAT, PUSH, PUSH, PULL, PULL]


def test_a_slow_line_takes_no_turn_from_the_others(place: Place) -> None:
    async def play() -> list[int]:
        slow, heard, taken = Slow(place), asyncio.Event(), asyncio.Event()
        slow.done.set()
        stuck = [slow.ask(heard=heard) for _ in range(MAX_AT_ONCE)]
        stuck += [slow.ask(taken=taken) for _ in range(MAX_AT_ONCE)]
        await _settle()
        slow.done.clear()
        tasks = [slow.ask() for _ in range(MAX_AT_ONCE)]
        await _settle()
        working = slow.working
        for event in (slow.done, heard, taken):
            event.set()
        await asyncio.gather(*stuck, *tasks)
        return [working, slow.working]

    assert asyncio.run(play()) == [MAX_AT_ONCE, 0]


@pytest.mark.parametrize("path", [PULL, PUSH])
def test_who_hangs_up_while_he_waits_is_not_asked_for(place: Place, path: str) -> None:
    async def play() -> list[int]:
        slow, left = Slow(place), asyncio.Event()
        served = [slow.ask(path) for _ in range(MAX_AT_ONCE)]
        await _settle()
        gone = [slow.ask(path, left=left) for _ in range(5)]
        last = slow.ask(path)
        await _settle()
        left.set()
        await asyncio.gather(*gone)  # while the others still work
        working = slow.working
        slow.done.set()
        await asyncio.gather(*served, last)
        return [working, len(slow.asked)]

    assert asyncio.run(play()) == [MAX_AT_ONCE, MAX_AT_ONCE + 1]


def test_who_waits_for_long_is_told_to_ask_again_and_the_superlink_never_hears_of_it(place: Place) -> None:
    async def play() -> tuple[list[int], int]:
        slow = Slow(place, max_wait_s=0.05)
        served = [slow.ask() for _ in range(MAX_AT_ONCE)]
        await _settle()
        await asyncio.gather(*(slow.ask(path) for path in (PUSH, PULL, BEAT)))
        slow.done.set()
        await asyncio.gather(*served)
        await slow.ask()  # the turns are free again
        return slow.answers, len(slow.asked)

    assert asyncio.run(play()) == ([503] * 3 + [200] * (MAX_AT_ONCE + 1), MAX_AT_ONCE + 1)


def test_a_request_that_fails_or_breaks_off_gives_its_turn_back(place: Place) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def play() -> list[int]:
        slow = Slow(place)
        slow.gate._app = broken
        failed = await asyncio.gather(*(slow.ask() for _ in range(2 * MAX_AT_ONCE)), return_exceptions=True)
        slow.gate._app = slow._app
        gone = [slow.ask(path) for path in (PUSH, PULL) for _ in range(2 * MAX_AT_ONCE)]
        await _settle()
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        slow.working = 0
        tasks = [slow.ask() for _ in range(2 * MAX_AT_ONCE)]
        await _settle()
        working = slow.working
        slow.done.set()
        await asyncio.gather(*tasks)
        return [sum(isinstance(error, ZeroDivisionError) for error in failed), working]

    assert asyncio.run(play()) == [2 * MAX_AT_ONCE, MAX_AT_ONCE]


HEADER = st.binary(max_size=20) | st.sampled_from(
    [b"9" * 30, b"9" * 5000, b"-1", b"1e9", b"2026-01-01", b"0001-01-01T00:00:00+23:59", b"9999-12-31T23:59:59-23:59"]
)


@given(length=HEADER, key=HEADER | HEADER.map(b64encode), signed=HEADER)
def test_headers_of_any_bytes_are_answered(
    tmp_path_factory: pytest.TempPathFactory, length: bytes, key: bytes, signed: bytes
) -> None:
    place = Place(tmp_path_factory.mktemp("gate"))
    place.status = 401  # and the gate says who it was
    headers = {b"content-length": length, b"flwr-public-key": key, b"flwr-timestamp": signed}

    assert place.ask(PULL, headers=headers) in (401, 413)


def test_a_client_has_a_budget_of_its_own_and_all_strangers_of_a_host_share_a_small_one(place: Place) -> None:
    place.status = 401
    for number in range(int(STRANGER_BURST)):
        assert place.ask(ACTIVATE, key=place.stranger + b"%d" % number) == 401  # another key each time does not help
    assert place.ask(ACTIVATE, key=place.stranger) == 429
    assert place.ask(ACTIVATE, key=place.stranger, host="10.0.0.8") == 401

    place.status = 200
    assert {place.ask(PULL, key=place.key, host="10.0.0.7") for _ in range(int(BURST))} == {200}
    assert place.ask(PULL, key=place.key, host="10.0.0.7") == 429
    assert {place.ask(PULL, key=place.key) for _ in range(int(BURST))} == {200}  # whose key it is spends at home
    assert place.ask(PULL, key=place.key) == 429
    place.now += 1.0  # a second: as many as the page on the trust boundary names
    assert [place.ask(PULL, key=place.key) for _ in range(201)] == [200] * 200 + [429]
    keys = [place.stranger + b"later %d" % number for number in range(6)]
    assert [place.ask(ACTIVATE, key=key) for key in keys] == [200] * 5 + [429]


def test_a_stranger_with_another_key_each_time_does_not_fill_the_log(
    place: Place, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    place.status = 401
    keys = [pem_of(make_key(tmp_path / f"key{number}")) for number in range(2 * STRANGER_LINES)]

    with caplog.at_level(logging.WARNING, logger="fedzo"):
        for key in keys:
            place.ask(ACTIVATE, key=key)

    assert len(caplog.records) == STRANGER_LINES

    place.now += QUIET_S
    with caplog.at_level(logging.WARNING, logger="fedzo"):
        place.ask(ACTIVATE, key=place.stranger)

    assert len(caplog.records) == STRANGER_LINES + 1


@pytest.mark.parametrize(
    ("who", "path", "behind_s", "status", "says"),
    [
        (
            "stranger",
            ACTIVATE,
            0.0,
            412,
            r"a node with the key SHA256:\S+ at 10\.0\.0\.9: its key is not registered here",
        ),
        ("client", ACTIVATE, 0.0, 412, "client hospital at 10.0.0.9: another node with its key is connected"),
        ("client", ACTIVATE, 0.0, 401, "client hospital at 10.0.0.9: activate-node was answered with status 401"),
        (
            "client",
            PULL,
            3600.0,
            401,
            r"client hospital .*: its clock is 36\d\d s behind this server's, .* Set its clock, or this server's if ",
        ),
        ("client", PULL, -3600.0, 401, r"its clock is 3[56]\d\d s ahead of this server's"),
        ("nobody", PULL, 0.0, 401, "a node with the key no key at 10.0.0.9: its key is not registered"),
    ],
)
def test_a_node_that_the_superlink_refuses_is_named_with_the_reason(
    place: Place, caplog: pytest.LogCaptureFixture, who: str, path: str, behind_s: float, status: int, says: str
) -> None:
    place.status = status
    key = {"stranger": place.stranger, "client": place.key, "nobody": None}[who]

    with caplog.at_level(logging.WARNING, logger="fedzo"):
        for _ in range(3):
            place.ask(path, key=key, behind_s=behind_s)

    (line,) = [record.getMessage() for record in caplog.records]  # once a minute
    assert re.search(says, line)


def test_words_of_a_stranger_do_not_reach_the_log(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.status = 401

    place.ask(ACTIVATE, key=b"\x1b[2J evil\n" * 50)

    assert "evil" not in caplog.text
    assert "\x1b" not in caplog.text


def test_who_asks_is_who_connected_whatever_he_says_of_himself() -> None:
    hosts: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        hosts.append(scope["client"][0])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    listening = socket.create_server(("127.0.0.1", 0))
    config = web_config(app, ssl_certfile=None, ssl_keyfile=None, log_config=None)
    config.lifespan = "off"
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with socket.create_connection(listening.getsockname()) as connection:
            connection.sendall(b"GET /v1/fleet/x HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 10.1.2.3\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        server.should_exit = True
        thread.join()

    assert hosts == ["127.0.0.1"]


def test_bytes_of_clients_are_counted_as_a_socket_carries_them_and_told_to_this_machine_alone(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"application/x"), (b"content-length", b"300")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"r" * 100, "more_body": True})
        await send({"type": "http.response.body", "body": b"r" * 200})

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    public, control = (each.getsockname()[1] for each in sockets)
    folder = ServerFolder.make(
        tmp_path / "s", Listening(address="h:1", listen=f"h:{public}", control=f"h:{control}"), names=["h"], days=30
    )
    folder.registry.add("hospital", index=0, key=make_key(tmp_path / "key"))
    (key,) = folder.registry.by_key()
    gate = Gate(app, public_port=public, folder=folder)
    server = uvicorn.Server(uvicorn.Config(gate, server_header=False, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    try:
        up = down = 0
        with socket.create_connection(("127.0.0.1", public)) as connection:
            for name, body in ((key, b"b" * 5000), (b"a stranger", b"x"), (key, b"")):
                lines = [f"POST {PULL} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}"]
                lines.append(f"Flwr-Public-Key: {b64encode(name).decode()}")
                request = "\r\n".join([*lines, "", ""]).encode() + body
                connection.sendall(request)
                answer = b""
                while answer.count(b"r" * 300) == 0:
                    answer += connection.recv(65536)
                if name == key:
                    up, down = up + len(request), down + len(answer)
        with socket.create_connection(("127.0.0.1", control)) as connection:
            connection.sendall(f"GET {WIRE} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            told = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")[2]
    finally:
        server.should_exit = True
        thread.join()

    assert json.loads(told)[1:] == [up, down]
    assert Place(tmp_path / "other").ask(WIRE) == 404
