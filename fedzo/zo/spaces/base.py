"""A space numbers the trained values of a model 0..n-1 and moves them along directions, exactly.

A trainer differs from another only in its space (``docs/explanation-architecture.md``): which numbers are trained.
Whatever is built on a space - estimators, the log, replay, the wire - never learns which one it is.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction

Values = npt.NDArray[np.float32]


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
        self._master.copy_(torch.from_numpy(as_values(values, self.size)))
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


def as_values(values: Values, size: int) -> Values:
    """``values`` as a space takes them: float32 [size], contiguous."""
    if values.dtype != np.float32 or values.shape != (size,):
        raise ValueError(f"values must be float32 of shape ({size},), got {values.dtype} {values.shape}")
    return np.ascontiguousarray(values)
