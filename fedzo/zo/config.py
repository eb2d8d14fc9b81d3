"""What a user can say about estimators and update rules."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Distribution(StrEnum):
    """Law of a direction's coordinates (``specs/directions``)."""

    gaussian = "gaussian"
    rademacher = "rademacher"


@dataclass(kw_only=True, slots=True)
class EstimatorConfig:
    """How a loss is turned into projected gradients."""


@dataclass(kw_only=True, slots=True)
class TwoPointConfig(EstimatorConfig):
    """Central difference along ``num_probes`` random directions a step (SPSA; MeZO, arXiv 2305.17333)."""

    eps: float = 1e-3
    """Half distance between the two evaluations."""
    num_probes: int = 1
    """Directions a step; the step is their mean."""
    distribution: Distribution = Distribution.gaussian


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """How aggregated projected gradients move the weights."""


@dataclass(kw_only=True, slots=True)
class SgdConfig(OptimizerConfig):
    """Plain SGD: theta -= lr * c * z."""

    lr: float = 1e-4
