"""Messages that a carrier loses when it is started again: they are sent anew, and each is answered once."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import DEFAULT_TTL, ConfigRecord, Error, Message, RecordDict

from fedzo.fl import content
from fedzo.fl.exchange import MAX_LOST, Outbox, Question, Talk, Traffic, converse
from fedzo.fl.messages import (
    ArtifactPiece,
    ArtifactReply,
    EvaluateReply,
    EvaluateRequest,
    Hello,
    HelloReply,
    ScalarReply,
    TrainRequest,
    decode,
    encode,
)


class Carrier:
    """A grid that keeps what it is given until it is started again, and numbers replies as they are made."""

    def __init__(self) -> None:
        self.under_way: dict[str, Message] = {}
        self.pushed: list[str] = []
        self.starts = 0
        self.forgotten: dict[str, Message] = {}
        self.gone: set[int] = set()

    def restarts(self) -> int:
        return self.starts

    def unreachable(self, reply: Message) -> bool:
        return False

    def limit_replies(self, number_bytes: int) -> None: ...

    def lost(self, reply: Message) -> bool:
        return bool(reply.has_error())

    def get_node_ids(self) -> list[int]:
        return []

    def client_of(self, node: int) -> int:
        return node

    def registered(self, clients: set[int]) -> set[int]:
        return clients

    def wire_bytes(self) -> None: ...

    def push_messages(self, messages: list[Message]) -> list[str]:
        names = []
        for message in messages:
            if message.metadata.dst_node_id in self.gone:
                names.append("")
                continue
            names.append(f"m{len(self.pushed)}")
            message.metadata.__dict__["_message_id"] = names[-1]
            self.under_way[names[-1]] = message
            self.pushed.append(str(message.content["c"]["text"]))
        return names

    def pull_messages(self, names: list[str]) -> list[Message]:
        told = [reply(self.under_way.pop(name)) for name in names if name in self.under_way]
        return told + [Message(Error(4), reply_to=self.forgotten.pop(name)) for name in names if name in self.forgotten]


def question(text: str, node: int = 0) -> Message:
    return Message(RecordDict({"c": ConfigRecord({"text": text})}), dst_node_id=node, message_type="train")


def reply(message: Message) -> Message:
    return Message(RecordDict({"c": ConfigRecord({"text": f"re {message.content['c']['text']}"})}), reply_to=message)


def told(outbox: Outbox[int], carrier: Carrier) -> list[tuple[int, str]]:
    return [(key, str(message.content["c"]["text"])) for key, message in outbox.pull(carrier)]


def test_what_a_carrier_lost_is_asked_again_and_answered_once() -> None:
    carrier, outbox = Carrier(), Outbox[int]()
    assert outbox.push(carrier, {0: question("a"), 1: question("b")}) == []
    del carrier.under_way["m0"]  # lost on its way; the other is only late

    carrier.starts = 1
    assert sorted(told(outbox, carrier)) == [(0, "re a"), (1, "re b")]
    assert carrier.pushed == ["a", "b", "a", "b"]
    assert len(outbox) == 0
    assert told(outbox, carrier) == []


def test_a_second_answer_to_an_earlier_question_is_not_taken_for_one_to_the_next() -> None:
    carrier, outbox = Carrier(), Outbox[int]()
    outbox.push(carrier, {0: question("first")})
    carrier.starts = 1
    late = carrier.under_way.pop("m0")
    assert told(outbox, carrier) == [(0, "re first")]

    carrier.under_way["m0"] = late
    outbox.push(carrier, {0: question("second")})
    assert told(outbox, carrier) == [(0, "re second")]
    assert carrier.pushed == ["first", "first", "second"]


def test_nothing_is_asked_again_while_a_carrier_stays_up_and_once_for_each_restart() -> None:
    carrier, outbox = Carrier(), Outbox[int]()
    outbox.push(carrier, {0: question("a")})
    carrier.under_way.clear()
    assert [told(outbox, carrier) for _ in range(3)] == [[], [], []]
    assert carrier.pushed == ["a"]

    carrier.starts = 1
    outbox.push(carrier, {1: question("b")})
    assert carrier.pushed == ["a", "a", "b"]
    carrier.starts = 3
    assert sorted(told(outbox, carrier)) == [(0, "re a"), (1, "re b")]
    assert carrier.pushed == ["a", "a", "b", "a", "b"]


def test_what_a_carrier_says_that_it_lost_is_asked_again_unless_its_node_is_gone() -> None:
    carrier, outbox = Carrier(), Outbox[int]()
    outbox.push(carrier, {0: question("a", 1), 1: question("b", 2)})
    carrier.forgotten = {"m0": carrier.under_way.pop("m0")}
    late = carrier.under_way.pop("m1")

    assert outbox.pull(carrier) == []
    assert carrier.pushed == ["a", "b", "a"]
    carrier.forgotten, carrier.gone = {"m1": late}, {2}
    replies = dict(outbox.pull(carrier))
    assert replies[0].content["c"]["text"] == "re a"
    assert replies[1].has_error()
    assert len(outbox) == 0


def test_a_client_whose_replies_are_lost_again_and_again_has_failed() -> None:
    """It can have the SuperLink drop them; each costs the server the whole question."""
    carrier, outbox = Carrier(), Outbox[int]()
    for number in (1, 2):  # the next question is asked as often
        outbox.push(carrier, {0: question(f"question {number}"), 1: question("kept", 1)})
        name = f"m{len(carrier.pushed) - 1}"
        kept = carrier.under_way.pop(name)
        for _ in range(MAX_LOST):
            carrier.forgotten, carrier.under_way = carrier.under_way, {}
            assert outbox.pull(carrier) == []
        carrier.forgotten, carrier.under_way = carrier.under_way, {name: kept}
        replies = dict(outbox.pull(carrier))

        assert replies[0].has_error()
        assert replies[1].content["c"]["text"] == "re kept"
        assert carrier.pushed.count(f"question {number}") == 1 + MAX_LOST
        assert len(outbox) == 0


def test_of_several_questions_to_one_client_each_is_lost_for_itself() -> None:
    """Such as greetings of a node that is silent for days, which Flower forgets after a while."""
    carrier, outbox = Carrier(), Outbox[int]()
    texts = [f"greeting {number}" for number in range(MAX_LOST + 1)]
    for text in texts:
        outbox.push(carrier, {0: question(text)})
    carrier.forgotten, carrier.under_way = carrier.under_way, {}

    assert outbox.pull(carrier) == []
    assert carrier.pushed == texts * 2


@pytest.mark.parametrize(
    ("takes_s", "looks"),
    [
        pytest.param(0.0, 800, id="a short pause"),
        pytest.param(0.1, 80, id="four times as long as the look"),
        pytest.param(4.0, 8, id="a second, as where a carrier was started again"),
    ],
)
def test_the_longer_a_look_for_replies_takes_the_rarer_it_is(takes_s: float, looks: int, clock: Any) -> None:
    class Slow(Carrier):
        looks = 0
        takes_s = 0.0

        def push_messages(self, messages: list[Message]) -> list[str]:
            return ["m"] * len(messages)

        def pull_messages(self, names: list[str]) -> list[Message]:
            self.looks += 1
            clock.now += self.takes_s
            return []

    def talk() -> Talk[HelloReply]:
        return (yield Question(Hello(client=0, config_hash="c" * 64, begun=False), HelloReply))

    carrier = Slow()
    carrier.takes_s = takes_s
    answers = converse(carrier, {0: talk()}, nodes={0: 7}, deadline_s=40.0)
    assert answers.mute == {0}
    assert carrier.looks == pytest.approx(looks, abs=1)


@pytest.mark.usefixtures("clock")
def test_what_is_asked_travels_by_its_type_and_bytes_are_counted_as_flower_counts_them() -> None:
    requests = [each(client=3) for each in (Hello, ArtifactPiece, EvaluateRequest, TrainRequest)]
    kinds = [HelloReply, ArtifactReply, EvaluateReply, ScalarReply]
    replies = [HelloReply(num_train=7), ArtifactReply(held=3), EvaluateReply(position=2), ScalarReply(g=b"1234")]
    types: list[str] = []

    class Answering(Carrier):
        def push_messages(self, messages: list[Message]) -> list[str]:
            for message in messages:
                types.append(message.metadata.message_type)
                message.metadata.__dict__["_message_id"] = str(len(types))
                self.under_way[str(len(types))] = message
            return [message.metadata.message_id for message in messages]

        def pull_messages(self, names: list[str]) -> list[Message]:
            return [Message(encode(replies[int(name) - 1]), reply_to=self.under_way.pop(name)) for name in names]

    def talk() -> Talk[list[Any]]:
        got = []
        for request, kind in zip(requests, kinds, strict=True):
            got.append((yield Question(request, kind)))
        return got

    answers = converse(Answering(), {0: talk()}, nodes={0: 7}, deadline_s=40.0)

    def count(messages: list[Any]) -> int:
        return sum(record.count_bytes() for message in messages for record in encode(message).values())

    assert answers.replies == {0: replies}
    assert types == ["query.hello", "query.artifact", "evaluate", "train"]
    assert (answers.traffic.up_bytes, answers.traffic.down_bytes) == (count(replies), count(requests))
    assert answers.traffic + Traffic(1, 2) == Traffic(count(replies) + 1, count(requests) + 2)


@pytest.mark.usefixtures("clock")
def test_long_bytes_that_several_are_sent_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a model's values for each client would not fit in memory, nor would Flower know that they are alike."""
    monkeypatch.setattr(content, "PIECE_BYTES", 4)
    pushed: list[Message] = []

    class Silent(Carrier):
        def push_messages(self, messages: list[Message]) -> list[str]:
            pushed.extend(messages)
            return [str(message.metadata.dst_node_id) for message in messages]

    def talk(request: TrainRequest) -> Talk[ScalarReply]:
        return (yield Question(request, ScalarReply))

    shared = bytes(range(10))
    requests = [TrainRequest(client=client, log=shared if client < 2 else b"another log") for client in range(3)]
    nodes = {client: 7 + client for client in range(3)}
    converse(Silent(), {client: talk(requests[client]) for client in nodes}, nodes=nodes, deadline_s=1.0)

    one, other, third = (message.content for message in pushed)
    pieces = [f"log {number:08}" for number in range(3)]
    assert sorted(one) == sorted(third) == [content.RECORD, *pieces]
    assert all(one[name] is other[name] for name in pieces)
    assert [decode(TrainRequest, message.content) for message in pushed] == requests


@pytest.mark.usefixtures("clock")
def test_what_is_sent_again_has_other_hashes_and_is_still_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was sent it may have told the SuperLink something else of the hashes that it then knew."""
    monkeypatch.setattr(content, "PIECE_BYTES", 4)
    pushed: list[dict[str, str]] = []
    requests = [TrainRequest(client=client, log=bytes(range(10))) for client in range(2)]

    class Restarted(Carrier):
        def push_messages(self, messages: list[Message]) -> list[str]:
            for message in messages:
                assert decode(TrainRequest, message.content) == requests[message.metadata.dst_node_id]
                pushed.append({name: record.object_id for name, record in message.content.items()})
            return [f"m{len(pushed)} {number}" for number, _ in enumerate(messages)]

        def pull_messages(self, names: list[str]) -> list[Message]:
            self.starts = 1
            return []

    def talk(request: TrainRequest) -> Talk[ScalarReply]:
        return (yield Question(request, ScalarReply))

    talks = {client: talk(requests[client]) for client in range(2)}
    converse(Restarted(), talks, nodes={0: 0, 1: 1}, deadline_s=1.0)

    assert len(pushed) == 2 * 2
    pieces = [f"log {number:08}" for number in range(3)]
    for one, other in (pushed[:2], pushed[2:]):
        assert [one[name] for name in pieces] == [other[name] for name in pieces]
    hashes = [name for message in pushed for name in message.values()]
    assert len(set(hashes)) == 2 * (3 + 2)  # at each time three pieces, and a record of each client


@pytest.mark.usefixtures("clock")
def test_a_later_question_with_the_same_pieces_has_other_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SuperLink may have dropped the pieces by then, and whoever got them could name them as made of others."""
    monkeypatch.setattr(content, "PIECE_BYTES", 4)
    request, pushed = TrainRequest(client=0, log=bytes(range(10))), list[set[str]]()

    class Answering(Carrier):
        def push_messages(self, messages: list[Message]) -> list[str]:
            (message,) = messages
            assert decode(TrainRequest, message.content) == request
            pushed.append({record.object_id for record in message.content.values()})
            message.metadata.__dict__["_message_id"] = name = f"m{len(pushed)}"
            self.under_way[name] = message
            return [name]

        def pull_messages(self, names: list[str]) -> list[Message]:
            return [Message(encode(ScalarReply()), reply_to=self.under_way.pop(name)) for name in names]

    def talk() -> Talk[ScalarReply]:
        yield Question(request, ScalarReply)
        return (yield Question(request, ScalarReply))

    converse(Answering(), {0: talk()}, nodes={0: 7}, deadline_s=1.0)

    first, second = pushed
    assert len(first) == len(second) == 3 + 1
    assert first.isdisjoint(second)


@pytest.mark.parametrize("deadline_s", [1.0, 100_000.0])
def test_flower_keeps_a_question_and_its_repetition_for_as_long_as_it_is_waited_for(
    deadline_s: float, clock: Any
) -> None:
    """By itself it forgets a question after 12 hours, and the reply of a slow site is then one to nothing."""
    kept: list[float] = []

    class Restarted(Carrier):
        def push_messages(self, messages: list[Message]) -> list[str]:
            kept.extend(message.metadata.ttl for message in messages)
            return [f"m{len(kept)}"]

        def pull_messages(self, names: list[str]) -> list[Message]:
            self.starts = 1
            clock.now += deadline_s / 40
            return []

    def talk() -> Talk[ScalarReply]:
        return (yield Question(TrainRequest(client=0), ScalarReply))

    converse(Restarted(), {0: talk()}, nodes={0: 7}, deadline_s=deadline_s)

    assert kept == [max(deadline_s, DEFAULT_TTL)] * 2
