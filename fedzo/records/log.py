"""The lines of the two logs: ``public.jsonl`` rebuilds the model, ``audit.jsonl`` tells what its rounds were made of.

Both have a line for each round, of scalars or of vectors, as its clients sent them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fedzo.errors import FedzoError
from fedzo.records.decode import decode
from fedzo.records.fields import (
    MAX_CLIENTS,
    MAX_OWNERS,
    Check,
    Client,
    Clients,
    Columns,
    Count,
    Flags,
    Hash,
    LearningRate,
    Length,
    Magnitude,
    MeasuredScalars,
    MeasuredSteps,
    OmitDefault,
    Products,
    RoundNumber,
    Scalars,
    Steps,
    Within,
)

_Directions = Annotated[int, Within(0, 0xFFFFFFFE)] | Literal["shared"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proof:
    """What a line of the public log says of the state after its round.

    Attributes:
        chain: Hash chain of the log up to there.
        check: 32-bit check of theta and of what the server optimizer remembers.
        digest: SHA-256 of theta, every ``fl.hash_every`` rounds.
    """

    chain: Hash
    check: Check
    digest: Hash | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalarLine(Proof):
    """A round of scalars (``fedzo.zo.log.ScalarRecord``), who took part in it, and the proof of the state after it.

    Attributes:
        owners: Owners of the columns of ``c``: ``("shared",)`` for an aggregate, or client indices.
        directions: Along which directions the columns lie (``fedzo.zo.keys``).
        c: Scalars by step, probe and owner, float32 [T, P, owners].
    """

    first: ClassVar[tuple[str, ...]] = ("round", "lr", "owners", "directions", "c", "attendance")
    round: RoundNumber
    lr: LearningRate
    owners: Annotated[tuple[Annotated[int, Within(0, 0xFFFFFFFE)] | Literal["shared"], ...], Length(1, MAX_OWNERS)]
    directions: Annotated[_Directions, OmitDefault()] = 0
    c: Columns
    attendance: Clients

    def __post_init__(self) -> None:
        if self.c.shape[2] != len(self.owners):
            raise ValueError(f"hold a column of c for each of {len(self.owners)} owners, not {self.c.shape[2]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorLine(Proof):
    """A round of vectors (``fedzo.zo.log.VectorRecord``); the rest as in ``ScalarLine``.

    Attributes:
        size: n.
        vector: SHA-256 of the mean of the vectors, which is kept beside the log.
    """

    kind: ClassVar[str] = "vector"
    first: ClassVar[tuple[str, ...]] = ("round", "lr", "size", "vector", "attendance")
    round: RoundNumber
    lr: LearningRate
    size: Annotated[int, Within(1, 1 << 36)]
    vector: Hash
    attendance: Clients


PublicLine = ScalarLine | VectorLine
"""A line of ``public.jsonl``: a committed round."""


def decode_public(value: object, *, where: str, error: type[FedzoError], remedy: str = "") -> PublicLine:
    """A line of the public log as the record of its kind."""
    if _kind(value) == VectorLine.kind:
        return decode(VectorLine, value, where=where, error=error, remedy=remedy)
    return decode(ScalarLine, value, where=where, error=error, remedy=remedy)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalarAudit:
    """One client's scalars of a round.

    Attributes:
        g: Projected gradients, float32 [T_k, P]; 0 where dropped.
        loss: Each probe's view of the loss before the step, float32 [T_k, P]; nan where it was not finite.
        dropped: Probes without a finite loss, bool [T_k, P].
        steps: T_k.
        used: Steps that the client had used before the round: its position in its data.
        weight: In the mean.
        end_check: The client's check of theta after its local steps, where it took more than one.
    """

    client: Client
    g: Scalars
    loss: MeasuredScalars
    dropped: Flags
    steps: Steps
    used: Count
    weight: Magnitude
    end_check: Check

    def __post_init__(self) -> None:
        shapes = [self.g.shape, self.loss.shape, self.dropped.shape]
        if len(set(shapes)) > 1 or len(self.g) != self.steps:
            told = ", ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"hold g, loss and dropped of steps = {self.steps} rows each, not {told}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalarAuditLine:
    """Whatever the record of a round of scalars was made of; it rebuilds every client's local steps.

    Attributes:
        lr: Learning rate of the local steps; that of the record is 0 where the round only measured.
        xi: The server's gradient along every direction, float64 [T, P, clients or 1]; None without a gradient.
        clients: Those that sent a usable reply, ascending.
        refused: The others that were asked, or would have been if they did not rest. Why is in the metrics: its words
            differ between runtimes, the log may not.
    """

    round: RoundNumber
    lr: LearningRate
    xi: Products | None
    clients: Annotated[tuple[ScalarAudit, ...], Length(0, MAX_CLIENTS)]
    refused: Clients

    def __post_init__(self) -> None:
        probes = {client.g.shape[1] for client in self.clients}
        if len(probes) > 1:
            raise ValueError(f"hold as many probes of each client, not {sorted(probes)}")
        if self.xi is None or not self.clients:
            return
        steps = max(client.steps for client in self.clients)
        columns = {1, len(self.clients)}
        if self.xi.shape[0] < steps or {self.xi.shape[1]} != probes or self.xi.shape[2] not in columns:
            told = f"{steps} steps or more, {min(probes)} probes and {sorted(columns)} columns"
            raise ValueError(f"hold xi of {told}, not of the shape {list(self.xi.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VectorAudit:
    """One client's vector of a round, which itself is not kept.

    Attributes:
        vector: SHA-256 of what the client sent.
        norm: Its Euclidean norm over lr and steps, which is of a gradient's size; 0 where lr is 0.
        loss: Before each step, float32 [T_k]; nan where a step was not taken.
    """

    client: Client
    vector: Hash
    norm: Magnitude
    loss: MeasuredSteps
    steps: Steps
    used: Count
    weight: Magnitude

    def __post_init__(self) -> None:
        if len(self.loss) != self.steps:
            raise ValueError(f"hold a loss of each of steps = {self.steps}, not {len(self.loss)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VectorAuditLine:
    """Whatever the record of a round of vectors was made of; fields as in ``ScalarAuditLine``."""

    kind: ClassVar[str] = "vectors"
    round: RoundNumber
    lr: LearningRate
    clients: Annotated[tuple[VectorAudit, ...], Length(0, MAX_CLIENTS)]
    refused: Clients


AuditLine = ScalarAuditLine | VectorAuditLine
"""A line of ``audit.jsonl``: what the record of a round was made of."""


def decode_audit(value: object, *, where: str, error: type[FedzoError], remedy: str = "") -> AuditLine:
    """A line of the audit log as the record of its kind."""
    if _kind(value) == VectorAuditLine.kind:
        return decode(VectorAuditLine, value, where=where, error=error, remedy=remedy)
    return decode(ScalarAuditLine, value, where=where, error=error, remedy=remedy)


def _kind(value: object) -> object:
    return value.get("kind") if isinstance(value, dict) else None
