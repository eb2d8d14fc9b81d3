"""Replies whose parts come late, never, or twice over a SuperLink that was started again."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PullTaskInputResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedzo.runtime.net import _flower_grid
from fedzo.runtime.net._flower_grid import ServerGrid, server_task


class SuperLink:
    """What a grid talks to: replies are told of before their parts are there."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.answered: set[str] = set()
        self.parts: dict[str, bytes] = {}
        self.lost: set[str] = set()
        self.confirmed: list[str] = []
        self.pushed: list[str] = []
        self.breaks_at = 0
        self.trees: dict[str, Any] = {}

    def answer(self, question: Message, text: str, *, parts: int, records: int = 1) -> Message:
        """A reply of which so many parts have arrived."""
        content = {"c": ConfigRecord({"text": text})} | {
            f"c{at}": ConfigRecord({"more": at}) for at in range(1, records)
        }
        reply = Message(RecordDict(content), reply_to=question)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.told.append(reply)
        self.arrive(reply, parts)
        return reply

    def arrive(self, reply: Message, parts: int) -> None:
        objects = get_all_nested_objects(reply)
        self.parts |= {name: each.deflate() for name, each in list(objects.items())[:parts]}

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        assert not self.answered & set(request.message_ids), "it does not know a question that it has the reply to"
        told = [each for each in self.told if each.metadata.reply_to_message_id in set(request.message_ids)]
        self.answered |= {each.metadata.reply_to_message_id for each in told}
        self.told = [each for each in self.told if each not in told]  # once
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(each)) for each in told],
            message_object_trees=[self.trees.get(each.metadata.message_id) or get_object_tree(each) for each in told],
        )

    def PullObject(self, request: Any) -> PullObjectResponse:
        found, content = request.object_id not in self.lost, self.parts.get(request.object_id)
        return PullObjectResponse(
            object_found=found, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:
        names = [each.metadata.message_id for each in request.messages_list]
        wanted = {part for tree in request.message_object_trees for part in _names(tree)} - set(self.pushed)
        return PushAppMessagesResponse(message_ids=names, objects_to_push=sorted(wanted), session_id="s")

    def PushObject(self, request: Any) -> PushObjectResponse:
        if len(self.pushed) == self.breaks_at - 1:  # it has the part, and is killed before it says so
            self.pushed.append(request.object_id)
            self.breaks_at = 0
            return PushObjectResponse(stored=False)
        assert request.object_id not in self.pushed
        self.pushed.append(request.object_id)
        return PushObjectResponse(stored=True)


def _names(tree: Any) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in _names(child))]


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return SuperLink()


@pytest.fixture
def grid(superlink: SuperLink, monkeypatch: pytest.MonkeyPatch) -> ServerGrid:
    made = ServerGrid("127.0.0.1:1", root_certificates=b"", token="x")
    made._client, made._run = superlink, SimpleNamespace(run_id=1)  # type: ignore[assignment]
    return made


def question(node: int) -> Message:
    asked = Message(RecordDict({"c": ConfigRecord({"text": f"to {node}"})}), dst_node_id=node, message_type="train")
    asked.metadata.__dict__["_message_id"] = asked.object_id
    return asked


def texts(messages: list[Message]) -> list[str]:
    return [str(message.content["c"]["text"]) for message in messages]


def test_a_reply_is_there_when_all_of_its_parts_are_and_holds_up_no_other(
    superlink: SuperLink, grid: ServerGrid
) -> None:
    asked = [question(node) for node in (1, 2)]
    names = [each.metadata.message_id for each in asked]
    slow = superlink.answer(asked[0], "slow", parts=1)
    superlink.answer(asked[1], "fast", parts=9)

    began = time.monotonic()
    assert texts(grid.pull_messages(names)) == ["fast"]
    assert grid.pull_messages(names[:1]) == []
    assert time.monotonic() - began < 1

    superlink.arrive(slow, 9)
    assert grid.pull_messages([]) == []  # nobody asks for it
    (reply,) = grid.pull_messages(names[:1])
    assert (texts([reply]), reply.metadata.reply_to_message_id) == (["slow"], names[0])
    assert len(superlink.confirmed) == 2


def test_a_reply_of_which_a_part_is_gone_or_never_comes_is_dropped(
    superlink: SuperLink, grid: ServerGrid, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [question(node) for node in (1, 2)]
    names = [each.metadata.message_id for each in asked]
    gone = superlink.answer(asked[0], "gone", parts=1)
    superlink.answer(asked[1], "late", parts=1)
    assert grid.pull_messages(names) == []
    superlink.lost.update(get_all_nested_objects(gone))

    assert grid.pull_messages(names) == []
    assert "a reply is lost" in caplog.text
    assert len(grid._arriving) == 1
    monkeypatch.setattr(_flower_grid, "OBJECT_PUSH_SESSION_TTL_SECONDS", -1.0)
    assert grid.pull_messages([]) == []
    assert grid._arriving == {}


def test_a_part_may_be_found_gone_just_when_its_reply_is_given_up(
    superlink: SuperLink, grid: ServerGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both clocks run for as long, so both often end within one look."""
    asked = question(1)
    gone = superlink.answer(asked, "gone", parts=1)
    assert grid.pull_messages([asked.metadata.message_id]) == []
    superlink.lost.update(get_all_nested_objects(gone))
    monkeypatch.setattr(_flower_grid, "OBJECT_PUSH_SESSION_TTL_SECONDS", -1.0)

    assert grid.pull_messages([asked.metadata.message_id]) == []
    assert grid._arriving == {}


@pytest.mark.parametrize("which", ["Message", "RecordDict", "ConfigRecord"])
def test_a_reply_whose_bytes_are_no_message_is_an_error_of_its_client(
    superlink: SuperLink, grid: ServerGrid, which: str
) -> None:
    """The SuperLink looks at the head of a part alone."""
    body = b"\xff\xff junk"
    asked = [question(node) for node in (1, 2)]
    bad = superlink.answer(asked[0], "bad", parts=9)
    superlink.answer(asked[1], "good", parts=9)
    (part,) = [name for name, each in get_all_nested_objects(bad).items() if type(each).__name__ == which]
    head = superlink.parts[part].partition(b"\0")[0]
    kind, children, _ = head.split(b" ")
    superlink.parts[part] = b" ".join([kind, children, str(len(body)).encode()]) + b"\0" + body

    replies = {
        each.metadata.reply_to_message_id: each for each in grid.pull_messages([each.object_id for each in asked])
    }

    assert texts([replies[asked[1].object_id]]) == ["good"]
    error = replies[asked[0].object_id]
    assert error.has_error()
    assert "its reply must be a message of Flower" in error.error.reason
    assert (len(superlink.confirmed), grid._arriving) == (2, {})


def test_a_reply_that_names_a_part_it_did_not_announce_is_an_error_of_its_client(
    superlink: SuperLink, grid: ServerGrid
) -> None:
    asked = question(1)
    bad = superlink.answer(asked, "bad", parts=9)
    kind, _, rest = superlink.parts[bad.object_id].partition(b"\0")[0].split(b" ")
    body = superlink.parts[bad.object_id].partition(b"\0")[2]
    superlink.parts[bad.object_id] = b" ".join([kind, b"f" * 64, rest]) + b"\0" + body

    (reply,) = grid.pull_messages([asked.object_id])

    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == asked.object_id


def test_a_reply_cannot_grow_when_its_parts_are_put_together(superlink: SuperLink, grid: ServerGrid) -> None:
    """Neither by an array that names one chunk many times, nor by a record under many names."""
    grid.limit_replies(10_000)
    many, often = question(1), question(2)
    chunks = Array("uint8", (1,), "numpy.ndarray", b"\0" * 100)
    grows = Message(RecordDict({"fedzo": ArrayRecord({"a": chunks})}), reply_to=many)
    record = ConfigRecord({"piece": b"1" * 9_000})
    repeats = Message(RecordDict({f"piece {at}": record for at in range(2_000)}), reply_to=often)
    for reply in (grows, repeats):
        reply.metadata.__dict__["_message_id"] = reply.object_id
        superlink.told.append(reply)
        superlink.arrive(reply, 9_999)

    replies = {
        each.metadata.reply_to_message_id: each.error.reason
        for each in grid.pull_messages([many.object_id, often.object_id])
    }

    assert "a part that is an Array" in replies[many.object_id]
    assert "its reply must have at most" in replies[often.object_id]


def test_what_a_reply_says_of_itself_counts_for_nothing(superlink: SuperLink, grid: ServerGrid) -> None:
    """Its client could name another question, or another sender; the SuperLink knows both."""
    asked = question(1)
    reply = Message(RecordDict({"c": ConfigRecord({"text": "of another"})}), reply_to=question(2))
    reply.metadata.__dict__["_message_id"] = reply.object_id
    superlink.arrive(reply, 9)
    envelope = Message(RecordDict(), reply_to=asked)
    envelope.metadata.__dict__["_message_id"] = reply.object_id
    superlink.told.append(envelope)
    tree = get_object_tree(reply)
    superlink.trees[reply.object_id] = tree

    (got,) = grid.pull_messages([asked.object_id])

    assert got.metadata.reply_to_message_id == asked.object_id
    assert texts([got]) == ["of another"]


def test_a_reply_that_is_too_long_is_an_error_before_all_of_it_is_taken(
    superlink: SuperLink, grid: ServerGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_flower_grid, "SMALL_REPLY_BYTES", 0)
    asked = question(1)
    long = superlink.answer(asked, "x" * 5000, parts=99, records=60)
    taken: list[str] = []
    pull = superlink.PullObject

    def count(request: Any) -> PullObjectResponse:
        taken.append(request.object_id)
        return pull(request)

    superlink.PullObject = count  # type: ignore[method-assign]
    grid.limit_replies(2000)

    (reply,) = grid.pull_messages([asked.object_id])

    assert reply.error.reason == "its reply must have at most 2000 bytes, got more"
    assert len(taken) < len(get_all_nested_objects(long))
    again = question(2)
    superlink.answer(again, "y" * 5000, parts=9)
    grid.limit_replies(10_000)
    assert texts(grid.pull_messages([again.object_id])) == ["y" * 5000]


def test_a_long_reply_is_taken_in_several_looks(
    superlink: SuperLink, grid: ServerGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the deadline is seen between them."""
    monkeypatch.setattr(_flower_grid, "TAKE_S", -1.0)
    asked = question(1)
    superlink.answer(asked, "long", parts=9)

    assert grid.pull_messages([asked.object_id]) == []
    monkeypatch.setattr(_flower_grid, "TAKE_S", 5.0)
    assert texts(grid.pull_messages([asked.object_id])) == ["long"]


def test_a_reply_that_uses_up_a_look_is_last_in_the_next(
    superlink: SuperLink, grid: ServerGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part takes a second here, so a look takes six of the long reply's twelve; the short one has three."""
    taken: list[str] = []
    pull = superlink.PullObject

    def count(request: Any) -> PullObjectResponse:
        taken.append(request.object_id)
        return pull(request)

    superlink.PullObject = count  # type: ignore[method-assign]
    monkeypatch.setattr(_flower_grid, "time", SimpleNamespace(monotonic=lambda: float(len(taken))))
    asked = [question(node) for node in (1, 2)]
    names = [each.object_id for each in asked]
    superlink.answer(asked[0], "long", parts=99, records=10)
    superlink.answer(asked[1], "short", parts=9)

    assert grid.pull_messages(names) == []
    assert texts(grid.pull_messages(names)) == ["short"]
    assert texts(grid.pull_messages(names[:1])) == ["long"]


def test_a_part_that_was_stored_unsaid_is_not_sent_twice(superlink: SuperLink, grid: ServerGrid) -> None:
    asked = question(1)
    superlink.breaks_at = 2

    assert list(grid.push_messages([asked])) == [asked.object_id]
    assert sorted(superlink.pushed) == sorted(get_all_nested_objects(asked))


class Away:
    """A SuperLink that goes away once it has handed out the task; who asks it retries as the grid does."""

    _interceptors = ()

    def __init__(self, grid: ServerGrid) -> None:
        self._retry = grid._retry_invoker

    def PullTaskInput(self, request: Any) -> PullTaskInputResponse:
        return PullTaskInputResponse()

    def SendTaskHeartbeat(self, request: Any) -> Any:
        return self._retry.invoke(self._refuse)

    PushTaskOutput = SendTaskHeartbeat

    def _refuse(self) -> None:
        raise httpx.ConnectError("[Errno 111] Connection refused")

    def close(self) -> None: ...


def test_a_run_that_is_interrupted_while_the_superlink_is_away_ends_at_once(
    superlink: SuperLink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its heartbeat is asking again and again just then."""
    monkeypatch.setattr(_flower_grid, "MAX_TIME_S", 5.0)
    monkeypatch.setattr(ServerGrid, "_runtime_client", property(Away))

    def interrupted() -> None:
        nonlocal began
        retries = threading.Event()
        with server_task(ServerGrid("127.0.0.1:1", root_certificates=b"", token="x"), not_taken=retries.set):
            assert retries.wait(4.0)
            began = time.monotonic()
            raise KeyboardInterrupt

    began = 0.0
    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert time.monotonic() - began < 1.0
    assert "the SuperLink was not told how the run ended" in caplog.text


@pytest.mark.usefixtures("superlink")
def test_a_handshake_that_breaks_off_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower gives up at once where the words of an error have "ssl" in them."""

    class BreaksOff(Away):
        def PullTaskInput(self, request: Any) -> PullTaskInputResponse:
            got: PullTaskInputResponse = self._retry.invoke(self._pull)
            return got

        def _pull(self) -> PullTaskInputResponse:
            asked.append("for the task")
            if len(asked) == 1:
                raise httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out")
            return PullTaskInputResponse()

        def SendTaskHeartbeat(self, request: Any) -> Any:
            return SimpleNamespace(success=True)

        PushTaskOutput = SendTaskHeartbeat

    asked = list[str]()
    monkeypatch.setattr(ServerGrid, "_runtime_client", property(BreaksOff))

    with server_task(ServerGrid("127.0.0.1:1", root_certificates=b"", token="x"), not_taken=lambda: None):
        pass

    assert len(asked) == 2
