"""What a user can say about estimators and server optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Distribution(StrEnum):
    """Law of a direction's coordinates (``docs/explanation-randomness.md``)."""

    gaussian = "gaussian"
    rademacher = "rademacher"


class Rounding(StrEnum):
    """How an updated weight is rounded where the model holds 16-bit weights and there is no float32 master."""

    nearest = "nearest"
    """To the nearest value. A step of less than half the spacing of the weight's neighbours moves nothing."""
    stochastic = "stochastic"
    """Up or down with probabilities that keep the mean, drawn from the run seed. Small steps add up."""


@dataclass(kw_only=True, slots=True)
class EstimatorConfig:
    """How a loss is turned into projected gradients."""

    eps: float = 1e-3
    """How far along a direction a loss is evaluated."""
    num_probes: int = 1
    """Number of directions in a step. The step is their mean."""
    distribution: Distribution = Distribution.gaussian
    freeze_routing: bool = False
    """Fix hard choices (the experts that a router takes) in the probes of a step. One more forward a step, unless
    the estimator evaluates the loss at theta."""


@dataclass(kw_only=True, slots=True)
class TwoPointConfig(EstimatorConfig):
    """Central difference along ``num_probes`` random directions a step (SPSA; MeZO, arXiv 2305.17333)."""


class Baseline(Enum):  # no StrEnum: a string has a method ``center``
    """What a one-sided estimate subtracts from a perturbed loss."""

    center = "center"
    """The loss at theta: one more forward a step."""
    mean = "mean"
    """The mean of the step's perturbed losses: no more forwards, but the estimate is (P - 1) / P of the gradient."""
    leave_one_out = "leave_one_out"
    """The mean of the step's other perturbed losses: no more forwards, unbiased."""


@dataclass(kw_only=True, slots=True)
class OneSidedConfig(EstimatorConfig):
    """Forward difference: one forward a probe, and one for all where the baseline is the centre."""

    baseline: Baseline = Baseline.center


@dataclass(kw_only=True, slots=True)
class FzooConfig(EstimatorConfig):
    """Forward differences over the standard deviation of their losses (FZOO, arXiv 2506.09034); lr is scale-free."""

    num_probes: int = 8
    distribution: Distribution = Distribution.rademacher


class Schedule(StrEnum):
    """Course of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class ServerOptimizerConfig:
    """How aggregated projected gradients move the trained values."""

    lr: float = 1e-4
    """Learning rate. The presets take ``trainer.lr``."""
    schedule: Schedule = Schedule.constant
    final_lr_share: float = 0.1
    """Share of ``lr`` in the last round, where the schedule is linear or cosine. With 0, the last round does not
    move the model."""
    warmup_rounds: int = 0
    """Rounds over which the learning rate rises linearly before it is reached."""
    weight_decay: float = 0.0
    """Decoupled: the trained values are multiplied by 1 - lr * weight_decay once a round."""


@dataclass(kw_only=True, slots=True)
class SgdConfig(ServerOptimizerConfig):
    """Plain SGD: ``theta -= lr * c * z``."""


@dataclass(kw_only=True, slots=True)
class MomentumConfig(ServerOptimizerConfig):
    """Heavy ball over rounds: ``m = momentum * m + u``, ``theta -= lr * m``. u is the sum of c z."""

    momentum: float = 0.9
    """Share of m that a round keeps."""
    nesterov: bool = False
    """Step along u + momentum * m instead of m."""


@dataclass(kw_only=True, slots=True)
class AdamConfig(ServerOptimizerConfig):
    """Adam over rounds (arXiv 1412.6980) with decoupled decay (AdamW, arXiv 1711.05101)."""

    beta1: float = 0.9
    """Share of the first moment that a round keeps."""
    beta2: float = 0.999
    """Share of the second moment that a round keeps."""
    eps: float = 1e-8
    """Added to the root of the second moment."""


@dataclass(kw_only=True, slots=True)
class ScaffoldConfig(ServerOptimizerConfig):
    """SCAFFOLD: control variates take each client's drift out of its local steps (arXiv 1910.06378)."""


@dataclass(kw_only=True, slots=True)
class FedDynConfig(ServerOptimizerConfig):
    """FedDyn: a dynamic regulariser lets local optima agree with the global one (arXiv 2111.04263)."""

    alpha: float = 0.0
    """Strength of the pull to the start of the round. 0 = 0.5 / (lr T). A gradient that all clients share moves
    theta by gradient / alpha a round, with other server optimizers by gradient times lr T. A smaller alpha makes
    longer steps."""
    local_steps: int = 1
    """T, set to ``fl.local_steps``. Used for alpha = 0 only."""

    @property
    def pull(self) -> float:
        """``alpha``, or what 0 stands for: FedDyn's step is then twice as long as that of the other rules."""
        reach = self.lr * self.local_steps
        return self.alpha or (0.5 / reach if reach > 0 else 1.0)
