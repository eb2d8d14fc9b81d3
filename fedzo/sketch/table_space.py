"""The tables of a sketch as a space, whose rows may have tables of their own.

The tables are ordinary float32 parameters, so this is the space of adapters. It can do one thing more: rows of many
owners (clients of a round, users of one server) share a forward, and each layer decodes once for each owner and
multiplies that owner's rows. Codes, embeddings and norms are everybody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedzo.sketch.linear import SketchLinear, sketched_linear
from fedzo.system import on_device
from fedzo.zo.config import Distribution
from fedzo.zo.spaces.base import RowWeights
from fedzo.zo.spaces.dense import DenseSpace


class TableSpace(DenseSpace):
    """The tables of sketched layers (SpaLLM, arXiv 2410.06364).

    Args:
        layers: In wire order.
        distribution: Law of the directions.
    """

    def __init__(self, layers: Sequence[SketchLinear], *, distribution: Distribution = Distribution.gaussian) -> None:
        self._layers = layers
        super().__init__([layer.tables for layer in layers], distribution=distribution)

    def row_weights(self, model: nn.Module) -> RowWeights | None:
        return OwnTables(self._layers)


class OwnTables:
    """Within the context each row of a forward has tables of its own, which ``follow`` tells before it.

    Args:
        layers: The sketched layers, in the order of the offsets.
    """

    def __init__(self, layers: Sequence[SketchLinear]) -> None:
        self._layers = layers
        ends = np.cumsum([layer.tables.numel() for layer in layers]).tolist()
        self._places = list(zip([0, *ends[:-1]], ends, strict=True))
        self._offsets: list[torch.Tensor] = []
        self._rows: Sequence[torch.Tensor] = ()
        self._num_rows = 0

    def __enter__(self) -> OwnTables:
        for layer, (start, end) in zip(self._layers, self._places, strict=True):
            layer.by_row = lambda x, layer=layer, start=start, end=end: self._product(layer, x, start, end)
        return self

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            layer.by_row = None
        self._offsets = []

    def follow(self, offsets: Iterable[torch.Tensor], index: npt.NDArray[np.intp]) -> None:
        """Row i of the forwards from now on has the tables theta + ``offsets[index[i]]``.

        Args:
            offsets: float32 [n] each, on the tables' device; those of the rows before are let go first.
            index: Integers [B].
        """
        self._offsets = []
        self._offsets.extend(offsets)
        by_owner = on_device(np.argsort(index, kind="stable"), self._layers[0].tables.device)
        self._rows = torch.split(by_owner, np.bincount(index, minlength=len(self._offsets)).tolist())
        self._num_rows = len(index)

    def _product(self, layer: SketchLinear, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        tokens, uneven = divmod(x[..., 0].numel(), max(1, self._num_rows))
        if uneven or (x.dim() > 2 and x.shape[0] != self._num_rows):
            raise NotImplementedError(f"an input of shape {tuple(x.shape)} does not hold {self._num_rows} rows")
        by_row = x.reshape(self._num_rows, tokens, x.shape[-1])
        y = x.new_empty(self._num_rows, tokens, layer.out_features)
        for offset, rows in zip(self._offsets, self._rows, strict=True):
            tables = layer.tables.detach() + offset[start:end].view(layer.tables.shape)
            y[rows] = sketched_linear(by_row[rows], tables, layer.codes, layer.bias)
        return y.view(*x.shape[:-1], layer.out_features)
