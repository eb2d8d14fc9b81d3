"""A space that is nothing but a vector: the obviously right twin for tests of estimators, logs and federations."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn

from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.spaces.base import RowWeights, Values


class VectorSpace:
    """theta is ``self.theta`` (float32 [n]); a probe writes to it and puts a copy back."""

    perturbs_weights = False

    def __init__(self, theta: Values, *, distribution: Distribution = Distribution.gaussian) -> None:
        self.distribution = distribution
        self.theta = np.asarray(theta, np.float32).copy()
        self._marked: Values | None = None
        self._probed = False

    @property
    def size(self) -> int:
        return self.theta.size

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return ()

    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        if self._probed:
            raise RuntimeError("a probe must be left before the next is entered: they do not add up")
        kept, self._probed = self.theta.copy(), True
        try:
            self.theta = kept + np.float32(scale) * self._direction(key)
            yield
        finally:
            self.theta, self._probed = kept, False

    def step(self, s: float, key: int) -> None:
        self.theta = self.theta - np.float32(s) * self._direction(key)

    def scale_by(self, factor: float) -> None:
        self.theta = self.theta * np.float32(factor)

    def values(self) -> Values:
        return self.theta.copy()

    def load(self, values: Values) -> None:
        self.theta = values.copy()

    def mark(self) -> None:
        self._marked = self.theta.copy()

    def rewind(self) -> None:
        assert self._marked is not None
        self.theta, self._marked = self._marked, None

    def check(self) -> int:
        return zlib.crc32(self.theta.tobytes())

    def digest(self) -> str:
        return hashlib.sha256(self.theta.tobytes()).hexdigest()

    def step_bytes(self, local_steps: int) -> int:
        return 5 * 4 * self.size  # theta, its copy, a direction and two values on the way

    def row_weights(self, model: nn.Module) -> RowWeights | None:
        return None

    def _direction(self, key: int) -> Values:
        return direction(key, self.size, distribution=self.distribution)
