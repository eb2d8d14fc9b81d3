"""The relative clip: a bound on |g| that follows what clients have measured, announced with every request.

A client clips before its local step and sends what it stepped with, so the server's picture of its path stays true; the
server refuses what lies beyond the announced bound and clips nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedzo.records.log import AuditLine
from fedzo.zo.log import RoundRecord, Scalars

NO_BOUND = 0.0


def announced_bound(audit: Sequence[AuditLine], records: Sequence[RoundRecord], *, factor: float, rounds: int) -> float:
    """``factor`` times the median |g| over all clients' scalars of the last ``rounds`` rounds.

    A function of the logs alone, so a resumed run announces what an unbroken one would. Dropped probes measured
    nothing, and the scalars of a round that only measured are of paths that were given up: both are left out.

    Args:
        audit: Audit lines of the committed rounds.
        records: Their records.
        factor: ``strategy.clip_factor``; 0 switches the clip off.
        rounds: ``strategy.clip_rounds``.

    Returns:
        A float32 value; ``NO_BOUND`` while there is no history, or where its median is 0.
    """
    if factor == 0:
        return NO_BOUND
    measured = [
        np.abs(entry.g.astype(np.float64))[~entry.dropped]
        for line, record in zip(audit[-rounds:], records[-rounds:], strict=True)
        if line.lr == record.lr  # a calibration's record has 0 instead
        for entry in line.clients
    ]
    scalars = np.concatenate(measured) if measured else np.empty(0)
    if scalars.size == 0:
        return NO_BOUND
    return float(np.float32(min(factor * float(np.median(scalars)), float(np.finfo(np.float32).max))))


def clip(g: Scalars, bound: float) -> Scalars:
    """Each scalar within [-bound, bound], float32 as it came; unchanged without a bound."""
    return g if bound == NO_BOUND else np.clip(g, np.float32(-bound), np.float32(bound))
