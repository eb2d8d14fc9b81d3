"""Rules on the selection of clients."""

from __future__ import annotations

from collections.abc import Iterator

from fedzo.config.problem import Problem, not_negative, positive, problem
from fedzo.config.schema import RunConfig
from fedzo.data.config import TaskKind
from fedzo.fl.config import Aggregation
from fedzo.fl.selection.config import (
    CusumConfig,
    EarlyStopConfig,
    OracleConfig,
    RandomConfig,
    Statistic,
    VpcsConfig,
    VpcsTest,
)
from fedzo.fl.selection.statistics import FEWEST
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
from fedzo.zo.path import MOST_STEPS

_REMEDY = "Leave it out for the default."
_WITHOUT_GRADIENT = (MezoConfig, LoraTrainerConfig, Ia3TrainerConfig, PrefixTrainerConfig, PromptTrainerConfig)


def selection_problems(config: RunConfig) -> Iterator[Problem]:
    """Broken rules on ``selection``."""
    selection, fl = config.selection, config.fl
    if isinstance(selection, EarlyStopConfig):
        yield from _early_stop(selection, local_steps=fl.local_steps)
    if isinstance(selection, VpcsConfig | CusumConfig) and isinstance(config.estimator, FzooConfig):
        rule = "be two_point or one_sided for a selection by |g|: fzoo divides |g| by the spread of its losses"
        yield problem("estimator", rule, "fzoo", "Choose another estimator, or selection=none.")
    if isinstance(selection, VpcsConfig | CusumConfig) and config.strategy.aggregation is Aggregation.majority_sign:
        rule = "be another than majority_sign for a selection by |g|: the clients send the sign of g alone"
        yield problem("strategy.aggregation", rule, "majority_sign", "Choose another, or selection=none.")
    match selection:
        case VpcsConfig():
            yield from _vpcs(selection, num_clients=fl.num_clients)
            yield from _gradip(config, selection)
        case CusumConfig():
            yield from not_negative("selection.drift", selection.drift, "1 is the default.")
            yield from positive("selection.threshold", selection.threshold, _REMEDY)
            asked = config.strategy.clients_per_round or fl.num_clients
            if asked < FEWEST:
                rule = (
                    f"give at least {FEWEST} clients a round for selection=cusum, which compares each with the others"
                )
                yield problem("fl.num_clients", rule, asked, "Add clients, or choose another selection.")
        case RandomConfig() if not 1 <= selection.num_flagged <= fl.num_clients:
            rule = f"be between 1 and fl.num_clients ({fl.num_clients})"
            yield problem("selection.num_flagged", rule, selection.num_flagged, "Lower it or add clients.")
        case OracleConfig():
            if not 0 < selection.label_share <= 1:
                remedy = "1 flags clients with a single label only."
                yield problem("selection.label_share", "be > 0 and <= 1", selection.label_share, remedy)
            if config.task.kind is not TaskKind.candidates:
                rule = "not be oracle for a task without labels"
                yield problem("selection", rule, "oracle", "Choose a task with candidates, or another selection.")


def _early_stop(selection: EarlyStopConfig, *, local_steps: int) -> Iterator[Problem]:
    if not 1 <= selection.early_steps <= max(local_steps, 1):
        rule = f"be between 1 and fl.local_steps ({local_steps})"
        yield problem("selection.early_steps", rule, selection.early_steps, "1 is the paper's.")
    if not 0 <= selection.fallback_steps <= max(local_steps, 1):
        rule = f"be between 0 (half) and fl.local_steps ({local_steps})"
        yield problem("selection.fallback_steps", rule, selection.fallback_steps, "Lower it, or raise fl.local_steps.")
    if not 0 <= selection.max_share <= 1:
        remedy = "It is the largest share of flagged clients; 1 sets no limit."
        yield problem("selection.max_share", "be between 0 and 1", selection.max_share, remedy)


def _vpcs(selection: VpcsConfig, *, num_clients: int) -> Iterator[Problem]:
    for key in ("initial_steps", "later_steps"):
        if getattr(selection, key) < 1:
            yield problem(f"selection.{key}", "be >= 1", getattr(selection, key), "20 is the default.")
    least = max(selection.initial_steps, 1) + max(selection.later_steps, 1)
    if not least <= selection.calibration_steps <= MOST_STEPS:
        rule = f"be between initial_steps + later_steps ({least}) and {MOST_STEPS}"
        yield problem("selection.calibration_steps", rule, selection.calibration_steps, "100 is the default.")
    for key in ("ratio_threshold", "quiet_threshold", "sigma_share", "level_threshold"):
        yield from positive(f"selection.{key}", getattr(selection, key), _REMEDY)
    if selection.quiet_threshold >= 1:
        remedy = "It is a share of steps that has to be exceeded."
        yield problem("selection.quiet_threshold", "be below 1", selection.quiet_threshold, remedy)
    if not selection.tests:
        yield problem("selection.tests", "name a test", [], "ratio, quiet and level are there.")
    if set(selection.tests) == {VpcsTest.level} and num_clients < FEWEST:
        rule = f"be at least {FEWEST} for selection.tests=[level], which compares each client with the others"
        yield problem("fl.num_clients", rule, num_clients, "Add clients, or another test.")


def _gradip(config: RunConfig, selection: VpcsConfig) -> Iterator[Problem]:
    trainer = config.trainer
    if selection.statistic is not Statistic.gradip:
        return
    remedy = "Use trainer=meerkat with trainer.selector=sensitivity, or selection.statistic=abs_g."
    chosen_without = isinstance(trainer, MeerkatConfig) and (
        trainer.selector is not Selector.sensitivity and trainer.mask_path is None
    )
    if isinstance(trainer, _WITHOUT_GRADIENT) or chosen_without:
        rule = "be abs_g for a trainer that has no gradient to compare with"
        yield problem("selection.statistic", rule, "gradip", remedy)
