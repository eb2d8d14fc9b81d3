"""The local optimizers on a quadratic, against their formulas written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.estimator import BackpropConfig, LocalOptimizer, build_gradient_estimator

START = np.array([1.0, -2.0, 0.5], np.float32)
CURVES = np.array([0.5, 1.0, 4.0])


class Bowl(VectorSpace):
    """theta with the loss sum(curves theta^2) / 2 times a factor that the batch gives."""

    def gradient(self, loss_fn: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        factor = float(loss_fn())
        theta = self.theta.astype(np.float64)
        return factor * float(CURVES @ theta**2) / 2, torch.tensor(factor * CURVES * theta, dtype=torch.float32)


def descend(config: BackpropConfig, factors: list[float], *, lr: float) -> tuple[list[float], np.ndarray]:
    space = Bowl(START)
    losses = ((lambda factor=factor: torch.tensor(factor)) for factor in factors)
    return build_gradient_estimator(config).descend(space, losses, lr=lr), space.theta  # type: ignore[arg-type]


def by_hand(config: BackpropConfig, factors: list[float], *, lr: float) -> np.ndarray:
    theta, m, v, t = START.astype(np.float64), np.zeros(3), np.zeros(3), 0
    for factor in factors:
        if not np.isfinite(factor):
            continue
        g = factor * CURVES * theta
        if config.local_optimizer is LocalOptimizer.sgd:
            theta = theta - lr * g
            continue
        t += 1
        theta = theta * (1 - lr * config.weight_decay)
        m, v = config.beta1 * m + (1 - config.beta1) * g, config.beta2 * v + (1 - config.beta2) * g * g
        theta -= lr * (m / (1 - config.beta1**t)) / (np.sqrt(v / (1 - config.beta2**t)) + config.eps)
    return theta


CONFIGS = [
    BackpropConfig(),
    BackpropConfig(local_optimizer=LocalOptimizer.adamw),
    BackpropConfig(local_optimizer=LocalOptimizer.adamw, beta1=0.5, beta2=0.75, eps=0.1, weight_decay=0.3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("factors", [[1.0], [1.0, 0.5, 2.0], [1.0, float("nan"), 2.0], [float("inf"), 1.0]], ids=str)
def test_steps_are_those_of_the_formulas_and_what_is_not_finite_is_left_out(
    config: BackpropConfig, factors: list[float]
) -> None:
    losses, theta = descend(config, factors, lr=0.1)

    assert theta == pytest.approx(by_hand(config, factors, lr=0.1), rel=1e-5)
    assert np.isfinite(losses).tolist() == np.isfinite(factors).tolist()
    if np.isfinite(factors[0]):
        assert losses[0] == pytest.approx(0.5 * (0.5 * 1 + 1.0 * 4 + 4.0 * 0.25))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nothing_is_remembered_between_two_rounds(config: BackpropConfig) -> None:
    estimator = build_gradient_estimator(config)
    ends = []
    for _ in range(2):
        space = Bowl(START)
        estimator.descend(space, [lambda: torch.tensor(1.0)] * 3, lr=0.1)  # type: ignore[arg-type]
        ends.append(space.theta.tobytes())

    assert ends[0] == ends[1]


def test_a_learning_rate_of_0_moves_nothing() -> None:
    _, theta = descend(CONFIGS[2], [1.0, 2.0], lr=0.0)

    assert theta.tobytes() == START.tobytes()
