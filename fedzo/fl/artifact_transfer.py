"""How an artifact travels to a client that lacks it: in pieces, one after another, each with its own digest.

A transfer that was interrupted goes on after the last piece that the client holds. Both sides hold one piece in memory
at a time.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.fl.exchange import Question, Talk
from fedzo.fl.messages import ArtifactPiece, ArtifactReply
from fedzo.records.folder import raised_as
from fedzo.records.lines import RESTORE
from fedzo.trainers.artifacts import PIECE_BYTES, Artifact, ArtifactStore, name_of

log = logging.getLogger(__name__)
TRIES = 2
"""How often a piece is sent, at most."""


def deliver(artifact: Artifact, *, client: int) -> Talk[None]:
    """The server's side: ask what the client holds, then send what it lacks.

    Raises:
        ProtocolError: The client did not take a piece.
        RunFolderError: The artifact cannot be read any more.
    """
    ask = ArtifactPiece(client=client, digest=artifact.digest, size=artifact.size)
    reply = yield Question(ask, ArtifactReply)
    sent: Counter[int] = Counter()
    while (held := reply.held) != artifact.size:
        if held % PIECE_BYTES or not 0 <= held < artifact.size:
            raise ProtocolError(
                f"{artifact}: the client must hold 0 to {artifact.size} bytes in whole pieces, got {held}."
            )
        sent[held] += 1
        if sent[held] > TRIES:
            why = "it was not taken" if reply.intact else "it came with other bytes"
            raise ProtocolError(f"{artifact}: {place(held, artifact.size)} was sent {TRIES} times: {why}.")
        reply = yield Question(_piece(artifact, held, client=client), ArtifactReply)
        if not reply.intact:
            log.warning("client %d: %s: %s came with other bytes", client, artifact, place(held, artifact.size))


def receive(piece: ArtifactPiece, store: ArtifactStore) -> ArtifactReply:
    """A client's side: put a piece in its place, and say what is held.

    Raises:
        ProtocolError: The piece has no place in the artifact, or the artifact is refused (``ArtifactStore.append``).
    """
    offset, size, data = piece.offset, piece.size, piece.data
    if data and (offset % PIECE_BYTES or not 0 <= offset < size or len(data) != min(PIECE_BYTES, size - offset)):
        raise ProtocolError(
            f"{name_of(piece.digest)}: a piece must hold {PIECE_BYTES} bytes from a multiple of that on, or the rest "
            f"of the {size} bytes, got {len(data)} bytes from {offset} on. Do both sides run the same fedzo?"
        )
    intact = not data or hashlib.sha256(data).hexdigest() == piece.piece_digest
    if not intact:
        log.error("%s: %s must have its SHA-256, got other bytes", name_of(piece.digest), place(offset, size))
    held = store.append(piece.digest, size, offset=offset, data=data if intact else b"")
    return ArtifactReply(held=held, intact=intact)


def place(offset: int, size: int) -> str:
    """``piece 3 of 48 (bytes 8388608 to 12582911)``."""
    last = min(offset + PIECE_BYTES, size) - 1
    return f"piece {offset // PIECE_BYTES + 1} of {-(-size // PIECE_BYTES)} (bytes {offset} to {last})"


def _piece(artifact: Artifact, offset: int, *, client: int) -> ArtifactPiece:
    rule = f"{artifact.path}: it must be there and readable, since a client lacks it"
    with raised_as(RunFolderError, rule, RESTORE), artifact.path.open("rb") as file:
        file.seek(offset)
        data = file.read(PIECE_BYTES)
    return ArtifactPiece(
        client=client,
        digest=artifact.digest,
        size=artifact.size,
        offset=offset,
        data=data,
        piece_digest=hashlib.sha256(data).hexdigest(),
    )
