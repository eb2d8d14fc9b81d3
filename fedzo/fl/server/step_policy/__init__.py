"""Which clients stop early in a round, decided from what they measured (``docs/how-to-non-iid.md``)."""

from __future__ import annotations

import logging

from fedzo.errors import ConfigError
from fedzo.fl.config import FlConfig
from fedzo.fl.server.step_policy import baselines, cusum, vpcs
from fedzo.fl.server.step_policy.config import EarlyStopConfig, Statistic, StepPolicyConfig, VpcsConfig
from fedzo.fl.server.step_policy.plan import STEP_POLICIES, Plan, StepPolicy
from fedzo.fl.server.step_policy.vpcs import NO_GRADIENT

__all__ = ["STEP_POLICIES", "Plan", "StepPolicy", "baselines", "cusum", "vpcs"]
log = logging.getLogger(__name__)


def most_steps(step_policy: StepPolicyConfig, fl: FlConfig) -> int:
    """The most local steps that a client takes in one round."""
    return max(fl.local_steps, step_policy.calibration_steps) if isinstance(step_policy, VpcsConfig) else fl.local_steps


def check_step_policy(step_policy: StepPolicyConfig, fl: FlConfig, *, has_gradient: bool) -> None:
    """What shows only once the trainer is prepared.

    Raises:
        ConfigError: GradIP is asked for, and there is no gradient.
    """
    if isinstance(step_policy, VpcsConfig) and step_policy.statistic is Statistic.gradip and not has_gradient:
        raise ConfigError(NO_GRADIENT)
    if isinstance(step_policy, VpcsConfig) and fl.rounds == 1:
        log.warning("fl.rounds is 1, and the first round is the calibration: the model will not move. Raise fl.rounds.")
    if isinstance(step_policy, EarlyStopConfig) and fl.local_steps == 1:
        log.warning(
            "fl.local_steps is 1, so no client can stop earlier. The step policy only reports its findings. "
            "Raise fl.local_steps to let it act."
        )
