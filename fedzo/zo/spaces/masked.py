"""A masked space: single weights of a model, named by a static mask (Meerkat)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import increment_version

from fedzo.errors import ConfigError
from fedzo.zo.config import Distribution
from fedzo.zo.directions import fused
from fedzo.zo.directions_cuda import DTYPES
from fedzo.zo.spaces.base import GraphLossFn, MasterSpace, RowWeights, differentiate
from fedzo.zo.spaces.own_weights import OwnWeights


class MaskedSpace(MasterSpace):
    """A fixed set of single weights with a float32 master (Meerkat, arXiv 2506.03337; SensZOQ, arXiv 2406.02913).

    The model's own weights hold ``cast(master)`` between probes and ``cast(master + scale * z)`` during one, so probing
    cannot drift and small updates do not vanish in a 16-bit model.

    Attributes:
        places: Each masked parameter with the flat indices of its trained values, in wire order.

    Args:
        model: The model whose weights are set in place.
        indices: Per parameter name the flat row-major indices (``check_indices``), names in wire order.
        distribution: Law of the directions.

    Raises:
        ConfigError: The model has no such parameter, ``check_indices`` refuses those of one, one is not float32,
            bfloat16 or float16, or there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        indices: Mapping[str, torch.Tensor],
        *,
        distribution: Distribution = Distribution.gaussian,
    ) -> None:
        parameters = dict(model.named_parameters())
        self.places: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name, flat in indices.items():
            if name not in parameters:
                raise ConfigError(f"mask: the model has no parameter {name!r}. Make the mask for this model.")
            check_indices(name, flat, parameters[name].numel())
            if flat.numel() and parameters[name].dtype not in DTYPES:
                raise ConfigError(
                    f"mask: {name!r} must be float32, bfloat16 or float16, got {parameters[name].dtype}. Call "
                    "model.float(), or leave it out of the mask."
                )
            self.places.append((parameters[name], flat.to(parameters[name].device)))
        self._sizes = [flat.numel() for _, flat in self.places]
        if sum(self._sizes) == 0:
            raise ConfigError("mask: it must hold at least one weight, got none. Take one that has.")
        super().__init__(
            torch.cat([_take(weight.detach(), flat).float() for weight, flat in self.places]), distribution
        )
        self._addresses = torch.empty(0, dtype=torch.int64)
        self._seen: list[int] = []

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return [weight for weight, flat in self.places if flat.numel()]

    def gradient(self, loss_fn: GraphLossFn) -> tuple[float, torch.Tensor]:
        """The gradients of whole weights are made, and only the trained values' kept."""
        loss, gradients = differentiate(loss_fn, [weight for weight, _ in self.places])
        picked = [_take(each, flat).float() for each, (_, flat) in zip(gradients, self.places, strict=True)]
        return loss, torch.cat(picked)

    def _move(self, s: float, key: int) -> bool:
        return self._launch(self._master, key, -s, update=True) or super()._move(s, key)

    def _write_moved(self, scale: float, key: int) -> None:
        if not self._launch(self._master, key, scale):
            super()._write_moved(scale, key)

    def write(self, values: torch.Tensor) -> None:
        if self._launch(values):
            return
        with torch.no_grad():
            for (weight, flat), part in zip(self.places, torch.split(values, self._sizes), strict=True):
                _put(weight.detach(), flat, part.to(weight.dtype))

    def row_weights(self, model: nn.Module) -> RowWeights | None:
        return OwnWeights(self.places) if OwnWeights.supports(self.places, model) else None

    def _launch(
        self, values: torch.Tensor, key: int | None = None, scale: float = 0.0, *, update: bool = False
    ) -> bool:
        """Write all weights in one launch, where there are fused kernels and the weights are of one dtype."""
        dtype = self.places[0][0].dtype
        if (kernels := fused(values.device)) is None or any(weight.dtype != dtype for weight, _ in self.places):
            return False
        seen = [weight.data_ptr() for weight, _ in self.places]
        if seen != self._seen:  # what is assigned to a parameter's data lies elsewhere
            parts = [weight.data_ptr() + dtype.itemsize * _offsets(weight, flat) for weight, flat in self.places]
            self._addresses, self._seen = torch.cat(parts), seen
        scale32 = float(np.float32(scale))
        kernels.scatter(
            values, self._addresses, dtype, key, scale=scale32, distribution=self.distribution, update=update
        )
        increment_version([weight for weight, _ in self.places])  # the kernel writes past torch
        return True


def check_indices(name: str, flat: torch.Tensor, numel: int) -> None:
    """Check indices of single values in a parameter of ``numel``: int64 [k], ascending.

    Raises:
        ConfigError: They are of another form, unsorted, repeated or out of range.
    """
    where = f"mask: the indices of {name!r}"
    if flat.dtype != torch.int64 or flat.ndim != 1:
        raise ConfigError(
            f"{where} must be an int64 vector, got {flat.dtype} of shape {tuple(flat.shape)}. "
            "choice.flatten().nonzero().flatten() makes them of a boolean tensor."
        )
    if not bool((flat[1:] > flat[:-1]).all()):
        raise ConfigError(
            f"{where} must ascend without repeats, they are unsorted or repeated. Call indices.unique(), or make the "
            "mask file again."
        )
    low, high = (int(flat[0]), int(flat[-1])) if flat.numel() else (0, -1)
    if low < 0 or high >= numel:
        raise ConfigError(f"{where} must lie in 0..{numel - 1}, got {low}..{high}: out of range. Make the mask again.")


def _offsets(weight: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Where values lie, counted in elements from the first."""
    if weight.is_contiguous():
        return flat
    index = torch.unravel_index(flat, weight.shape)
    return sum((i * stride for i, stride in zip(index, weight.stride(), strict=True)), torch.zeros_like(flat))


def _take(weight: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    return weight.view(-1)[flat] if weight.is_contiguous() else weight[torch.unravel_index(flat, weight.shape)]


def _put(weight: torch.Tensor, flat: torch.Tensor, part: torch.Tensor) -> None:
    if weight.is_contiguous():
        weight.view(-1).index_copy_(0, flat, part)
    else:
        weight[torch.unravel_index(flat, weight.shape)] = part
