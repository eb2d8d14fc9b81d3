"""Forwards whose rows each have weights of their own, which differ from the model's at the masked places alone.

After a round's first step every client is somewhere else; with a mask, in a thousandth of the weights:

    y[i] = x[i] W_k^T = x[i] W^T + x[i] (W_k - W)^T

So rows of many clients share the large product, and each adds the few products of its client's offsets. A torch
function mode does that wherever the model multiplies with a masked matrix, as in ``fedzo.zo.perturb``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fedzo.zo.perturb import reads_metadata_only
from fedzo.zo.spaces.base import Values

Integers = npt.NDArray[np.intp]
Places = Sequence[tuple[nn.Parameter, torch.Tensor]]
"""Each masked parameter with the flat indices (int64) of its trained values, in wire order."""


class OwnWeights(TorchFunctionMode):
    """Within the mode each row of a forward has weights of its own, which ``follow`` tells before it.

    Args:
        places: Such that ``supports`` accepts them.

    Raises:
        NotImplementedError: A masked matrix is used for anything but the product of all rows, batch first.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = {}
        start = 0
        for weight, flat in places:
            rows, columns = np.divmod(flat.numpy().astype(np.uint32), np.uint32(weight.shape[1]))
            self._places[id(weight)] = rows, columns, start
            start += len(rows)
        self._size = start
        self._offsets, self._index = np.empty((0, 0), np.float32), np.empty(0, np.intp)

    @staticmethod
    def supports(places: Places, model: nn.Module) -> bool:
        """Whether all trained values lie in float32 weights of linear layers on a CPU.

        Elsewhere than on a CPU the few products would be added in an order that changes from time to time.
        """
        linear = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
        return all(
            id(weight) in linear and weight.dtype == torch.float32 and weight.device.type == "cpu"
            for weight, _ in places
        )

    def follow(self, offsets: Iterable[Values], index: Integers) -> None:
        """Row i of the forwards from now on has the weights theta + ``offsets[index[i]]``.

        Args:
            offsets: float32 [n] each; those of the rows before are let go first.
            index: Integers [B].
        """
        self._index = index
        num_offsets = int(index.max()) + 1
        if len(self._offsets) < num_offsets:
            self._offsets = np.empty((0, 0), np.float32)
            self._offsets = np.empty((num_offsets, self._size), np.float32)
        for place, offset in zip(self._offsets, offsets, strict=False):
            place[:] = offset

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``; the product of a masked matrix gets what the rows' offsets add to it."""
        kwargs = kwargs or {}
        masked = [arg for arg in (*args, *kwargs.values()) if id(arg) in self._places]
        if not masked or reads_metadata_only(func):
            return func(*args, **kwargs)
        if func is not F.linear or len(args) < 2 or args[1] is not masked[0]:
            raise NotImplementedError(f"{func} of a masked matrix is not known for rows with weights of their own")
        rows, columns, start = self._places[id(args[1])]
        x, y = args[0], func(*args, **kwargs)
        tokens, uneven = divmod(x[..., 0].numel(), max(1, len(self._index)))
        if uneven or (x.dim() > 2 and x.shape[0] != len(self._index)):
            raise NotImplementedError(f"an input of shape {tuple(x.shape)} does not hold {len(self._index)} rows")
        moved = y.contiguous()
        _add_products(
            x.reshape(-1, x.shape[-1]).contiguous().numpy(),
            moved.view(-1, y.shape[-1]).numpy(),
            rows,
            columns,
            self._offsets,
            self._index,
            start,
            tokens,
        )
        return moved


@nb.njit(parallel=True, cache=True)
def _add_products(x: Any, y: Any, rows: Any, columns: Any, offsets: Any, index: Any, start: Any, tokens: Any) -> None:
    """y[i, rows[j]] += offsets[index[i // tokens], start + j] * x[i, columns[j]], in the order of j."""
    for i in nb.prange(x.shape[0]):
        own = offsets[index[i // tokens], start : start + rows.size]
        for j in range(rows.size):
            y[i, rows[j]] += own[j] * x[i, columns[j]]
