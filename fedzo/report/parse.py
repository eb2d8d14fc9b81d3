"""Lines of ``metrics.jsonl`` as records, checked field by field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedzo.report.reader import Reader
from fedzo.report.records import (
    ClientRound,
    ClientScore,
    ClientSetup,
    ClientVerdict,
    FederatedScore,
    Record,
    Round,
    Score,
    Setup,
    Signals,
    StepDecision,
    Summary,
)


def _setup(read: Reader) -> Setup:
    clients = []
    for row in read.each("clients"):
        labels = row.inner("label_counts")
        counts = {} if labels is None else {str(label): labels.whole(label) for label in labels.record}
        clients.append(ClientSetup(row.whole("client"), row.whole("num_train"), row.whole("num_heldout", 0), counts))
    return Setup(
        num_params=read.whole("num_params"),
        space_size=read.whole("space_size"),
        clients=tuple(clients),
        setup_down_bytes=read.optional_whole("setup_down_bytes"),
    )


def _round(read: Reader) -> Round:
    return Round(
        round=read.whole("round"),
        calibration=read.truth("calibration", False),
        seconds=read.number("seconds"),
        loss=read.optional("loss"),
        payload_up_bytes=read.whole("payload_up_bytes"),
        payload_down_bytes=read.whole("payload_down_bytes"),
        message_up_bytes=read.optional_whole("message_up_bytes"),
        message_down_bytes=read.optional_whole("message_down_bytes"),
        dropped_probes=read.whole("dropped_probes", 0),
        absent=read.clients("absent"),
        refused=read.reasons("reasons"),
        clients=tuple(
            ClientRound(
                row.whole("client"), row.optional("loss"), row.optional("abs_g"), _signals(row.inner("signals"))
            )
            for row in read.each("clients")
        ),
    )


def _signals(read: Reader | None) -> Signals | None:
    if read is None:
        return None
    return Signals(read.series("grad_ip"), read.series("abs_g"), read.series("loss") if "loss" in read.record else ())


def _step_policy(read: Reader) -> StepDecision:
    clients = []
    for row in read.each("clients"):
        found = row.inner("statistics")
        statistics = {} if found is None else {str(name): found.optional(name) for name in found.record}
        clients.append(ClientVerdict(row.whole("client"), row.truth("flagged"), row.whole("steps"), statistics))
    windows = read.inner("windows")
    return StepDecision(
        round=read.whole("round"),
        windows={} if windows is None else {str(name): windows.span(name) for name in windows.record},
        clients=tuple(clients),
        fallback=read.truth("fallback", False),
    )


def _score(read: Reader) -> Score:
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


def _federated(read: Reader) -> FederatedScore:
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


def _summary(read: Reader) -> Summary:
    before, after = read.inner("before"), read.inner("after")
    worst, step_policy = read.inner("worst_client"), read.inner("step_policy")
    return Summary(
        rounds=read.whole("rounds"),
        best_round=read.optional_whole("best_round"),
        before=_score(before) if before else None,
        after=_score(after) if after else None,
        worst_client=worst.optional("value") if worst else None,
        flagged=tuple(row.whole("client") for row in step_policy.each("flagged")) if step_policy else None,
        final_digest=read.text("final_digest", ""),
        payload_up_bytes=read.whole("payload_up_bytes"),
        payload_down_bytes=read.whole("payload_down_bytes"),
        message_up_bytes=read.optional_whole("message_up_bytes"),
        message_down_bytes=read.optional_whole("message_down_bytes"),
        seconds=read.number("seconds"),
    )


_KINDS: dict[str, Callable[[Reader], Record]] = {
    "setup": _setup,
    "round": _round,
    "step_policy": _step_policy,
    "score": _score,
    "federated_score": _federated,
    "summary": _summary,
}


def parse_record(record: dict[str, Any], *, where: str = "record") -> Record | None:
    """One metrics record as its type; None for a kind that this version does not know.

    Raises:
        RunFolderError: a field is missing or of the wrong type; ``where`` begins the message.
    """
    read = Reader(record, where)
    parse = _KINDS.get(read.text("kind"))
    return parse(read) if parse else None
