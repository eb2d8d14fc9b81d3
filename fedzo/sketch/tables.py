"""The tables of a sketch: exact weighted k-means of the numbers of a row.

SpaLLM (arXiv 2410.06364) and LeanQuant (2407.10032) cluster each row by Lloyd's algorithm, which stops where no single
step helps. In one dimension the clusters of a best solution are intervals of the sorted values, so dynamic programming
finds it. With C[m][j] the least cost of the first j + 1 values in m + 1 clusters,

    C[m][j] = min over i of C[m - 1][i - 1] + cost(i, j),

and the best i never falls as j grows (Wu, J. Algorithms 12, 1991; Grønlund et al., arXiv 1701.07204). So the j are
taken in the order of a binary search: O(k n log n) a row.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from fedzo.errors import ConfigError

Floats = npt.NDArray[np.float64]


def kmeans_1d(values: npt.NDArray[np.float32], weights: Floats, num_levels: int, *, name: str = "weight") -> Floats:
    """For each row the levels with the least sum of ``weights[i] * (values[i] - nearest level)**2``.

    Exact up to the rounding of float64 sums. Equal values share a level; a value of weight 0 has no say. Rows are
    independent of one another, and the number of threads changes no bit.

    Args:
        values: float32 [R, n].
        weights: float64 [n], >= 0, shared by all rows; their scale changes nothing.
        num_levels: k, at least 1.
        name: The matrix that the values are of, for errors.

    Returns:
        The levels, float64 [R, k], ascending. A row with fewer distinct values than k repeats its last one.

    Raises:
        ConfigError: A value or a weight is not finite, a weight is negative, or all are 0.

    Example:
        >>> kmeans_1d(np.float32([[0, 1, 10, 12]]), np.array([1.0, 3.0, 1.0, 1.0]), 2)
        array([[ 0.75, 11.  ]])
    """
    check_finite(values, f"the weights of {name!r}")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ConfigError(
            f"sketch: the importance of the columns of {name!r} must be >= 0, finite and not 0 everywhere, got "
            f"{weights.min(initial=np.inf)} to {weights.max(initial=-np.inf)}. Check the calibration text."
        )
    levels = np.empty((len(values), num_levels))
    _fit_rows(np.ascontiguousarray(values), weights / weights.max(), levels)
    return levels


def check_finite(values: npt.NDArray[Any], what: str) -> None:
    """Refuse numbers that hold NaN or infinity.

    Raises:
        ConfigError: Saying of what, and how many these are.
    """
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise ConfigError(
            f"sketch: {what} must be finite, got {bad} of {values.size} that are NaN or infinite. "
            "Check the model's files, or load the model in float32."
        )


@nb.njit(parallel=True, cache=True)
def _fit_rows(values: Any, weights: Any, levels: Any) -> None:
    for row in nb.prange(values.shape[0]):
        _fit_row(values[row], weights, levels[row])


@nb.njit(cache=True)
def _fit_row(values: Any, weights: Any, levels: Any) -> None:
    """The levels of one row into ``levels`` [k]."""
    points, masses = np.empty(values.size), np.empty(values.size)
    n = 0  # distinct values of positive weight, ascending
    for at in np.argsort(values, kind="mergesort"):
        if weights[at] > 0:
            if n == 0 or points[n - 1] != values[at]:
                points[n], masses[n] = values[at], 0.0
                n += 1
            masses[n - 1] += weights[at]
    k = min(levels.size, n)
    starts = np.arange(k)  # the first point of each cluster
    if k < n:
        _best_starts(points[:n], masses[:n], starts)
    for m in range(k):
        end = starts[m + 1] if m + 1 < k else n
        total = mass = 0.0
        for i in range(starts[m], end):
            total += masses[i] * points[i]
            mass += masses[i]
        levels[m] = total / mass
    levels[k:] = levels[k - 1]


@nb.njit(cache=True, error_model="numpy")
def _best_starts(points: Any, masses: Any, starts: Any) -> None:
    """The first points of the best ``starts.size`` clusters of ``points`` (float64 [n], distinct, ascending).

    cost(i, j) is the sum of squares less the squared sum over the mass, all from prefix sums; the constant sum of
    squares is left out. The points are centred, so that the squares do not drown what differs.
    """
    n, k = points.size, starts.size
    middle = (points * masses).sum() / masses.sum()
    mass, total = np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        mass[i + 1] = mass[i] + masses[i]
        total[i + 1] = total[i] + masses[i] * (points[i] - middle)
    before, now = np.empty(n), np.empty(n)
    for j in range(n):
        now[j] = -(total[j + 1] ** 2) / mass[j + 1]
    best = np.zeros((k, n), np.int32)
    widest = 1
    while 2 * widest <= n:
        widest *= 2
    for m in range(1, k):
        before, now = now, before
        first = best[m]
        stride = widest
        while stride:  # -1 + odd multiples of the stride, whose neighbours wider strides have done
            for j in range(stride - 1, n, 2 * stride):
                if j < m:
                    continue
                low = max(m, first[j - stride]) if j >= stride else m
                high = min(j, first[j + stride]) if j + stride < n else j
                least, at = np.inf, low
                for i in range(low, high + 1):
                    own = mass[j + 1] - mass[i]  # 0 where the sum before it has absorbed a tiny weight
                    cost = before[i - 1] - ((total[j + 1] - total[i]) ** 2 / own if own > 0 else 0.0)
                    if cost < least:
                        least, at = cost, i
                now[j], first[j] = least, at
            stride //= 2
    j = n - 1
    for m in range(k - 1, 0, -1):
        starts[m] = best[m, j]
        j = starts[m] - 1
    starts[0] = 0
