"""Bounds that follow what clients measure, so that no client's extreme numbers decide a round or a mean.

The relative clip is a bound on |g| from the scalars of earlier rounds, announced with every request. A client clips
before its local step and sends what it stepped with, so the server's picture of its path stays true; the server refuses
what lies beyond the announced bound and clips nothing itself. Where no earlier round tells (the first one, losses,
vectors), a reply is compared with the other replies of its round. A median bounds these as long as fewer than half of a
round's clients are hostile, which takes three clients at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedzo.records.log import ScalarAuditLine
from fedzo.records.scores import MAX_LOSS
from fedzo.zo.log import ScalarRecord, Scalars

NO_BOUND = 0.0
FAR_OFF = 100.0  # times the median of a round's clients; SmolLM2's scalars on non-IID clients come to a fifth of it
LARGE_LOSS = 100.0  # nats: no loss below it is far off, however small the others' are


def announced_bound(
    audit: Sequence[ScalarAuditLine], records: Sequence[ScalarRecord], *, factor: float, rounds: int
) -> float:
    """``factor`` times the median |g| over all clients' scalars of the last ``rounds`` rounds.

    A function of the logs alone, so a resumed run announces what an unbroken one would. Dropped probes measured
    nothing, and the scalars of a round that only measured are of paths that were given up: both are left out. Of a
    round count the steps that all of its clients took: a client that is stopped early would else have less weight in
    the median than one that sends more.

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
        g
        for line, record in zip(audit[-rounds:], records[-rounds:], strict=True)
        if line.lr == record.lr  # a calibration's record has 0 instead
        for g in _of_common_steps(line)
    ]
    scalars = np.abs(np.concatenate([*measured, np.zeros(0)]), dtype=np.float64)
    if scalars.size == 0:
        return NO_BOUND
    return float(np.float32(min(factor * float(np.median(scalars)), float(np.finfo(np.float32).max))))


def _of_common_steps(line: ScalarAuditLine) -> Iterator[Scalars]:
    """What each client measured in the steps that all of them took."""
    common = min((entry.steps for entry in line.clients), default=0)
    for entry in line.clients:
        yield entry.g[:common][~entry.dropped[:common]]


def far_off(sizes: Mapping[int, float], *, factor: float = 0.0, least: float = 0.0) -> dict[int, float]:
    """The bound of each client whose number lies beyond it: ``factor`` times the median over the clients of a round.

    Args:
        sizes: A number of at least 0 by client (``largest_of``); nan where it measured nothing, since zeros would draw
            the median down.
        factor: How far is far; what is less than ``FAR_OFF`` counts as that.
        least: What is never beyond the bound.

    Example:
        >>> far_off({0: 1.0, 1: 3.0, 2: 2.0, 3: 1e6}), far_off({0: 1.0, 1: 1e6})
        ({3: 250.0}, {})
    """
    known = [size for size in sizes.values() if np.isfinite(size)]
    bound = max(least, max(FAR_OFF, factor) * float(np.median(known))) if known else 0.0
    return {client: bound for client, size in sizes.items() if bound > 0 and size > bound}


def largest_of(measured: np.ndarray) -> float:
    """The largest magnitude of what a client measured; nan where it measured nothing."""
    return float(np.abs(measured).max()) if measured.size else float("nan")


def clip(g: Scalars, bound: float) -> Scalars:
    """Each scalar within [-bound, bound], float32 as it came; unchanged without a bound."""
    return g if bound == NO_BOUND else np.clip(g, np.float32(-bound), np.float32(bound))


def sent_losses(losses: npt.ArrayLike) -> Scalars:
    """Losses as a client sends them, float32: within ``MAX_LOSS``, which a model that has diverged may exceed."""
    return np.clip(np.asarray(losses, np.float64), -MAX_LOSS, MAX_LOSS).astype(np.float32)
