"""What a client's local step goes by, in two kinds: scalars along directions, or the gradient itself.

``Estimator`` turns losses into projected gradients: scalars g such that g * z estimates the gradient along z.
``GradientEstimator`` takes steps along gradients that backpropagation computes.

Legend: theta the trained values, z a direction, P the probes of a step, l0 the loss at theta, l_p the loss at
theta + eps z_p. A step is the mean of g_p z_p over its probes, dropped ones counting as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt

from fedzo.errors import ConfigError, Problem, at_least, positive, positive_float32, problem
from fedzo.records.fields import MAX_STEPS
from fedzo.registry import PluginConfig, Registry
from fedzo.zo.config import Distribution
from fedzo.zo.spaces.base import DifferentiableSpace, GraphLossFn, Space

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

LossFn = Callable[[], float]
"""The mean loss of one batch at the model's present weights."""
Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Projection:
    """One probe: the gradient seen along one direction."""

    g: np.float32
    """The projected gradient, rounded to float32 once; 0 if dropped."""
    loss: float
    """The loss at theta as the probe saw it: mean of two sides, l0 if evaluated, else l_p; nan if dropped."""
    dropped: bool
    """A loss was not finite, or there was nothing to compare it with: g = 0, and it is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorTraits:
    """What the rules on other parts of a run must know of an estimator.

    Attributes:
        incomparable_g: Why |g| of different steps or clients cannot be compared, as half a sentence; empty where it
            can.
    """

    incomparable_g: str = ""


@dataclass(kw_only=True, slots=True)
class EstimatorConfig(PluginConfig):
    """How a client computes a local step: from scalars (``ZerothOrderConfig``), or from a gradient."""

    @property
    def traits(self) -> EstimatorTraits:
        """What other parts of a run must know of this estimator."""
        return EstimatorTraits()

    # what follows from the kind and its keys is no trait: a plugin that states traits of its own cannot forget it

    @property
    def sends_vectors(self) -> bool:
        """Whether clients send where their gradients led, and no scalars."""
        return True

    @property
    def probes_per_step(self) -> int:
        """P, the scalars of a local step; 0 where there are none."""
        return 0

    @property
    def freezes_routing(self) -> bool:
        """Whether the probes of a step make the hard choices of the forward at its centre."""
        return False


@dataclass(kw_only=True, slots=True)
class ZerothOrderConfig(EstimatorConfig):
    """How a loss is turned into projected gradients, the scalars that clients send."""

    eps: float | None = None
    """Distance along a direction at which the loss is evaluated. null = ``trainer.eps``."""
    num_probes: int = 1
    """Number of directions in a step. The step is their mean."""
    distribution: Distribution = Distribution.gaussian
    freeze_routing: bool = False
    """Use the same discrete choices (a router's experts) in all probes of a step. Costs a forward a step, unless
    the estimator evaluates the loss at theta."""

    @property
    def sends_vectors(self) -> bool:
        return False

    @property
    def probes_per_step(self) -> int:
        return self.num_probes

    @property
    def freezes_routing(self) -> bool:
        return self.freeze_routing

    @property
    def float32_eps(self) -> float:
        """``eps`` of a loaded configuration as it is applied: a space scales directions by a float32.

        Raises:
            ConfigError: It is no positive float32.
        """
        with np.errstate(over="ignore"):
            eps = float(np.float32(self.eps or 0))
        if not (eps > 0 and math.isfinite(eps)):
            raise ConfigError(
                f"estimator.eps must be > 0 and finite in float32, got {self.eps}. 1e-3 suits most language models."
            )
        return eps

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if self.eps is not None:
            yield from positive_float32("estimator.eps", self.eps, "1e-3 is usual.")
        elif not any(positive("", run.trainer.eps, "")):
            yield from positive_float32("estimator.eps", run.trainer.eps, "1e-3 is usual.")
        yield from at_least("estimator.num_probes", self.num_probes, 1, "A step needs a direction.")
        if self.num_probes > MAX_STEPS:
            rule = f"be at most {MAX_STEPS}, the maximum of a record of the log"
            yield problem("estimator.num_probes", rule, self.num_probes, "Lower it.")


class Estimator(Protocol):
    """Estimates projected gradients by a space's ``probe``, and leaves the model's bits as they were.

    Of the space it may also know ``size`` and ``distribution``, by which it can make the directions of its keys. One
    object serves all clients of a process, in any order, so nothing is remembered between two calls.
    """

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        """One projection for each stream key, whatever their number, all at the same theta and on the same batch.

        When the loss is asked for, and how often, depends on the keys alone and never on a loss: so many clients'
        losses can be evaluated together and handed out afterwards (``estimate_together``).
        """
        ...

    def forwards_per_step(self, num_probes: int) -> int:
        """How often ``estimate`` asks for the loss, given ``num_probes`` keys."""
        ...


class GradientEstimator(Protocol):
    """Takes local steps along gradients of the loss."""

    def descend(self, space: DifferentiableSpace, losses: Iterable[GraphLossFn], *, lr: float) -> list[float]:
        """Take one local step for each loss, from where the space is; nothing is remembered between two calls.

        Args:
            space: Moved in place.
            losses: The loss of each step's batch.
            lr: Learning rate of the round, a float32 value.

        Returns:
            The loss before each step; nan for a step that was not taken, since a number in it was not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class Still:
    """Stands for a space whose losses are known already: a probe of it moves nothing."""

    size: int
    distribution: Distribution

    def probe(self, scale: float, key: int) -> AbstractContextManager[None]:
        return nullcontext()


def estimate_together(
    estimator: Estimator, space: Space, losses_fn: Callable[[], Losses], keys: Sequence[int], *, count: int
) -> list[list[Projection]]:
    """What ``estimate`` gives for each of ``count`` loss functions that are evaluated together.

    Args:
        estimator: The estimator.
        space: The model's space.
        losses_fn: All losses at the model's present weights, float64 [count].
        keys: Stream keys, which the loss functions share.
        count: Number of loss functions.
    """
    asked: list[Losses] = []

    def joint() -> float:
        asked.append(losses_fn())
        return 0.0

    estimator.estimate(space, joint, keys)
    answers = [iter([float(losses[i]) for losses in asked]) for i in range(count)]
    still = cast(Space, Still(space.size, space.distribution))
    return [estimator.estimate(still, answer.__next__, keys) for answer in answers]


ESTIMATORS: Registry[Estimator | GradientEstimator] = Registry("estimator", base=EstimatorConfig)
DROPPED = Projection(g=np.float32(0), loss=math.nan, dropped=True)


def projections(g: Losses, losses: Losses) -> list[Projection]:
    """The probes of a step from float64 [P] each: g is rounded to float32 once, what is not finite is dropped."""
    with np.errstate(all="ignore"):
        rounded = g.astype(np.float32)
    good = np.isfinite(rounded) & np.isfinite(losses)
    return [
        Projection(g=rounded[p], loss=float(losses[p]), dropped=False) if good[p] else DROPPED for p in range(g.size)
    ]


def build_gradient_estimator(config: EstimatorConfig) -> GradientEstimator:
    """The estimator plugin of a configuration that is none of the zeroth order."""
    return cast(GradientEstimator, ESTIMATORS.build(config))
