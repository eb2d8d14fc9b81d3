"""Estimators: what a client's local step goes by, scalars along directions or the gradient itself."""

from fedzo.zo.estimator.backprop import Backprop, BackpropConfig, LocalOptimizer
from fedzo.zo.estimator.base import (
    ESTIMATORS,
    Estimator,
    EstimatorConfig,
    EstimatorTraits,
    GradientEstimator,
    Losses,
    LossFn,
    Projection,
    Still,
    ZerothOrderConfig,
    build_gradient_estimator,
    estimate_together,
    projections,
)
from fedzo.zo.estimator.differences import (
    Baseline,
    Fzoo,
    FzooConfig,
    OneSided,
    OneSidedConfig,
    TwoPoint,
    TwoPointConfig,
)
from fedzo.zo.estimator.frozen_routing import build_estimator

__all__ = [
    "Backprop",
    "BackpropConfig",
    "LocalOptimizer",
    "ESTIMATORS",
    "Estimator",
    "EstimatorConfig",
    "EstimatorTraits",
    "GradientEstimator",
    "Losses",
    "LossFn",
    "Projection",
    "Still",
    "ZerothOrderConfig",
    "build_gradient_estimator",
    "estimate_together",
    "projections",
    "Baseline",
    "Fzoo",
    "FzooConfig",
    "OneSided",
    "OneSidedConfig",
    "TwoPoint",
    "TwoPointConfig",
    "build_estimator",
]
