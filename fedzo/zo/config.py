"""What a user can say about estimators and server optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from fedzo.errors import Problem, at_least, not_negative, positive_float32, problem, share_below_1
from fedzo.registry import PluginConfig

if TYPE_CHECKING:
    from fedzo.config.schema import RunConfig

_SMALLEST_DECAY = 2.0**-24  # a smaller one leaves 1 - lr * decay at 1 in float32


class Distribution(StrEnum):
    """Law of a direction's coordinates (``docs/explanation-randomness.md``)."""

    gaussian = "gaussian"
    rademacher = "rademacher"


class Rounding(StrEnum):
    """How an updated weight is rounded where the model holds 16-bit weights and there is no float32 master."""

    nearest = "nearest"
    """To the nearest value: a step of less than half the spacing of the weight's neighbours moves nothing."""
    stochastic = "stochastic"
    """Up or down with the probabilities that keep the mean, drawn from the run seed: small steps add up."""


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
    """How a loss is turned into projected gradients."""

    eps: float = 1e-3
    """How far along a direction a loss is evaluated."""
    num_probes: int = 1
    """Directions a step; the step is their mean."""
    distribution: Distribution = Distribution.gaussian
    freeze_routing: bool = False
    """Hold hard choices (the experts that a router takes) still in a step's probes; one more forward a step, unless
    the estimator has the loss at the centre anyway."""

    @property
    def traits(self) -> EstimatorTraits:
        """What other parts of a run must know of this estimator."""
        return EstimatorTraits()

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from positive_float32("estimator.eps", self.eps, "1e-3 is usual.")
        yield from at_least("estimator.num_probes", self.num_probes, 1, "A step needs a direction.")


@dataclass(kw_only=True, slots=True)
class TwoPointConfig(EstimatorConfig):
    """Central difference along ``num_probes`` random directions a step (SPSA; MeZO, arXiv 2305.17333)."""


class Baseline(Enum):  # no StrEnum: a string has a method ``center``
    """What a one-sided estimate subtracts from a perturbed loss."""

    center = "center"
    """The loss at the weights themselves: one more forward a step."""
    mean = "mean"
    """The mean of the step's perturbed losses: no more forwards, but the estimate is (P - 1) / P of the gradient."""
    leave_one_out = "leave_one_out"
    """The mean of the step's other perturbed losses: no more forwards, unbiased."""


@dataclass(kw_only=True, slots=True)
class OneSidedConfig(EstimatorConfig):
    """Forward difference: one forward a probe, and one for all where the baseline is the centre."""

    baseline: Baseline = Baseline.center

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if self.num_probes == 1 and self.baseline is not Baseline.center:
            remedy = "One loss has no other to be compared with; or write estimator.baseline=center."
            yield problem("estimator.num_probes", "be >= 2", 1, remedy)


@dataclass(kw_only=True, slots=True)
class FzooConfig(EstimatorConfig):
    """Forward differences over the standard deviation of their losses (FZOO, arXiv 2506.09034); lr is scale-free."""

    num_probes: int = 8
    distribution: Distribution = Distribution.rademacher

    @property
    def traits(self) -> EstimatorTraits:
        return EstimatorTraits(incomparable_g="fzoo divides |g| by the spread of its losses")

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if self.num_probes == 1:
            yield problem("estimator.num_probes", "be >= 2", 1, "One loss has no standard deviation.")


class Schedule(StrEnum):
    """Course of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptimizerTraits:
    """What the rules on other parts of a run must know of a server optimizer.

    Attributes:
        keeps_moments: Whether it keeps float32 vectors of the trained values' size between rounds (``num_moments``).
        walks_clients: Whether it walks every client's local steps, and so needs each client's own scalars along shared
            directions (``ControlVariates``).
    """

    keeps_moments: bool = False
    walks_clients: bool = False


@dataclass(kw_only=True, slots=True)
class ServerOptimizerConfig(PluginConfig):
    """How aggregated projected gradients move the weights."""

    lr: float = 1e-4
    """Learning rate; every option that is shipped takes ``trainer.lr``."""
    schedule: Schedule = Schedule.constant
    final_lr_share: float = 0.1
    """Share of ``lr`` in the last round, where the schedule is linear or cosine; 0 wastes that round."""
    warmup_rounds: int = 0
    """Rounds over which the learning rate rises linearly before it is reached."""
    weight_decay: float = 0.0
    """Decoupled: the trained values are multiplied by 1 - lr * weight_decay once a round."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        """What other parts of a run must know of this server optimizer."""
        return ServerOptimizerTraits()

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if not 0 <= self.lr < 2.0**128:  # it travels and is logged as a float32
            yield problem("server_optimizer.lr", "be >= 0 and finite in float32", self.lr, "0 trains nothing.")
        if not 0 <= self.final_lr_share <= 1:
            remedy = "It is the last round's share of server_optimizer.lr."
            yield problem("server_optimizer.final_lr_share", "be between 0 and 1", self.final_lr_share, remedy)
        if not 0 <= self.warmup_rounds < max(run.fl.rounds, 1):
            rule = f"be >= 0 and below fl.rounds ({run.fl.rounds})"
            yield problem("server_optimizer.warmup_rounds", rule, self.warmup_rounds, "Lower it, or train longer.")
        yield from not_negative("server_optimizer.weight_decay", self.weight_decay, "0 switches it off.")
        shrink = self.lr * self.weight_decay
        if shrink > 0 and not _SMALLEST_DECAY <= shrink < 1:
            rule = "make server_optimizer.lr * weight_decay 0, or at least 6e-8 (float32 sees no less) and below 1"
            yield problem("server_optimizer.weight_decay", rule, self.weight_decay, "Change it, or write 0.")


@dataclass(kw_only=True, slots=True)
class SgdConfig(ServerOptimizerConfig):
    """Plain SGD: theta -= lr * c * z."""


@dataclass(kw_only=True, slots=True)
class MomentumConfig(ServerOptimizerConfig):
    """Heavy ball over rounds: m = momentum * m + u, theta -= lr * m; u is the round's sum of c * z."""

    momentum: float = 0.9
    """Share of m that a round keeps."""
    nesterov: bool = False
    """Step along u + momentum * m instead of m."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from share_below_1("server_optimizer.momentum", self.momentum, "0.9 is usual.")


@dataclass(kw_only=True, slots=True)
class AdamConfig(ServerOptimizerConfig):
    """Adam over rounds (arXiv 1412.6980) with decoupled decay (AdamW, arXiv 1711.05101)."""

    beta1: float = 0.9
    """Share of the first moment that a round keeps."""
    beta2: float = 0.999
    """Share of the second moment that a round keeps."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from share_below_1("server_optimizer.beta1", self.beta1, "0.9 is usual.")
        yield from share_below_1("server_optimizer.beta2", self.beta2, "0.999 is usual.")
        yield from positive_float32("server_optimizer.eps", self.eps, "1e-8 is usual.")


@dataclass(kw_only=True, slots=True)
class ScaffoldConfig(ServerOptimizerConfig):
    """SCAFFOLD: control variates take each client's drift out of its local steps (arXiv 1910.06378)."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True, walks_clients=True)


@dataclass(kw_only=True, slots=True)
class FedDynConfig(ServerOptimizerConfig):
    """FedDyn: a dynamic regulariser lets local optima agree with the global one (arXiv 2111.04263)."""

    alpha: float = 0.0
    """Strength of the pull to the round's start; 0 = 0.5 / (lr * T). What all clients agree on moves theta by its
    gradient / alpha a round, where the other rules go lr * T: a smaller alpha makes longer steps."""
    local_steps: int = 1
    """T, which the option takes from ``fl.local_steps``; read for alpha = 0 alone."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=True, walks_clients=True)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if not (self.pull >= 2.0**-126 and self.lr * self.pull < 1):
            rule = "be >= 0 and make server_optimizer.lr * alpha less than 1, or the pull overshoots the round's start"
            remedy = "Write 0, which chooses 0.5 / (lr * local steps)."
            yield problem("server_optimizer.alpha", rule, self.alpha, remedy)

    @property
    def pull(self) -> float:
        """``alpha``, or what 0 stands for: FedDyn's step is then twice as long as that of the other rules."""
        reach = self.lr * self.local_steps
        return self.alpha or (0.5 / reach if reach > 0 else 1.0)
