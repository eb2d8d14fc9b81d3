"""The full space: all weights of a model, or of its upper blocks (MeZO)."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedzo.errors import ConfigError
from fedzo.system import consecutive
from fedzo.zo.config import Distribution, Rounding
from fedzo.zo.directions_cuda import DTYPES
from fedzo.zo.perturb import GROUPS_KEPT, PerturbedWeights
from fedzo.zo.spaces.base import GraphLossFn, RowWeights, Values, as_values, differentiate
from fedzo.zo.tensor_group import all_together, embedding_shapes, reading_order

_CHUNK = 1 << 20  # values that are widened to float32 at a time
_READ_BYTES = 64 << 20  # that are read from the device at a time


class FullSpace:
    """All weights of a model (MeZO, arXiv 2305.17333), each counted once.

    A probe does not touch the weights: torch functions that read a weight are handed ``theta + scale * z`` instead
    (``fedzo.zo.perturb``), made when needed and dropped for the next. Deviation from MeZO's code: no +eps, -2 eps, +eps
    walk, which does not come back to the same bits.

    Memory: one perturbed weight at a time (on CUDA two groups of up to 128 MiB, and what is small, to save launches);
    ``mark`` keeps a copy of all weights, since subtracting steps is not exact.

    Args:
        model: The model whose parameters are trained, in the order of ``named_parameters``.
        parameters: Those of them that are trained, by name in that order; all by default.
        distribution: Law of the directions.
        rounding: How a step rounds a 16-bit weight; a float32 one it does not concern.

    Raises:
        ConfigError: A weight is not float32, bfloat16 or float16, or a probe would not see every use of it.
    """

    perturbs_weights = True

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Mapping[str, nn.Parameter] | None = None,
        distribution: Distribution = Distribution.gaussian,
        rounding: Rounding = Rounding.nearest,
    ) -> None:
        self.distribution = distribution
        self._rounding = rounding
        trained = dict(model.named_parameters()) if parameters is None else parameters
        self._parameters = [*trained.values()]
        _refuse_unseen(model, self._parameters)
        for name, parameter in trained.items():
            if parameter.dtype not in DTYPES:
                raise ConfigError(
                    f"FullSpace: every trained weight must be float32, bfloat16 or float16, but {name!r} is "
                    f"{parameter.dtype}. Leave it out of `parameters`, call model.float(), load the model unquantised, "
                    "or train an adapter in its place."
                )
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        sizes = [parameter.numel() for parameter in self._parameters]
        *starts, size = accumulate(sizes, initial=0)
        self._starts, self._size = starts, size
        self._all = all_together(self._parameters, self._starts)
        self._embeddings = embedding_shapes(model)
        self._small, self._groups = reading_order(self._embeddings, self._parameters, self._starts)
        self._marked: list[torch.Tensor] | None = None

    @property
    def size(self) -> int:
        return self._size

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return self._parameters

    def probe(self, scale: float, key: int) -> AbstractContextManager[None]:
        moved = PerturbedWeights(
            self._parameters,
            self._starts,
            scale=scale,
            key=key,
            distribution=self.distribution,
            groups=self._groups,
        )
        moved.make(self._small)
        return moved.active()

    def step(self, s: float, key: int) -> None:
        stochastic = self._rounding is Rounding.stochastic
        for tensors in self._all:
            tensors.add(key, scale=-s, distribution=self.distribution, stochastic=stochastic)

    def scale_by(self, factor: float) -> None:
        for parameter in self._parameters:
            for part in torch.split(parameter.detach().view(-1), _CHUNK):
                part.copy_(part.float() * factor)

    def values(self) -> Values:
        values, at = np.empty(self.size, np.float32), 0
        for group in _groups(self._parameters):
            read = _read([each.float() for each in group])
            values[at : at + read.size] = read
            at += read.size
        return values

    def load(self, values: Values) -> None:
        parts = torch.split(torch.from_numpy(as_values(values, self.size)), [p.numel() for p in self._parameters])
        with torch.no_grad():
            for parameter, part in zip(self._parameters, parts, strict=True):
                parameter.copy_(part.view(parameter.shape))

    def mark(self) -> None:
        self._marked = [parameter.detach().clone() for parameter in self._parameters]

    def rewind(self) -> None:
        if self._marked is None:
            raise RuntimeError("rewind without a mark")
        with torch.no_grad():
            for parameter, kept in zip(self._parameters, self._marked, strict=True):
                parameter.copy_(kept)
        self._marked = None

    def check(self) -> int:
        """CRC-32 of a few thousand weights of every tensor: a missed or doubled step moves them all."""
        crc, flat = 0, [parameter.detach().view(-1) for parameter in self._parameters]
        for group in _groups([each[:: max(1, each.numel() // 1024)] for each in flat]):
            crc = zlib.crc32(_read_bits(group), crc)
        return crc

    def digest(self) -> str:
        sha = hashlib.sha256()
        for group in _groups(self._parameters):
            sha.update(_read_bits(group))
        return sha.hexdigest()

    def step_bytes(self, local_steps: int) -> int:
        """The largest perturbed weight, what is made together on CUDA, and scratch; a mark copies all weights.

        Of a weight of an embedding's shape few rows are made. Whoever reads all of it, as a whole LM head, counts it.
        """
        perturbed = max((each.nbytes for each in self._parameters if each.shape not in self._embeddings), default=0)
        groups = sorted(group.nbytes for group in set(self._groups.values()))
        together = sum(groups[-GROUPS_KEPT:]) + sum(small.nbytes for small in self._small)
        as_they_lie = "cpu", torch.float32  # a kernel reads and writes these, and nothing is widened
        widened = (each.numel() for each in self._parameters if (each.device.type, each.dtype) != as_they_lie)
        scratch = 3 * 4 * min(_CHUNK, max(widened, default=0))
        mark = sum(parameter.nbytes for parameter in self._parameters)
        return perturbed + together + scratch + (mark if local_steps > 1 else 0)

    def gradient(self, loss_fn: GraphLossFn) -> tuple[float, torch.Tensor]:
        loss, gradients = differentiate(loss_fn, self._parameters)
        return loss, torch.cat([each.float().reshape(-1) for each in gradients])

    def row_weights(self, model: nn.Module) -> RowWeights | None:
        return None


def _refuse_unseen(model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    """Refuse modules whose use of trained weights a probe does not see, or that compute in another way within one.

    Raises:
        ConfigError: There is one.
    """
    mine = {id(parameter) for parameter in trained}
    for name, module in model.named_modules():
        if mine.isdisjoint(map(id, module.parameters())):
            continue
        what = f"{name or 'the model'} is a {type(module).__name__}"
        compiled = "_orig_mod" in dict(module.named_children()) or module._compiled_call_impl is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"FullSpace must see every use of a trained weight, but {what}, and compiled code hides them. Give it, "
                "and call in the loss, the module before it was compiled, or take MaskedSpace or DenseSpace."
            )
        attention = module.self_attn if isinstance(module, nn.TransformerEncoderLayer) else module
        fast = isinstance(attention, nn.MultiheadAttention) and attention.batch_first  # others have no such path
        if fast and torch.backends.mha.get_fastpath_enabled():
            raise ConfigError(
                f"FullSpace must compute within a probe as outside of it, but {what}, whose fast path torch takes only "
                "outside. Call torch.backends.mha.set_fastpath_enabled(False) first."
            )


def _groups(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Neighbours that are read at once: each read waits for the device, so there must not be one for every tensor."""
    tensors = [tensor.detach() for tensor in tensors]
    parts = consecutive([tensor.nbytes for tensor in tensors], most=_READ_BYTES)
    return [tensors[part.start : part.stop] for part in parts]


def _read(group: Sequence[torch.Tensor]) -> npt.NDArray[Any]:
    """Tensors, all of the same dtype, one after another in the host's memory."""
    flat = [tensor.reshape(-1) for tensor in group]
    read: npt.NDArray[Any] = (flat[0] if len(flat) == 1 else torch.cat(flat)).cpu().numpy()
    return read


def _read_bits(group: Sequence[torch.Tensor]) -> memoryview:
    return _read([tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in group]).data
