"""Replies whose parts come late, never, or twice over a SuperLink that was started again."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedzo.runtime.net import _flower_grid
from fedzo.runtime.net._flower_grid import ServerGrid


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

    def answer(self, question: Message, text: str, *, parts: int) -> Message:
        """A reply of which so many parts have arrived."""
        reply = Message(RecordDict({"c": ConfigRecord({"text": text})}), reply_to=question)
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
            message_object_trees=[get_object_tree(each) for each in told],
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


def test_a_part_that_was_stored_unsaid_is_not_sent_twice(superlink: SuperLink, grid: ServerGrid) -> None:
    asked = question(1)
    superlink.breaks_at = 2

    assert list(grid.push_messages([asked])) == [asked.object_id]
    assert sorted(superlink.pushed) == sorted(get_all_nested_objects(asked))
