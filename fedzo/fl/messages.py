"""The messages of a federation: typed records, strictly read. Nothing in them is imported, evaluated or unpickled.

``fedzo.fl.content`` makes Flower records of their fields. Every request names the client that it is for: a process may
play several, and none of them says itself which it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedzo.errors import OtherVersionError, ProtocolError
from fedzo.fl.content import in_pieces, joined, packed, split
from fedzo.records import decode as records
from fedzo.records.fields import (
    Check,
    Client,
    Count,
    HashOrEmpty,
    LearningRate,
    Length,
    Magnitude,
    Matching,
    RoundNumber,
    Steps,
    Within,
    Words,
)
from fedzo.system import code_version
from fedzo.trainers.artifacts import PIECE_BYTES
from fedzo.zo.log import Scalars

PROTOCOL, VERSION = 6, code_version()
M = TypeVar("M")

Digest = Annotated[str, Matching(re.compile("[0-9A-Za-z]{0,128}"), "at most 128 digits and letters")]
"""A hash, or what a peer says in its place: only compared and shown."""
Version = Annotated[str, Matching(re.compile("[0-9A-Za-z.+-]{0,64}"), "a version")]
JsonText = Annotated[str, Length(0, 1 << 22)]
StepBytes = Annotated[bytes, Length(0, 1 << 30)]
"""A reply's numbers; their count is compared with the round's steps and probes."""
VectorBytes = Annotated[bytes, Length(0, 1 << 38)]
"""A reply's vector; its length is compared with the space's size."""
StateBytes = Annotated[bytes, Length(0, 1 << 38)]
"""A log or trained values; what they must measure is compared with what the process holds."""
PieceBytes = Annotated[bytes, Length(0, PIECE_BYTES)]
Rows = Annotated[int, Within(0, 1 << 32)]
Size = Annotated[int, Within(0, 1 << 40)]


class Status(StrEnum):
    """Whether a client could bring itself to the state that a request names."""

    ok = "ok"
    behind = "behind"
    """Its log position is before the request's ``from_round``: send more of the log."""
    bare = "bare"
    """It does not hold the space's artifact: send it."""
    mismatch = "mismatch"
    """After replaying, its hash is not the server's: send the values themselves."""


class Refusal(StrEnum):
    """Why a client does not take part, or does not answer: a number, which travels, and a sentence.

    The sentence is the same whatever the site holds. A number never changes its meaning.
    """

    sentence: str

    none = "", ""
    rows = "1", "its rows cannot be read or encoded"
    changed = "2", "its rows are not those that it began the run with"
    site = "3", "its site cannot take this run"
    task = "11", "its site does not take part in this task"
    trainer = "12", "its site does not take part in this trainer"
    stage = "13", "its site does not take part in a preprocess stage of this run"
    steps = "14", "its site does not take so many local steps a round"
    step_rows = "15", "its site does not use so many rows a request"
    base = "16", "its site does not accept this base model"
    artifact = "17", "its site does not take an artifact of this size"
    few_rows = "18", "a number that the run needs covers fewer rows than its site allows"
    label_counts = "19", "its site does not send its label counts"
    client = "20", "its site is another client of this run"
    losses = "21", "its site does not send the losses of its local steps, which this run needs"
    vectors = "22", "its site does not send update vectors, which this run needs"
    probes = "23", "its site does not take so many probes a local step"
    estimator = "24", "its site does not take part in this estimator"
    failed = "31", "the client failed to do what was asked"
    foreign = "32", "the request does not belong to this run"
    absent = "33", "the client is absent in this round, as faults.absent asks"
    slow = "34", "a step took longer than its site allows"
    version = "35", "its site runs another fedzo than the server"
    preparing = "36", "its training rows are still being prepared"
    rewriter = "37", "its site cannot rewrite the rows now, or lacks the prompts or rewrites that the run names"
    memory = "38", "its memory is too small for the request"

    def __new__(cls, number: str, sentence: str) -> Refusal:
        """A member that is its number as text."""
        member = str.__new__(cls, number)
        member._value_, member.sentence = number, sentence
        return member

    @property
    def text(self) -> str:
        """For the server's log: all that it is told."""
        return f"refusal {self}, {self.sentence}" if self else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What all peers of a run must hold alike, as digests."""

    config_hash: Digest = ""
    base_digest: Digest = ""
    tokenizer_digest: Digest = ""
    task_digest: Digest = ""
    architecture_digest: Digest = ""
    partition_digest: Digest = ""
    """Of which client has which rows of one set; empty where each has a set of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Server to client, once: you are this client. What do you hold, and do we mean the same run?"""

    client: Client
    protocol: Annotated[int, Within(PROTOCOL, PROTOCOL)] = PROTOCOL
    version: Version = VERSION
    config_hash: Digest = ""
    begun: bool = False
    """Whether the run has begun: then a client's rows must be those that it began with."""
    artifact_bytes: Size = 0
    """Of what the space needs beside the model: a client that would not take it says so now."""
    why: Words = ""
    """Why the server has not let this client take part so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloReply(Identity):
    """A client's registration: what it holds. ``label_counts`` and ``stages`` are JSON."""

    protocol: Annotated[int, Within(PROTOCOL, PROTOCOL)] = PROTOCOL
    version: Version = VERSION
    refusal: Refusal = Refusal.none
    """Other than none: the client cannot take part, and the fields below say nothing."""
    preparing: Rows = 0
    """Other than 0: the client's stages work on its rows, so many of them, and the fields below say nothing yet but
    for ``prepared`` and what all peers hold alike. It asks to be greeted again."""
    prepared: Rows = 0
    """Those of ``preparing`` that are done."""
    num_train: Rows = 0
    num_heldout: Rows = 0
    """0 also where they are fewer than the site tells of."""
    num_train_cut: Rows = 0
    num_heldout_cut: Rows = 0
    """Those of ``num_train`` and ``num_heldout`` that ``task.max_length`` cuts."""
    rows_digest: HashOrEmpty = ""
    """Of its rows and what its stages made of them, keyed by a secret of the site: it can be compared, and nothing can
    be read off it."""
    label_counts: JsonText = "{}"
    stages: JsonText = "{}"
    """What its stages tell of its rows, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """How a client reaches the server's state: log records from ``from_round`` on, or the values themselves."""

    client: Client
    config_hash: Digest = ""
    space_id: HashOrEmpty = ""
    """SHA-256 of what is needed beside the model to build the space (``fedzo.trainers.artifacts``)."""
    round: RoundNumber = 0
    from_round: RoundNumber = 0
    log: StateBytes = b""
    values: StateBytes = b""
    """theta, then what the server optimizer remembers: float32 [n * (1 + num_moments)], little endian."""
    chain: HashOrEmpty = ""
    """Hash chain of the log up to ``round``, hexadecimal."""
    check: Check = 0
    """32-bit check of theta and of what the server optimizer remembers, at ``round``."""
    digest: HashOrEmpty = ""
    """SHA-256 of theta at ``round``, every ``fl.hash_every`` rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest(Sync):
    """One round's work."""

    steps: Steps = 1
    used: Count = 0
    """Steps this client has used before: its position in its data."""
    lr: LearningRate = 0.0
    max_abs_g: Magnitude = 0.0
    """Bound to which the client clips every g before it steps and answers; 0 = none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarReply:
    """What a client answers: its scalars. ``g`` and ``loss`` are float32 [T, P], little endian."""

    status: Status = Status.ok
    position: RoundNumber = 0
    g: StepBytes = b""
    loss: StepBytes = b""
    dropped: StepBytes = b""
    end_check: Check = 0
    """32-bit check of theta after the local steps (T > 1); proves the virtual path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorReply:
    """What a client answers that computes gradients: where its steps led."""

    status: Status = Status.ok
    position: RoundNumber = 0
    change: VectorBytes = b""
    """The round's start minus the client's end, float32 [n] in wire order, little endian."""
    loss: StepBytes = b""
    """float32 [T], little endian; nan for a step that was not taken, since a number in it was not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRequest(Sync):
    """Score the model on the client's own held-out rows, as many as the run's configuration says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReply:
    """Counts and means only, as JSON: of each evaluator's score what may leave the site, perhaps nothing."""

    status: Status = Status.ok
    position: RoundNumber = 0
    scores: JsonText = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactPiece:
    """A part of what a space needs beside the model. Without ``data`` it asks how much the client holds."""

    client: Client
    digest: HashOrEmpty = ""
    """SHA-256 of the whole artifact, hexadecimal."""
    size: Size = 0
    """Bytes of the whole artifact."""
    offset: Size = 0
    data: PieceBytes = b""
    piece_digest: HashOrEmpty = ""
    """SHA-256 of ``data``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactReply:
    """How many bytes of the artifact a client holds, from the start; and whether the piece came as it was sent."""

    held: Size = 0
    intact: bool = True


def encode(message: Any, *, cut: Callable[[bytes], list[ConfigRecord]] = in_pieces) -> RecordDict:
    """A message as Flower content. What is empty, which Flower cannot count, or as it is by default is left out."""
    told = dict[str, Any]()
    for name, default in _left_out(message.__class__).items():
        value = getattr(message, name)
        if value != default and value not in ("", b""):
            told[name] = str(value) if isinstance(value, StrEnum) else value
    return packed(told, cut=cut)


@cache
def _left_out(kind: Any) -> dict[str, Any]:
    """By field the value that need not travel; a peer's own protocol and version always do."""
    return {f.name: MISSING if f.name in ("protocol", "version") else f.default for f in fields(kind)}


def decode(kind: type[M], content: RecordDict) -> M:
    """The message in Flower content; ``ProtocolError`` for anything that is not exactly one."""
    given, pieces = split(content, what=kind.__name__)
    if empty := [name for name, value in given.items() if value in ("", b"")]:
        raise ProtocolError(f"{kind.__name__}: {empty[0]:.40} must be left out where it is empty")
    if (protocol := given.get("protocol", PROTOCOL)) != PROTOCOL:  # before fields that one of the two does not know
        raise OtherVersionError(
            f"{kind.__name__}: protocol must be {PROTOCOL}, that of fedzo {VERSION}, got {protocol!r:.20}, "
            f"that of fedzo {given.get('version', 'unknown')!s:.40}. Install the same fedzo on both sides."
        )
    given = joined(given, pieces, what=kind.__name__)
    remedy = "Do both sides run the same fedzo?"
    return records.decode(kind, given, where=kind.__name__, error=ProtocolError, remedy=remedy)


def scalars_to_bytes(values: Scalars) -> bytes:
    """float32, little endian, C order."""
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def scalars_from_bytes(data: bytes, *, shape: tuple[int, ...], what: str) -> Scalars:
    """The inverse; ``ProtocolError`` if the length is not that of ``shape``."""
    if len(data) != (want := 4 * int(np.prod(shape))):
        raise ProtocolError(f"{what} must hold {want} bytes (float32 {list(shape)}), got {len(data)}")
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False).reshape(shape)


def signs_to_bytes(g: Scalars) -> bytes:
    """One bit a scalar in C order, 1 for a positive one; the first bit is the highest of its byte."""
    return np.packbits(g.ravel() > 0).tobytes()


def signs_from_bytes(data: bytes, *, shape: tuple[int, ...], what: str) -> Scalars:
    """+1 for a bit of 1, -1 for a bit of 0, float32; ``ProtocolError`` if these are not ``shape``'s bits."""
    count = int(np.prod(shape))
    if len(data) != (want := -(-count // 8)):
        raise ProtocolError(f"{what} must hold {want} bytes (a bit each for {list(shape)}), got {len(data)}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count:].any():
        raise ProtocolError(f"{what} must be filled up with bits of 0 after the first {count}")
    return (2 * bits[:count].astype(np.float32) - 1).reshape(shape)
