"""Forwards whose rows each have weights of their own, which differ from the model's at the masked places alone.

After a round's first step every client is somewhere else; with a mask, in a thousandth of the weights:

    y[i] = x[i] W_k^T = x[i] W^T + x[i] (W_k - W)^T

So rows of many clients share the large product, and each adds the few products of its client's offsets. A torch
function mode does that wherever the model multiplies with a masked matrix, as in ``fedzo.zo.perturb``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numba as nb
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fedzo.system import on_device
from fedzo.zo.directions_cuda import DTYPES
from fedzo.zo.perturb import reads_metadata_only

Integers = npt.NDArray[np.intp]
Places = Sequence[tuple[nn.Parameter, torch.Tensor]]
"""Each masked parameter with the flat indices (int64, increasing) of its trained values, in wire order."""


class OwnWeights(TorchFunctionMode):
    """Within the mode each row of a forward has weights of its own, which ``follow`` tells before it.

    Args:
        places: Such that ``supports`` accepts them.

    Raises:
        NotImplementedError: A masked matrix is used for anything but the product of all rows, batch first.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()
        on_host = all(weight.device.type == "cpu" for weight, _ in places)
        self._products: _Products = (_HostProducts if on_host else _DeviceProducts)(places)
        self._masked = {id(weight): place for place, (weight, _) in enumerate(places)}
        self._num_rows = 0

    @staticmethod
    def supports(places: Places, model: nn.Module) -> bool:
        """Whether all trained values lie in weights of linear layers: on a CPU in float32, or on one CUDA device."""
        linear = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
        devices = {weight.device for weight, _ in places}
        known = {"cpu": (torch.float32,), "cuda": tuple(DTYPES)}.get(places[0][0].device.type, ())
        return len(devices) == 1 and all(id(weight) in linear and weight.dtype in known for weight, _ in places)

    def follow(self, offsets: Iterable[torch.Tensor], index: Integers) -> None:
        """Row i of the forwards from now on has the weights theta + ``offsets[index[i]]``.

        Args:
            offsets: float32 [n] each, on the weights' device; those of the rows before are let go first.
            index: Integers [B].
        """
        self._num_rows = len(index)
        self._products.follow(offsets, index)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``; the product of a masked matrix gets what the rows' offsets add to it."""
        kwargs = kwargs or {}
        masked = [arg for arg in (*args, *kwargs.values()) if id(arg) in self._masked]
        if not masked or reads_metadata_only(func):
            return func(*args, **kwargs)
        if func is not F.linear or len(args) < 2 or args[1] is not masked[0]:
            raise NotImplementedError(f"{func} of a masked matrix is not known for rows with weights of their own")
        x, y = args[0], func(*args, **kwargs)
        tokens, uneven = divmod(x[..., 0].numel(), max(1, self._num_rows))
        if uneven or (x.dim() > 2 and x.shape[0] != self._num_rows):
            raise NotImplementedError(f"an input of shape {tuple(x.shape)} does not hold {self._num_rows} rows")
        moved = y.contiguous()
        flat = x.reshape(-1, x.shape[-1]).contiguous(), moved.view(-1, y.shape[-1])
        self._products.add(self._masked[id(args[1])], *flat, tokens)
        return moved


class _Products(Protocol):
    def follow(self, offsets: Iterable[torch.Tensor], index: Integers) -> None:
        """As ``OwnWeights.follow``."""
        ...

    def add(self, place: int, x: torch.Tensor, y: torch.Tensor, tokens: int) -> None:
        """Add to y [B * tokens, outputs] what the offsets of one matrix make of x [B * tokens, inputs], in place."""
        ...


class _HostProducts:
    """On a CPU: compiled loops over rows."""

    def __init__(self, places: Places) -> None:
        self._places = []
        start = 0
        for weight, flat in places:
            rows, columns = np.divmod(flat.numpy().astype(np.uint32), np.uint32(weight.shape[1]))
            self._places.append((rows, columns, start))
            start += len(rows)
        self._size = start
        self._offsets, self._index = np.empty((0, 0), np.float32), np.empty(0, np.intp)

    def follow(self, offsets: Iterable[torch.Tensor], index: Integers) -> None:
        self._index = index
        num_offsets = int(index.max()) + 1
        if len(self._offsets) < num_offsets:
            self._offsets = np.empty((0, 0), np.float32)
            self._offsets = np.empty((num_offsets, self._size), np.float32)
        for room, offset in zip(self._offsets, offsets, strict=False):
            room[:] = offset.numpy()

    def add(self, place: int, x: torch.Tensor, y: torch.Tensor, tokens: int) -> None:
        rows, columns, start = self._places[place]
        _add_products(x.numpy(), y.numpy(), rows, columns, self._offsets, self._index, start, tokens)


class _Segments(NamedTuple):
    """The trained values of one matrix, those of an output after one another.

    Attributes:
        outputs: Those that have any, increasing.
        lengths: How many each of them has.
        columns: The input of each value.
        start: Coordinate of the first.
    """

    outputs: torch.Tensor
    lengths: torch.Tensor
    columns: torch.Tensor
    start: int


_PRODUCTS = 1 << 26
"""Numbers that ``_DeviceProducts`` multiplies at once: 256 MiB, and as much again in another order."""


class _DeviceProducts:
    """On a GPU: products of all values, and their sum for each output, which one thread adds in the places' order.

    So a sum has the same bits whatever else the GPU does; atomic additions would come in an order of their own. Of
    16-bit numbers, too, products and sums are float32, and what they are added to is rounded once more.
    """

    def __init__(self, places: Places) -> None:
        self._places = []
        start = 0
        for weight, flat in places:
            outputs, lengths = torch.unique_consecutive(flat // weight.shape[1], return_counts=True)
            self._places.append(_Segments(outputs, lengths, flat % weight.shape[1], start))
            start += flat.numel()
        self._size = start
        self._device = places[0][0].device
        self._offsets = torch.empty(0, 0)
        self._index = torch.empty(0, dtype=torch.int64)

    def follow(self, offsets: Iterable[torch.Tensor], index: Integers) -> None:
        self._offsets = torch.empty(0, 0)
        self._offsets = torch.empty(int(index.max()) + 1, self._size, dtype=torch.float32, device=self._device)
        for room, offset in zip(self._offsets, offsets, strict=True):
            room.copy_(offset)
        self._index = on_device(index.astype(np.int64), self._device)

    def add(self, place: int, x: torch.Tensor, y: torch.Tensor, tokens: int) -> None:
        outputs, lengths, columns, start = self._places[place]
        if not columns.numel():
            return
        at_once = max(1, _PRODUCTS // columns.numel())
        own, whose = self._offsets[:, start : start + columns.numel()], self._index.repeat_interleave(tokens)
        for x_part, y_part, of in zip(*(torch.split(each, at_once) for each in (x, y, whose)), strict=True):
            products = x_part.index_select(1, columns).float()
            products *= own.index_select(0, of)
            flat = products.T.contiguous()  # [k, tokens]
            sums = torch.segment_reduce(flat, "sum", lengths=lengths, axis=0, unsafe=True)  # unsafe: no look at lengths
            y_part[:, outputs] += sums.T


@nb.njit(parallel=True, cache=True)
def _add_products(x: Any, y: Any, rows: Any, columns: Any, offsets: Any, index: Any, start: Any, tokens: Any) -> None:
    """y[i, rows[j]] += offsets[index[i // tokens], start + j] * x[i, columns[j]], in the order of j."""
    for i in nb.prange(x.shape[0]):
        own = offsets[index[i // tokens], start : start + rows.size]
        for j in range(rows.size):
            y[i, rows[j]] += own[j] * x[i, columns[j]]
