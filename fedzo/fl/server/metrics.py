"""What a round leaves in the audit log and in the metrics: pure functions of its record and replies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedzo.fl.exchange import Traffic
from fedzo.fl.server.aggregate import ClientResult
from fedzo.records.fields import MOST_TEXT
from fedzo.records.log import AuditLine, ClientAudit
from fedzo.records.metrics import ClientRound, Round, StepSignals, known
from fedzo.zo.log import RoundRecord


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


def round_metrics(
    record: RoundRecord,
    results: Mapping[int, ClientResult],
    *,
    calibration: bool,
    signals: Mapping[int, StepSignals],
    refused: Mapping[int, str],
    traffic: Traffic,
    down_bytes: int,
    bound: float,
    seconds: float,
    round_seconds: float,
) -> Round:
    """The metrics record of a round.

    Args:
        record: What was committed.
        results: The usable replies.
        calibration: Whether the round only measured; its losses are of paths that were given up.
        signals: Of each client's local steps (``fedzo.fl.server.signals``).
        refused: Why the other sampled clients are not among them.
        traffic: Bytes of the round's messages as Flower counts them.
        down_bytes: Payload that brings the clients that answered to the round's end: scalars, or values.
        bound: The announced clip of |g|; 0 = none.
        seconds: Since the run started.
        round_seconds: What the round took.
    """
    clients = sorted(results)
    losses = {client: finite_mean(results[client].loss) for client in clients}
    abs_g = {client: float(np.abs(results[client].g).mean()) for client in clients}
    return Round(
        seconds=seconds,
        round=record.round,
        calibration=calibration,
        loss=known(finite_mean(np.array(list(losses.values())))),
        mean_abs_g=known(float(np.mean(list(abs_g.values())))),
        payload_up_bytes=sum(result.payload_bytes for result in results.values()),
        payload_down_bytes=down_bytes,
        message_up_bytes=traffic.up_bytes,
        message_down_bytes=traffic.down_bytes,
        round_seconds=round_seconds,
        dropped_probes=int(sum(result.dropped.sum() for result in results.values())),
        clip_bound=bound or None,
        clipped=int(sum((np.abs(result.g) == bound).sum() for result in results.values())) if bound else 0,
        absent=tuple(sorted(refused)),
        reasons={client: reason[:MOST_TEXT] for client, reason in sorted(refused.items())},
        clients=tuple(
            ClientRound(
                client=client,
                loss=known(losses[client]),
                abs_g=known(abs_g[client]),
                steps=len(results[client].g),
                signals=signals[client],
            )
            for client in clients
        ),
    )


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite numbers in float64; nan where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.astype(np.float64).mean()) if finite.size else float("nan")
