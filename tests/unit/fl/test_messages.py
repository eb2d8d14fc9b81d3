"""Messages: exact round trips, and a clear refusal of everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.errors import ProtocolError
from fedzo.fl import content
from fedzo.fl.content import RECORD, in_pieces
from fedzo.fl.exchange import message_bytes
from fedzo.fl.messages import (
    PROTOCOL,
    VERSION,
    ArtifactPiece,
    ArtifactReply,
    EvaluateReply,
    EvaluateRequest,
    Hello,
    HelloReply,
    ScalarReply,
    Status,
    TrainRequest,
    VectorReply,
    decode,
    encode,
)

KINDS = [
    Hello,
    HelloReply,
    TrainRequest,
    ScalarReply,
    VectorReply,
    EvaluateRequest,
    EvaluateReply,
    ArtifactPiece,
    ArtifactReply,
]
REQUESTS = [Hello, TrainRequest, EvaluateRequest, ArtifactPiece]
SALT: dict[str, Any] = {"salt": b"8 bytes."}


def sent(fields: dict[str, Any], **records: dict[str, Any]) -> RecordDict:
    """What a peer may send: the record of plain fields, and others by their names."""
    return RecordDict({name: ConfigRecord(SALT | each) for name, each in {RECORD: fields, **records}.items()})


def unsalted(record: Any) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "salt"}


@given(
    round=st.integers(0, 2**32 - 1),
    log=st.binary(max_size=50),
    lr=st.floats(0, 1e38),
    chain=st.text("0123456789abcdef", min_size=64, max_size=64),
)
@settings(max_examples=50, deadline=None)
def test_a_request_survives_the_wire(round: int, log: bytes, lr: float, chain: str) -> None:
    request = TrainRequest(client=7, round=round, log=log, lr=lr, chain=chain, steps=3)

    assert decode(TrainRequest, encode(request)) == request


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_has_defaults_that_survive_the_wire_and_can_be_counted(kind: Any) -> None:
    """All but whom it is for: that is in every request, and in no reply."""
    whom = {"client": 3} if kind in REQUESTS else {}
    encoded = encode(kind(**whom))

    assert decode(kind, encoded) == kind(**whom)
    assert decode(kind, recorddict_from_proto(recorddict_to_proto(encoded))) == kind(**whom)
    assert message_bytes(encoded) >= 0


def test_what_is_as_it_is_by_default_does_not_travel_but_a_peers_own_version_does() -> None:
    request, reply = TrainRequest(client=0, lr=0.5, steps=1), ArtifactReply(held=0, intact=False)

    assert unsalted(encode(request)[RECORD]) == {"client": 0, "lr": 0.5}
    assert unsalted(encode(reply)[RECORD]) == {"intact": False}
    assert unsalted(encode(HelloReply())[RECORD]) == {"protocol": PROTOCOL, "version": VERSION}


def test_no_part_of_a_message_can_be_known_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower believes whoever is the first to say of a hash what its part is made of, and refuses all others."""
    monkeypatch.setattr(content, "PIECE_BYTES", 4)
    long = b"01234567"
    twice: list[Any] = [encode(VectorReply(change=long)) for _ in range(2)]
    greetings: list[Any] = [encode(Hello(client=1)) for _ in range(2)]
    shared = in_pieces(long)
    both: list[Any] = [encode(VectorReply(position=at, change=long), cut=lambda value: shared) for at in range(2)]

    for one, other in (twice, greetings):
        assert sorted(one) == sorted(other)
        assert not {record.object_id for record in one.values()} & {record.object_id for record in other.values()}
    assert [both[0][name].object_id == both[1][name].object_id for name in sorted(both[0])] == [True, True, False]
    assert {len(record["salt"]) for message in (*twice, *both) for record in message.values()} == {8}


@pytest.mark.parametrize("salt", [{}, {"salt": b"7 bytes"}, {"salt": "8 bytes."}, {"salt": [b"8 bytes."]}], ids=str)
def test_a_record_without_a_salt_of_its_length_is_refused(salt: dict[str, Any]) -> None:
    pieces = {RECORD: ConfigRecord(SALT), "change 00000000": ConfigRecord({"piece": b"1", **salt})}
    for records in (pieces, {RECORD: ConfigRecord({"position": 1, **salt})}):
        with pytest.raises(ProtocolError, match="VectorReply: each record must have a salt of 8 bytes, got"):
            decode(VectorReply, RecordDict({**records}))


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_that_does_not_say_whom_it_is_for_is_refused(kind: Any) -> None:
    with pytest.raises(ProtocolError, match=f"{kind.__name__}: client must be .*, got nothing"):
        decode(kind, sent({}))


def test_a_status_travels_as_its_name() -> None:
    assert decode(ScalarReply, encode(ScalarReply(status=Status.behind))).status is Status.behind


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"surprise": 1},
            "surprise must be left out: TrainRequest has no such field, got 1. Do both sides run the same",
        ),
        ({"client": -1}, "client must be a whole number of 0 to 4294967293, got -1"),
        ({"round": "1"}, "round must be a whole number of 0 to 4294967295, got '1'"),
        ({"round": True}, "round must be a whole number of 0 to 4294967295, got True"),
        ({"log": "text"}, "log must be 0 to 274877906944 bytes, got 'text'"),
        ({"lr": 1}, "lr must be a float of 0 to .*, got 1"),
        ({"chain": ""}, "chain must be left out where it is empty"),
        ({"log": b""}, "log must be left out where it is empty"),
        ({"log": []}, r"log must be 0 to 274877906944 bytes, got \[\]"),
        ({"round": -1}, "TrainRequest: round must be a whole number of 0 to 4294967295, got -1"),
        ({"round": 1 << 32}, "round must be a whole number of 0 to 4294967295, got 4294967296"),
        ({"from_round": -1}, "from_round must be a whole number"),
        ({"steps": 0}, "steps must be a whole number of 1 to 65535, got 0"),
        ({"steps": 1 << 16}, "steps must be a whole number of 1 to 65535, got 65536"),
        ({"used": -1}, "used must be a whole number"),
        ({"check": 1 << 32}, "check must be a whole number"),
        ({"lr": -0.1}, "lr must be a float"),
        ({"lr": math.nan}, "lr must be a float"),
        ({"lr": math.inf}, "lr must be a float"),
        ({"max_abs_g": -1.0}, "max_abs_g must be a float"),
        ({"max_abs_g": math.inf}, "max_abs_g must be a float"),
        ({"chain": "0" * 63 + "g"}, "chain must be 64 hexadecimal digits"),
        ({"config_hash": "x" * 129}, "config_hash must be at most 128 digits and letters, got 'xxx"),
        ({"config_hash": "\x1b[2J"}, r"config_hash must be at most 128 digits and letters, got '\\x1b\[2J'"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode(TrainRequest, sent({"client": 0, **fields}))


@pytest.mark.parametrize("kind", [Hello, HelloReply])
def test_a_peer_of_another_protocol_is_told_both_versions(kind: Any) -> None:
    """Whatever else it sends; words of a peer are cut."""
    fields = {"client": 0, "protocol": 99, "version": "9.9.0" + "x" * 10**6, "of": "another fedzo"}

    with pytest.raises(ProtocolError) as caught:
        decode(kind, RecordDict({RECORD: ConfigRecord(fields)}))

    told = f"{kind.__name__}: protocol must be 6, that of fedzo {VERSION}, got 99, that of fedzo 9.9.0x"
    assert str(caught.value).startswith(told)
    assert len(str(caught.value)) < 200


def test_an_unknown_status_is_named() -> None:
    with pytest.raises(ProtocolError, match="status must be 'ok' or 'behind' or 'bare' or 'mismatch', got 'fine'"):
        decode(ScalarReply, sent({"status": "fine"}))


@pytest.mark.parametrize(
    "other", [RecordDict({}), RecordDict({"other": ConfigRecord()}), RecordDict({RECORD: MetricRecord()})]
)
def test_content_that_is_not_one_record_is_refused(other: RecordDict) -> None:
    with pytest.raises(ProtocolError, match="expected one record 'fedzo'"):
        decode(ScalarReply, other)


def test_long_bytes_travel_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network takes requests of at most 16 MiB, and Flower sends each record in one."""
    monkeypatch.setattr(content, "PIECE_BYTES", 4)
    whole = {"change": b"0123456789", "loss": b"abcd"}

    encoded = encode(VectorReply(position=3, **whole))

    assert {name: unsalted(record) for name, record in encoded.items()} == {
        RECORD: {"position": 3, "loss": b"abcd"},
        "change 00000000": {"piece": b"0123"},
        "change 00000001": {"piece": b"4567"},
        "change 00000002": {"piece": b"89"},
    }
    assert decode(VectorReply, recorddict_from_proto(recorddict_to_proto(encoded))) == VectorReply(position=3, **whole)


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ({"change 00000001": {"piece": b"4"}}, "record 'change 00000001' must be a field's next piece"),
        ({"change 0": {"piece": b"4"}}, "record 'change 0' must be a field's next piece"),
        ({"change 00000000": {"piece": "text"}}, "'change 00000000' must be a field's next piece"),
        ({"change 00000000": {"piece": b""}}, "'change 00000000' must be a field's next piece"),
        ({"change 00000000": {}}, "'change 00000000' must be a field's next piece"),
        ({"change 00000000": {"piece": b"4", "more": 1}}, "'change 00000000' must be a field's next piece"),
        ({"loss 00000000": {"piece": b"4"}}, "'loss 00000000' must be a field's next piece"),  # which came whole
        ({"surprise 00000000": {"piece": b"4"}}, "surprise must be left out: VectorReply has no such field"),
        ({"position 00000000": {"piece": b"4"}}, "position must be a whole number"),
    ],
)
def test_pieces_that_are_not_one_field_are_refused(records: dict[str, Any], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode(VectorReply, sent({"loss": b"abcd"}, **records))


def test_a_huge_value_is_shown_in_a_few_words() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(ScalarReply, sent({"position": b"x" * 10**7, "x" * 10**6: 1}))

    assert len(str(caught.value)) < 300


VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=70),
    st.binary(max_size=20),
    st.lists(st.integers(-9, 9), max_size=3),
    st.lists(st.binary(max_size=3), max_size=2),
)
NAMES = sorted({name for kind in KINDS for name in kind.__dataclass_fields__})


@given(kind=st.sampled_from(KINDS), fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES))
def test_any_content_is_a_message_or_refused_as_a_breach_of_protocol(kind: Any, fields: dict[str, Any]) -> None:
    try:
        message = decode(kind, sent(fields))
    except ProtocolError:
        return
    assert decode(kind, encode(message)) == message
