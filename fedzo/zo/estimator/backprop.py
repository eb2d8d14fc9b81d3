"""Local steps by backpropagation: the upper bound of what scalars can reach (FedAvg, arXiv 1602.05629).

A client computes the exact gradient of its loss in the space's coordinates, takes its local steps with an optimizer of
its own, and sends where they led as a vector of n float32 numbers. The memory is not that of inference: activations of
all layers are kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from fedzo.errors import Problem, not_negative, positive_float32, problem, share_below_1
from fedzo.zo.estimator.base import ESTIMATORS, EstimatorConfig
from fedzo.zo.spaces.base import DifferentiableSpace, GraphLossFn

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


class LocalOptimizer(StrEnum):
    """How a client moves along its gradients within a round."""

    sgd = "sgd"
    """``theta -= lr * gradient``."""
    adamw = "adamw"
    """AdamW (arXiv 1711.05101), as in torch with a decay of ``lr * weight_decay``. Its moments are zero at the start of
    each round."""


@dataclass(kw_only=True, slots=True)
class BackpropConfig(EstimatorConfig):
    """Exact gradients by backpropagation: an upper bound. A client sends n float32 numbers (FedAvg)."""

    local_optimizer: LocalOptimizer = LocalOptimizer.sgd
    beta1: float = 0.9
    """Share of the first moment that a local step keeps (adamw)."""
    beta2: float = 0.999
    """Share of the second moment that a local step keeps (adamw)."""
    eps: float = 1e-8
    """Added to the root of the second moment (adamw)."""
    weight_decay: float = 0.0
    """Decoupled: a local step multiplies the trained values by 1 - lr * weight_decay (adamw)."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from share_below_1("estimator.beta1", self.beta1, "0.9 is usual.")
        yield from share_below_1("estimator.beta2", self.beta2, "0.999 is usual.")
        yield from positive_float32("estimator.eps", self.eps, "1e-8 is usual.")
        yield from not_negative("estimator.weight_decay", self.weight_decay, "0 switches it off.")
        if self.local_optimizer is LocalOptimizer.adamw:  # torch makes float32 of its factor, too
            yield from run.server_optimizer.decay_problems("estimator.weight_decay", self.weight_decay, run)
        else:
            for each in fields(self):
                given = getattr(self, each.name)
                if each.name != "local_optimizer" and given != each.default:
                    rule = f"be {each.default} for estimator.local_optimizer=sgd, which does not use it"
                    yield problem(f"estimator.{each.name}", rule, given, "Write estimator.local_optimizer=adamw.")


@ESTIMATORS.register("backprop", BackpropConfig)
@dataclass(frozen=True, slots=True)
class Backprop:
    """torch's SGD or AdamW on theta in float32, whatever dtype the model computes in."""

    config: BackpropConfig

    def descend(self, space: DifferentiableSpace, losses: Iterable[GraphLossFn], *, lr: float) -> list[float]:
        theta = torch.nn.Parameter(torch.from_numpy(space.values()))
        optimizer, before = self._optimizer(theta, lr), []
        for loss_fn in losses:
            loss, gradient = space.gradient(loss_fn)
            if math.isfinite(loss) and bool(torch.isfinite(gradient).all()):
                theta.grad = gradient.to(theta.device)
                optimizer.step()
                space.load(theta.detach().numpy())
            else:
                loss = math.nan
            before.append(loss)
        return before

    def _optimizer(self, theta: torch.nn.Parameter, lr: float) -> torch.optim.Optimizer:
        config = self.config
        if config.local_optimizer is LocalOptimizer.sgd:
            return torch.optim.SGD([theta], lr=lr)
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW([theta], lr=lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
