"""Many tensors moved at once: on CUDA by one launch for each group of them, however many tensors that has.

A step moves all weights of a device and dtype as one group. A probe makes weights on their way into the forward, so
that few are there at a time: the small ones as one group, of the others as many neighbours as take 128 MiB, and alone
what is larger or of an embedding's shape. So its launches grow with the bytes of the large weights, and not with the
number of the small ones. Where there are no fused kernels the same is done tensor after tensor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import increment_version

from fedzo.system import consecutive
from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction, fused
from fedzo.zo.directions_cuda import CudaDirections, Pieces

_SMALL = 1 << 16  # values of a tensor that is not worth a launch of its own
_GROUP_BYTES = 128 << 20  # of weights that a probe makes in one launch


class TensorGroup:
    """Tensors of one device and dtype that one direction moves.

    Args:
        tensors: Contiguous; float32, bfloat16 or float16.
        starts: Coordinates of their first elements.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], starts: Sequence[int]) -> None:
        present = [(tensor, start) for tensor, start in zip(tensors, starts, strict=True) if tensor.numel()]
        self._tensors, self._starts = [tensor for tensor, _ in present], [start for _, start in present]
        self._pieces: dict[bool, tuple[list[int], Pieces]] = {}
        self._room: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def add(self, key: int, *, scale: float, distribution: Distribution, stochastic: bool = False) -> None:
        """Move all of them in place; ``stochastic`` says how 16-bit ones are rounded."""
        if (kernels := self._kernels()) is not None:
            pieces, scale32 = self._pieces_now(in_place=True), float(np.float32(scale))
            kernels.add_pieces(pieces, key, scale=scale32, distribution=distribution, stochastic=stochastic)
        else:
            for tensor, start in zip(self._tensors, self._starts, strict=True):
                add_direction(
                    tensor, key, scale=scale, start=start, out=tensor, distribution=distribution, stochastic=stochastic
                )
        increment_version(self._tensors)  # kernels write past torch, which counts its own writes alone

    def moved(
        self, key: int, *, scale: float, distribution: Distribution, in_place_of_last: bool = False
    ) -> dict[int, torch.Tensor]:
        """Moved copies, by the ``id`` of their tensors. Needs fused kernels.

        Args:
            key: Stream key.
            scale: Factor of the direction.
            distribution: Law of the direction.
            in_place_of_last: Write them where the last ones lie.
        """
        if (kernels := self._kernels()) is None:
            return {}
        pieces, like = self._pieces_now(in_place=False), self._tensors[0]
        room = self._room
        if room is None or not in_place_of_last:
            room = torch.empty(pieces.room, dtype=like.dtype, device=like.device)
        if in_place_of_last:
            self._room = room
        kernels.add_pieces(pieces, key, scale=float(np.float32(scale)), distribution=distribution, room=room)
        width = 16 // like.dtype.itemsize
        parts = torch.split(room, [-(-tensor.numel() // width) * width for tensor in self._tensors])
        return {
            id(tensor): part[: tensor.numel()].view(tensor.shape)
            for tensor, part in zip(self._tensors, parts, strict=True)
        }

    def _kernels(self) -> CudaDirections | None:
        return fused(self._tensors[0].device) if self._tensors else None

    def _pieces_now(self, *, in_place: bool) -> Pieces:
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        seen, pieces = self._pieces.get(in_place, ([], None))
        if pieces is None or seen != addresses:  # what is assigned to a parameter's data lies elsewhere
            pieces = Pieces.of(self._tensors, self._starts, in_place=in_place)
            self._pieces[in_place] = addresses, pieces
        return pieces


def all_together(tensors: Sequence[torch.Tensor], starts: Sequence[int]) -> list[TensorGroup]:
    """All tensors, for each device and dtype among them."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), []).append(i)
    return [_of(tensors, starts, group) for group in places.values()]


def embedding_shapes(model: nn.Module) -> set[torch.Size]:
    """Shapes of the weights of which a forward reads few rows."""
    return {module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)}


def reading_order(
    embeddings: Container[torch.Size], parameters: Sequence[nn.Parameter], starts: Sequence[int]
) -> tuple[list[TensorGroup], dict[int, TensorGroup]]:
    """What a probe makes in one launch: small weights, and larger ones with their neighbours, which are read soon.

    Not of it: weights that fill a group alone, and those of an embedding's shape, of which few rows are read.

    Args:
        embeddings: Shapes of the model's embeddings.
        parameters: The trained ones, contiguous, in the order of ``named_parameters``.
        starts: Coordinates of their first elements.

    Returns:
        The small ones, and for others, by their ``id``, whom they are made with. Nothing where there are no kernels.
    """
    there = [i for i, parameter in enumerate(parameters) if fused(parameter.device) is not None]
    small = [i for i in there if parameters[i].numel() <= _SMALL]
    large = [i for i in there if parameters[i].numel() > _SMALL and parameters[i].nbytes <= _GROUP_BYTES]
    large = [i for i in large if parameters[i].shape not in embeddings]
    groups: list[list[int]] = []
    for _, alike in groupby(large, key=lambda i: (parameters[i].device, parameters[i].dtype)):
        of_kind = list(alike)
        parts = consecutive([parameters[i].nbytes for i in of_kind], most=_GROUP_BYTES)
        groups += [[of_kind[j] for j in part] for part in parts]
    smalls = all_together([parameters[i] for i in small], [starts[i] for i in small])
    made = [_of(parameters, starts, group) for group in groups]
    return smalls, {id(parameters[i]): m for group, m in zip(groups, made, strict=True) for i in group}


def _of(tensors: Sequence[torch.Tensor], starts: Sequence[int], places: Iterable[int]) -> TensorGroup:
    places = list(places)
    return TensorGroup([tensors[i] for i in places], [starts[i] for i in places])
