"""Sensitivity of weights (arXiv 2506.03337, 2406.02913): the sum over calibration windows of the squared gradient.

``score = sum g**2``. Each window is a batch of its own, since ``(sum g)**2`` is something else. The signed sum is kept
beside it, for GradIP. Deviation: both accumulate in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fedzo.errors import NumericsError

LossFn = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""``loss_fn(model, input_ids [1, num_tokens])``: a scalar."""


class GradientSums(NamedTuple):
    """Sums over windows, per parameter name, float32 [numel].

    Attributes:
        squares: Of the squared gradients.
        signed: Of the gradients.
    """

    squares: dict[str, torch.Tensor]
    signed: dict[str, torch.Tensor]


def accumulate_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    windows: Sequence[torch.Tensor],
    loss_fn: LossFn,
    on_window: Callable[[int, int], None] | None,
) -> GradientSums:
    """Sums of the windows' squared and signed gradients with respect to ``parameters``.

    The model is left as it was found: bits, ``requires_grad``, gradients, training mode. A gradient is added and freed
    as soon as it is there, so not all are held at once.

    Raises:
        NumericsError: A window's loss is not finite.
    """
    squares: dict[str, torch.Tensor] = {}
    signed: dict[str, torch.Tensor] = {}

    def collector(name: str) -> Callable[[torch.Tensor], None]:
        def collect(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.reshape(-1).float()
            parameter.grad = None
            squares[name].addcmul_(gradient, gradient)
            signed[name].add_(gradient)

        return collect

    device = next(model.parameters()).device
    with _only_these_learn(model, parameters), torch.inference_mode(False), torch.enable_grad():
        # in here, since tensors made under a caller's inference mode could not be added to
        for name, parameter in parameters.items():
            squares[name] = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            signed[name] = torch.zeros_like(squares[name])
        handles = [
            p.register_post_accumulate_grad_hook(collector(name))  # type: ignore[no-untyped-call]
            for name, p in parameters.items()
        ]
        try:
            for number, window in enumerate(windows):
                loss = loss_fn(model, window.to(device).unsqueeze(0))
                if not bool(loss.isfinite()):
                    raise NumericsError(
                        f"trainer.calibration: the loss of calibration window {number} must be finite, got "
                        f"{loss.item()}. Load the model in float32 or bfloat16."
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                if on_window is not None:
                    on_window(number + 1, len(windows))
        finally:
            for handle in handles:
                handle.remove()
    return GradientSums(squares, signed)


@contextmanager
def _only_these_learn(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for ``parameters`` alone, dropout off; flags, gradients and modes come back exactly."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(parameter, parameter.grad) for parameter in parameters.values()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter, _ in gradients:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def next_token_loss(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of tokens 1.. given those before, in float32; ``input_ids`` is [1, num_tokens]."""
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:].to(logits.device))
