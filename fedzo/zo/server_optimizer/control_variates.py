"""Server optimizers that correct what pulls a client's local steps towards its own optimum, in a restricted space.

A correction is a function of the log, so no vector travels: a record of these optimizers keeps every client's own
scalars (along shared directions), and every peer walks again the local steps of those that answered: S T P directions
a round, where others have T P. The collapse of all clients' steps into one mean scalar a direction does not
hold here, since a correction is not along a direction. A step without any scalar measured nothing and is not taken at
all: the correction alone would lead uphill.

Legend: theta float32 [n] the round's start; y_k client k's end; K clients of the run, S those that answered; T local
steps; ghat the estimate of a local step. ``moments`` [K + 1, n]: row 1 + k remembers client k, row 0 the mean of these.

Arithmetic: every elementwise operation is one rounded float32 operation in numpy; means are float64 sums in the order
of client index, divided, and rounded to float32 once. A round with lr = 0 changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedzo.errors import Problem, problem
from fedzo.zo.log import ScalarRecord
from fedzo.zo.server_optimizer.base import (
    SERVER_OPTIMIZERS,
    ControlVariates,
    ServerOptimizer,
    ServerOptimizerConfig,
    ServerOptimizerTraits,
)
from fedzo.zo.spaces.base import MasterSpace, Space, Values
from fedzo.zo.steps import Drift, local_step

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


def end_models(
    optimizer: ControlVariates, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int
) -> Iterator[tuple[int, Values]]:
    """Each client of a record with its model after its local steps, float32 [n]; the space is left as it is.

    The bits are those that the client itself had: it takes its steps by the same ``local_step``, in float32.
    """
    start, device = space.values(), next((weight.device for weight in space.parameters), torch.device("cpu"))
    path = MasterSpace(torch.from_numpy(start.copy()).to(device), space.distribution)
    for column, client in enumerate(record.owners):
        path.load(start)
        drift = optimizer.drift(start, moments, client, lr=record.lr)
        for t in range(len(record.coefficients)):
            keys = record.keys_of(run_seed, step=t, column=column)
            local_step(path, lr=record.lr, c=record.coefficients[t, :, column], keys=keys, drift=drift)
        yield client, path.values()


@dataclass(kw_only=True, slots=True)
class ScaffoldConfig(ServerOptimizerConfig):
    """SCAFFOLD: control variates take each client's drift out of its local steps (arXiv 1910.06378)."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True, walks_clients=True)


@dataclass(frozen=True, slots=True)
class Scaffold:
    """SCAFFOLD (arXiv 1910.06378): local steps y <- y - lr (ghat - c_k + c), c_k the client's mean gradient, c theirs.

    theta <- mean over S of y_k; c_k <- c_k - c + (theta - y_k) / (T lr) for k in S (the paper's option II), c <- the
    mean of c_k over all K. Deviations: the server's step size is 1; c is averaged anew, which equals the paper's
    increments since all begin at 0; T counts the steps that were taken.
    """

    def num_moments(self, num_clients: int) -> int:
        return num_clients + 1

    def drift(self, start: Values, moments: Values, client: int, *, lr: float) -> Drift:
        return Drift(moments[0] - moments[1 + client])

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        if record.lr == 0:
            return
        start, total = space.values(), np.zeros(space.size, np.float64)
        measured = np.any(record.coefficients, axis=1).sum(axis=0)  # steps of each client that were taken
        with np.errstate(all="ignore"):
            ends = end_models(self, space, moments, record, run_seed=run_seed)
            for (client, end), taken in zip(ends, measured.tolist(), strict=True):
                if taken:
                    moments[1 + client] += (start - end) / np.float32(record.lr * taken) - moments[0]
                total += end
            moments[0] = _mean_row(moments[1:])
            space.load((total / len(record.owners)).astype(np.float32))


@SERVER_OPTIMIZERS.register("scaffold", ScaffoldConfig)
def scaffold(config: ScaffoldConfig, *, local_steps: int) -> ServerOptimizer:
    """Build SCAFFOLD."""
    return Scaffold()


@dataclass(kw_only=True, slots=True)
class FedDynConfig(ServerOptimizerConfig):
    """FedDyn: a dynamic regulariser lets local optima agree with the global one (arXiv 2111.04263)."""

    alpha: float = 0.0
    """Weight of the proximal term in local steps. 0 = 0.5 / (lr T), with the lr of the round. A gradient that all
    clients share moves theta by gradient / alpha a round, with ``sgd`` by gradient times lr T. A smaller alpha makes
    longer steps. A schedule shortens them only where alpha is 0."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True, walks_clients=True)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        lr = self.lr_in(run)
        pull = FedDyn(self.alpha, run.fl.local_steps).pull(lr)
        if not (pull >= 2.0**-126 and lr * pull < 1):
            rule = "be >= 0 and make server_optimizer.lr * alpha less than 1, or a step overshoots the round's start"
            remedy = "Write 0, which chooses 0.5 / (lr * local steps)."
            yield problem("server_optimizer.alpha", rule, self.alpha, remedy)


@dataclass(frozen=True, slots=True)
class FedDyn:
    """FedDyn (arXiv 2111.04263): local steps y <- y - lr (ghat - h_k + alpha (y - theta)), h_k the client's gradient.

    h_k <- h_k - alpha (y_k - theta) for k in S, h <- the mean of h_k over all K; theta <- mean over S of y_k, minus
    h / alpha. Deviations: the local problem is not solved but followed for T steps, as the paper's experiments do; h is
    averaged anew, which equals the paper's increments since all begin at 0; an alpha of 0 goes by the lr of the round,
    and h_k, a gradient, is the same whatever alpha was when it was measured.
    """

    alpha: float
    local_steps: int

    def pull(self, lr: float) -> float:
        """``alpha``, or what 0 stands for: a step is then twice as long as that of ``sgd``, in every round."""
        reach = lr * self.local_steps
        return self.alpha or (0.5 / reach if reach > 0 else 1.0)

    def num_moments(self, num_clients: int) -> int:
        return num_clients + 1

    def drift(self, start: Values, moments: Values, client: int, *, lr: float) -> Drift:
        return Drift(-moments[1 + client], start=start, pull=self.pull(lr))

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        if record.lr == 0:
            return
        start, total, alpha = space.values(), np.zeros(space.size, np.float64), np.float32(self.pull(record.lr))
        with np.errstate(all="ignore"):
            for client, end in end_models(self, space, moments, record, run_seed=run_seed):
                moments[1 + client] -= alpha * (end - start)
                total += end
            moments[0] = _mean_row(moments[1:])
            space.load((total / len(record.owners)).astype(np.float32) - moments[0] / alpha)


@SERVER_OPTIMIZERS.register("feddyn", FedDynConfig)
def feddyn(config: FedDynConfig, *, local_steps: int) -> ServerOptimizer:
    """Build FedDyn."""
    return FedDyn(config.alpha, local_steps)


def _mean_row(rows: Values) -> Values:
    total = np.zeros(rows.shape[1], np.float64)
    for row in rows:  # one after another: the order of numpy's own sums is not promised
        total += row
    mean: Values = (total / len(rows)).astype(np.float32)
    return mean
