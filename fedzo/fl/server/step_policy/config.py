"""What a user can say about step policies. Defaults are ours: the paper's thresholds are not recoverable."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


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
    """Both tests must flag the client. A test that is not in ``tests`` is ignored."""
    either = "either"


@dataclass(kw_only=True, slots=True)
class StepPolicyConfig:
    """Which clients stop early in every round."""


@dataclass(kw_only=True, slots=True)
class NoStepPolicyConfig(StepPolicyConfig):
    """All clients take all local steps."""


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig(StepPolicyConfig):
    """What happens to flagged clients."""

    early_steps: int = 1
    """Local steps a round of a flagged client. Its next round continues with its next rows."""
    max_share: float = 0.5
    """Largest share of flagged clients. Above it, no client is stopped early and all clients take
    ``fallback_steps``."""
    fallback_steps: int = 0
    """Local steps a round of all clients above ``max_share``. 0 = half of ``fl.local_steps``."""


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
    """The test ``ratio`` flags a client whose initial mean over its later mean is above."""
    quiet_threshold: float = 0.5
    """The test ``quiet`` flags a client whose share of steps below sigma is above."""
    sigma_share: float = 0.1
    """sigma is this share of the median over clients of the initial phase's mean."""
    level_threshold: float = 2.0
    """The test ``level`` flags a client for which the others' median over its own mean is above."""
    graded: bool = False
    """Set the steps by the strength of the finding: T/2 from the threshold on, T/4 from twice the threshold on, and
    so on. The minimum is ``early_steps``."""


@dataclass(kw_only=True, slots=True)
class CusumConfig(EarlyStopConfig):
    """A sequential test before every round: a CUSUM of how far log |g| lies below the others' median."""

    drift: float = 1.0
    """Difference in natural logarithms that is subtracted at every step."""
    threshold: float = 8.0
    """A client whose CUSUM has once been above is flagged for the rest of the run."""
    graded: bool = False
    """Stop by strength: T/2 from the threshold on, T/4 from twice the threshold on, ...; at least ``early_steps``."""


@dataclass(kw_only=True, slots=True)
class RandomConfig(EarlyStopConfig):
    """A baseline that flags clients drawn at random once."""

    num_flagged: int = 1
    """Number of flagged clients, for example as many as another step policy flagged."""


@dataclass(kw_only=True, slots=True)
class OracleConfig(EarlyStopConfig):
    """A baseline that flags clients with (nearly) one label, by the label counts that they declared."""

    label_share: float = 0.9
    """A client is flagged if its most frequent label has at least this share of its rows."""
