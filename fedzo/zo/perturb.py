"""Computing with perturbed weights without writing to them.

During a probe the trained parameters are of a class whose ``__torch_function__`` sees every torch function and tensor
method that gets one of them: it gets ``theta + scale * z`` in another tensor instead. So tied weights, Conv1D layers,
fused expert tensors and code that reads ``lm_head.weight`` without calling ``lm_head`` are all perturbed alike, and
what the function computes is exactly what it would compute on a perturbed copy of the model. (A torch function mode
would see the same and everything else: some 10 us for each of a model's 40 calls a layer.)

Not seen is what passes by torch functions. ``FullSpace`` refuses modules of TorchScript and ``torch.compile``, and a
probe the address of a weight. Nobody refuses ``torch.func.vmap`` over a weight, extensions in C++, or a loss that calls
a compiled copy of the model.

Functions that read only some rows of a weight (embedding look-ups, ``weight[rows]``, ``weight[expert]``) are handed
only those rows: a direction's coordinates can be made one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._C import DisableTorchFunctionSubclass

from fedzo.errors import ConfigError
from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction, add_direction_rows, fused
from fedzo.zo.tensor_group import TensorGroup

Function = Callable[..., Any]

GROUPS_KEPT = 2
"""Of weights that are made together, how many groups are there at a time."""
_ADDRESS = (
    "FullSpace must see every use of a weight, but a kernel of this model takes a trained weight by its address, where "
    "the unperturbed one lies. Uninstall the package of that kernel (such as mamba_ssm), so that transformers runs its "
    "own code, or train a mask or an adapter (MaskedSpace, DenseSpace)."
)
_VIEWS = {"T", "mT", "H", "mH", "data", "real"}  # properties whose value carries the weight's numbers
_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.stride,
    torch.Tensor.storage_offset,
    torch.Tensor.element_size,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.get_device,
    torch.Tensor.__len__,
    torch.Tensor.__hash__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


class PerturbedWeights:
    """Within ``active()``, parameters read as theta + scale * z, for every thread.

    Attributes:
        groups: What is made together; of all probes of a space the same object.
        kernels: The fused kernels that make the perturbed values, where there are any.

    Args:
        weights: The trained parameters.
        starts: Coordinates of their first elements.
        scale: Factor of the direction, float32.
        key: Stream key of the direction.
        distribution: Law of the direction.
        groups: Parameters that are made together when the first of them is read, by ``id(parameter)``.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        starts: Sequence[int],
        *,
        scale: float,
        key: int,
        distribution: Distribution,
        groups: Mapping[int, TensorGroup],
    ) -> None:
        self._weights = weights
        self._starts = {id(weight): start for weight, start in zip(weights, starts, strict=True)}
        self._scale = scale
        self._key = key
        self._distribution = distribution
        self.groups = groups
        self.kernels = fused(weights[0].device)
        self._spent: set[TensorGroup] = set()
        self._made: dict[int, torch.Tensor] = {}
        self._made_first: Sequence[TensorGroup] = ()
        self._recent: deque[dict[int, torch.Tensor]] = deque()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def make(self, tensors: Sequence[TensorGroup]) -> None:
        """Make perturbed values now and keep them, all probes of a space in the same place."""
        self._made_first = tensors
        with DisableTorchFunctionSubclass():
            for together in tensors:
                self._made |= together.moved(
                    self._key, scale=self._scale, distribution=self._distribution, in_place_of_last=True
                )

    @contextmanager
    def afresh(self, scale: float | None = None) -> Iterator[None]:
        """Within the context nothing is made yet but what ``make`` made; at another scale, if one is given."""
        kept = self._scale, self._spent, self._recent
        self._scale, self._spent, self._recent, self._last = scale or self._scale, set(), deque(), None
        try:
            if scale:
                self.make(self._made_first)
            yield
        finally:
            (self._scale, self._spent, self._recent), self._last = kept, None
            if scale:
                self.make(self._made_first)

    def write_draw(self) -> None:
        """Let kernels that read their draw later (``CudaDirections.reading_later``) make this probe's values."""
        if self.kernels is not None:
            self.kernels.write_draw(self._key, float(np.float32(self._scale)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the parameters read so within a block of code."""

        def see(cls: type, func: Function, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
            with DisableTorchFunctionSubclass():
                return self._call(func, args, kwargs or {})

        kinds = [type(weight) for weight in self._weights]
        seen = {"__torch_function__": classmethod(see), "probe": self}
        perturbed = {kind: type("Perturbed", (kind,), seen) for kind in set(kinds)}
        try:
            for weight, kind in zip(self._weights, kinds, strict=True):
                weight.__class__ = perturbed[kind]
            yield
        finally:
            for weight, kind in zip(self._weights, kinds, strict=True):
                weight.__class__ = kind
            # a class is in a reference cycle, and this probe with it: it lives until Python looks for cycles
            self._made, self._last = {}, None
            self._recent.clear()

    def _call(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with trained parameters replaced by their perturbed values."""
        if reads_metadata_only(func):
            return func(*args, **kwargs)
        if func is torch.Tensor.data_ptr:
            raise ConfigError(_ADDRESS)
        if func is F.embedding and self._is_trained(weight := _argument(args, kwargs, 1, "weight")):
            return self._embedding(weight, args, kwargs)
        if func is torch.Tensor.__getitem__ and self._is_trained(args[0]) and _selects_rows(args[1]):
            return self._rows(args[0], args[1])
        return func(
            *(self._perturbed(arg) for arg in args), **{name: self._perturbed(arg) for name, arg in kwargs.items()}
        )

    def _is_trained(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self._starts

    def _perturbed(self, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
            return type(value)(self._perturbed(item) for item in value)
        if not self._is_trained(value):
            return value
        if (made := self._among_made(value)) is not None:
            return made
        return self._made_alone(value)

    def _among_made(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Its perturbed value, if that is there or is made with its neighbours' now: once, and two groups are kept.

        Who reads in another order than that of the parameters gets single weights the second time.
        """
        for made in (self._made, *self._recent):
            if id(weight) in made:
                return made[id(weight)]
        group = self.groups.get(id(weight))
        if group is None or group in self._spent:
            return None
        self._spent.add(group)
        if len(self._recent) == GROUPS_KEPT:
            self._recent.popleft()
        self._recent.append(group.moved(self._key, scale=self._scale, distribution=self._distribution))
        return self._recent[-1][id(weight)]

    def _made_alone(self, weight: torch.Tensor) -> torch.Tensor:
        """Its perturbed value, kept until another weight is read: a head is read once for each part of the logits."""
        last = self._last
        if last is None or last[0] is not weight:
            self._last = last = None  # before the next is made, so that there is one at a time
            start = self._starts[id(weight)]
            moved = add_direction(
                weight.detach(), self._key, scale=self._scale, start=start, distribution=self._distribution
            )
            self._last = last = weight, moved
        return last[1]

    def _rows(self, weight: torch.Tensor, index: int | torch.Tensor) -> torch.Tensor:
        """``weight[index]`` of the perturbed weight, making only the rows that ``index`` selects."""
        if isinstance(index, int):
            part = weight.detach()[index]
            start = self._starts[id(weight)] + index % len(weight) * part.numel()
            return add_direction(part, self._key, scale=self._scale, start=start, distribution=self._distribution)
        rows = index.to(weight.device).reshape(-1).remainder(weight.shape[0])
        picked = weight.detach()[rows].reshape(rows.numel(), -1)
        starts = self._starts[id(weight)] + rows * picked.shape[1]
        moved = add_direction_rows(picked, self._key, scale=self._scale, starts=starts, distribution=self._distribution)
        return moved.view(*index.shape, *weight.shape[1:])

    def _embedding(self, weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if _argument(args, kwargs, 3, "max_norm") is not None:
            raise NotImplementedError("embedding with max_norm writes to its weight and cannot be perturbed on the fly")
        ids = _argument(args, kwargs, 0, "input")
        if fused(ids.device):  # to wait for the number of different rows is dearer than to make some of them twice
            return self._rows(weight, ids)
        unique, inverse = torch.unique(ids, return_inverse=True)
        return self._rows(weight, unique)[inverse]


def probe_of(tensors: Iterable[torch.Tensor]) -> PerturbedWeights | None:
    """The probe that is active on some of these tensors, if one is."""
    return next((probe for tensor in tensors if (probe := getattr(type(tensor), "probe", None)) is not None), None)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _selects_rows(index: Any) -> bool:
    if isinstance(index, torch.Tensor):
        return index.dtype == torch.int64
    return isinstance(index, int) and not isinstance(index, bool)


def reads_metadata_only(func: Function) -> bool:
    """Whether a torch function tells nothing of a tensor's numbers."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VIEWS
    return func in _METADATA
