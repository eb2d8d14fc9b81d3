"""The two-point estimator against pencil, autograd and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.config import TwoPointConfig
from fedzo.zo.directions import direction
from fedzo.zo.estimator import ESTIMATORS, TwoPoint, two_point


def test_a_linear_loss_gives_the_inner_product_exactly() -> None:
    gradient = np.array([0.5, -2.0, 4.0])
    space = VectorSpace(np.zeros(3))

    (projection,) = TwoPoint(eps=0.25).estimate(space, lambda: float(space.theta.astype(float) @ gradient), [7])

    assert projection.g == np.float32(direction(7, 3).astype(float) @ gradient)
    assert not projection.dropped


def test_the_error_on_a_smooth_loss_falls_with_the_square_of_eps() -> None:
    def loss(theta: torch.Tensor) -> torch.Tensor:
        return (theta.sin() * theta.exp()).sum() + theta.prod()

    start = torch.linspace(-0.5, 0.7, 6, dtype=torch.float64)
    space = VectorSpace(start.numpy())
    theta0 = torch.from_numpy(space.theta.astype(np.float64))
    slope = torch.func.jvp(loss, (theta0,), (torch.from_numpy(direction(3, 6).astype(float)),))[1].item()

    errors = []
    for eps in (0.2, 0.1):
        value = (
            TwoPoint(eps=eps)
            .estimate(space, lambda: loss(torch.from_numpy(space.theta.astype(float))).item(), [3])[0]
            .g
        )
        errors.append(abs(float(value) - slope))

    assert 3.5 < errors[0] / errors[1] < 4.5


def test_g_z_is_unbiased_and_its_second_moment_follows_the_law_of_n_plus_2() -> None:
    n, trials = 50, 4000
    gradient = np.sin(np.arange(n))
    space = VectorSpace(np.zeros(n))
    projections = TwoPoint(eps=1.0).estimate(space, lambda: float(space.theta.astype(float) @ gradient), range(trials))

    samples = np.array([p.g * direction(key, n) for key, p in enumerate(projections)], dtype=np.float64)

    errors = samples.std(axis=0, ddof=1) / math.sqrt(trials)
    assert (np.abs(samples.mean(axis=0) - gradient) < 5 * errors).all()
    squares = (samples**2).sum(axis=1)
    assert abs(squares.mean() - (n + 2) * (gradient @ gradient)) < 5 * squares.std(ddof=1) / math.sqrt(trials)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_loss_that_is_not_finite_drops_the_probe_and_no_other(bad: float, side: int) -> None:
    losses = iter([1.0, bad, 2.0, 1.0] if side else [bad, 1.0, 2.0, 1.0])
    space = VectorSpace(np.zeros(4))

    first, second = TwoPoint(eps=0.5).estimate(space, lambda: next(losses), [1, 2])

    assert (first.g, first.dropped, math.isnan(first.loss)) == (0, True, True)
    assert (second.g, second.dropped, second.loss) == (1.0, False, 1.5)


def test_a_difference_beyond_float32_is_dropped() -> None:
    losses = iter([1e300, 0.0])

    (projection,) = TwoPoint(eps=1e-3).estimate(VectorSpace(np.zeros(1)), lambda: next(losses), [1])

    assert projection.dropped


def test_two_forwards_a_probe_and_not_one_more() -> None:
    calls = []
    space = VectorSpace(np.zeros(4))

    TwoPoint(eps=0.5).estimate(space, lambda: calls.append(1) or 0.0, [1, 2, 3])

    assert len(calls) == 6


def test_eps_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"estimator\.eps must be > 0, got 0"):
        two_point(TwoPointConfig(eps=0.0))
    assert isinstance(ESTIMATORS.build(TwoPointConfig()), TwoPoint)
