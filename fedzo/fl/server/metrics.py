"""What a round leaves in the audit log and in the metrics: pure functions of its record and replies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedzo.fl.exchange import Traffic
from fedzo.fl.server.aggregate import ClientResult
from fedzo.records.fields import MOST_TEXT
from fedzo.records.log import AuditLine, ClientAudit
from fedzo.records.metrics import ClientRound, Round, StepSignals
from fedzo.records.scores import known
from fedzo.zo.log import LogRecord, RoundRecord


def audit_line(
    record: RoundRecord,
    results: Mapping[int, ClientResult],
    *,
    lr: float,
    xi: npt.NDArray[np.float64] | None,
    used: Mapping[int, int],
    weights: Mapping[int, float],
    refused: Mapping[int, str],
) -> AuditLine:
    """The audit line of a round: whatever its record was made of.

    Args:
        record: What is committed.
        results: The usable replies.
        lr: Learning rate of the local steps; that of the record is 0 where the round only measured.
        xi: The server's gradient along every direction, [T, P, owners or 1]; None without a gradient.
        used: Steps that each client had used before the round.
        weights: Of the clients in the mean.
        refused: The other sampled clients. Why is in the metrics: its words differ between runtimes, the log may not.
    """
    return AuditLine(
        round=record.round,
        lr=lr,
        xi=xi,
        clients=tuple(
            ClientAudit(
                client=client,
                g=results[client].g,
                loss=results[client].loss,
                dropped=results[client].dropped,
                steps=len(results[client].g),
                used=used.get(client, 0),
                weight=weights[client],
                end_check=results[client].end_check,
            )
            for client in sorted(results)
        ),
        refused=tuple(sorted(refused)),
    )


def client_rounds(results: Mapping[int, ClientResult], signals: Mapping[int, StepSignals]) -> tuple[ClientRound, ...]:
    """What each client measured, ascending; ``signals`` of its local steps come from ``fedzo.fl.server.signals``."""
    return tuple(
        ClientRound(
            client=client,
            loss=known(finite_mean(results[client].loss)),
            abs_g=known(float(np.abs(results[client].g).mean())),
            steps=len(results[client].g),
            signals=signals[client],
        )
        for client in sorted(results)
    )


def round_metrics(
    record: LogRecord,
    clients: tuple[ClientRound, ...],
    *,
    calibration: bool,
    up_bytes: int,
    dropped: int,
    clipped: int,
    refused: Mapping[int, str],
    traffic: Traffic,
    wire: Traffic | None,
    down_bytes: int,
    bound: float,
    seconds: float,
    round_seconds: float,
) -> Round:
    """The metrics record of a round.

    Args:
        record: What was committed.
        clients: What each client measured.
        calibration: Whether the round only measured; its losses are of paths that were given up.
        up_bytes: Payload of the usable replies.
        dropped: What was measured in vain.
        clipped: Scalars on the announced bound.
        refused: Why the other sampled clients are not among them.
        traffic: Bytes of the round's messages as Flower counts them.
        wire: All bytes since the round before; None where there is no network.
        down_bytes: Payload that brings the clients that answered to the round's end: scalars, or values.
        bound: The announced clip of |g|; 0 = none.
        seconds: Since the run started.
        round_seconds: What the round took.
    """
    return Round(
        seconds=seconds,
        round=record.round,
        calibration=calibration,
        loss=_mean_of_known([each.loss for each in clients]),
        mean_abs_g=_mean_of_known([each.abs_g for each in clients]),
        payload_up_bytes=up_bytes,
        payload_down_bytes=down_bytes,
        message_up_bytes=traffic.up_bytes,
        message_down_bytes=traffic.down_bytes,
        round_seconds=round_seconds,
        dropped_probes=dropped,
        clip_bound=bound or None,
        clipped=clipped,
        absent=tuple(sorted(refused)),
        reasons={client: reason[:MOST_TEXT] for client, reason in sorted(refused.items())},
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
