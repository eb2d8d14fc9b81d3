"""The statistics against numbers worked out by hand, and against plain Python."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.fl.server.step_policy.statistics import (
    Statistic,
    cusum,
    level,
    magnitudes,
    mean,
    median_of_others,
    quiet_share,
    ratio,
    shortfall,
)
from fedzo.records.log import ScalarAuditLine
from fedzo.testing.logs import audit_line


def line(
    *gs: list[list[float]], dropped: dict[int, list[list[bool]]] | None = None, xi: Any = None, first: int = 0
) -> ScalarAuditLine:
    return audit_line(dict(enumerate(gs, start=first)), dropped=dropped, xi=xi)


def test_the_size_of_a_step_is_the_mean_over_its_probes() -> None:
    found = magnitudes(line([[3.0, -5.0], [0.0, 2.0]], [[-1.0, -1.0]], first=4), Statistic.abs_g)

    assert {client: steps.tolist() for client, steps in found.items()} == {4: [4.0, 1.0], 5: [1.0]}


def test_a_dropped_probe_measured_nothing() -> None:
    dropped = {0: [[False, True], [True, True]]}
    found = magnitudes(line([[3.0, 0.0], [0.0, 0.0]], dropped=dropped, xi=[[[2.0], [9.0]]] * 2), Statistic.abs_g)
    gradip = magnitudes(line([[3.0, 0.0], [0.0, 0.0]], dropped=dropped, xi=[[[2.0], [9.0]]] * 2), Statistic.gradip)

    assert found[0][0] == 3.0
    assert math.isnan(found[0][1])
    assert gradip[0][0] == 6.0
    assert math.isnan(gradip[0][1])


def test_gradip_takes_the_products_of_its_own_step_probe_and_owner() -> None:
    xi = [[[1.0, 10.0], [2.0, 20.0]], [[3.0, 30.0], [4.0, 40.0]]]  # [T][P][owners]
    shared = [[[1.0], [2.0]], [[3.0], [4.0]]]
    g0, g1 = [[1.0, -1.0], [1.0, 1.0]], [[5.0, 0.0]]

    own = magnitudes(line(g0, g1, xi=xi, first=7), Statistic.gradip)
    one = magnitudes(line(g0, g1, xi=shared, first=7), Statistic.gradip)

    assert {client: steps.tolist() for client, steps in own.items()} == {7: [0.5, 3.5], 8: [25.0]}
    assert {client: steps.tolist() for client, steps in one.items()} == {7: [0.5, 3.5], 8: [2.5]}


def test_gradip_of_a_line_without_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="round 0 has none"):
        magnitudes(line([[3.0]]), Statistic.gradip)


def test_ratio_quiet_and_level_by_hand() -> None:
    steps = np.array([[8.0, 4.0, 1.0, 2.0, 1.0], [2.0, 2.0, 9.0, 3.0, 3.0], [1.0, 3.0, 9.0, 5.0, 5.0]])

    assert ratio(steps, initial=2, later=2).tolist() == [4.0, 2 / 3, 0.4]
    assert quiet_share(steps, 3.0, later=2).tolist() == [1.0, 0.0, 0.0]  # below, not at
    assert level(steps, later=2).tolist() == [4 / 1.5, 3.25 / 3, 2.25 / 5]


def test_steps_that_measured_nothing_are_left_out() -> None:
    steps = np.array([4.0, np.nan, np.nan, 1.0])

    assert mean(steps) == 2.5
    assert ratio(steps, initial=2, later=2) == 4.0
    assert quiet_share(steps, 2.0, later=2) == 1.0
    assert math.isnan(mean(np.array([np.nan])))
    assert math.isnan(quiet_share(np.array([np.nan, np.nan]), 1.0, later=1))
    assert math.isnan(quiet_share(steps, math.nan, later=2))


def test_a_client_that_falls_silent_has_a_huge_ratio_and_level_but_a_finite_one() -> None:
    steps = np.array([[1e6, 0.0], [1.0, 1.0], [1.0, 1.0]])

    assert np.isfinite(ratio(steps, initial=1, later=1)).all()
    assert np.isfinite(level(steps, later=1)).all()
    assert ratio(steps, initial=1, later=1)[0] > 1e30


@given(st.lists(st.floats(-100, 100), min_size=0, max_size=9), st.integers(0, 3))
def test_the_median_of_the_others_is_that_of_the_list_without_one(numbers: list[float], holes: int) -> None:
    values = np.array([*numbers, *[np.nan] * holes])

    found = median_of_others(values)

    for index, got in enumerate(found):
        others = [value for i, value in enumerate(numbers) if i != index]
        if index < len(numbers) and len(others) >= 2:
            assert got == pytest.approx(statistics.median(others))
        else:
            assert math.isnan(got)


def test_the_median_of_the_others_goes_along_the_last_axis() -> None:
    assert median_of_others(np.array([[1.0, 2.0, 9.0], [5.0, 5.0, 5.0]])).tolist() == [[5.5, 5.0, 1.5], [5.0] * 3]


def test_the_shortfall_is_in_logarithms_bounded_and_free_of_common_factors() -> None:
    step = np.array([1.0, 1.0, math.e, math.e**-1, 0.0])

    found = shortfall(step)

    # the others' median of log |g| is 0 for the quiet ones, and -0.5 for the loudest
    assert found.tolist() == pytest.approx([-0.5, -0.5, -1.5, 1.0, 2.0])
    np.testing.assert_allclose(shortfall(17 * step[:4]), shortfall(step[:4]), atol=1e-12)
    assert np.isnan(shortfall(np.array([1.0, np.nan, 2.0]))).all()


def test_a_cusum_adds_what_exceeds_the_drift_and_never_falls_below_zero() -> None:
    sums = np.zeros(3)
    for shortfalls in ([2.0, 0.5, 1.5], [2.0, 3.0, np.nan], [-9.0, 0.5, 1.0]):
        sums = cusum(sums, np.array(shortfalls), drift=1.0)

    assert sums.tolist() == [0.0, 1.5, 0.5]
