"""A dense space: every value of some float32 parameters, all of which live in one buffer (adapters)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.autograd.graph import increment_version

from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction
from fedzo.zo.spaces.base import GraphLossFn, MasterSpace, differentiate


class DenseSpace(MasterSpace):
    """All values of float32 parameters that are few beside the frozen model (LoRA-MeZO, arXiv 2305.17333).

    The parameters become views into one flat buffer. A probe writes ``master + scale * z`` into it in one pass and
    copies the master back afterwards, so nothing drifts. Memory: buffer and master, 8 bytes a value; ``mark`` 4 more.

    Args:
        parameters: float32, on one device, in wire order; from here on none may be moved or cast.
        distribution: Law of the directions.

    Raises:
        ValueError: There is none, one is not float32, or one is there twice.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, distribution: Distribution = Distribution.gaussian
    ) -> None:
        parameters = [*parameters]
        if not parameters or any(parameter.dtype != torch.float32 for parameter in parameters):
            dtypes = sorted({str(parameter.dtype) for parameter in parameters})
            raise ValueError(f"a dense space needs float32 parameters, got {dtypes or 'none'}")
        if (twice := len(parameters) - len({id(parameter) for parameter in parameters})) > 0:
            raise ValueError(
                f"a dense space needs each parameter once, got {twice} of {len(parameters)} again. Take those of "
                "model.parameters(), which names tied weights once."
            )
        self._buffer = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self._parameters = parameters
        parts = torch.split(self._buffer, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)
        super().__init__(self._buffer.clone(), distribution)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return self._parameters

    def gradient(self, loss_fn: GraphLossFn) -> tuple[float, torch.Tensor]:
        loss, gradients = differentiate(loss_fn, self._parameters)
        return loss, torch.cat([each.reshape(-1) for each in gradients])

    def _write_moved(self, scale: float, key: int) -> None:
        add_direction(self._master, key, scale=scale, out=self._buffer, distribution=self.distribution)

    def write(self, values: torch.Tensor) -> None:
        self._buffer.copy_(values)
        increment_version(self._parameters)  # they share the memory of the buffer, but not torch's count of its writes
