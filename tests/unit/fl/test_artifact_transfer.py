"""The transfer of an artifact, each side against the other and against a bad peer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.fl.artifact_transfer import deliver, receive
from fedzo.fl.messages import ArtifactPiece, ArtifactReply, decode, encode
from fedzo.trainers.artifacts import EMPTY, PIECE_BYTES, Artifact, ArtifactStore

CONTENT = np.random.default_rng(0).bytes(2 * PIECE_BYTES + 5)
SIZE = len(CONTENT)
SECOND = rf"piece 2 of 3 \(bytes {PIECE_BYTES} to {2 * PIECE_BYTES - 1}\)"
Peer = Callable[[ArtifactPiece], ArtifactReply]


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return ArtifactStore(tmp_path / "server").put(CONTENT)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "client")


def play(artifact: Artifact, peer: Peer, *, at_most: int = 100) -> list[ArtifactPiece]:
    """What the server sends to a peer until it is done."""
    talk, sent = deliver(artifact, client=4), []
    question = next(talk)
    try:
        for _ in range(at_most):
            piece = decode(ArtifactPiece, encode(question.request))
            sent.append(piece)
            question = talk.send(decode(ArtifactReply, encode(peer(piece))))
    except StopIteration:
        pass
    return sent


def damaged(number: int, *, times: int, store: ArtifactStore) -> Peer:
    """A client that gets piece ``number`` with a wrong byte the first ``times`` times."""
    left = [times]

    def peer(piece: ArtifactPiece) -> ArtifactReply:
        if piece.data and piece.offset == number * PIECE_BYTES and left[0]:
            left[0] -= 1
            wrong = bytes([piece.data[0] ^ 1]) + piece.data[1:]
            piece = dataclasses.replace(piece, data=wrong)
        return receive(piece, store)

    return peer


def test_an_artifact_arrives_in_pieces_and_is_not_sent_again(artifact: Artifact, store: ArtifactStore) -> None:
    sent = play(artifact, lambda piece: receive(piece, store))

    assert [len(piece.data) for piece in sent] == [0, PIECE_BYTES, PIECE_BYTES, 5]
    assert {piece.client for piece in sent} == {4}
    assert b"".join(piece.data for piece in sent) == CONTENT
    assert [piece.piece_digest for piece in sent[1:]] == [hashlib.sha256(p.data).hexdigest() for p in sent[1:]]
    held = store.find(hashlib.sha256(CONTENT).hexdigest())
    assert held is not None
    assert held.read() == CONTENT
    assert [len(piece.data) for piece in play(artifact, lambda piece: receive(piece, store))] == [0]


def test_an_interrupted_transfer_goes_on_where_it_was(artifact: Artifact, store: ArtifactStore) -> None:
    play(artifact, lambda piece: receive(piece, store), at_most=3)

    again = play(artifact, lambda piece: receive(piece, ArtifactStore(store.folder)))

    assert [(piece.offset, len(piece.data)) for piece in again] == [(0, 0), (2 * PIECE_BYTES, 5)]
    assert (store.folder / artifact.digest).read_bytes() == CONTENT


def test_a_wrong_byte_is_named_with_its_piece_which_is_sent_once_more(
    artifact: Artifact, store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    sent = play(artifact, damaged(1, times=1, store=store))

    assert [piece.offset for piece in sent if piece.data] == [0, PIECE_BYTES, PIECE_BYTES, 2 * PIECE_BYTES]
    assert (store.folder / artifact.digest).read_bytes() == CONTENT
    second = f"{artifact}: piece 2 of 3 (bytes 4194304 to 8388607)"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", f"{second} must have its SHA-256, got other bytes"),  # at the client
        ("WARNING", f"client 4: {second} came with other bytes"),
    ]


def test_a_piece_that_is_wrong_again_ends_the_transfer_with_its_place(artifact: Artifact, store: ArtifactStore) -> None:
    with pytest.raises(ProtocolError, match=rf"{SECOND} was sent 2 times: it came with other bytes"):
        play(artifact, damaged(1, times=2, store=store))

    assert store.append(artifact.digest, SIZE, offset=0, data=b"") == PIECE_BYTES  # the first piece is kept


def test_a_client_that_takes_nothing_does_not_hold_the_server(artifact: Artifact) -> None:
    sent: list[ArtifactPiece] = []

    with pytest.raises(ProtocolError, match=r"piece 1 of 3 \(bytes 0 to 4194303\) was sent 2 times: it was not taken"):
        play(artifact, lambda piece: sent.append(piece) or ArtifactReply(held=0))

    assert len(sent) == 1 + 2


@pytest.mark.parametrize("held", [-PIECE_BYTES, 1, SIZE + 1, 3 * PIECE_BYTES, 2**62])
def test_a_client_that_claims_an_impossible_amount_is_refused(artifact: Artifact, held: int) -> None:
    rule = rf"(must hold 0 to {SIZE} bytes in whole pieces|held must be .*), got {held}"

    with pytest.raises(ProtocolError, match=rule):
        play(artifact, lambda piece: ArtifactReply(held=held))


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1},
        {"offset": -PIECE_BYTES},
        {"offset": 3 * PIECE_BYTES},
        {"offset": 2 * PIECE_BYTES},
        {"data": CONTENT[: PIECE_BYTES - 1]},
        {"data": CONTENT[: PIECE_BYTES + 1]},
    ],
    ids=["between", "negative", "behind the end", "too long for the end", "short", "long"],
)
def test_a_piece_without_a_place_is_refused_by_the_client(store: ArtifactStore, change: dict[str, Any]) -> None:
    data = change.get("data", CONTENT[:PIECE_BYTES])
    digest = hashlib.sha256(data).hexdigest()
    fields: dict[str, Any] = {"digest": "a" * 64, "size": SIZE, "data": data, "piece_digest": digest, **change}

    with pytest.raises(ProtocolError, match=rf"artifact aaaaaaaaaaaa: a piece must hold .* got {len(data)} bytes from"):
        receive(ArtifactPiece(client=4, **fields), store)

    assert not store.folder.exists()


def test_an_artifact_that_somebody_removed_is_named_when_a_client_lacks_it(
    artifact: Artifact, store: ArtifactStore
) -> None:
    artifact.path.unlink()

    with pytest.raises(RunFolderError, match=rf"{artifact.path}: it must be there .*, got 'No such file .*Restore"):
        play(artifact, lambda piece: receive(piece, store))


def test_a_space_that_needs_nothing_is_held_by_every_client(store: ArtifactStore) -> None:
    assert store.find(EMPTY.digest) == EMPTY
