"""Plain SGD and the heavy ball over rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedzo.errors import Problem, share_below_1
from fedzo.zo.log import ScalarRecord, VectorRecord
from fedzo.zo.server_optimizer.base import (
    SERVER_OPTIMIZERS,
    ServerOptimizer,
    ServerOptimizerConfig,
    ServerOptimizerTraits,
    decay,
    round_direction,
    step_along,
)
from fedzo.zo.spaces.base import Space, Values
from fedzo.zo.steps import apply_record

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class SgdConfig(ServerOptimizerConfig):
    """Plain SGD: ``theta -= lr * c * z``."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(takes_vectors=True)


@dataclass(frozen=True, slots=True)
class Sgd:
    """theta <- theta - (lr c) z for each scalar, one after another; nothing is remembered."""

    weight_decay: float = 0.0

    def num_moments(self, num_clients: int) -> int:
        return 0

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        decay(space, record, self.weight_decay)
        apply_record(space, record, run_seed=run_seed)

    def displace(self, space: Space, moments: Values, record: VectorRecord) -> None:
        """The mean of the clients' ends (FedAvg), as their mean displacement from the round's start."""
        decay(space, record, self.weight_decay)
        space.load(space.values() - record.read())


@SERVER_OPTIMIZERS.register("sgd", SgdConfig)
def sgd(config: SgdConfig, *, local_steps: int) -> ServerOptimizer:
    """Build plain SGD."""
    return Sgd(weight_decay=config.weight_decay)


@dataclass(kw_only=True, slots=True)
class MomentumConfig(ServerOptimizerConfig):
    """Heavy ball over rounds: ``m = momentum * m + u``, ``theta -= lr * m``. u is the sum of c z.

    Along a gradient that stays the same, steps grow to 1 / (1 - momentum) times those of ``sgd``, by default ten times.
    The trainer's rate does not suit.
    """

    momentum: float = 0.9
    """Share of m that a round keeps."""
    nesterov: bool = False
    """Step along u + momentum * m instead of m."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from share_below_1("server_optimizer.momentum", self.momentum, "0.9 is usual.")


@dataclass(frozen=True, slots=True)
class Momentum:
    """Heavy ball: m <- mu m + u, theta <- theta - lr m; with Nesterov theta <- theta - lr (u + mu m).

    As torch.optim.SGD with dampening 0 and u for the gradient, but for the decay, which is decoupled.
    """

    momentum: float
    nesterov: bool
    weight_decay: float = 0.0

    def num_moments(self, num_clients: int) -> int:
        return 1

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        decay(space, record, self.weight_decay)
        u = round_direction(space, record, run_seed=run_seed)
        (m,) = moments
        mu = np.float32(self.momentum)
        with np.errstate(all="ignore"):
            m *= mu
            m += u
            step_along(space, u + mu * m if self.nesterov else m, record)


@SERVER_OPTIMIZERS.register("momentum", MomentumConfig)
def momentum(config: MomentumConfig, *, local_steps: int) -> ServerOptimizer:
    """Build the heavy ball."""
    return Momentum(momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay)
