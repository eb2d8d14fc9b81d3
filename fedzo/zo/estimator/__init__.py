"""Estimators: what a client's local step goes by, scalars along directions or the gradient itself."""

from fedzo.zo.estimator.backprop import Backprop as Backprop
from fedzo.zo.estimator.backprop import BackpropConfig as BackpropConfig
from fedzo.zo.estimator.backprop import LocalOptimizer as LocalOptimizer
from fedzo.zo.estimator.base import ESTIMATORS as ESTIMATORS
from fedzo.zo.estimator.base import Estimator as Estimator
from fedzo.zo.estimator.base import EstimatorConfig as EstimatorConfig
from fedzo.zo.estimator.base import EstimatorTraits as EstimatorTraits
from fedzo.zo.estimator.base import GradientEstimator as GradientEstimator
from fedzo.zo.estimator.base import Losses as Losses
from fedzo.zo.estimator.base import LossFn as LossFn
from fedzo.zo.estimator.base import Projection as Projection
from fedzo.zo.estimator.base import Still as Still
from fedzo.zo.estimator.base import ZerothOrderConfig as ZerothOrderConfig
from fedzo.zo.estimator.base import build_gradient_estimator as build_gradient_estimator
from fedzo.zo.estimator.base import estimate_together as estimate_together
from fedzo.zo.estimator.base import projections as projections
from fedzo.zo.estimator.differences import Baseline as Baseline
from fedzo.zo.estimator.differences import Fzoo as Fzoo
from fedzo.zo.estimator.differences import FzooConfig as FzooConfig
from fedzo.zo.estimator.differences import OneSided as OneSided
from fedzo.zo.estimator.differences import OneSidedConfig as OneSidedConfig
from fedzo.zo.estimator.differences import TwoPoint as TwoPoint
from fedzo.zo.estimator.differences import TwoPointConfig as TwoPointConfig
from fedzo.zo.estimator.frozen_routing import build_estimator as build_estimator
