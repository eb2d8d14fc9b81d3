"""The records of ``metrics.jsonl`` as types, checked field by field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedzo.errors import RunFolderError


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """One client's rows."""

    client: int
    num_train: int
    num_heldout: int
    label_counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is known before the first round."""

    num_params: int
    space_size: int
    trainer: str
    clients: tuple[ClientSetup, ...]
    setup_down_bytes: int | None
    estimated_memory_bytes: float | None
    estimated_seconds: float | None


@dataclass(frozen=True, slots=True)
class ClientRound:
    """What one client measured in one round."""

    client: int
    loss: float | None
    abs_g: float | None


@dataclass(frozen=True, slots=True)
class Round:
    """One applied round; ``round`` counts from 0 and bytes are sums over the clients."""

    round: int
    seconds: float
    round_seconds: float | None
    loss: float | None
    mean_abs_g: float | None
    payload_up_bytes: int
    payload_down_bytes: int
    message_up_bytes: int | None
    message_down_bytes: int | None
    dropped_probes: int
    absent: tuple[int, ...]
    refused: dict[int, str]
    clients: tuple[ClientRound, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """One score of the whole model after ``round`` rounds (0 = before training)."""

    split: str
    round: int
    metric: str
    value: float
    loss: float | None = None
    num_examples: int | None = None
    auc: float | None = None
    best_threshold_accuracy: float | None = None
    per_class: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientScore:
    """One client's score on its own held-out rows."""

    client: int
    value: float | None
    loss: float | None
    num_examples: int


@dataclass(frozen=True, slots=True)
class FederatedScore:
    """The clients' scores on their own held-out rows after ``round`` rounds."""

    round: int
    metric: str
    value: float
    loss: float | None
    worst_client: float | None
    clients: tuple[ClientScore, ...]
    per_class: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a finished run; bytes are sums over rounds and clients."""

    rounds: int
    best_round: int | None
    before: Score | None
    after: Score | None
    final_digest: str
    payload_up_bytes: int
    payload_down_bytes: int
    message_up_bytes: int | None
    message_down_bytes: int | None
    seconds: float


Record = Setup | Round | Score | FederatedScore | Summary


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to one record; every complaint names the place."""

    record: dict[str, Any]
    where: str

    def fail(self, key: str, must: str) -> RunFolderError:
        got = repr(self.record[key])[:80] if key in self.record else "nothing"
        return RunFolderError(
            f"{self.where}: {key} must be {must}, got {got}. The file was not written by this version of fedzo "
            "or was edited; restore it from the run or run again."
        )

    def optional(self, key: str) -> float | None:
        value = self.record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self.fail(key, "a number or null")
        return value

    def number(self, key: str) -> float:
        value = self.optional(key)
        if value is None:
            raise self.fail(key, "a number")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.optional(key) if default is None else self.record.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, "a whole number")
        return value

    def optional_whole(self, key: str) -> int | None:
        return None if self.record.get(key) is None else self.whole(key)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.record.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "a text")
        return value

    def each(self, key: str) -> list[_Reader]:
        rows = self.record.get(key) or []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.fail(key, "a list of objects")
        return [_Reader(row, f"{self.where}, {key}[{index}]") for index, row in enumerate(rows)]

    def inner(self, key: str) -> _Reader | None:
        value = self.record.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "an object or null")
        return None if value is None else _Reader(value, f"{self.where}, {key}")

    def clients(self, key: str) -> tuple[int, ...]:
        found = self.record.get(key) or []
        if not isinstance(found, list) or any(not isinstance(client, int) for client in found):
            raise self.fail(key, "a list of clients")
        return tuple(found)

    def reasons(self, key: str) -> dict[int, str]:
        found = self.record.get(key) or {}
        if not isinstance(found, dict) or not all(
            client.isdecimal() and isinstance(reason, str) for client, reason in found.items()
        ):
            raise self.fail(key, "an object of client and reason")
        return {int(client): reason for client, reason in found.items()}

    def tallies(self, key: str) -> dict[str, tuple[int, int]]:
        value = self.record.get(key) or {}
        if not isinstance(value, dict) or not all(
            isinstance(row, list) and len(row) == 2 and all(isinstance(n, int) for n in row) for row in value.values()
        ):
            raise self.fail(key, "an object of [correct, total]")
        return {str(label): (row[0], row[1]) for label, row in value.items()}


def _setup(read: _Reader) -> Setup:
    estimate = read.inner("estimate")
    clients = []
    for row in read.each("clients"):
        labels = row.inner("label_counts")
        counts = {} if labels is None else {str(label): labels.whole(label) for label in labels.record}
        clients.append(ClientSetup(row.whole("client"), row.whole("num_train"), row.whole("num_heldout", 0), counts))
    return Setup(
        num_params=read.whole("num_params"),
        space_size=read.whole("space_size"),
        trainer=read.text("trainer"),
        clients=tuple(clients),
        setup_down_bytes=read.optional_whole("setup_down_bytes"),
        estimated_memory_bytes=estimate.optional("memory_bytes") if estimate else None,
        estimated_seconds=estimate.optional("seconds") if estimate else None,
    )


def _round(read: _Reader) -> Round:
    return Round(
        round=read.whole("round"),
        seconds=read.number("seconds"),
        round_seconds=read.optional("round_seconds"),
        loss=read.optional("loss"),
        mean_abs_g=read.optional("mean_abs_g"),
        payload_up_bytes=read.whole("payload_up_bytes"),
        payload_down_bytes=read.whole("payload_down_bytes"),
        message_up_bytes=read.optional_whole("message_up_bytes"),
        message_down_bytes=read.optional_whole("message_down_bytes"),
        dropped_probes=read.whole("dropped_probes", 0),
        absent=read.clients("absent"),
        refused=read.reasons("reasons"),
        clients=tuple(
            ClientRound(row.whole("client"), row.optional("loss"), row.optional("abs_g"))
            for row in read.each("clients")
        ),
    )


def _score(read: _Reader) -> Score:
    return Score(
        split=read.text("split", "clients"),
        round=read.whole("round"),
        metric=read.text("metric"),
        value=read.number("value"),
        loss=read.optional("loss"),
        num_examples=read.optional_whole("num_examples"),
        auc=read.optional("auc"),
        best_threshold_accuracy=read.optional("best_threshold_accuracy"),
        per_class=read.tallies("per_class"),
    )


def _federated(read: _Reader) -> FederatedScore:
    return FederatedScore(
        round=read.whole("round"),
        metric=read.text("metric"),
        value=read.number("value"),
        loss=read.optional("loss"),
        worst_client=read.optional("worst_client"),
        clients=tuple(
            ClientScore(row.whole("client"), row.optional("value"), row.optional("loss"), row.whole("num_examples"))
            for row in read.each("clients")
        ),
        per_class=read.tallies("per_class"),
    )


def _summary(read: _Reader) -> Summary:
    before, after = read.inner("before"), read.inner("after")
    return Summary(
        rounds=read.whole("rounds"),
        best_round=read.optional_whole("best_round"),
        before=_score(before) if before else None,
        after=_score(after) if after else None,
        final_digest=read.text("final_digest", ""),
        payload_up_bytes=read.whole("payload_up_bytes"),
        payload_down_bytes=read.whole("payload_down_bytes"),
        message_up_bytes=read.optional_whole("message_up_bytes"),
        message_down_bytes=read.optional_whole("message_down_bytes"),
        seconds=read.number("seconds"),
    )


_KINDS: dict[str, Callable[[_Reader], Record]] = {
    "setup": _setup,
    "round": _round,
    "score": _score,
    "federated_score": _federated,
    "summary": _summary,
}


def parse_record(record: dict[str, Any], *, where: str = "record") -> Record | None:
    """One metrics record as its type; None for a kind that this version does not know.

    Raises:
        RunFolderError: a field is missing or of the wrong type; ``where`` begins the message.
    """
    read = _Reader(record, where)
    parse = _KINDS.get(read.text("kind"))
    return parse(read) if parse else None
