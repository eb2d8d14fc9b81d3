"""What a round leaves in the metrics: pure functions of its record and what its clients measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedzo.fl.exchange import Traffic
from fedzo.fl.server.aggregator import Replies, Result
from fedzo.records.fields import MAX_TEXT
from fedzo.records.log import AuditLine, ScalarAudit
from fedzo.records.metrics import ClientRound, Round, StepSignals
from fedzo.records.scores import known
from fedzo.zo.log import LogRecord


def round_metrics(
    record: LogRecord,
    replies: Replies[Result],
    audit: AuditLine,
    signals: Mapping[int, StepSignals],
    *,
    clipped: int,
    wire: Traffic | None,
    down_bytes: int,
    seconds: float,
    round_seconds: float,
) -> Round:
    """The metrics record of a round.

    Args:
        record: What is committed.
        replies: What it was made of.
        audit: What the log keeps of these.
        signals: Of each client's steps.
        clipped: Scalars on the announced bound.
        wire: All bytes since the round before; None where there is no network.
        down_bytes: Payload that brings the clients that answered to the round's end: scalars, or values.
        seconds: Since the run started.
        round_seconds: What the round took.
    """
    results, refused = replies.results.values(), sorted(replies.refused.items())
    clients = tuple(
        ClientRound(
            client=entry.client,
            loss=known(finite_mean(entry.loss)),
            abs_g=known(float(np.abs(entry.g).mean())) if isinstance(entry, ScalarAudit) else None,
            steps=entry.steps,
            signals=signals[entry.client],
        )
        for entry in audit.clients
    )
    return Round(
        seconds=seconds,
        round=record.round,
        calibration=replies.measures_only,
        loss=_mean_of_known([each.loss for each in clients]),
        mean_abs_g=_mean_of_known([each.abs_g for each in clients]),
        payload_up_bytes=sum(result.payload_bytes for result in results),
        payload_down_bytes=down_bytes,
        message_up_bytes=replies.traffic.up_bytes,
        message_down_bytes=replies.traffic.down_bytes,
        round_seconds=round_seconds,
        dropped_probes=int(sum(result.dropped.sum() for result in results)),
        clip_bound=replies.bound or None,
        clipped=clipped,
        absent=tuple(client for client, _ in refused),
        reasons={client: reason[:MAX_TEXT] for client, reason in refused},
        clients=clients,
        wire_up_bytes=wire.up_bytes if wire else None,
        wire_down_bytes=wire.down_bytes if wire else None,
    )


def _mean_of_known(values: list[float | None]) -> float | None:
    return known(finite_mean(np.array([value for value in values if value is not None])))


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite numbers in float64; nan where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.astype(np.float64).mean()) if finite.size else float("nan")
