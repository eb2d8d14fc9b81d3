"""What less than float32 does to the scalars of a run: what may stand in for it, and where probes vanish.

A two-point scalar is a small difference of two losses over 2 eps, so errors of the forward pass that leave accuracy
alone can drown it, the more so the fewer weights are trained. Whether they do depends on model, space, eps and batch;
so it is measured, on the run's own, and speed comes second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedzo.models.config import DType
from fedzo.models.virtual_tokens import num_virtual_tokens
from fedzo.sketch import tables_of
from fedzo.zo.estimator import Estimator, Losses, LossFn
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.masked import MaskedSpace

NUM_DIRECTIONS = 4
"""Of which scalars are compared, unless a step has more."""
_LARGEST_ERROR = 0.1
_LARGEST_TIME = 0.9
_MAX_NAMES = 5


@dataclass(frozen=True, slots=True)
class Trial:
    """Scalars along some directions, float64 (nan for a dropped probe), and the seconds they took."""

    g: Losses
    seconds: float


def try_out(
    space: Space, estimator: Estimator, loss_fn: LossFn, keys: Sequence[int], num_warm_ups: int = 1, num_probes: int = 1
) -> Trial:
    """Estimate along the directions of ``keys``, after warm-ups: kernels are compiled and recorded.

    A warm-up is a step of ``num_probes``, along the first of them: with fewer an estimator may have nothing to compare.
    """
    for _ in range(num_warm_ups):
        estimator.estimate(space, loss_fn, keys[:num_probes])
    begin = time.perf_counter()
    projections = estimator.estimate(space, loss_fn, keys)
    seconds = time.perf_counter() - begin
    return Trial(np.array([math.nan if each.dropped else float(each.g) for each in projections]), seconds)


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to compute that may stand in for float32.

    Attributes:
        name: What people call it.
        error: Root mean square of the scalars' differences, over that of float32's scalars; infinite if there is none.
        time: Time of its estimate over that of float32's.
    """

    name: str
    error: float
    time: float

    @property
    def passes(self) -> bool:
        """Whether it is true to float32, and faster."""
        return self.error <= _LARGEST_ERROR and self.time <= _LARGEST_TIME


@dataclass(frozen=True, slots=True)
class Choice:
    """Which contender is taken in place of float32, if any.

    Attributes:
        contenders: Those that were measured.
        num_directions: Along so many directions.
    """

    contenders: tuple[Contender, ...]
    num_directions: int

    @property
    def name(self) -> str:
        """Of the fastest that passes; else float32."""
        passing = [each for each in self.contenders if each.passes]
        return min(passing, key=lambda each: each.time).name if passing else DType.float32

    def __str__(self) -> str:
        found = "; ".join(
            f"{each.name} {each.error:.1%} off in {each.time:.2f} of the time" for each in self.contenders
        )
        return (
            f"model.dtype=auto: {self.name} is chosen. Scalars along {self.num_directions} directions, beside "
            f"float32's (at most {_LARGEST_ERROR:.0%} off, rms, in at most {_LARGEST_TIME:.2f} of the time): {found}."
        )


def choose_dtype(wide: Trial, others: Mapping[str, Trial]) -> Choice:
    """Compare trials of other ways, by name, with one in float32 (wide)."""
    size = float(np.mean(wide.g**2))

    def of(name: str, trial: Trial) -> Contender:
        error = math.sqrt(float(np.mean((trial.g - wide.g) ** 2)) / size) if size > 0 else math.inf
        return Contender(name, error if math.isfinite(error) else math.inf, trial.seconds / wide.seconds)

    return Choice(tuple(of(name, trial) for name, trial in others.items()), num_directions=wide.g.size)


def spacing(value: float, dtype: torch.dtype) -> float:
    """Distance from a magnitude to the next larger one that the dtype holds.

    Example:
        >>> spacing(1.0, torch.bfloat16), spacing(0.2, torch.float16) == 2**-13
        (0.0078125, True)
    """
    info = torch.finfo(dtype)
    exponent = math.frexp(max(value, info.smallest_normal))[1] - 1
    return math.ldexp(info.eps, exponent)


def too_coarse(model: nn.Module, space: Space, eps: float) -> list[str]:
    """Weights whose trained values are spaced by more than 2 eps at their root mean square: probes mostly vanish."""
    return [
        name
        for name, values, dtype in _as_used(model, space)
        if values.numel() and eps < spacing(_root_mean_square(values), dtype) / 2
    ]


def _trained(space: Space) -> Iterable[tuple[nn.Parameter, torch.Tensor]]:
    """The space's parameters, each with its trained values: a mask may pick the largest of a matrix."""
    if not isinstance(space, MaskedSpace):
        return [(parameter, parameter.detach()) for parameter in space.parameters]
    parts = torch.split(space.master, [flat.numel() for _, flat in space.places])
    return [(parameter, part) for (parameter, _), part in zip(space.places, parts, strict=True)]


def _as_used(model: nn.Module, space: Space) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Names of weights, their trained values, and the dtype in which a forward sees them.

    Tables and virtual tokens are float32, and rounded to the model's dtype before they are used. Low-rank adapters are
    multiplied in their own dtype.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = {id(table) for table in tables_of(model).values()}
    model_dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    for parameter, values in _trained(space):
        if id(parameter) in names:
            yield names[id(parameter)], values, model_dtype if id(parameter) in tables else parameter.dtype
        elif num_virtual_tokens(model):
            yield "virtual tokens", values, model_dtype


def coarseness_warning(model: nn.Module, space: Space, eps: float) -> str | None:
    """What to tell a user who probes this space of a model with this eps; None if there is nothing to tell."""
    names = too_coarse(model, space, eps)
    if not names:
        return None
    shown = ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
    return (
        f"estimator.eps={eps:g} is below half the spacing of the model's dtype, at the root mean square of the trained "
        f"values, in {len(names)} tensors ({shown}): theta + eps z mostly rounds back to theta there. Raise "
        "estimator.eps, or write model.dtype=float32."
    )


def _root_mean_square(values: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(values, dtype=torch.float32)
    return float(norm) / math.sqrt(values.numel())
