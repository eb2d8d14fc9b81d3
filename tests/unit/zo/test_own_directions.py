"""An estimator that makes the directions of its keys for itself, by the size and the law of a space, as plugins may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from fedzo.testing import check_estimator
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.estimator import LossFn, Projection, TwoPoint, estimate_together, projections
from fedzo.zo.estimator.frozen_routing import Frozen
from fedzo.zo.spaces.base import Space

GRADIENT = np.array([0.5, -2.0, 4.0, 1.0, -0.25])


@dataclass(frozen=True)
class Decorrelated:
    """g that leads to the gradient's part in the span of a step's directions: P times pinv(Z Z') times the slopes."""

    eps: float

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        found = TwoPoint(self.eps).estimate(space, loss_fn, keys)
        kept = [p for p, each in enumerate(found) if not each.dropped]
        made = [direction(keys[p], space.size, distribution=space.distribution) for p in kept]
        z = np.array(made, np.float64).reshape(-1, space.size)
        g = np.full(len(keys), np.nan)
        g[kept] = len(keys) * np.linalg.pinv(z @ z.T, 1e-6) @ np.array([found[p].g for p in kept], np.float64)
        return projections(g, np.array([each.loss for each in found]))

    def forwards_per_step(self, num_probes: int) -> int:
        return 2 * num_probes


def linear(space: VectorSpace, slope: np.ndarray) -> Callable[[], float]:
    return lambda: float(space.theta.astype(np.float64) @ slope)


@pytest.mark.parametrize("law", list(Distribution))
def test_with_enough_directions_it_finds_the_whole_gradient(law: Distribution) -> None:
    space, keys = VectorSpace(np.zeros(5), distribution=law), range(12)

    answer = Decorrelated(eps=0.5).estimate(space, linear(space, GRADIENT), keys)

    z = np.array([direction(key, 5, distribution=law) for key in keys], np.float64)
    assert np.linalg.matrix_rank(z) == 5
    assert np.array([each.g for each in answer], np.float64) @ z / 12 == pytest.approx(GRADIENT, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("law", list(Distribution))
def test_what_stands_for_a_space_has_its_size_and_its_law(law: Distribution) -> None:
    """Where losses are evaluated together, and where routing is held still."""
    space, keys = VectorSpace(np.zeros(5), distribution=law), [3, 4, 5]
    losses = [linear(space, GRADIENT), linear(space, np.arange(5.0))]
    alone = [Decorrelated(eps=0.5).estimate(space, loss, keys) for loss in losses]

    for estimator in (Decorrelated(eps=0.5), Frozen(Decorrelated(eps=0.5))):
        together = estimate_together(
            estimator, space, lambda: np.array([loss() for loss in losses]), keys, count=len(losses)
        )
        assert together == alone

    assert Frozen(Decorrelated(eps=0.5)).forwards_per_step(100) == 201


def test_it_passes_the_check() -> None:
    check_estimator(Decorrelated, on_linear=None, share=None)


def test_the_twin_of_a_space_refuses_a_probe_within_a_probe() -> None:
    space = VectorSpace(np.zeros(3))

    with space.probe(0.5, 1):
        with pytest.raises(RuntimeError, match="a probe must be left before the next is entered"), space.probe(0.5, 2):
            raise AssertionError("it was entered")
        assert np.array_equal(space.theta, np.float32(0.5) * direction(1, 3))

    assert not space.theta.any()
    with space.probe(0.5, 2):
        assert space.theta.any()
