"""What a user can say about step policies. Defaults are ours: the paper's thresholds are not recoverable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from fedzo.errors import Problem, not_negative, positive, problem
from fedzo.records.fields import MOST_STEPS
from fedzo.registry import PluginConfig

if TYPE_CHECKING:
    from fedzo.config.schema import RunConfig

FEWEST = 3
"""Clients that must have measured a step for "the others" to have a median."""
_REMEDY = "Leave it out for the default."


class Statistic(StrEnum):
    """What is measured of a client's local step."""

    abs_g = "abs_g"
    """|g|, the projected gradient itself; any trainer."""
    gradip = "gradip"
    """|g xi|, the paper's GradIP: |g| times a factor of the seed; the trainer must have a gradient."""


class VpcsTest(StrEnum):
    """What speaks for a client being extreme."""

    ratio = "ratio"
    """The mean of the initial phase over that of the later phase is above ``ratio_threshold``."""
    quiet = "quiet"
    """The share of the later phase's steps below sigma is above ``quiet_threshold``."""
    level = "level"
    """The others' median of the later phase over the client's own mean is above ``level_threshold``."""


class Combine(StrEnum):
    """How ratio and quiet are combined; level, where it is chosen, flags alone."""

    both = "both"
    """Both must speak for it; one that is not made is not asked."""
    either = "either"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPolicyTraits:
    """What the rules on other parts of a run must know of a step policy.

    Attributes:
        stops_clients: Whether some clients may take fewer steps than others.
        compares_abs_g: Whether it compares |g| of steps and clients.
        needs_labels: Whether it reads how many rows of each label a client declared.
    """

    stops_clients: bool = True
    compares_abs_g: bool = False
    needs_labels: bool = False


@dataclass(kw_only=True, slots=True)
class StepPolicyConfig(PluginConfig):
    """Which clients stop early in every round."""

    @property
    def traits(self) -> StepPolicyTraits:
        """What other parts of a run must know of this step policy."""
        return StepPolicyTraits()


@dataclass(kw_only=True, slots=True)
class NoStepPolicyConfig(StepPolicyConfig):
    """All clients take all local steps."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(stops_clients=False)


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig(StepPolicyConfig):
    """What happens to flagged clients."""

    early_steps: int = 1
    """Local steps a round of a flagged client; its data pointer stays, so all its rows are used."""
    max_share: float = 0.5
    """Largest share of flagged clients; above it nobody is stopped early and all clients take ``fallback_steps``."""
    fallback_steps: int = 0
    """Local steps a round of all clients then; 0 = half of ``fl.local_steps``."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        most = max(run.fl.local_steps, 1)
        if not 1 <= self.early_steps <= most:
            rule = f"be between 1 and fl.local_steps ({run.fl.local_steps})"
            yield problem("step_policy.early_steps", rule, self.early_steps, "1 is the paper's.")
        if not 0 <= self.fallback_steps <= most:
            rule = f"be between 0 (half) and fl.local_steps ({run.fl.local_steps})"
            remedy = "Lower it, or raise fl.local_steps."
            yield problem("step_policy.fallback_steps", rule, self.fallback_steps, remedy)
        if not 0 <= self.max_share <= 1:
            remedy = "It is the largest share of flagged clients; 1 sets no limit."
            yield problem("step_policy.max_share", "be between 0 and 1", self.max_share, remedy)


@dataclass(kw_only=True, slots=True)
class VpcsConfig(EarlyStopConfig):
    """VPCS: round 0 is a calibration that does not move the model (Meerkat-vp, arXiv 2506.03337)."""

    calibration_steps: int = 100
    """Local steps of every client in round 0, at ``server_optimizer.lr``."""
    initial_steps: int = 20
    """Length of the initial phase."""
    later_steps: int = 20
    """Length of the later phase, at the end."""
    statistic: Statistic = Statistic.abs_g
    tests: list[VpcsTest] = field(default_factory=lambda: list(VpcsTest))
    """Which tests are made; flagged = (ratio ``combine`` quiet) or level."""
    combine: Combine = Combine.both
    ratio_threshold: float = 3.0
    """Of the initial phase's mean over the later phase's; a client above it speaks for the test ``ratio``."""
    quiet_threshold: float = 0.5
    """Of the share of quiet steps, for the test ``quiet``."""
    sigma_share: float = 0.1
    """sigma is this share of the median over clients of the initial phase's mean."""
    level_threshold: float = 2.0
    """Of the others' median over the client's own mean, for the test ``level``."""
    graded: bool = False
    """Stop by strength: T/2 from the threshold on, T/4 from twice the threshold on, ...; at least ``early_steps``."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(compares_abs_g=True)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        for key in ("initial_steps", "later_steps"):
            if getattr(self, key) < 1:
                yield problem(f"step_policy.{key}", "be >= 1", getattr(self, key), "20 is the default.")
        least = max(self.initial_steps, 1) + max(self.later_steps, 1)
        if not least <= self.calibration_steps <= MOST_STEPS:
            rule = f"be between initial_steps + later_steps ({least}) and {MOST_STEPS}"
            yield problem("step_policy.calibration_steps", rule, self.calibration_steps, "100 is the default.")
        for key in ("ratio_threshold", "quiet_threshold", "sigma_share", "level_threshold"):
            yield from positive(f"step_policy.{key}", getattr(self, key), _REMEDY)
        if self.quiet_threshold >= 1:
            remedy = "It is a share of steps that has to be exceeded."
            yield problem("step_policy.quiet_threshold", "be below 1", self.quiet_threshold, remedy)
        if not self.tests:
            yield problem("step_policy.tests", "name a test", [], "ratio, quiet and level are there.")
        if set(self.tests) == {VpcsTest.level} and run.fl.num_clients < FEWEST:
            rule = f"be at least {FEWEST} for step_policy.tests=[level], which compares each client with the others"
            yield problem("fl.num_clients", rule, run.fl.num_clients, "Add clients, or another test.")
        if self.statistic is Statistic.gradip and not run.trainer.traits.gradient:
            rule = "be abs_g for a trainer that has no gradient to compare with"
            remedy = "Use trainer=meerkat with trainer.selector=sensitivity, or step_policy.statistic=abs_g."
            yield problem("step_policy.statistic", rule, self.statistic, remedy)


@dataclass(kw_only=True, slots=True)
class CusumConfig(EarlyStopConfig):
    """A sequential test before every round: a CUSUM of how far log |g| lies below the others' median."""

    drift: float = 1.0
    """Shortfall in natural logarithms that every step forgives."""
    threshold: float = 8.0
    """A client is flagged for good once its CUSUM has been above."""
    graded: bool = False
    """Stop by strength: T/2 from the threshold on, T/4 from twice the threshold on, ...; at least ``early_steps``."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(compares_abs_g=True)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from not_negative("step_policy.drift", self.drift, "1 is the default.")
        yield from positive("step_policy.threshold", self.threshold, _REMEDY)
        asked = run.strategy.clients_per_round or run.fl.num_clients
        if asked < FEWEST:
            rule = f"give at least {FEWEST} clients a round for step_policy=cusum, which compares each with the others"
            yield problem("fl.num_clients", rule, asked, "Add clients, or choose another step_policy.")


@dataclass(kw_only=True, slots=True)
class RandomConfig(EarlyStopConfig):
    """A baseline: clients drawn at random once."""

    num_flagged: int = 1
    """How many, for example as many as another step policy flagged."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if not 1 <= self.num_flagged <= run.fl.num_clients:
            rule = f"be between 1 and fl.num_clients ({run.fl.num_clients})"
            yield problem("step_policy.num_flagged", rule, self.num_flagged, "Lower it or add clients.")


@dataclass(kw_only=True, slots=True)
class OracleConfig(EarlyStopConfig):
    """A baseline that knows the labels: clients with (nearly) one label, by the counts of their registration."""

    label_share: float = 0.9
    """A client is flagged whose commonest label has at least this share of its rows."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(needs_labels=True)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if not 0 < self.label_share <= 1:
            remedy = "1 flags clients with a single label only."
            yield problem("step_policy.label_share", "be > 0 and <= 1", self.label_share, remedy)
