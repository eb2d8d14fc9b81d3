"""A sweep before it starts: its folder, and every job composed and checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from fedzo.config.compose import FAILURES, compose_run, option_names, session
from fedzo.config.diagnose import diagnose, parse_overrides, reason
from fedzo.config.load import check, message
from fedzo.config.overrides import quoted, rewrite_model
from fedzo.config.schema import LaunchConfig
from fedzo.errors import ConfigError, Problem

log = logging.getLogger(__name__)


class Sweep(NamedTuple):
    """A sweep whose jobs are all sound."""

    folder: Path
    """Holds one folder a job."""
    overrides: list[str]
    """What to give to Hydra; the folder is fixed in it."""
    configs: list[LaunchConfig]
    """One per job, in Hydra's order."""


def plan_sweep(overrides: Sequence[str]) -> Sweep:
    """Compose and check every job of a sweep, so that a bad one is found before the first one runs.

    Raises:
        ConfigError: the problems of all jobs; a problem that several jobs share is named once.
    """
    with session():
        overrides = rewrite_model(overrides, option_names("model", overrides))
        parsed, unreadable = parse_overrides(overrides)
        swept = [each.input_line for each in parsed if each.is_hydra_override() and each.is_sweep_override()]
        if swept:
            raise ConfigError(f"{swept[0]}: a setting of Hydra itself must have one value, got several. Choose one.")
        own, wrong = _hydra_node([str(each.input_line) for each in parsed if _concerns_hydra(each)])
        folder = Path(str(own.sweep.dir))
        pinned = [*overrides, f"hydra.sweep.dir={quoted(str(folder))}"]
        if not str(own.sweeper.get("_target_")).endswith(".BasicSweeper"):
            log.warning("hydra/sweeper: jobs of this sweeper are checked only when they start.")
            return Sweep(folder, pinned, [])
        presets, _ = parse_overrides([f"{key}={value}" for key, value in (own.sweeper.params or {}).items()])
        return Sweep(folder, pinned, _check_jobs(_split([*presets, *parsed]), known=[*unreadable, *wrong]))


def _concerns_hydra(override: Override) -> bool:
    return (override.is_hydra_override() or override.key_or_group == "experiment") and not override.is_sweep_override()


def _hydra_node(overrides: Sequence[str]) -> tuple[DictConfig, list[Problem]]:
    """Hydra's own settings, with the overrides that are wrong left out and their problems beside."""
    try:
        node = compose_run(overrides, hydra=True).hydra
        _ = node.sweep.dir  # may hold an interpolation
        return cast(DictConfig, node), []
    except FAILURES as error:
        kept, found = diagnose(overrides)
        if not found:
            raise ConfigError(f"The sweep is not valid: {reason(error)}") from error
        return cast(DictConfig, compose_run(kept, hydra=True).hydra), found


def _split(parsed: list[Override]) -> list[list[str]]:
    try:
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise ConfigError(f"The sweep is not valid: {reason(error)}") from error
    if not jobs:
        raise ConfigError("The sweep must have at least one job, got none: an override has an empty choice.")
    return jobs


def _check_jobs(jobs: Sequence[Sequence[str]], *, known: Sequence[Problem]) -> list[LaunchConfig]:
    checked = [check(job) for job in jobs]
    lines = [problem.text for problem in known]
    for text in dict.fromkeys(problem.text for _, found in checked for problem in found if problem not in known):
        where = [number for number, (_, found) in enumerate(checked) if text in {problem.text for problem in found}]
        lines.append(text if len(where) == len(jobs) else f"{_name(jobs, where)}: {text}")
    if lines:
        raise ConfigError(message(lines))
    return [config for config, _ in checked if config is not None]


def _name(jobs: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    first = numbers[0]
    own = " ".join(text for text in jobs[first] if not all(text in job for job in jobs))
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"job {first} ({own}){more}"
