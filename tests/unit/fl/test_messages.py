"""Messages: exact round trips, and a clear refusal of everything else."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.errors import ProtocolError
from fedzo.fl.messages import (
    RECORD,
    ArtifactPiece,
    ArtifactReply,
    EvaluateReply,
    EvaluateRequest,
    Hello,
    HelloReply,
    Status,
    TrainReply,
    TrainRequest,
    decode,
    encode,
    message_bytes,
)

KINDS = [Hello, HelloReply, TrainRequest, TrainReply, EvaluateRequest, EvaluateReply, ArtifactPiece, ArtifactReply]


@given(
    round=st.integers(0, 2**32), log=st.binary(max_size=50), lr=st.floats(allow_nan=False), chain=st.text(max_size=9)
)
@settings(max_examples=50, deadline=None)
def test_a_request_survives_the_wire(round: int, log: bytes, lr: float, chain: str) -> None:
    request = TrainRequest(round=round, log=log, lr=lr, chain=chain, steps=3)

    assert decode(TrainRequest, encode(request)) == request


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_has_defaults_that_survive_the_wire_and_can_be_counted(kind: Any) -> None:
    content = encode(kind())

    assert decode(kind, content) == kind()
    assert message_bytes(content) >= 0


def test_a_status_travels_as_its_name() -> None:
    assert decode(TrainReply, encode(TrainReply(status=Status.behind))).status is Status.behind


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"surprise": 1}, r"unknown fields \['surprise'\]"),
        ({"round": "1"}, "round must be int, got str"),
        ({"round": True}, "round must be int, got bool"),
        ({"log": "text"}, "log must be bytes, got str"),
        ({"lr": 1}, "lr must be float, got int"),
        ({"chain": ""}, "chain must be str, got an empty one"),
        ({"log": b""}, "log must be bytes, got an empty one"),
        ({"log": []}, "log must be bytes, got list"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode(TrainRequest, RecordDict({RECORD: ConfigRecord(fields)}))


def test_an_unknown_status_is_named() -> None:
    with pytest.raises(ProtocolError, match=r"status must be one of .* got 'fine'"):
        decode(TrainReply, RecordDict({RECORD: ConfigRecord({"status": "fine"})}))


@pytest.mark.parametrize(
    "content", [RecordDict({}), RecordDict({"other": ConfigRecord()}), RecordDict({RECORD: MetricRecord()})]
)
def test_content_that_is_not_one_record_is_refused(content: RecordDict) -> None:
    with pytest.raises(ProtocolError, match="expected one record 'fedzo'"):
        decode(TrainReply, content)
