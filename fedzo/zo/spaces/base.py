"""A space numbers the trained values of a model 0..n-1 and moves them along directions, exactly.

A trainer differs from another only in its space (``docs/explanation-architecture.md``): which numbers are trained.
Whatever is built on a space - estimators, the log, replay, the wire - never learns which one it is.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction

Values = npt.NDArray[np.float32]
GraphLossFn = Callable[[], torch.Tensor]
"""The mean loss of one batch at the model's present weights, a scalar with its graph."""
_STEP_BYTES = 20  # master, index, direction and two scratch values of a trained value


class RowWeights(Protocol):
    """Within the context each row of a forward computes with trained values of its own, which ``follow`` tells."""

    def __enter__(self) -> object: ...
    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> object: ...

    def follow(self, offsets: Iterable[torch.Tensor], index: npt.NDArray[np.intp]) -> None:
        """Row i of the forwards from now on is computed at theta + ``offsets[index[i]]``.

        Args:
            offsets: float32 [n] each, on the model's device; those of the rows before are let go first.
            index: Integers [B].
        """
        ...


class Space(Protocol):
    """What estimators, the log and the federation need of the trained values."""

    @property
    def size(self) -> int:
        """Number of trained values n."""
        ...

    @property
    def distribution(self) -> Distribution:
        """Law of the directions z, which ``fedzo.zo.directions.direction`` makes of a key alike for every space."""
        ...

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The model's parameters that trained values lie in; what a forward makes of others alone stays as it is."""
        ...

    def probe(self, scale: float, key: int) -> AbstractContextManager[None]:
        """Within the context the model computes at theta + scale * z(key); afterwards its bits are what they were.

        Probes do not add up: one must be left before the next is entered.
        """
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

    @property
    def perturbs_weights(self) -> bool:
        """Whether each forward of a probe passes over all weights once more, so that few large ones are cheaper."""
        ...

    def step_bytes(self, local_steps: int) -> int:
        """Bytes that a step takes beside the model's weights and activations, with ``local_steps`` steps a round."""
        ...

    def row_weights(self, model: nn.Module) -> RowWeights | None:
        """How rows of one forward get trained values of their own; None where the space or the model has no way.

        Only for values that ``step`` moves as a ``MasterSpace`` does: where a client's steps lead is followed there.

        Raises:
            NotImplementedError: In the forward, where the model uses its weights in a way that is not known.
        """
        ...


@runtime_checkable
class DifferentiableSpace(Space, Protocol):
    """A space that the loss can be differentiated in: a capability that a space has by having the method."""

    def gradient(self, loss_fn: GraphLossFn) -> tuple[float, torch.Tensor]:
        """The loss at theta and its gradient in theta, float32 [n] in wire order, on the model's device."""
        ...


def differentiate(loss_fn: GraphLossFn, parameters: Sequence[nn.Parameter]) -> tuple[float, tuple[torch.Tensor, ...]]:
    """The loss and its gradient in parameters of a frozen model, in their shapes and dtypes; they are frozen again."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = loss_fn()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return float(loss.detach()), gradients
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


class MasterSpace:
    """What spaces with a float32 master share; of its own, a subclass needs ``parameters`` and ``write`` alone.

    By itself it is values of no model: where steps lead can be followed without any forward.
    """

    perturbs_weights = False

    def __init__(self, master: torch.Tensor, distribution: Distribution) -> None:
        self._master = master
        self.distribution = distribution
        self._marked: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return self._master.numel()

    @property
    def master(self) -> torch.Tensor:
        """theta, float32 [n], as it lies on its device."""
        return self._master

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return ()

    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        try:
            self._write_moved(scale, key)  # within, since it may fail half-way, for want of memory
            yield
        finally:
            self.write(self._master)

    def step(self, s: float, key: int) -> None:
        if not self._move(s, key):
            self.write(self._master)

    def steps(self, steps: Sequence[tuple[float, int]]) -> None:
        """``theta <- theta - s * z(key)`` for each (s, key), one after another, but the model is written to once."""
        model_has_it = True
        for s, key in steps:
            model_has_it = self._move(s, key)
        if not model_has_it:
            self.write(self._master)

    def scale_by(self, factor: float) -> None:
        self._master.mul_(factor)
        self.write(self._master)

    def values(self) -> Values:
        return self._master.cpu().numpy().copy()

    def load(self, values: Values) -> None:
        self._master.copy_(torch.from_numpy(as_values(values, self.size)))
        self.write(self._master)

    def mark(self) -> None:
        self._marked = self._master.clone()

    def rewind(self) -> None:
        if self._marked is None:
            raise RuntimeError("rewind without a mark")
        self._master, self._marked = self._marked, None
        self.write(self._master)

    def check(self) -> int:
        return zlib.crc32(self._master.cpu().numpy().data)

    def digest(self) -> str:
        return hashlib.sha256(self._master.cpu().numpy().data).hexdigest()

    def step_bytes(self, local_steps: int) -> int:
        return _STEP_BYTES * self.size

    def row_weights(self, model: nn.Module) -> RowWeights | None:
        return None

    def write(self, values: torch.Tensor) -> None:
        """Let the model compute with ``values``, float32 [n] on the master's device; what is kept of them is a copy.

        Whoever writes past torch has it count that (``torch.autograd.graph.increment_version``): others look there for
        whether weights have changed.
        """

    def _move(self, s: float, key: int) -> bool:
        """Move the master; returns whether the model computes with where it is now."""
        add_direction(self._master, key, scale=-s, out=self._master, distribution=self.distribution)
        return False

    def _write_moved(self, scale: float, key: int) -> None:
        self.write(add_direction(self._master, key, scale=scale, distribution=self.distribution))


def as_values(values: Values, size: int) -> Values:
    """``values`` as a space takes them: float32 [size], contiguous."""
    if values.dtype != np.float32 or values.shape != (size,):
        raise ValueError(f"values must be float32 of shape ({size},), got {values.dtype} {values.shape}")
    return np.ascontiguousarray(values)
