"""Rules on the step policy of clients."""

from __future__ import annotations

from collections.abc import Iterator

from fedzo.config.problem import Problem, not_negative, positive, problem
from fedzo.config.schema import RunConfig
from fedzo.data.config import TaskKind
from fedzo.fl.config import Aggregation
from fedzo.fl.server.step_policy.config import (
    CusumConfig,
    EarlyStopConfig,
    OracleConfig,
    RandomConfig,
    Statistic,
    VpcsConfig,
    VpcsTest,
)
from fedzo.fl.server.step_policy.statistics import FEWEST
from fedzo.records.fields import MOST_STEPS
from fedzo.trainers.config import (
    Ia3TrainerConfig,
    LoraTrainerConfig,
    MeerkatConfig,
    MezoConfig,
    PrefixTrainerConfig,
    PromptTrainerConfig,
    Selector,
)
from fedzo.zo.config import FzooConfig

_REMEDY = "Leave it out for the default."
_WITHOUT_GRADIENT = (MezoConfig, LoraTrainerConfig, Ia3TrainerConfig, PrefixTrainerConfig, PromptTrainerConfig)


def step_policy_problems(config: RunConfig) -> Iterator[Problem]:
    """Broken rules on ``step_policy``."""
    step_policy, fl = config.step_policy, config.fl
    if isinstance(step_policy, EarlyStopConfig):
        yield from _early_stop(step_policy, local_steps=fl.local_steps)
    if isinstance(step_policy, VpcsConfig | CusumConfig) and isinstance(config.estimator, FzooConfig):
        rule = "be two_point or one_sided for a step policy by |g|: fzoo divides |g| by the spread of its losses"
        yield problem("estimator", rule, "fzoo", "Choose another estimator, or step_policy=none.")
    if isinstance(step_policy, VpcsConfig | CusumConfig) and config.strategy.aggregation is Aggregation.majority_sign:
        rule = "be another than majority_sign for a step policy by |g|: the clients send only the sign of g"
        yield problem("strategy.aggregation", rule, "majority_sign", "Choose another, or step_policy=none.")
    match step_policy:
        case VpcsConfig():
            yield from _vpcs(step_policy, num_clients=fl.num_clients)
            yield from _gradip(config, step_policy)
        case CusumConfig():
            yield from not_negative("step_policy.drift", step_policy.drift, "1 is the default.")
            yield from positive("step_policy.threshold", step_policy.threshold, _REMEDY)
            asked = config.strategy.clients_per_round or fl.num_clients
            if asked < FEWEST:
                rule = (
                    f"give at least {FEWEST} clients a round for step_policy=cusum, which compares each with the others"
                )
                yield problem("fl.num_clients", rule, asked, "Add clients, or choose another step_policy.")
        case RandomConfig() if not 1 <= step_policy.num_flagged <= fl.num_clients:
            rule = f"be between 1 and fl.num_clients ({fl.num_clients})"
            yield problem("step_policy.num_flagged", rule, step_policy.num_flagged, "Lower it or add clients.")
        case OracleConfig():
            if not 0 < step_policy.label_share <= 1:
                remedy = "1 flags clients with a single label only."
                yield problem("step_policy.label_share", "be > 0 and <= 1", step_policy.label_share, remedy)
            if config.task.kind is not TaskKind.candidates:
                rule = "not be oracle for a task without labels"
                yield problem("step_policy", rule, "oracle", "Choose a task with candidates, or another step_policy.")


def _early_stop(step_policy: EarlyStopConfig, *, local_steps: int) -> Iterator[Problem]:
    if not 1 <= step_policy.early_steps <= max(local_steps, 1):
        rule = f"be between 1 and fl.local_steps ({local_steps})"
        yield problem("step_policy.early_steps", rule, step_policy.early_steps, "1 is the paper's.")
    if not 0 <= step_policy.fallback_steps <= max(local_steps, 1):
        rule = f"be between 0 (half) and fl.local_steps ({local_steps})"
        yield problem(
            "step_policy.fallback_steps", rule, step_policy.fallback_steps, "Lower it, or raise fl.local_steps."
        )
    if not 0 <= step_policy.max_share <= 1:
        remedy = "The largest share of flagged clients. 1 sets no limit."
        yield problem("step_policy.max_share", "be between 0 and 1", step_policy.max_share, remedy)


def _vpcs(step_policy: VpcsConfig, *, num_clients: int) -> Iterator[Problem]:
    for key in ("initial_steps", "later_steps"):
        if getattr(step_policy, key) < 1:
            yield problem(f"step_policy.{key}", "be >= 1", getattr(step_policy, key), "20 is the default.")
    least = max(step_policy.initial_steps, 1) + max(step_policy.later_steps, 1)
    if not least <= step_policy.calibration_steps <= MOST_STEPS:
        rule = f"be between initial_steps + later_steps ({least}) and {MOST_STEPS}"
        yield problem("step_policy.calibration_steps", rule, step_policy.calibration_steps, "100 is the default.")
    for key in ("ratio_threshold", "quiet_threshold", "sigma_share", "level_threshold"):
        yield from positive(f"step_policy.{key}", getattr(step_policy, key), _REMEDY)
    if step_policy.quiet_threshold >= 1:
        remedy = "A client is flagged above this share of steps."
        yield problem("step_policy.quiet_threshold", "be below 1", step_policy.quiet_threshold, remedy)
    if not step_policy.tests:
        yield problem("step_policy.tests", "name a test", [], "Choose among ratio, quiet and level.")
    if set(step_policy.tests) == {VpcsTest.level} and num_clients < FEWEST:
        rule = f"be at least {FEWEST} for step_policy.tests=[level], which compares each client with the others"
        yield problem("fl.num_clients", rule, num_clients, "Add clients, or another test.")


def _gradip(config: RunConfig, step_policy: VpcsConfig) -> Iterator[Problem]:
    trainer = config.trainer
    if step_policy.statistic is not Statistic.gradip:
        return
    remedy = "Use trainer=meerkat with trainer.selector=sensitivity, or step_policy.statistic=abs_g."
    chosen_without = isinstance(trainer, MeerkatConfig) and (
        trainer.selector is not Selector.sensitivity and trainer.mask_path is None
    )
    if isinstance(trainer, _WITHOUT_GRADIENT) or chosen_without:
        rule = "be abs_g for a trainer that has no gradient to compare with"
        yield problem("step_policy.statistic", rule, "gradip", remedy)
