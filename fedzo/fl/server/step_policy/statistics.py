"""What the tests measure: how large a client's local steps are, from the scalars of the audit log alone.

A stationary client's g is close to N(0, |grad|^2) along Gaussian directions, so |g| follows the norm of its local
gradient. That of a client with one label dies away once its own path has learnt to answer it; that of an IID client
keeps going (Meerkat, arXiv 2506.03337). Time is the last axis of every array of steps; a step whose probes were all
dropped is nan and is left out.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

from fedzo.records.log import ScalarAuditLine

Numbers = npt.NDArray[np.float64]
TINY = 1e-30
FEWEST = 3
"""Clients that must have measured a step for "the others" to have a median."""
_MAX_BELOW = 2.0  # of one step in a CUSUM, in natural logarithms: even a |g| of 0 counts as e**-2 of the others'


class Statistic(StrEnum):
    """What is measured of a client's local step."""

    abs_g = "abs_g"
    """|g|, the projected gradient itself; any trainer."""
    gradip = "gradip"
    """|g xi|, the size of the paper's GradIP: |g| times a factor of the seed; the trainer must have a gradient."""


def magnitudes(line: ScalarAuditLine, statistic: Statistic) -> dict[int, Numbers]:
    """The size of every local step of one round, float64 [T_k] of each client.

    ``abs_g``: mean over the probes p of |g[p]|. ``gradip``: |mean over p of g[p] xi[p]|, the size of the paper's
    statistic; xi is the server's gradient along the direction, the same for every client that shares it. Dropped probes
    are left out of both means (in the signals of ``fedzo.zo.virtual_path`` they count as 0, as they do in the step
    itself).

    Args:
        line: An audit line; for ``gradip`` its ``xi`` must be there.
        statistic: Which.
    """
    xi = line.xi
    if xi is None and statistic is Statistic.gradip:
        raise ValueError(f"gradip needs the server's gradient along each direction, but round {line.round} has none")
    found = {}
    for column, entry in enumerate(line.clients):
        g = entry.g.astype(np.float64)
        kept = (~entry.dropped).sum(axis=1)
        if xi is None or statistic is Statistic.abs_g:
            total = np.abs(g).sum(axis=1)
        else:
            total = np.abs((g * xi[: len(g), :, column if xi.shape[2] > 1 else 0]).sum(axis=1))
        found[entry.client] = np.where(kept > 0, total / np.maximum(kept, 1), np.nan)
    return found


def mean(values: Numbers) -> Numbers:
    """Over the steps that measured something; nan where none did."""
    kept = np.isfinite(values)
    count = kept.sum(axis=-1)
    total = np.where(kept, values, 0.0).sum(axis=-1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def ratio(steps: Numbers, *, initial: int, later: int) -> Numbers:
    """Mean of the first ``initial`` steps over that of the last ``later``: large where a client has gone quiet."""
    return np.asarray(mean(steps[..., :initial]) / np.maximum(mean(steps[..., -later:]), TINY))


def quiet_share(steps: Numbers, sigma: float | Numbers, *, later: int) -> Numbers:
    """Share of the last ``later`` steps that are smaller than sigma; nan where sigma is unknown."""
    last = steps[..., -later:]
    measured = np.isfinite(last) & np.isfinite(sigma)
    below = np.where(measured, (last < sigma).astype(np.float64), np.nan)
    return mean(below)


def level(steps: Numbers, *, later: int) -> Numbers:
    """Of the mean of the last ``later`` steps: the others' median over the client's own. Clients are the first axis.

    It does not ask for a decay, so it also finds a client that is quiet from the start, because the model leans to its
    label already.
    """
    means = mean(steps[..., -later:])
    return np.asarray(median_of_others(means) / np.maximum(means, TINY))


def median_of_others(values: Numbers) -> Numbers:
    """For each entry of the last axis the median of all others; nan where fewer than two others are numbers."""
    count = (~np.isnan(values)).sum(axis=-1, keepdims=True)
    order = np.argsort(values, axis=-1, kind="stable")  # nan comes last
    ranked, rank = np.take_along_axis(values, order, axis=-1), np.argsort(order, axis=-1)

    def among_others(place: npt.NDArray[np.int64]) -> Numbers:
        """Without the one of rank r, the others' i-th is ranked[i] below r and ranked[i + 1] from r on."""
        found = np.clip(place + (place >= rank), 0, values.shape[-1] - 1)
        return np.asarray(np.take_along_axis(ranked, found, axis=-1))

    median = (among_others((count - 2) // 2) + among_others((count - 1) // 2)) / 2
    return np.asarray(np.where((count >= FEWEST) & ~np.isnan(values), median, np.nan))


def shortfall(step: Numbers) -> Numbers:
    """How far each client's |g| of one step lies below the others' median, in natural logarithms; [K] in, [K] out.

    Common factors cancel: the scale of the loss, its fall while the model learns and, with shared directions,
    the direction's own.
    """
    logs = np.log(np.maximum(step, TINY))
    return np.minimum(median_of_others(logs) - logs, _MAX_BELOW)


def cusum(before: Numbers, shortfalls: Numbers, *, drift: float) -> Numbers:
    """One step of Page's one-sided CUSUM (Biometrika 41, 1954): max(0, S + shortfall - drift); nan changes nothing."""
    return np.asarray(np.where(np.isfinite(shortfalls), np.maximum(0.0, before + shortfalls - drift), before))
