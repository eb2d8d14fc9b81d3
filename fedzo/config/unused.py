"""Settings that nothing reads beside the others: a command line that names one is refused.

Presets may hold some, for runs of many kinds, and so may jobs of a sweep of which others need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedzo.config.plugins import option_of
from fedzo.config.schema import LaunchConfig
from fedzo.data.config import Loss
from fedzo.data.tasks import lists_candidates, num_labels
from fedzo.errors import Problem, printable
from fedzo.fl.config import Aggregation, BestBy, Directions, Weighting
from fedzo.models.config import DType
from fedzo.trainers.base import TrainerConfig
from fedzo.trainers.calibration import CalibratedConfig
from fedzo.zo.estimator import ZerothOrderConfig
from fedzo.zo.server_optimizer import Schedule

Row = tuple[str, str, str]
"""A key or a section, why nothing reads it, and what to do."""


def unused_problems(
    configs: Sequence[LaunchConfig], typed: Mapping[str, str], *, is_search: bool = False
) -> Iterator[Problem]:
    """The problems of a command line that is sound otherwise.

    Args:
        configs: The settings of its run, or of each job of its sweep, before they are filled; of a search, a few jobs
            that have every choice.
        typed: What it says itself, by key, in its own words.
        is_search: Whether the jobs are those of a search.
    """
    first, *others = [list(_rows(config)) for config in configs]
    for row in first:
        key, why, remedy = row
        # Of a search for one reason in all, which is the choice of one other key: so no job has another choice there.
        # By the key alone, it would need jobs with every pair of choices, which a grid has.
        if not all(row in each if is_search else key in {other[0] for other in each} for each in others):
            continue
        for name, value in typed.items():
            if name == key or name.startswith(f"{key}."):
                yield Problem(name, f"{name} must be left out {why}, got {printable(value)}. {remedy}")


def _rows(config: LaunchConfig) -> Iterator[Row]:
    estimator, partition = config.estimator, config.partition
    if partition.traits.own_rows:
        why = f"for {option_of(config, 'partition')}, where each client has a file of its own, and all rows of it"
        for key in ("split", "partition.min_rows"):
            yield key, why, "Give each file the rows that its client is to have."
    if config.runtime.traits.has_sites:
        why = f"for {option_of(config, 'runtime')}, where each site's own file names its rows"
        yield "data.path", why, "Write it into the files of the sites."
    if config.server_optimizer.lr is not None:
        yield "trainer.lr", "beside server_optimizer.lr, which is used in its place", "Write one of them."
    if not isinstance(estimator, ZerothOrderConfig):
        yield "trainer.eps", f"for {option_of(config, 'estimator')}, which has no probes", "Leave it out."
    elif estimator.eps is not None:
        yield "trainer.eps", "beside estimator.eps, which is used in its place", "Write one of them."
    if config.fl.label_counts and num_labels(config.task) == 0:
        listed = "rows that list their own candidates, which"
        which = listed if lists_candidates(config.task) else f"task.kind={config.task.kind}, whose rows"
        yield "fl.label_counts", f"for {which} have no labels", "Leave it out."
    if config.runtime.traits.takes_turns:
        why = f"for {option_of(config, 'runtime')}, where clients run one after another, without a limit"
        yield "strategy.deadline_s", why, "Leave it out."
    if config.inputs.artifact is None:  # else its own settings count
        yield from _of_trainer(config.trainer)
    yield from _of_updates(config)
    yield from _of_scores(config)
    yield from _of_forwards(config)


def _of_trainer(trainer: TrainerConfig) -> Iterator[Row]:
    if isinstance(trainer, CalibratedConfig) and not trainer.reads_text:
        word = trainer.traits.gradient_setting
        for name in ("calibration", "calibration_docs", "calibration_tokens"):
            yield f"trainer.{name}", f"without {word}, since no text is read", f"Write {word}, or leave it out."


def _of_updates(config: LaunchConfig) -> Iterator[Row]:
    strategy, is_sign = config.strategy, config.strategy.aggregation is Aggregation.majority_sign
    sizeless = "for strategy.aggregation=majority_sign, since a sign has no size", "Leave it out."
    if config.fl.directions is not Directions.pool:
        yield "fl.pool_size", "without fl.directions=pool", "Write fl.directions=pool, or leave it out."
    if strategy.weighting is Weighting.uniform:
        why = "for strategy.weighting=uniform, which does not use it"
        yield "strategy.size_cap", why, "Write strategy.weighting=size, or leave it out."
    if strategy.aggregation is not Aggregation.trimmed_mean:
        word = "strategy.aggregation=trimmed_mean"
        yield "strategy.trim_share", f"without {word}", f"Write {word}, or leave it out."
    if is_sign:
        yield "strategy.max_abs_g", *sizeless
    if strategy.clip_factor == 0:
        why = "for strategy.clip_factor=0, which does not use it"
        yield "strategy.clip_rounds", why, "Write strategy.clip_factor=100, or leave it out."
    elif is_sign:
        yield "strategy.clip_rounds", *sizeless
    elif config.estimator.sends_vectors:
        why = f"for {option_of(config, 'estimator')}, whose vectors are compared with those of their round alone"
        yield "strategy.clip_rounds", why, "Leave it out."
    if config.server_optimizer.schedule is Schedule.constant:
        why, word = "for server_optimizer.schedule=constant, which does not use it", "server_optimizer.schedule"
        yield "server_optimizer.final_lr_share", why, f"Write {word}=linear or cosine, or leave it out."
    if config.model.dtype is DType.float32 and (setting := config.trainer.traits.rounding_setting):
        why = "for model.dtype=float32, whose values it does not change"
        yield setting.partition("=")[0], why, "Write model.dtype=bfloat16 or float16, or leave it out."


def _of_scores(config: LaunchConfig) -> Iterator[Row]:
    evaluation, nobody = config.evaluation, {"evaluators=[]": not config.evaluators}
    central = {"evaluation.central=false": not evaluation.central, "split.num_dev=0": config.split.num_dev == 0}
    if lacks := _first(nobody | central):
        why = f"for {lacks}, with which no dev row is scored"
        yield "evaluation.best_by", why, "Leave it out."
        if evaluation.every_rounds:
            yield "evaluation.every_rounds", why, "For scores of clients, write evaluation.federated_every_rounds."
    elif config.task.loss is Loss.score and evaluation.best_by is BestBy.loss:
        yield "evaluation.best_by", "for task.loss=score, with which the value chooses", "Leave it out."
    held = {"partition.holdout=0": config.partition.holdout == 0}
    if (lacks := _first(nobody | held)) and evaluation.federated_every_rounds > 0:
        yield "evaluation.federated_every_rounds", f"for {lacks}, with which no client scores a row", "Leave it out."
    never = {"evaluation.federated_every_rounds=-1": evaluation.federated_every_rounds < 0}
    if lacks := _first(nobody | held | never):
        yield "evaluation.federated_max_rows", f"for {lacks}, with which no client scores a row", "Leave it out."


def _of_forwards(config: LaunchConfig) -> Iterator[Row]:
    model, estimator, names = config.model, config.estimator, ["cuda_graphs", "lower_layers_cache_mb"]
    if model.compile:
        chosen = "model.compile=true"
    elif estimator.sends_vectors:
        chosen = option_of(config, "estimator")
    elif estimator.freezes_routing:
        chosen = "estimator.freeze_routing=true"
    elif config.task.loss is Loss.score:
        chosen, names = "task.loss=score", ["lower_layers_cache_mb"]
    else:
        return
    for name in names:
        if getattr(model, name):
            yield f"model.{name}", f"for {chosen}, with which it is not used", "Leave it out."


def _first(holds: Mapping[str, bool]) -> str:
    """The first word that holds; empty where none does."""
    return next((word for word, is_so in holds.items() if is_so), "")
