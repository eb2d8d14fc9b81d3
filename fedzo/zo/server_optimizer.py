"""Server optimizers: how a round of the log moves the trained values, at the server and at clients that replay it.

Legend: theta float32 [n]; u = sum of c z over the round's (step, probe, owner), float32 [n]; lr of the record; lambda
the weight decay. Before the step of any rule, theta <- theta * float32(1 - lr lambda), once a round.

A rule is a pure function of (theta, state, record). Its arithmetic is the correctly rounded IEEE float32 sum, product,
quotient and square root, one operation after another in numpy on the CPU, whatever holds theta: the same bits on every
machine. Numbers that all coordinates share (1 - beta^t) are evaluated in float64 products and rounded to float32 once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fedzo.registry import Registry
from fedzo.zo.config import AdamConfig, FedDynConfig, MomentumConfig, ScaffoldConfig, ServerOptimizerConfig, SgdConfig
from fedzo.zo.control_variates import FedDyn, Scaffold
from fedzo.zo.directions import add_direction
from fedzo.zo.log import Drift, RoundRecord, apply_record, scalars_and_keys
from fedzo.zo.spaces.base import Space, Values


class ServerOptimizer(Protocol):
    """Moves a space along the log, one round a call."""

    def num_moments(self, num_clients: int) -> int:
        """Numbers that the rule remembers for each trained value, in a run of so many clients."""
        ...

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        """Move theta, and ``moments`` in place, by one round.

        Args:
            space: At the state before the round.
            moments: float32 [num_moments, n]; zero before the first round.
            record: The round.
            run_seed: Seed of the run's directions.
        """
        ...


@runtime_checkable
class ControlVariates(ServerOptimizer, Protocol):
    """Corrects each client's local steps by what it remembers; its records keep every client's own scalars."""

    def drift(self, start: Values, moments: Values, client: int) -> Drift:
        """The correction of a client's local steps in the coming round; ``start`` is theta now, float32 [n]."""
        ...


SERVER_OPTIMIZERS: Registry[ServerOptimizer] = Registry("server_optimizer", base=ServerOptimizerConfig)


def round_direction(space: Space, record: RoundRecord, *, run_seed: int) -> Values:
    """U of a round: float32 [n], one rounded product and one rounded sum for each scalar in the log's order."""
    u = torch.zeros(space.size)
    for c, key in scalars_and_keys(record, run_seed=run_seed):
        if c != 0:  # a dropped probe
            add_direction(u, key, scale=float(c), out=u, distribution=space.distribution)
    return u.numpy()


def step_along(space: Space, along: Values, record: RoundRecord) -> None:
    """theta <- theta - lr * along: one rounded product, one rounded difference."""
    space.load(space.values() - np.float32(record.lr) * along)


def decay(space: Space, record: RoundRecord, weight_decay: float) -> None:
    """theta <- theta * float32(1 - lr * weight_decay); a factor of 1 touches nothing."""
    factor = np.float32(1 - record.lr * weight_decay)
    if factor != 1:
        space.scale_by(float(factor))


@dataclass(frozen=True, slots=True)
class Sgd:
    """theta <- theta - (lr c) z for each scalar, one after another; nothing is remembered."""

    weight_decay: float = 0.0

    def num_moments(self, num_clients: int) -> int:
        return 0

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        decay(space, record, self.weight_decay)
        apply_record(space, record, run_seed=run_seed)


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

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        decay(space, record, self.weight_decay)
        u = round_direction(space, record, run_seed=run_seed)
        (m,) = moments
        mu = np.float32(self.momentum)
        with np.errstate(all="ignore"):
            m *= mu
            m += u
            step_along(space, u + mu * m if self.nesterov else m, record)


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam with bias correction (arXiv 1412.6980) and decoupled decay (AdamW, arXiv 1711.05101); t = round + 1.

    m <- beta1 m + (1 - beta1) u, v <- beta2 v + (1 - beta2) u u,
    theta <- theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float = 0.0

    def num_moments(self, num_clients: int) -> int:
        return 2

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        decay(space, record, self.weight_decay)
        u = round_direction(space, record, run_seed=run_seed)
        m, v = moments
        correct1, correct2 = (np.float32(1 - _power(beta, record.round + 1)) for beta in (self.beta1, self.beta2))
        with np.errstate(all="ignore"):
            m *= np.float32(self.beta1)
            m += np.float32(1 - self.beta1) * u
            v *= np.float32(self.beta2)
            v += np.float32(1 - self.beta2) * (u * u)
            step_along(space, (m / correct1) / (np.sqrt(v / correct2) + np.float32(self.eps)), record)


def _power(base: float, exponent: int) -> float:
    """base ** exponent by squaring: float64 products only, which unlike ``pow`` round alike everywhere."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@SERVER_OPTIMIZERS.register("sgd", SgdConfig)
def sgd(config: SgdConfig) -> ServerOptimizer:
    """Build plain SGD."""
    return Sgd(weight_decay=config.weight_decay)


@SERVER_OPTIMIZERS.register("momentum", MomentumConfig)
def momentum(config: MomentumConfig) -> ServerOptimizer:
    """Build the heavy ball."""
    return Momentum(momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay)


@SERVER_OPTIMIZERS.register("adam", AdamConfig)
def adam(config: AdamConfig) -> ServerOptimizer:
    """Build Adam."""
    return Adam(beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)


@SERVER_OPTIMIZERS.register("scaffold", ScaffoldConfig)
def scaffold(config: ScaffoldConfig) -> ServerOptimizer:
    """Build SCAFFOLD."""
    return Scaffold()


@SERVER_OPTIMIZERS.register("feddyn", FedDynConfig)
def feddyn(config: FedDynConfig) -> ServerOptimizer:
    """Build FedDyn."""
    return FedDyn(alpha=config.pull)
