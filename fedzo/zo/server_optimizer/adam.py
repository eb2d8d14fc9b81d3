"""Adam over rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedzo.errors import Problem, positive_float32, share_below_1
from fedzo.zo.log import ScalarRecord
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

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class AdamConfig(ServerOptimizerConfig):
    """Adam over rounds (arXiv 1412.6980), with decoupled decay as in torch's AdamW.

    Whatever the size of the gradient, a round moves a value by about ``lr``, or less where rounds disagree. The
    trainer's rate does not suit. Clients take their local steps at the same rate.
    """

    beta1: float = 0.9
    """Share of the first moment that a round keeps."""
    beta2: float = 0.999
    """Share of the second moment that a round keeps."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from share_below_1("server_optimizer.beta1", self.beta1, "0.9 is usual.")
        yield from share_below_1("server_optimizer.beta2", self.beta2, "0.999 is usual.")
        yield from positive_float32("server_optimizer.eps", self.eps, "1e-8 is usual.")


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam with bias correction (arXiv 1412.6980) and decoupled decay as in torch's AdamW; t = round + 1.

    m <- beta1 m + (1 - beta1) u, v <- beta2 v + (1 - beta2) u u,
    theta <- theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).

    Deviations from FedAdam (arXiv 2003.00295): one rate for clients and server; bias correction; moments of u, the
    mean displacement of the clients over lr, so that eps is its tau over lr.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float = 0.0

    def num_moments(self, num_clients: int) -> int:
        return 2

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
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


@SERVER_OPTIMIZERS.register("adam", AdamConfig)
def adam(config: AdamConfig, *, local_steps: int) -> ServerOptimizer:
    """Build Adam."""
    return Adam(beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
