"""Exact weighted k-means in one dimension, against the enumeration of all partitions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fedzo.errors import ConfigError
from fedzo.sketch import kmeans_1d


def cost(values: Any, weights: Any, levels: Any) -> float:
    nearest = np.abs(values[:, None].astype(np.float64) - levels).min(axis=1)
    return float((weights * nearest**2).sum())


def scatter(values: list[float], weights: list[float]) -> float:
    """The weighted sum of squares about the mean, in the form that needs no prefix sums."""
    mean = sum(w * x for x, w in zip(values, weights, strict=True)) / sum(weights)
    return sum(w * (x - mean) ** 2 for x, w in zip(values, weights, strict=True))


def least_over_intervals(values: Any, weights: Any, k: int) -> float:
    """Every way to cut the sorted values into at most k intervals."""
    pairs = sorted(zip(values.tolist(), weights.tolist(), strict=True))
    n, least = len(pairs), np.inf
    for count in range(min(k, n)):
        for cuts in itertools.combinations(range(1, n), count):
            parts = [pairs[a:b] for a, b in itertools.pairwise((0, *cuts, n))]
            least = min(least, sum(scatter([x for x, _ in part], [w for _, w in part]) for part in parts))
    return least


def assignments(n: int, k: int) -> Iterator[list[int]]:
    """Every set partition of n things into at most k sets, each once."""

    def extend(label: list[int]) -> Iterator[list[int]]:
        if len(label) == n:
            yield label
            return
        for next_label in range(min(max(label, default=-1) + 2, k)):
            yield from extend([*label, next_label])

    return extend([])


def least_over_sets(values: Any, weights: Any, k: int) -> float:
    least = np.inf
    for labels in assignments(len(values), k):
        sets = [[i for i, label in enumerate(labels) if label == j] for j in set(labels)]
        least = min(least, sum(scatter([float(values[i]) for i in s], [float(weights[i]) for i in s]) for s in sets))
    return least


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_no_partition_into_sets_costs_less(n: int, k: int) -> None:
    rng = np.random.default_rng([n, k])
    values, weights = rng.normal(size=(3, n)).astype(np.float32), rng.uniform(0.1, 2, n) ** 4

    levels = kmeans_1d(values, weights, k)

    for row, of_row in zip(values, levels, strict=True):
        assert cost(row, weights, of_row) == pytest.approx(least_over_sets(row, weights, k), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_no_cut_into_intervals_costs_less_whatever_the_values_are(k: int) -> None:
    rng = np.random.default_rng(k)
    values = rng.normal(size=(20, 12)).astype(np.float32)
    values[10:15] = np.round(values[10:15] * 2) / 2  # many equal ones, and equally good cuts
    values[15:] = values[15:] * 0.01 + 100  # far from 0, near to one another
    weights = rng.uniform(0.1, 10, 12) ** 3

    levels = kmeans_1d(values, weights, k)

    for row, of_row in zip(values, levels, strict=True):
        assert cost(row, weights, of_row) == pytest.approx(least_over_intervals(row, weights, k), rel=1e-6, abs=1e-9)


def least_by_plain_recurrence(values: Any, weights: Any, k: int) -> float:
    """C[m][j] as the recurrence says, over all i; the cost of an interval by Welford's update, without prefix sums."""
    order = np.argsort(values)
    x, w = values[order].astype(np.float64), weights[order]
    n = len(x)
    cost_of = np.full((n, n), np.inf)
    for i in range(n):
        mean, mass, total = 0.0, 0.0, 0.0
        for j in range(i, n):
            mass += w[j]
            step = x[j] - mean
            mean += step * w[j] / mass
            total += w[j] * step * (x[j] - mean)
            cost_of[i, j] = total
    least = cost_of[0]
    for _ in range(1, k):
        least = np.minimum(least, np.min(np.append(np.inf, least[:-1])[:, None] + cost_of, axis=0))
    return float(least[-1])


@pytest.mark.parametrize(("n", "k"), [(127, 8), (128, 16), (200, 16)])
def test_a_wide_row_costs_what_the_plain_recurrence_finds_and_leaves_no_level_empty(n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    values, weights = rng.standard_t(4, size=n).astype(np.float32), rng.uniform(0.2, 1, n) ** 4

    levels = kmeans_1d(values[None], weights, k)[0]

    assert cost(values, weights, levels) == pytest.approx(least_by_plain_recurrence(values, weights, k), rel=1e-9)
    nearest = np.abs(values[:, None] - levels).argmin(axis=1)
    means = [np.average(values[nearest == j].astype(float), weights=weights[nearest == j]) for j in range(k)]
    np.testing.assert_allclose(levels, means, rtol=1e-12)


def test_levels_ascend_and_fewer_distinct_values_repeat_the_last() -> None:
    values = np.float32([[3, 1, 3, 1, 2], [7, 7, 7, 7, 7], [5, 4, 3, 2, 1]])

    levels = kmeans_1d(values, np.ones(5), 4)

    np.testing.assert_array_equal(levels[:2], [[1, 2, 3, 3], [7, 7, 7, 7]])
    assert (np.diff(levels[2]) > 0).all()


def test_a_value_of_weight_0_has_no_say_and_the_scale_of_the_weights_has_none() -> None:
    rng = np.random.default_rng(3)
    values, weights = rng.normal(size=(4, 40)).astype(np.float32), rng.uniform(0.1, 1, 40)
    weights[::4] = 0
    values[:, 0] = 1e30
    kept = weights > 0

    levels = kmeans_1d(values, weights, 8)

    np.testing.assert_array_equal(levels, kmeans_1d(values[:, kept], weights[kept], 8))
    np.testing.assert_array_equal(levels, kmeans_1d(values, weights * 2.0**-900, 8))


def test_a_weight_that_sums_absorb_does_no_harm() -> None:
    values = np.float32([[0, 5, 10, 11]])

    levels = kmeans_1d(values, np.array([1, 1e-17, 1e-3, 1e-3]), 3)

    np.testing.assert_allclose(levels, [[0, 10, 11]], atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_with_its_number(bad: float) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = bad

    with pytest.raises(ConfigError, match=r"'layers.0.q_proj' must be finite, got 1 of 6"):
        kmeans_1d(values, np.ones(3), 2, name="layers.0.q_proj")


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_weights_that_weigh_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"importance of the columns of 'q' must be >= 0"):
        kmeans_1d(np.ones((1, 2), np.float32), np.array(weights), 2, name="q")
