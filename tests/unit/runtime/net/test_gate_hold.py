"""When the gate holds a site's question for work: with a SuperLink that hands out messages from boxes."""

import asyncio
from base64 import b64encode
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest

from fedzo.runtime.net.credentials import make_key
from fedzo.runtime.net.gate import POLL, SEND, Gate
from fedzo.runtime.net.server_folder import Listening, ServerFolder

PUBLIC, CONTROL = 8443, 8444
LONG_S = 60.0
HOSPITAL, CLINIC = 11, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ServerFolder:
    at = tmp_path_factory.mktemp("gate")
    listening = Listening(address="h:1", listen=f"0.0.0.0:{PUBLIC}", control=f"127.0.0.1:{CONTROL}")
    made = ServerFolder.make(at / "server", listening, names=["h"], days=30)
    for index in range(2):
        made.registry.add(f"site-{index}", index=index, key=make_key(at / f"key-{index}"))
    return made


class Post:
    """A SuperLink that does what a gate can see: messages are put into boxes, and a node takes one at a time."""

    def __init__(self, folder: ServerFolder, *, hold_s: float = LONG_S) -> None:
        self.gate = Gate(self._app, public_port=PUBLIC, folder=folder, hold_s=hold_s)
        self.boxes: dict[int, list[bytes]] = {HOSPITAL: [], CLINIC: []}
        self.looked: list[int] = []
        self._keys = dict(zip((HOSPITAL, CLINIC), folder.registry.by_key(), strict=True))

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body, answer, status = (await receive()).get("body", b""), b"", 200
        if scope["path"] == POLL and (b"signed", b"yes") not in scope["headers"]:
            status = 401
        elif scope["path"] == SEND:
            for message in PushAppMessagesRequest.FromString(body).messages_list:
                self.boxes[message.metadata.dst_node_id].append(b"a message")
        else:
            node = PullMessagesRequest.FromString(body).node.node_id
            self.looked.append(node)
            answer = self.boxes[node].pop() if self.boxes.get(node) else b""
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    async def _request(self, scope: Any, body: bytes, left: asyncio.Event) -> list[Any]:
        events, sent = [{"type": "http.request", "body": body}], []

        async def receive() -> Any:
            if events:
                return events.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            sent.append(event.get("status", event.get("body")))

        scope |= {"type": "http", "client": ("c", 5), "method": "POST"}
        await self.gate(scope, receive, send)
        return sent

    async def send(self, *nodes: int) -> None:
        """The run's server sends a message to each."""
        messages = [Message(metadata=Metadata(dst_node_id=node)) for node in nodes]
        body = PushAppMessagesRequest(messages_list=messages).SerializeToString()
        await self._request({"server": ("h", CONTROL), "path": SEND, "headers": []}, body, asyncio.Event())

    def poll(
        self, node: int, *, body: bytes | None = None, left: asyncio.Event | None = None, signed: bool = True
    ) -> Any:
        """A node asks for work, or who only says that he is it; gives status and body of the answer."""
        given = PullMessagesRequest(node=Node(node_id=node)).SerializeToString() if body is None else body
        headers = [(b"flwr-public-key", b64encode(self._keys[node]))]
        headers += [(b"signed", b"yes")] if signed else []
        scope = {"server": ("h", PUBLIC), "path": POLL, "headers": headers}
        return asyncio.ensure_future(self._request(scope, given, left or asyncio.Event()))


async def _settle() -> None:
    for _ in range(40):
        await asyncio.sleep(0)


NOTHING, SOMETHING = [200, b""], [200, b"a message"]


def test_a_question_for_work_is_held_until_the_server_has_sent_its_node_a_message(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        assert await post.poll(HOSPITAL) == NOTHING  # the first is not held: something may have come before
        assert await post.poll(CLINIC) == NOTHING
        hospital, clinic = post.poll(HOSPITAL), post.poll(CLINIC)
        await _settle()
        assert not hospital.done()
        await post.send(HOSPITAL)
        assert await hospital == NOTHING  # whoever asked may have died meanwhile ...
        assert post.looked == [HOSPITAL, CLINIC]
        assert await post.poll(HOSPITAL) == SOMETHING  # ... and who asks now has not
        await _settle()
        assert not clinic.done()
        await post.send(CLINIC)
        assert [await clinic, await post.poll(CLINIC)] == [NOTHING, SOMETHING]

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_all_messages_come_that_are_there_before_anything_is_held(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        assert await post.poll(HOSPITAL) == NOTHING
        await post.send(HOSPITAL, CLINIC, HOSPITAL)
        await post.send(HOSPITAL)
        answers = [await post.poll(HOSPITAL) for _ in range(4)]
        assert answers == [SOMETHING, SOMETHING, SOMETHING, NOTHING]
        last = post.poll(HOSPITAL)
        await _settle()
        assert not last.done()
        last.cancel()

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_a_message_that_comes_while_the_superlink_looks_is_not_waited_for(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        app = post.gate._app

        async def late(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            if scope["path"] == POLL and len(post.looked) == 1:
                await post.send(HOSPITAL)  # after the look, before the answer is over

        post.gate._app = late
        assert await post.poll(HOSPITAL) == NOTHING
        assert await post.poll(HOSPITAL) == SOMETHING

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_a_message_that_comes_just_before_the_wait_begins_ends_it(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        await post.poll(HOSPITAL)
        held = post.poll(HOSPITAL)
        for steps in range(8):
            await asyncio.sleep(0)  # one step further each time
            await post.send(HOSPITAL)
            assert (await held)[0] == 200, steps
            while await post.poll(HOSPITAL) == SOMETHING:
                pass
            held = post.poll(HOSPITAL)
            for _ in range(steps):
                await asyncio.sleep(0)
        held.cancel()

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_nothing_is_held_for_ever_nor_for_who_has_left(folder: ServerFolder) -> None:
    async def play() -> None:
        post, left = Post(folder, hold_s=0.05), asyncio.Event()
        assert [await post.poll(HOSPITAL) for _ in range(3)] == [NOTHING, NOTHING, NOTHING]
        assert post.looked == [HOSPITAL, HOSPITAL]  # the second was held, and the SuperLink is asked again after it
        post = Post(folder)  # whose holds are long
        assert await post.poll(HOSPITAL) == NOTHING
        gone = post.poll(HOSPITAL, left=left)
        await _settle()
        left.set()
        assert await gone == []
        assert post.looked == [HOSPITAL]

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_a_message_that_the_gate_did_not_see_comes_after_one_hold(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder, hold_s=0.05)
        assert await post.poll(HOSPITAL) == NOTHING
        post.boxes[HOSPITAL].append(b"a message")
        assert [await post.poll(HOSPITAL) for _ in range(2)] == [NOTHING, SOMETHING]

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_a_message_whose_sender_was_told_of_a_failure_is_not_waited_for(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        app = post.gate._app

        async def failing(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            if scope["path"] == SEND:
                raise ZeroDivisionError

        post.gate._app = failing
        assert await post.poll(HOSPITAL) == NOTHING
        with pytest.raises(ZeroDivisionError):
            await post.send(HOSPITAL)
        assert await post.poll(HOSPITAL) == SOMETHING

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_of_two_questions_in_one_name_the_second_is_held(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        await post.poll(HOSPITAL)
        first = post.poll(HOSPITAL)
        await _settle()
        second = post.poll(HOSPITAL)
        assert await first == NOTHING
        await _settle()
        assert not second.done()
        await post.send(HOSPITAL)
        assert [await second, await post.poll(HOSPITAL)] == [NOTHING, SOMETHING]

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_who_only_knows_a_nodes_name_keeps_no_message_from_it(folder: ServerFolder) -> None:
    """A public key and a node's number are in logs: only the SuperLink knows whose word a question is."""

    async def play() -> None:
        post, looks, answers = Post(folder), asyncio.Event(), asyncio.Event()
        app = post.gate._app

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == POLL and (b"signed", b"yes") not in scope["headers"]:
                looks.set()
                await answers.wait()
            await app(scope, receive, send)

        post.gate._app = slow
        stranger = post.poll(HOSPITAL, signed=False)
        await looks.wait()
        await post.send(HOSPITAL)
        answers.set()
        assert await stranger == [401, b""]
        assert await post.poll(HOSPITAL, signed=False) == [401, b""]
        assert await asyncio.wait_for(post.poll(HOSPITAL), 10) == SOMETHING  # it is not held

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_a_message_that_comes_while_the_superlink_looks_is_not_forgotten_by_a_late_answer(
    folder: ServerFolder,
) -> None:
    async def play() -> None:
        post = Post(folder)
        app = post.gate._app

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            async def late(event: Any) -> None:
                if scope["path"] == POLL and event["type"] == "http.response.start" and len(post.looked) == 1:
                    await post.send(HOSPITAL)  # after the look, before the answer begins
                await send(event)

            await app(scope, receive, late)

        post.gate._app = slow
        assert await post.poll(HOSPITAL) == NOTHING
        assert await asyncio.wait_for(post.poll(HOSPITAL), 10) == SOMETHING

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_what_names_no_node_is_not_held(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        assert [await post.poll(HOSPITAL, body=b"") for _ in range(2)] == [NOTHING, NOTHING]
        for _ in range(2):
            with pytest.raises(Exception, match="parsing"):  # of this SuperLink
                await post.poll(HOSPITAL, body=b"\xff")

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))


def test_what_is_held_is_answered_when_the_server_ends(folder: ServerFolder) -> None:
    async def play() -> None:
        post = Post(folder)
        await post.poll(HOSPITAL)
        held = post.poll(HOSPITAL)
        await _settle()
        post.gate.end()
        assert await held == NOTHING
        assert await post.poll(CLINIC) == [503, b"busy"]

    asyncio.run(asyncio.wait_for(play(), LONG_S / 2))
