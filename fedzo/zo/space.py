"""A space numbers the trained values of a model 0..n-1 and moves them along directions, exactly.

A trainer differs from another only in its space (``docs/explanation-architecture.md``): which numbers are trained.
Whatever is built on a space - estimators, the log, replay, the wire - never learns which one it is.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedzo.errors import ConfigError
from fedzo.zo.config import Distribution, Rounding
from fedzo.zo.directions import add_direction
from fedzo.zo.perturb import PerturbedWeights
from fedzo.zo.rounding import add_direction_stochastically, is_rounded

Values = npt.NDArray[np.float32]
_CHUNK = 1 << 20  # values that are widened to float32 at a time


class Space(Protocol):
    """What estimators, the log and the federation need of the trained values."""

    @property
    def size(self) -> int:
        """Number of trained values n."""
        ...

    @property
    def distribution(self) -> Distribution:
        """Law of the directions z."""
        ...

    def probe(self, scale: float, key: int) -> AbstractContextManager[None]:
        """Within the context the model computes at theta + scale * z(key); afterwards its bits are what they were."""
        ...

    def step(self, s: float, key: int) -> None:
        """theta <- theta - s * z(key): one rounded product, one rounded difference a value (``s`` is float32).

        Then rounded to the dtype that holds it; the result is a function of theta, s and key alone.
        """
        ...

    def scale_by(self, factor: float) -> None:
        """theta <- factor * theta: one rounded product a value (``factor`` is float32), cast to the value's dtype."""
        ...

    def values(self) -> Values:
        """A copy of theta, float32 [n] in wire order."""
        ...

    def load(self, values: Values) -> None:
        """Replace theta; ``values`` is float32 [n]."""
        ...

    def mark(self) -> None:
        """Remember theta, for ``rewind``."""
        ...

    def rewind(self) -> None:
        """Put the marked theta back, bit for bit, and forget the mark."""
        ...

    def check(self) -> int:
        """A 32-bit check of theta, cheap enough for every round."""
        ...

    def digest(self) -> str:
        """SHA-256 of theta's bits."""
        ...


class MasterSpace:
    """What spaces with a float32 master share; a subclass says how values enter the model (``_write``).

    By itself it is values of no model: where steps lead can be followed without any forward.
    """

    def __init__(self, master: torch.Tensor, distribution: Distribution) -> None:
        self._master = master
        self.distribution = distribution
        self._marked: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return self._master.numel()

    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        self._write_moved(scale, key)
        try:
            yield
        finally:
            self._write(self._master)

    def step(self, s: float, key: int) -> None:
        add_direction(self._master, key, scale=-s, out=self._master, distribution=self.distribution)
        self._write(self._master)

    def scale_by(self, factor: float) -> None:
        self._master.mul_(factor)
        self._write(self._master)

    def values(self) -> Values:
        return self._master.cpu().numpy().copy()

    def load(self, values: Values) -> None:
        self._master.copy_(torch.from_numpy(_as_values(values, self.size)))
        self._write(self._master)

    def mark(self) -> None:
        self._marked = self._master.clone()

    def rewind(self) -> None:
        if self._marked is None:
            raise RuntimeError("rewind without a mark")
        self._master, self._marked = self._marked, None
        self._write(self._master)

    def check(self) -> int:
        return zlib.crc32(self._master.cpu().numpy().data)

    def digest(self) -> str:
        return hashlib.sha256(self._master.cpu().numpy().data).hexdigest()

    def _write_moved(self, scale: float, key: int) -> None:
        self._write(add_direction(self._master, key, scale=scale, distribution=self.distribution))

    def _write(self, values: torch.Tensor) -> None:
        """Let the model compute with ``values``."""


class MaskedSpace(MasterSpace):
    """A fixed set of single weights with a float32 master (Meerkat, SensZOQ: specs section 1.7).

    The model's own weights hold ``cast(master)`` between probes and ``cast(master + scale * z)`` during one, so probing
    cannot drift and small updates do not vanish in a 16-bit model.

    Attributes:
        places: Each masked parameter with the flat indices of its trained values, in wire order.

    Args:
        model: The model whose weights are set in place.
        indices: Per parameter name the flat row-major indices (int64, sorted); the order of names is the wire order.
        distribution: Law of the directions.
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
            self.places.append((parameters[name], flat.to(parameters[name].device)))
        self._sizes = [flat.numel() for _, flat in self.places]
        if sum(self._sizes) == 0:
            raise ConfigError("mask: it must hold at least one weight, got none. Raise trainer.density.")
        super().__init__(
            torch.cat([_take(weight.detach(), flat).float() for weight, flat in self.places]), distribution
        )

    def _write(self, values: torch.Tensor) -> None:
        with torch.no_grad():
            for (weight, flat), part in zip(self.places, torch.split(values, self._sizes), strict=True):
                _put(weight.detach(), flat, part.to(weight.dtype))


class FullSpace:
    """All weights of a model (MeZO, arXiv 2305.17333), each counted once.

    A probe does not touch the weights: torch functions that read a weight are handed ``theta + scale * z`` instead
    (``fedzo.zo.perturb``), made when needed and dropped after. Deviation from MeZO's code: no +eps, -2 eps, +eps walk,
    which does not come back to the same bits.

    Memory: one perturbed weight at a time; ``mark`` keeps a copy of all weights, since subtracting steps is not exact.

    Args:
        model: The model whose parameters are trained, in the order of ``named_parameters``.
        distribution: Law of the directions.
        rounding: How a step rounds a 16-bit weight; a float32 one it does not concern.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distribution: Distribution = Distribution.gaussian,
        rounding: Rounding = Rounding.nearest,
    ) -> None:
        self.distribution = distribution
        self._rounding = rounding
        self._parameters = [parameter for _, parameter in model.named_parameters()]
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise ConfigError(
                    f"trainer=mezo trains every weight, but {name!r} is {parameter.dtype}. "
                    "Load the model unquantised, or use trainer=meerkat."
                )
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        sizes = [parameter.numel() for parameter in self._parameters]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._size = sum(sizes)
        self._marked: list[torch.Tensor] | None = None

    @property
    def size(self) -> int:
        return self._size

    def probe(self, scale: float, key: int) -> AbstractContextManager[None]:
        starts = {id(parameter): start for parameter, start in zip(self._parameters, self._starts, strict=True)}
        return PerturbedWeights(starts, scale=scale, key=key, distribution=self.distribution).active()

    def step(self, s: float, key: int) -> None:
        for parameter, start in zip(self._parameters, self._starts, strict=True):
            weight = parameter.detach()
            if self._rounding is Rounding.stochastic and is_rounded(weight.dtype):
                add_direction_stochastically(weight, key, scale=-s, start=start, distribution=self.distribution)
            else:
                add_direction(weight, key, scale=-s, start=start, out=weight, distribution=self.distribution)

    def scale_by(self, factor: float) -> None:
        for parameter in self._parameters:
            for part in torch.split(parameter.detach().view(-1), _CHUNK):
                part.copy_(part.float() * factor)

    def values(self) -> Values:
        return torch.cat([parameter.detach().float().view(-1).cpu() for parameter in self._parameters]).numpy()

    def load(self, values: Values) -> None:
        parts = torch.split(torch.from_numpy(_as_values(values, self.size)), [p.numel() for p in self._parameters])
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
        crc = 0
        for parameter in self._parameters:
            flat = parameter.detach().view(-1)
            crc = zlib.crc32(_raw(flat[:: max(1, flat.numel() // 1024)].contiguous()), crc)
        return crc

    def digest(self) -> str:
        sha = hashlib.sha256()
        for parameter in self._parameters:
            sha.update(_raw(parameter.detach()))
        return sha.hexdigest()


def _as_values(values: Values, size: int) -> Values:
    if values.dtype != np.float32 or values.shape != (size,):
        raise ValueError(f"values must be float32 of shape ({size},), got {values.dtype} {values.shape}")
    return np.ascontiguousarray(values)


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).cpu().numpy().data


def _take(weight: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    return weight.view(-1)[flat] if weight.is_contiguous() else weight[torch.unravel_index(flat, weight.shape)]


def _put(weight: torch.Tensor, flat: torch.Tensor, part: torch.Tensor) -> None:
    if weight.is_contiguous():
        weight.view(-1).index_copy_(0, flat, part)
    else:
        weight[torch.unravel_index(flat, weight.shape)] = part
