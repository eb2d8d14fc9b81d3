"""Estimators against pencil and closed forms; ``tests/unit/testing`` holds them to their contract."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.estimator import (
    ESTIMATORS,
    BackpropConfig,
    Baseline,
    Estimator,
    EstimatorConfig,
    EstimatorTraits,
    Fzoo,
    FzooConfig,
    OneSided,
    OneSidedConfig,
    Projection,
    TwoPoint,
    TwoPointConfig,
    ZerothOrderConfig,
)
from fedzo.zo.estimator.differences import two_point
from fedzo.zo.spaces.base import Values

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


def test_a_linear_loss_without_an_offset_gives_the_inner_product_exactly() -> None:
    space = VectorSpace(np.zeros(5))

    (projection,) = TwoPoint(eps=0.25).estimate(space, lambda: float(space.theta.astype(float) @ GRADIENT), [7])

    assert projection.g == np.float32(slopes([7])[0])


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_fzoo_divides_by_the_deviation_so_neither_eps_nor_the_loss_s_scale_matters(eps: float, scale: float) -> None:
    space = VectorSpace(np.zeros(5))
    loss = linear(space)

    projections = Fzoo(eps=eps).estimate(space, lambda: scale * loss(), KEYS)

    assert gs(projections) == pytest.approx(slopes(KEYS) / np.std(slopes(KEYS), ddof=1), rel=2e-5)


def test_fzoo_steps_as_its_authors_code_does_but_for_the_denominator_of_the_deviation() -> None:
    """There a step along z_p is (l_p - l0) / (P std), and std has P in its denominator (github.com/DKmiyan/FZOO)."""
    space = VectorSpace(np.zeros(5))
    losses = 3.0 + 0.25 * torch.from_numpy(slopes(KEYS))

    projections = Fzoo(eps=0.25).estimate(space, linear(space), KEYS)

    theirs = (losses - 3.0) / (4 * torch.std(losses, unbiased=False))
    assert gs(projections) / 4 == pytest.approx(theirs.numpy() * math.sqrt(3 / 4), rel=2e-5)


# --- in expectation ---------------------------------------------------------------------------------------------------


class Signs(VectorSpace):
    """Keys 0 to 7 stand for the eight directions of three signs."""

    def _direction(self, key: int) -> Values:
        return np.array([1 - 2 * (key >> i & 1) for i in range(3)], np.float32)


@pytest.mark.parametrize(
    ("estimator", "share"),
    [
        (TwoPoint(eps=0.5), 1.0),
        (OneSided(eps=0.5, baseline=Baseline.center), 1.0),
        (OneSided(eps=0.5, baseline=Baseline.mean), 0.5),
        (OneSided(eps=0.5, baseline=Baseline.leave_one_out), 1.0),
    ],
    ids=str,
)
def test_the_mean_of_one_sided_estimates_is_exactly_that_of_the_central_difference(
    estimator: Estimator, share: float
) -> None:
    """Over all pairs of directions of a step of two probes: curvature cancels, the cubic term a t^3 adds eps^2 a."""
    start, slope, cubic = np.array([0.25, -0.5, 1.0]), np.array([0.5, -2.0, 4.0]), np.array([1.0, -0.5, 2.0])
    hessian = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, -1.0], [0.5, -1.0, 1.0]])
    space, total = Signs(start), np.zeros(3)

    def loss() -> float:
        t = space.theta.astype(float)
        return float(slope @ t + t @ hessian @ t / 2 + cubic @ t**3)

    for pair in itertools.product(range(8), repeat=2):
        for key, p in zip(pair, estimator.estimate(space, loss, pair), strict=True):
            total += float(p.g) * space._direction(key) / 2

    gradient = slope + hessian @ start + 3 * cubic * start**2
    assert total / 64 == pytest.approx(share * (gradient + 0.5**2 * cubic), rel=1e-6)


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


def test_the_numbers_of_forwards_are_those_of_the_formulas() -> None:
    assert [estimator.forwards_per_step(8) for estimator in EVERY] == [16, 9, 8, 8, 9]


@pytest.mark.parametrize("config_class", [TwoPointConfig, OneSidedConfig, FzooConfig])
def test_every_config_builds_its_estimator_and_eps_must_be_positive(config_class: type) -> None:
    assert type(ESTIMATORS.build(config_class(eps=1e-3))) in {TwoPoint, OneSided, Fzoo}
    for eps in (None, 0.0, -1.0, 1e-60, 1e300, math.nan):
        with pytest.raises(ConfigError, match=r"estimator\.eps must be > 0 and finite in float32, got"):
            ESTIMATORS.build(config_class(eps=eps))


def test_eps_is_rounded_to_float32_as_spaces_apply_it() -> None:
    assert two_point(TwoPointConfig(eps=1e-3)) == TwoPoint(eps=float(np.float32(1e-3)))


@dataclass(kw_only=True, slots=True)
class OwnTraitsConfig(ZerothOrderConfig):
    """As a plugin writes it, which states its own traits and nothing else."""

    @property
    def traits(self) -> EstimatorTraits:
        return EstimatorTraits(incomparable_g="its author says so")


@pytest.mark.parametrize(
    ("config", "sends_vectors", "probes", "freezes"),
    [
        (TwoPointConfig(), False, 1, False),
        (FzooConfig(freeze_routing=True), False, 8, True),
        (OwnTraitsConfig(num_probes=3, freeze_routing=True), False, 3, True),
        (BackpropConfig(), True, 0, False),
        (EstimatorConfig(), True, 0, False),
    ],
)
def test_a_config_tells_what_its_clients_send_whatever_traits_it_states(
    config: EstimatorConfig, sends_vectors: bool, probes: int, freezes: bool
) -> None:
    assert (config.sends_vectors, config.probes_per_step, config.freezes_routing) == (sends_vectors, probes, freezes)
