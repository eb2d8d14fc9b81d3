"""Estimators against pencil, autograd and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.config import Baseline, Distribution, FzooConfig, OneSidedConfig, TwoPointConfig
from fedzo.zo.directions import direction
from fedzo.zo.estimator import ESTIMATORS, Estimator, Fzoo, OneSided, Projection, TwoPoint, two_point

GRADIENT = np.array([0.5, -2.0, 4.0, 1.0, -0.25])
KEYS = [7, 8, 9, 10]
ONE_SIDED = [OneSided(eps=0.25, baseline=baseline) for baseline in Baseline]
EVERY: list[Estimator] = [TwoPoint(eps=0.25), *ONE_SIDED, Fzoo(eps=0.25)]


def linear(space: VectorSpace) -> Callable[[], float]:
    """Loss 3 + <GRADIENT, theta> in float64."""
    return lambda: 3.0 + float(space.theta.astype(float) @ GRADIENT)


def slopes(keys: Sequence[int]) -> np.ndarray:
    """<GRADIENT, z> of each key."""
    return np.array([direction(key, GRADIENT.size).astype(float) @ GRADIENT for key in keys])


def gs(projections: list[Projection]) -> np.ndarray:
    return np.array([projection.g for projection in projections])


# --- exact on linear losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [TwoPoint(eps=0.25), OneSided(eps=0.25, baseline=Baseline.center)], ids=str)
def test_a_linear_loss_gives_the_inner_product(estimator: Estimator) -> None:
    space = VectorSpace(np.zeros(5))

    projections = estimator.estimate(space, linear(space), KEYS)

    assert gs(projections) == pytest.approx(slopes(KEYS), rel=1e-6)
    assert [projection.dropped for projection in projections] == [False] * 4


def test_a_linear_loss_without_an_offset_gives_the_inner_product_exactly() -> None:
    space = VectorSpace(np.zeros(5))

    (projection,) = TwoPoint(eps=0.25).estimate(space, lambda: float(space.theta.astype(float) @ GRADIENT), [7])

    assert projection.g == np.float32(slopes([7])[0])


def test_the_mean_baseline_gives_the_inner_product_less_that_of_the_mean_direction() -> None:
    space = VectorSpace(np.zeros(5))

    projections = OneSided(eps=0.25, baseline=Baseline.mean).estimate(space, linear(space), KEYS)

    assert gs(projections) == pytest.approx(slopes(KEYS) - slopes(KEYS).mean(), rel=1e-5)


def test_leave_one_out_compares_each_probe_with_the_others() -> None:
    space = VectorSpace(np.zeros(5))

    projections = OneSided(eps=0.25, baseline=Baseline.leave_one_out).estimate(space, linear(space), KEYS)

    expected = [own - np.delete(slopes(KEYS), p).mean() for p, own in enumerate(slopes(KEYS))]
    assert gs(projections) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_fzoo_divides_by_the_deviation_so_neither_eps_nor_the_loss_s_scale_matters(eps: float, scale: float) -> None:
    space = VectorSpace(np.zeros(5))
    loss = linear(space)

    projections = Fzoo(eps=eps).estimate(space, lambda: scale * loss(), KEYS)

    assert gs(projections) == pytest.approx(slopes(KEYS) / np.std(slopes(KEYS), ddof=1), rel=2e-5)


# --- in expectation ---------------------------------------------------------------------------------------------------


def quadratic(space: VectorSpace) -> Callable[[], float]:
    """Loss <GRADIENT, theta> + theta' H theta / 2 with a full H; its gradient at 0 is GRADIENT."""
    root = np.sin(np.arange(25.0)).reshape(5, 5)
    hessian = root @ root.T

    def loss() -> float:
        theta = space.theta.astype(float)
        return float(GRADIENT @ theta + theta @ hessian @ theta / 2)

    return loss


def steps(estimator: Estimator, *, trials: int, probes: int, law: Distribution) -> np.ndarray:
    """The mean over probes of g z, for ``trials`` independent steps."""
    space = VectorSpace(np.zeros(5), distribution=law)
    made = []
    for trial in range(trials):
        keys = range(trial * probes, (trial + 1) * probes)
        projections = estimator.estimate(space, quadratic(space), keys)
        made.append(
            np.mean([p.g * direction(key, 5, distribution=law) for key, p in zip(keys, projections, strict=True)], 0)
        )
    return np.array(made, dtype=np.float64)


@pytest.mark.parametrize("law", list(Distribution))
@pytest.mark.parametrize(
    ("estimator", "share"),
    [
        (TwoPoint(eps=0.5), 1),
        (OneSided(eps=0.5, baseline=Baseline.center), 1),
        (OneSided(eps=0.5, baseline=Baseline.mean), 2 / 3),
        (OneSided(eps=0.5, baseline=Baseline.leave_one_out), 1),
    ],
    ids=str,
)
def test_g_z_is_on_average_the_gradient_or_the_share_of_it_that_is_said(
    estimator: Estimator, share: float, law: Distribution
) -> None:
    trials = 1500

    samples = steps(estimator, trials=trials, probes=3, law=law)

    errors = samples.std(axis=0, ddof=1) / math.sqrt(trials)
    assert (np.abs(samples.mean(axis=0) - share * GRADIENT) < 5 * errors).all()
    if share != 1:  # and the test would see the difference
        assert (np.abs(samples.mean(axis=0) - GRADIENT) > 5 * errors).any()


@pytest.mark.parametrize(("law", "extra"), [(Distribution.gaussian, 2), (Distribution.rademacher, 0)])
def test_the_second_moment_of_g_z_is_n_plus_2_or_n_times_that_of_the_gradient(law: Distribution, extra: int) -> None:
    n, trials = 50, 3000
    gradient = np.sin(np.arange(n))
    space = VectorSpace(np.zeros(n), distribution=law)

    projections = TwoPoint(eps=1.0).estimate(space, lambda: float(space.theta.astype(float) @ gradient), range(trials))

    samples = [p.g * direction(key, n, distribution=law).astype(float) for key, p in enumerate(projections)]
    squares = np.array([sample @ sample for sample in samples])
    error = squares.std(ddof=1) / math.sqrt(trials)
    assert abs(squares.mean() - (n + extra) * (gradient @ gradient)) < 5 * error


# --- small eps --------------------------------------------------------------------------------------------------------


class DoubleSpace(VectorSpace):
    """As its parent, but a probe is made in float64, so that only the formula's own error is seen."""

    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        kept = self.theta
        self.theta = kept.astype(np.float64) + scale * direction(key, self.size).astype(np.float64)
        try:
            yield
        finally:
            self.theta = kept


def smooth(theta: torch.Tensor) -> torch.Tensor:
    return (theta.exp() * theta.sin()).sum() + theta.pow(3).sum() + theta.prod()


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda eps: TwoPoint(eps=eps), 2),
        (lambda eps: OneSided(eps=eps, baseline=Baseline.center), 1),
        (lambda eps: OneSided(eps=eps, baseline=Baseline.leave_one_out), 1),
    ],
    ids=["two_point", "center", "leave_one_out"],
)
def test_the_error_falls_with_eps_as_the_order_says(make: Callable[[float], Estimator], order: int) -> None:
    space = DoubleSpace(np.linspace(-0.5, 0.7, 6))
    theta = torch.from_numpy(space.theta.astype(np.float64))
    exact = np.array(
        [
            torch.func.jvp(smooth, (theta,), (torch.from_numpy(direction(key, 6).astype(float)),))[1].item()
            for key in KEYS
        ]
    )
    widths = np.array([2.0**-k for k in (4, 5, 6, 7)])

    errors = []
    for eps in widths:
        estimator = make(float(eps))
        found = gs(estimator.estimate(space, lambda: smooth(torch.from_numpy(space.theta.astype(float))).item(), KEYS))
        wanted = exact
        if estimator == OneSided(eps=float(eps), baseline=Baseline.leave_one_out):
            wanted = np.array([own - np.delete(exact, p).mean() for p, own in enumerate(exact)])
        errors.append(np.abs(found - wanted).max())

    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1)


# --- losses that are not finite ---------------------------------------------------------------------------------------


def scripted(*losses: float) -> Callable[[], float]:
    values = iter(losses)
    return lambda: next(values)


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_side_drops_its_probe_and_no_other(bad: float, side: int) -> None:
    losses = [1.0, bad, 2.0, 1.0] if side else [bad, 1.0, 2.0, 1.0]

    first, second = TwoPoint(eps=0.5).estimate(VectorSpace(np.zeros(4)), scripted(*losses), [1, 2])

    assert (first.g, first.dropped, math.isnan(first.loss)) == (0, True, True)
    assert (second.g, second.dropped, second.loss) == (1.0, False, 1.5)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("estimator", "center", "expected"),
    [
        (OneSided(eps=0.5, baseline=Baseline.center), [0.5], [1.0, 0.0, 5.0, 3.0]),
        (OneSided(eps=0.5, baseline=Baseline.mean), [], [-2.0, 0.0, 2.0, 0.0]),
        (OneSided(eps=0.5, baseline=Baseline.leave_one_out), [], [-3.0, 0.0, 3.0, 0.0]),
        (Fzoo(eps=0.5), [0.5], [0.5, 0.0, 2.5, 1.5]),
    ],
    ids=str,
)
def test_a_bad_loss_drops_its_probe_and_takes_no_part_in_the_baseline(
    bad: float, estimator: Estimator, center: list[float], expected: list[float]
) -> None:
    losses = scripted(*center, 1.0, bad, 3.0, 2.0)  # the finite ones: mean 2, deviation 1

    projections = estimator.estimate(VectorSpace(np.zeros(4)), losses, KEYS)

    assert gs(projections).tolist() == expected
    assert [projection.dropped for projection in projections] == [False, True, False, False]
    assert [projection.loss for projection in projections if not projection.dropped] == (center * 3 or [1.0, 3.0, 2.0])
    assert math.isnan(projections[1].loss)


@pytest.mark.parametrize(
    ("estimator", "losses"),
    [
        *((OneSided(eps=0.5, baseline=Baseline.center), [bad, 1.0, 2.0, 3.0]) for bad in BAD),
        *((Fzoo(eps=0.5), [bad, 1.0, 2.0, 3.0]) for bad in BAD),
        (Fzoo(eps=0.5), [0.5, 1.0, math.nan, math.inf]),  # one finite loss has no deviation
        (Fzoo(eps=0.5), [0.5, 1.0, 1.0, 1.0]),  # a deviation of 0
        (Fzoo(eps=0.5), [1.0, 1.0, 1.0, 1.0]),
        (Fzoo(eps=0.5), [0.0, 1e300, -1e300, 0.0]),  # its square overflows
        (OneSided(eps=0.5, baseline=Baseline.mean), [1.0, math.nan, math.inf]),
        (OneSided(eps=0.5, baseline=Baseline.leave_one_out), [math.nan, math.nan, 2.0]),
        (OneSided(eps=0.5, baseline=Baseline.leave_one_out), [math.nan] * 3),
        (TwoPoint(eps=1e-3), [1e300, 0.0] * 3),  # beyond float32
        (OneSided(eps=1e-3, baseline=Baseline.center), [0.0, 1e300, 1e39, -1e39]),
    ],
)
def test_where_nothing_can_be_compared_every_probe_is_dropped(estimator: Estimator, losses: list[float]) -> None:
    projections = estimator.estimate(VectorSpace(np.zeros(2)), scripted(*losses), [1, 2, 3])

    assert [(projection.g, projection.dropped) for projection in projections] == [(0, True)] * 3


# --- what every estimator must do -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", EVERY, ids=str)
@pytest.mark.parametrize("probes", [2, 5])
def test_the_loss_is_asked_for_as_often_as_is_said(estimator: Estimator, probes: int) -> None:
    calls: list[int] = []

    estimator.estimate(VectorSpace(np.zeros(4)), lambda: calls.append(1) or 0.5, range(probes))

    assert len(calls) == estimator.forwards_per_step(probes)


def test_the_numbers_of_forwards_are_those_of_the_formulas() -> None:
    assert [estimator.forwards_per_step(8) for estimator in EVERY] == [16, 9, 8, 8, 9]


@pytest.mark.parametrize("estimator", EVERY, ids=str)
def test_every_loss_is_of_theta_moved_along_one_direction_and_the_bits_come_back(estimator: Estimator) -> None:
    theta = np.array([1.0, -0.0, 1e-30, 3e7, -7.1], np.float32)
    space = VectorSpace(theta)
    seen: list[bytes] = []

    def loss() -> float:
        seen.append(space.theta.tobytes())
        return float(len(seen))

    estimator.estimate(space, loss, KEYS)

    allowed = {(theta + np.float32(scale) * direction(key, 5)).tobytes() for key in KEYS for scale in (0.25, -0.25)}
    assert set(seen) <= allowed | {theta.tobytes()}
    assert space.theta.tobytes() == theta.tobytes()


@pytest.mark.parametrize("config_class", [TwoPointConfig, OneSidedConfig, FzooConfig])
def test_every_config_builds_its_estimator_and_eps_must_be_positive(config_class: type) -> None:
    assert type(ESTIMATORS.build(config_class())) in {TwoPoint, OneSided, Fzoo}
    for eps in (0.0, -1.0, 1e-60, 1e300, math.nan):
        with pytest.raises(ConfigError, match=r"estimator\.eps must be > 0 and finite in float32, got"):
            ESTIMATORS.build(config_class(eps=eps))


def test_eps_is_rounded_to_float32_as_spaces_apply_it() -> None:
    assert two_point(TwoPointConfig(eps=1e-3)) == TwoPoint(eps=float(np.float32(1e-3)))
