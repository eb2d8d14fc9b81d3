"""Estimators from differences of losses.

Legend: theta the trained values, z a direction, P the probes of a step, l0 the loss at theta, l_p the loss at
theta + eps z_p. A step is the mean of g_p z_p over its probes, dropped ones counting as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from fedzo.errors import Problem, problem
from fedzo.zo.config import Distribution
from fedzo.zo.estimator.base import (
    DROPPED,
    ESTIMATORS,
    Estimator,
    EstimatorTraits,
    Losses,
    LossFn,
    Projection,
    ZerothOrderConfig,
    projections,
)
from fedzo.zo.spaces.base import Space

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class TwoPointConfig(ZerothOrderConfig):
    """Central difference along ``num_probes`` random directions a step (SPSA; MeZO, arXiv 2305.17333)."""


@dataclass(frozen=True, slots=True)
class TwoPoint:
    """Central difference g = (l(theta + eps z) - l(theta - eps z)) / 2 eps (SPSA; MeZO, arXiv 2305.17333).

    Unbiased up to O(eps^2). Deviation from MeZO's code: both sides start from theta itself; nothing is walked back.
    """

    eps: float

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        plus, minus = np.empty(len(keys)), np.empty(len(keys))
        for p, key in enumerate(keys):
            with space.probe(self.eps, key):
                plus[p] = loss_fn()
            with space.probe(-self.eps, key):
                minus[p] = loss_fn()
        with np.errstate(all="ignore"):
            return projections((plus - minus) / (2 * self.eps), (plus + minus) / 2)

    def forwards_per_step(self, num_probes: int) -> int:
        return 2 * num_probes


class Baseline(Enum):  # no StrEnum: a string has a method ``center``
    """What a one-sided estimate subtracts from a perturbed loss."""

    center = "center"
    """The loss at theta: one more forward a step."""
    mean = "mean"
    """The mean of the step's perturbed losses: no more forwards, but the estimate is (P - 1) / P of the gradient."""
    leave_one_out = "leave_one_out"
    """The mean of the step's other perturbed losses: no more forwards, unbiased."""


@dataclass(kw_only=True, slots=True)
class OneSidedConfig(ZerothOrderConfig):
    """Forward difference: one forward per probe, plus one a step if the baseline is the centre."""

    baseline: Baseline = Baseline.center

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if self.num_probes == 1 and self.baseline is not Baseline.center:
            remedy = "One loss has no other loss for comparison. Or write estimator.baseline=center."
            yield problem("estimator.num_probes", "be >= 2", 1, remedy)


@dataclass(frozen=True, slots=True)
class OneSided:
    """Forward differences g_p = (l_p - b_p) / eps with a baseline b that is shared by the step's probes.

    - ``center``: b = l0. P + 1 forwards.
    - ``mean``: b = the mean of all l_q. P forwards. The mean of g z is (P - 1) / P of the others', since b holds l_p.
    - ``leave_one_out``: b_p = the mean of the l_q with q != p. P forwards.

    Since -z is as likely as z, the mean of g z is exactly that of the central difference, unbiased up to O(eps^2). A
    single g is off by O(eps), about eps z'Hz / 2 with H the Hessian. ``mean`` and ``leave_one_out`` subtract the
    average of this over the probes, and that of their slopes. A loss that is not finite takes no part in a mean.
    """

    eps: float
    baseline: Baseline

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        if self.baseline is Baseline.center:
            center = loss_fn()
            losses = _perturbed_losses(space, loss_fn, keys, eps=self.eps)
            with np.errstate(all="ignore"):
                return projections((losses - center) / self.eps, np.where(np.isfinite(losses), center, np.nan))
        losses = _perturbed_losses(space, loss_fn, keys, eps=self.eps)
        finite = losses[np.isfinite(losses)]
        if finite.size < 2:
            return [DROPPED] * len(keys)
        # l_p minus the mean of the others is l_p minus the mean of all, times n / (n - 1)
        scale = finite.size / (finite.size - 1) if self.baseline is Baseline.leave_one_out else 1.0
        with np.errstate(all="ignore"):
            return projections((losses - finite.mean()) * scale / self.eps, losses)

    def forwards_per_step(self, num_probes: int) -> int:
        return num_probes + (self.baseline is Baseline.center)


@dataclass(kw_only=True, slots=True)
class FzooConfig(ZerothOrderConfig):
    """Forward differences over the standard deviation of their losses (FZOO, arXiv 2506.09034); lr is scale-free."""

    num_probes: int = 8
    distribution: Distribution = Distribution.rademacher

    @property
    def traits(self) -> EstimatorTraits:
        return EstimatorTraits(incomparable_g="fzoo divides |g| by the spread of its losses")

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if self.num_probes == 1:
            yield problem("estimator.num_probes", "be >= 2", 1, "One loss has no standard deviation.")


@dataclass(frozen=True, slots=True)
class Fzoo:
    """g_p = (l_p - l0) / sigma, sigma the sample standard deviation (ddof 1) of the step's perturbed losses.

    FZOO (arXiv 2506.09034) takes batched one-sided estimates along Rademacher directions and divides the step by the
    standard deviation of the batch's losses. The formula is that of its authors' code (github.com/DKmiyan/FZOO), which
    does not divide by eps either. Deviation: there sigma has ddof 0, so steps are sqrt(P / (P - 1)) times ours. To
    first order sigma is eps * |gradient|, so g does not grow with the loss's scale, with the gradient or with eps, and
    its learning rate is not that of the others.

    P + 1 forwards. If sigma is 0 or not finite, every probe is dropped.
    """

    eps: float

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        center = loss_fn()
        losses = _perturbed_losses(space, loss_fn, keys, eps=self.eps)
        finite = losses[np.isfinite(losses)]
        if finite.size < 2:
            return [DROPPED] * len(keys)
        with np.errstate(all="ignore"):
            sigma = finite.std(ddof=1)
            # a sigma of 0 divides to inf or nan, an infinite one to a g that says nothing
            g = (losses - center) / sigma if np.isfinite(sigma) else np.full_like(losses, np.nan)
            return projections(g, np.where(np.isfinite(losses), center, np.nan))

    def forwards_per_step(self, num_probes: int) -> int:
        return num_probes + 1


def _perturbed_losses(space: Space, loss_fn: LossFn, keys: Sequence[int], *, eps: float) -> Losses:
    losses = np.empty(len(keys))
    for p, key in enumerate(keys):
        with space.probe(eps, key):
            losses[p] = loss_fn()
    return losses


@ESTIMATORS.register("two_point", TwoPointConfig)
def two_point(config: TwoPointConfig) -> Estimator:
    """Build the two-point estimator."""
    return TwoPoint(eps=config.float32_eps)


@ESTIMATORS.register("one_sided", OneSidedConfig)
def one_sided(config: OneSidedConfig) -> Estimator:
    """Build the one-sided estimator."""
    return OneSided(eps=config.float32_eps, baseline=config.baseline)


@ESTIMATORS.register("fzoo", FzooConfig)
def fzoo(config: FzooConfig) -> Estimator:
    """Build the FZOO estimator."""
    return Fzoo(eps=config.float32_eps)
