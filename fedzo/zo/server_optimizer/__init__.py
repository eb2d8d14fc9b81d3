"""Server optimizers: how a round of the log moves the trained values, at the server and at clients that replay it."""

from fedzo.zo.server_optimizer.adam import Adam, AdamConfig
from fedzo.zo.server_optimizer.base import (
    SERVER_OPTIMIZERS,
    ControlVariates,
    Schedule,
    ServerOptimizer,
    ServerOptimizerConfig,
    ServerOptimizerTraits,
    VectorOptimizer,
    build_server_optimizer,
    decay,
    learning_rate,
    norm,
    round_direction,
    step_along,
)
from fedzo.zo.server_optimizer.control_variates import FedDyn, FedDynConfig, Scaffold, ScaffoldConfig, end_models
from fedzo.zo.server_optimizer.sgd import Momentum, MomentumConfig, Sgd, SgdConfig

__all__ = [
    "Adam",
    "AdamConfig",
    "SERVER_OPTIMIZERS",
    "ControlVariates",
    "Schedule",
    "ServerOptimizer",
    "ServerOptimizerConfig",
    "ServerOptimizerTraits",
    "VectorOptimizer",
    "build_server_optimizer",
    "decay",
    "learning_rate",
    "norm",
    "round_direction",
    "step_along",
    "FedDyn",
    "FedDynConfig",
    "Scaffold",
    "ScaffoldConfig",
    "end_models",
    "Momentum",
    "MomentumConfig",
    "Sgd",
    "SgdConfig",
]
