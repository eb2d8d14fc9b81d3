"""Which clients stop early in a round, decided from what they measured (``docs/how-to-non-iid.md``)."""

from fedzo.fl.server.step_policy import baselines, cusum, vpcs
from fedzo.fl.server.step_policy.plan import STEP_POLICIES, Plan, StepPolicy, StepPolicyConfig, StepPolicyTraits

__all__ = [
    "STEP_POLICIES",
    "StepPolicy",
    "StepPolicyConfig",
    "StepPolicyTraits",
    "Plan",
    "baselines",
    "cusum",
    "vpcs",
]
