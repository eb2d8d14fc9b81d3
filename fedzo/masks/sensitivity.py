"""Sensitivity of weights (arXiv 2506.03337, 2406.02913): the sum over calibration windows of the squared gradient.

``score = sum g**2``. Each window is a batch of its own, since ``(sum g)**2`` is something else. The signed sum is kept
beside it, for GradIP. Deviation: both accumulate in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fedzo.errors import NumericsError
from fedzo.system import OnProgress, no_progress

LossFn = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""``loss_fn(model, input_ids [1, num_tokens])``: a scalar."""


class GradientSums(NamedTuple):
    """Sums over windows, per parameter name, float32 [numel]; empty where they were not asked for.

    Attributes:
        squares: Of the squared gradients.
        signed: Of the gradients.
    """

    squares: dict[str, torch.Tensor]
    signed: dict[str, torch.Tensor]


@dataclass(slots=True)
class WindowGradients:
    """The gradients of a model on windows of text.

    A pass over the windows leaves the model as it was found: bits, ``requires_grad``, gradients, training mode. A
    gradient is added and freed as soon as it is there, so not all are held at once. On a CPU every pass has the same
    bits; on a GPU the backward pass of attention sums in no fixed order.

    Attributes:
        model: The model.
        windows: Token ids, int64 [num_tokens] each.
        loss_fn: The loss of a window.
        on_window: Called after each window with (windows done, windows in all), all passes counted.
        passes: How many passes there will be.
    """

    model: nn.Module
    windows: Sequence[torch.Tensor]
    loss_fn: LossFn
    on_window: OnProgress = no_progress
    passes: int = 1
    _done: Iterator[int] = field(default_factory=lambda: count(1), init=False)

    def sums(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        squares: bool = True,
        signed: bool = True,
        places: Mapping[str, torch.Tensor] | None = None,
    ) -> GradientSums:
        """Sums of the gradients with respect to ``parameters``, in one pass; what is left out takes no memory.

        Args:
            parameters: All that a gradient is taken of.
            squares: Whether the squared gradients are summed.
            signed: Whether the signed ones are.
            places: Flat indices (int64) of each parameter, where not all of its signed sums are wanted.

        Raises:
            NumericsError: A window's loss is not finite.
        """
        of_squares = _zeros(parameters) if squares else {}
        of_signed = _zeros(parameters if places is None else places) if signed else {}

        def add(name: str, gradient: torch.Tensor) -> None:
            if squares:
                of_squares[name].addcmul_(gradient, gradient)
            if signed:
                of_signed[name].add_(gradient if places is None else gradient[places[name]])

        self._differentiate(parameters, add)
        return GradientSums(of_squares, of_signed)

    def _differentiate(self, parameters: Mapping[str, nn.Parameter], add: Callable[[str, torch.Tensor], None]) -> None:
        """Hand over each window's gradients, float32 [numel]."""

        def collector(name: str) -> Callable[[torch.Tensor], None]:
            def collect(parameter: torch.Tensor) -> None:
                assert parameter.grad is not None
                gradient = parameter.grad.reshape(-1).float()
                parameter.grad = None
                add(name, gradient)

            return collect

        model, device = self.model, next(self.model.parameters()).device
        learning = _only_these_learn(model, parameters.values())
        with learning, torch.inference_mode(False), torch.enable_grad(), ExitStack() as hooks:
            for name, p in parameters.items():
                hooks.enter_context(p.register_post_accumulate_grad_hook(collector(name)))  # type: ignore[no-untyped-call]
            for number, window in enumerate(self.windows):
                loss = self.loss_fn(model, window.to(device).unsqueeze(0))
                if not bool(loss.isfinite()):
                    raise NumericsError(
                        f"calibration window {number}: its loss must be finite, got {loss.item()}. Load the model in "
                        "float32 or bfloat16."
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                self.on_window(next(self._done), self.passes * len(self.windows))


def _zeros(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 [numel] each."""
    with torch.inference_mode(False):  # tensors made under a caller's inference mode could not be added to
        return {name: torch.zeros(each.numel(), dtype=torch.float32, device=each.device) for name, each in like.items()}


@contextmanager
def _only_these_learn(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for ``parameters`` alone, dropout off; flags, gradients and modes come back exactly."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(parameter, parameter.grad) for parameter in parameters]
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
