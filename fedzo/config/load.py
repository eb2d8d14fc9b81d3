"""From overrides to a checked ``LaunchConfig``. The only door: strict, and every problem in one message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from fedzo.config.compose import FAILURES, compose_run, session, to_config, with_models
from fedzo.config.diagnose import diagnose, parse_overrides, reason, respelled
from fedzo.config.rules import launch_problems, missing_here
from fedzo.config.schema import LaunchConfig, filled
from fedzo.config.unused import unused_problems
from fedzo.errors import ConfigError, Problem, listed, refuse
from fedzo.report.trackers import missing_libraries


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
        overrides = with_models(overrides)
        parsed, _ = parse_overrides(overrides)
        config, found = check(overrides, parsed, trains=trains)
        if config is not None:
            found += unused_problems([config], own_words(parsed))
    if config is None or found:
        raise ConfigError(listed([problem.text for problem in found]))
    return filled(config)


def own_words(parsed: Iterable[Override]) -> dict[str, str]:
    """What overrides set, by key, as they are written."""
    return {each.key_or_group: str(each.input_line).partition("=")[2] for each in parsed if not each.is_delete()}


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
    refuse(found)
    return filled(config)


def check(
    overrides: Sequence[str], parsed: Iterable[Override], *, trains: bool = True
) -> tuple[LaunchConfig | None, list[Problem]]:
    """The config before it is filled, ``None`` if it cannot be composed, and its problems; needs a ``session``.

    Args:
        overrides: Of one run.
        parsed: The same, as Hydra's grammar reads them.
        trains: As in ``load``.
    """
    try:
        config = to_config(compose_run(overrides))
    except FAILURES as error:
        return None, _all_problems(overrides, error, trains=trains)
    config, found = _ruled(config, trains=trains)
    return config, [*respelled(parsed), *found]


def _ruled(config: LaunchConfig, *, trains: bool = True) -> tuple[LaunchConfig, list[Problem]]:
    """The config with the trainer as its artifact has it, and its broken rules."""
    missing, unread = missing_here(config), []
    if config.inputs.artifact is not None and not any(each.key == "inputs.artifact" for each in missing):
        try:
            recipe = config.trainer.recipe_of(Path(config.inputs.artifact).expanduser())
            config = replace(config, trainer=recipe)
        except ConfigError as error:
            unread = [Problem("inputs.artifact", str(error))]
    return config, [
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
    return [*found, *others(rest, refused=found)] or [Problem("", reason(first))]


def others(found: Iterable[Problem], *, refused: Iterable[Problem]) -> list[Problem]:
    """Without those that name a setting that was refused: what reads it has seen the default in its place."""
    keys = [rf"(?<![\w.]){re.escape(problem.key)}(?!\w)" for problem in refused if problem.key]
    return [problem for problem in found if not any(re.search(key, problem.text) for key in keys)]
