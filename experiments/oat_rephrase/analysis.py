"""Statistics of the study: an effect over runs and rows that are both samples, and the gain of a zeroth-order step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean difference.

    Attributes:
        mean: The estimate.
        error: Its standard error.
        low: Lower end of the 95 % interval.
        high: Upper end.
        smallest: The true effect that such a study finds four times in five (two-sided test at 5 %).
    """

    mean: float
    error: float
    low: float
    high: float
    smallest: float


def crossed_effect(differences: Array) -> Effect:
    """The mean of differences whose runs and rows are both drawn from larger populations.

    The model is ``difference = effect + run + row + rest``, three independent normal terms of mean 0, and every run has
    every row. Its mean squares M (of runs, rows, rest) give the variance of the mean as
    (M_runs + M_rows - M_rest) / number of cells. As this is an estimate, it is taken to be at least what runs alone or
    rows alone give. The interval is Student's t with Satterthwaite's degrees of freedom.

    Args:
        differences: [runs, rows], two of each at least.
    """
    runs, rows = differences.shape
    mean = float(differences.mean())
    by_run, by_row = differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    freedom = np.array([runs - 1, rows - 1, (runs - 1) * (rows - 1)], dtype=np.float64)
    squares = (
        np.array(
            [
                rows * ((by_run - mean) ** 2).sum(),
                runs * ((by_row - mean) ** 2).sum(),
                ((differences - by_run - by_row + mean) ** 2).sum(),
            ]
        )
        / freedom
    )
    choices = [np.array(signs) * squares for signs in ([1, 1, -1], [1, 0, 0], [0, 1, 0])]
    parts = max(choices, key=lambda choice: float(choice.sum()))
    error = float(np.sqrt(parts.sum() / differences.size))
    if error == 0:
        return Effect(mean, 0.0, mean, mean, 0.0)
    t = stats.t(parts.sum() ** 2 / (parts**2 / freedom).sum())
    half = error * float(t.ppf(0.975))
    return Effect(mean, error, mean - half, mean + half, error * float(t.ppf(0.975) + t.ppf(0.8)))


def gain(along: Array, squared: Array) -> Array:
    """What a zeroth-order step at its best rate gains: ``<G_train, G_dev>^2 / E|G_batch|^2``, up to ``|G_dev|^2``.

    Args:
        along: ``<G_batch, G_dev>`` of the batches on the last axis; their mean is ``<G_train, G_dev>``.
        squared: ``|G_batch|^2``, of the same shape.
    """
    result: Array = along.mean(-1) ** 2 / squared.mean(-1)
    return result


def relative_gain(sets: Sequence[tuple[Array, Array]], original: tuple[Array, Array]) -> tuple[float, float, float]:
    """Geometric mean over sets of their gain over the original's, with the ends of a 95 % bootstrap interval.

    Batches hold the same rows in every set, and are resampled for all sets together; sets, being draws of one prompt,
    are resampled as well. The rows that ``G_dev`` is of are taken as given.

    Args:
        sets: ``along`` and ``squared`` [batches] of each set.
        original: Those of the original rows.
    """
    along, squared = (np.stack([each[part] for each in sets]) for part in (0, 1))
    at_base = np.log(gain(along, squared) / gain(*original)).mean()
    draw = np.random.Generator(np.random.Philox(20))
    found = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        batches = draw.integers(along.shape[1], size=along.shape[1])
        chosen = draw.integers(len(sets), size=len(sets))
        ratios = gain(along[:, batches], squared[:, batches]) / gain(original[0][batches], original[1][batches])
        found[number] = np.log(ratios)[chosen].mean()
    low, high = np.quantile(found, [0.025, 0.975])
    return float(np.exp(at_base)), float(np.exp(low)), float(np.exp(high))
