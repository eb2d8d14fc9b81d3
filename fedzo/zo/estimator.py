"""Estimators turn losses into projected gradients: scalars g such that g * z estimates the gradient along z."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedzo.errors import ConfigError
from fedzo.registry import Registry
from fedzo.zo.config import EstimatorConfig, TwoPointConfig
from fedzo.zo.space import Space

LossFn = Callable[[], float]
"""The mean loss of one batch at the model's present weights."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One probe: the gradient seen along one direction."""

    g: np.float32
    """(loss+ - loss-) / (2 eps), rounded to float32 once; 0 if dropped."""
    loss: float
    """Mean of the two losses, nan if dropped."""
    dropped: bool
    """A loss was not finite: the probe counts as g = 0 and is reported."""


class Estimator(Protocol):
    """Estimates projected gradients; leaves the model's bits as they were."""

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        """One projection for each stream key, all at the same theta and on the same batch."""
        ...


ESTIMATORS: Registry[Estimator] = Registry("estimator", base=EstimatorConfig)


@dataclass(frozen=True, slots=True)
class TwoPoint:
    """Central difference g = (l(theta + eps z) - l(theta - eps z)) / 2 eps (SPSA; MeZO, arXiv 2305.17333).

    Deviation from MeZO's code: both sides start from theta itself; nothing is walked back.
    """

    eps: float

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        """One projection for each key; two forwards each."""
        return [self._project(space, loss_fn, key) for key in keys]

    def _project(self, space: Space, loss_fn: LossFn, key: int) -> Projection:
        with space.probe(self.eps, key):
            plus = loss_fn()
        with space.probe(-self.eps, key):
            minus = loss_fn()
        with np.errstate(over="ignore"):
            g = np.float32((plus - minus) / (2 * self.eps))
        if not (math.isfinite(plus) and math.isfinite(minus) and np.isfinite(g)):
            return Projection(g=np.float32(0), loss=math.nan, dropped=True)
        return Projection(g=g, loss=(plus + minus) / 2, dropped=False)


@ESTIMATORS.register("two_point", TwoPointConfig)
def two_point(config: TwoPointConfig) -> Estimator:
    """Build the two-point estimator; eps is rounded to float32, the precision in which it travels."""
    if not config.eps > 0:
        raise ConfigError(f"estimator.eps must be > 0, got {config.eps}. 1e-3 suits most language models.")
    return TwoPoint(eps=float(np.float32(config.eps)))
