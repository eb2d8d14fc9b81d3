"""Whole steps that fedzo's is timed beside: MeZO's walk over the weights, and plain SGD by backpropagation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fedzo.models.head import hidden_at, project


def mezo_walk_step(model: nn.Module, loss_fn: Callable[[], float], *, eps: float, lr: float, seed: int) -> None:
    """MeZO's step as published (arXiv 2305.17333, algorithm 1): the weights walk +eps, -2 eps, +eps, then step.

    Four passes of ``torch.normal`` over all weights, added in place; rounding leaves the weights a little off.

    Args:
        model: All of its weights are trained.
        loss_fn: The loss at the present weights.
        eps: How far the weights walk to either side.
        lr: Learning rate.
        seed: Of the direction, which is drawn four times.
    """

    def walk(scale: float) -> None:
        generator.manual_seed(seed)
        for parameter in parameters:
            z = torch.normal(
                0.0, 1.0, size=parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype
            )
            parameter.add_(z, alpha=scale)

    parameters = [parameter.detach() for parameter in model.parameters()]
    generator = torch.Generator(parameters[0].device)
    walk(eps)
    plus = loss_fn()
    walk(-2 * eps)
    minus = loss_fn()
    walk(eps)
    walk(-lr * (plus - minus) / (2 * eps))


def first_order_step(model: nn.Module, ids: torch.Tensor, choices: torch.Tensor, *, lr: float) -> None:
    """One step of SGD by backpropagation on the same loss: cross-entropy of candidate 0 at the last position.

    Args:
        model: A causal language model.
        ids: int64 [B, T].
        choices: Token ids of the candidates, int64 [C].
        lr: Learning rate.
    """
    rows = torch.arange(len(ids), device=ids.device)
    last = torch.full_like(rows, ids.shape[1] - 1)
    model.requires_grad_(True)
    try:
        logits = project(model, hidden_at(model, ids, rows, last), vocabulary=choices)
        torch.autograd.backward(F.cross_entropy(logits, torch.zeros_like(rows)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=lr)
                    parameter.grad = None
    finally:
        model.requires_grad_(False)
