"""From overrides to a checked ``LaunchConfig``. The only door: strict, and every problem in one message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedzo.config.compose import FAILURES, compose_run, option_names, session, to_config
from fedzo.config.diagnose import diagnose, reason, respelled
from fedzo.config.overrides import rewrite_model
from fedzo.config.rules import launch_problems, missing_files
from fedzo.config.schema import LaunchConfig, filled
from fedzo.errors import ConfigError, Problem, problem
from fedzo.fl.config import Aggregation, Seeds, Weighting
from fedzo.models.config import DType
from fedzo.report.trackers import missing_libraries
from fedzo.zo.server_optimizer import Schedule


def load(overrides: Sequence[str], *, trains: bool = True) -> LaunchConfig:
    """Compose, resolve and check one run.

    Args:
        overrides: Hydra overrides, such as ``["trainer=mezo", "fl.rounds=3"]``; ``model=`` also takes a hub name or
            a local folder.
        trains: Whether a run may come of it. Otherwise what a trainer asks of the model plays no part.

    Raises:
        ConfigError: unknown keys and options, wrong types, broken rules and settings without effect, all of them in one
            message.
    """
    with session():
        config, found = check(rewrite_model(overrides, option_names("model", overrides)), trains=trains)
    if config is not None:
        found += unused_problems(config)
    if config is None or found:
        raise ConfigError(message([problem.text for problem in found]))
    return config


def checked(composed: DictConfig) -> LaunchConfig:
    """The typed config of what ``hydra.main`` composed, which may come from a sweeper that nobody checked before.

    Raises:
        ConfigError: it breaks a rule.
    """
    try:
        config = to_config(composed)
    except FAILURES as error:
        raise ConfigError(reason(error)) from error
    config, found = _ruled(config)
    if found:
        raise ConfigError(message([problem.text for problem in found]))
    return config


def check(overrides: Sequence[str], *, trains: bool = True) -> tuple[LaunchConfig | None, list[Problem]]:
    """The config, ``None`` if it cannot be composed, and its problems; needs a ``session``."""
    try:
        config = to_config(compose_run(overrides))
    except FAILURES as error:
        return None, _all_problems(overrides, error, trains=trains)
    config, found = _ruled(config, trains=trains)
    return config, [*respelled(overrides), *found]


def _ruled(config: LaunchConfig, *, trains: bool = True) -> tuple[LaunchConfig, list[Problem]]:
    """The config with what was left to the trainer, and its broken rules."""
    missing, unread = missing_files(config), []
    if config.inputs.artifact is not None and not any(each.key == "inputs.artifact" for each in missing):
        try:
            recipe = config.trainer.recipe_of(Path(config.inputs.artifact).expanduser())
            config = replace(config, trainer=recipe)
        except ConfigError as error:
            unread = [Problem("inputs.artifact", str(error))]
    return filled(config), [
        *launch_problems(config, trains=trains),
        *missing,
        *missing_libraries(config.trackers),
        *unread,
    ]


def _all_problems(overrides: Sequence[str], first: Exception, *, trains: bool) -> list[Problem]:
    """Hydra stops at its first problem: look at every override alone, then at the rules with those that are left."""
    kept, found = diagnose(overrides)
    try:
        config = to_config(compose_run(kept))
        rest = _ruled(config, trains=trains)[1]
    except FAILURES as error:
        rest = [Problem("", reason(error))]
    # What reads a setting that was refused just now would report the default in its place.
    refused = [rf"(?<![\w.]){re.escape(problem.key)}(?!\w)" for problem in found if problem.key]
    found += [problem for problem in rest if not any(re.search(key, problem.text) for key in refused)]
    return found or [Problem("", reason(first))]


def message(lines: Sequence[str]) -> str:
    """One text for all problems."""
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} problems in the configuration:", *(f"  - {line}" for line in lines)])


# --- settings without effect


def unused_problems(config: LaunchConfig) -> Iterator[Problem]:
    """One for each setting that differs from its default though nothing reads it beside the others.

    Jobs of a sweep may have some, where a setting belongs to one of several choices, and so may run folders.
    """
    fl, strategy, optimizer = config.fl, config.strategy, config.server_optimizer
    if fl.seeds is not Seeds.pool:
        yield from _unused("fl.pool_size", fl, f"fl.seeds={fl.seeds}", "fl.seeds=pool")
    if strategy.weighting is Weighting.uniform:
        chosen = f"strategy.weighting={strategy.weighting}"
        yield from _unused("strategy.size_cap", strategy, chosen, "strategy.weighting=size")
    if strategy.aggregation is not Aggregation.trimmed_mean:
        chosen = f"strategy.aggregation={strategy.aggregation}"
        yield from _unused("strategy.trim_share", strategy, chosen, "strategy.aggregation=trimmed_mean")
    if strategy.clip_factor == 0:
        yield from _unused("strategy.clip_rounds", strategy, "strategy.clip_factor=0", "strategy.clip_factor=100")
    if optimizer.schedule is Schedule.constant:
        chosen, other = "server_optimizer.schedule=constant", "server_optimizer.schedule=linear or cosine"
        yield from _unused("server_optimizer.final_lr_share", optimizer, chosen, other)
    if config.model.dtype is DType.float32 and (setting := config.trainer.traits.rounding_setting):
        rule = f"be bfloat16 or float16 for {setting}, which does not change float32 values"
        remedy = f"Write model.dtype=bfloat16, or leave {setting} out."
        yield problem("model.dtype", rule, config.model.dtype, remedy)


def _unused(key: str, config: Any, chosen: str, other: str) -> Iterator[Problem]:
    name = key.rpartition(".")[2]
    given, default = getattr(config, name), {each.name: each.default for each in fields(config)}[name]
    if given != default:
        rule = f"be {default} for {chosen}, which does not use it"
        yield problem(key, rule, given, f"Write {other}, or leave it out.")
