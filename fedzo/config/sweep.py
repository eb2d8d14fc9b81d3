"""A sweep before it starts: its folder, and every job composed and checked; of a search, what it optimises."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fedzo.config.compose import FAILURES, compose_run, group_names, option_names, session, with_models
from fedzo.config.diagnose import diagnose, parse_overrides, reason
from fedzo.config.load import check, others, own_words
from fedzo.config.overrides import quoted
from fedzo.config.schema import LaunchConfig, filled
from fedzo.config.unused import unused_problems
from fedzo.errors import ConfigError, Problem, listed, problem
from fedzo.evaluate import EVALUATORS
from fedzo.fl.config import BestBy

log = logging.getLogger(__name__)


class Sweep(NamedTuple):
    """A sweep whose jobs are all sound."""

    folder: Path
    """Holds one folder a job."""
    overrides: list[str]
    """What to give to Hydra; the folder is fixed in it."""
    configs: list[LaunchConfig]
    """One per job, in Hydra's order; of a search, those of its corners."""
    searches: bool = False
    """Whether each job's settings follow from the scores of those before it."""


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether ``hydra.mode`` asks for a sweep, on the command line or in a file that it names.

    Args:
        overrides: As ``with_models`` gives them.

    Raises:
        ConfigError: Hydra would change the working folder.
    """
    with session():
        parsed, _ = parse_overrides(overrides)
        if not any(map(_concerns_hydra, parsed)):
            return False  # without a composition, which takes as long as all of the check
        try:
            own, _ = _hydra_node(parsed)
        except ConfigError:  # of a sweep; a run's own problems are found when it is loaded
            return False
    _check_folder_stays(own)
    return own.mode is RunMode.MULTIRUN


def plan_sweep(overrides: Sequence[str]) -> Sweep:
    """Compose and check every job of a sweep, so that a bad one is found before the first one runs.

    Raises:
        ConfigError: the problems of all jobs; a problem that several jobs share is named once.
    """
    with session():
        overrides = _without_globs(with_models(overrides))
        parsed, unreadable = parse_overrides(overrides)
        swept = [each.input_line for each in parsed if each.is_hydra_override() and each.is_sweep_override()]
        if swept:
            raise ConfigError(f"{swept[0]}: a setting of Hydra itself must have one value, got several. Choose one.")
        own, wrong = _hydra_node(parsed)
        if lines := [each.text for each in wrong if "hydra/sweeper must" in each.text]:
            raise ConfigError(listed(lines))  # without it, nobody knows the jobs
        _check_folder_stays(own)
        folder = Path(str(own.sweep.dir))
        pinned = [*overrides, f"hydra.sweep.dir={quoted(str(folder))}"]
        sweeper = str(own.sweeper.get("_target_")).rpartition(".")[2]
        if sweeper not in ("BasicSweeper", "OptunaSweeper"):
            log.warning("hydra/sweeper: jobs of this sweeper are checked only when they start.")
            return Sweep(folder, pinned, [])
        presets, _ = parse_overrides([f"{key}={value}" for key, value in (own.sweeper.params or {}).items()])
        words, known = [*presets, *parsed], [*unreadable, *wrong]
        if sweeper == "BasicSweeper":
            return Sweep(folder, pinned, _check_jobs(_split(words), words, known=known))
        configs = _check_jobs(_corners(words), words, known=known, is_search=True)
        return Sweep(folder, [*pinned, *_search(own, configs, given=parsed)], configs, searches=True)


def _without_globs(overrides: Sequence[str]) -> list[str]:
    """Each ``group=glob(...)`` as the options that it matches; Hydra would run a job of each schema, too."""
    written = []
    for text in overrides:
        parsed, _ = parse_overrides([text])
        if not parsed or parsed[0].value_type is not ValueType.GLOB_CHOICE_SWEEP:
            written.append(text)
            continue
        known = option_names(parsed[0].key_or_group, overrides)
        names = cast(Glob, parsed[0].value()).filter(known)
        if not names:
            raise ConfigError(f"{text}: it must match one of {', '.join(known) or 'a group'}, but matches none.")
        written.append(f"{parsed[0].get_key_element()}={','.join(names)}")
    return written


def _concerns_hydra(override: Override) -> bool:
    may = override.is_hydra_override() or override.key_or_group in ("hydra", "experiment")
    return may and not override.is_sweep_override()


def _hydra_node(parsed: Sequence[Override]) -> tuple[DictConfig, list[Problem]]:
    """Hydra's own settings, with the overrides that are wrong left out and their problems beside."""
    try:  # beside all that the jobs share: a folder may be named by it
        return _composed_node([str(each.input_line) for each in parsed if not each.is_sweep_override()]), []
    except FAILURES:  # perhaps of a setting that only the jobs need: it is told with theirs
        overrides = [str(each.input_line) for each in parsed if _concerns_hydra(each)]
    try:
        return _composed_node(overrides), []
    except FAILURES as error:
        kept, found = diagnose(overrides)
        if not found:
            raise ConfigError(f"The sweep is not valid: {reason(error)}") from error
        return cast(DictConfig, compose_run(kept, hydra=True).hydra), found


def _composed_node(overrides: Sequence[str]) -> DictConfig:
    node = compose_run(overrides, hydra=True).hydra
    _ = node.sweep.dir  # may hold an interpolation
    return cast(DictConfig, node)


def _check_folder_stays(own: DictConfig) -> None:
    if own.job.chdir:
        remedy = "What was checked would not be found from the run's own folder. Leave it out."
        raise ConfigError(problem("hydra.job.chdir", "be false", own.job.chdir, remedy).text)


def _split(parsed: list[Override]) -> list[list[str]]:
    try:
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise ConfigError(f"The sweep is not valid: {reason(error)}") from error
    if not jobs:
        raise ConfigError("The sweep must have at least one job, got none: an override has an empty choice.")
    return jobs


def _corners(parsed: Iterable[Override]) -> list[list[str]]:
    """Few jobs of a search that together use every choice and both ends of every range."""
    varied: list[list[str]] = []
    for each in parsed:
        if not each.is_sweep_override():
            varied.append([str(each.input_line)])
            continue
        values = [f"{each.get_key_element()}={value}" for value in _ends(each) or each.sweep_string_iterator()]
        if not values:
            raise ConfigError(f"{each.input_line}: it must have a choice, got none. Write at least one value.")
        varied.append(values)
    return [[values[min(job, len(values) - 1)] for values in varied] for job in range(max([2, *map(len, varied)]))]


def _ends(override: Override) -> tuple[object, object] | None:
    """First and last value of what Optuna takes for a range, whose stop is one of its values; None for choices."""
    swept = override.value()
    if isinstance(swept, IntervalSweep):
        return swept.start, swept.end
    if isinstance(swept, RangeSweep) and not swept.shuffle and swept.start is not None and swept.stop is not None:
        return swept.start, swept.start + (swept.stop - swept.start) // swept.step * swept.step
    return None


def _search(own: DictConfig, configs: Sequence[LaunchConfig], *, given: Sequence[Override]) -> list[str]:
    """What a search of Optuna needs beside what its user gave: the direction, and that a failed job does not end it.

    The sampler has a seed, so that a repeated command asks for the same jobs and goes on with those that are there.

    Raises:
        ConfigError: The jobs have no dev score, or the sweeper's own settings do not fit.
    """
    from optuna.logging import set_verbosity

    set_verbosity(logging.WARNING)  # Hydra's plugin tells of the study, too
    directions = {_direction(config) for config in configs}
    if len(directions) > 1:
        raise ConfigError("hydra/sweeper=optuna: all jobs must be compared by one dev score, got both directions.")
    (direction,) = directions
    typed = {str(each.key_or_group): each.value() for each in given if each.is_hydra_override()}
    if str(typed.get("hydra.sweeper.direction", direction)) != direction:
        raise ConfigError(
            f"hydra.sweeper.direction must be {direction} for this dev score, got "
            f"{typed['hydra.sweeper.direction']}. Leave it out."
        )
    if own.sweeper.storage is not None:
        raise ConfigError(
            f"hydra.sweeper.storage must be null, got {own.sweeper.storage!r}: Optuna 2 keeps no study with the "
            "SQLAlchemy that Flower needs. To go on with a search, repeat its command with the same hydra.sweep.dir."
        )
    defaults: dict[str, Any] = {"hydra.sweeper.max_failure_rate": 1.0}
    if "seed" in own.sweeper.sampler and own.sweeper.sampler.seed is None:
        defaults["hydra.sweeper.sampler.seed"] = 0
    if str(own.launcher.get("_target_")).endswith(".BasicLauncher"):  # one job at a time, so each knows all before it
        defaults["hydra.sweeper.n_jobs"] = 1
    else:  # jobs that run at the same time may be equal, and a folder takes one: their numbers tell them apart
        unresolved = cast(dict[str, Any], OmegaConf.to_container(own.sweep))
        defaults["hydra.sweep.subdir"] = quoted(f"${{hydra:job.num}}_{unresolved['subdir']}")
    # Optuna repeats in each job what is the same in all: leave it out of their folders' names
    fixed = [each.key_or_group for each in given if not each.is_hydra_override() and not each.is_sweep_override()]
    defaults["hydra.job.config.override_dirname.exclude_keys"] = f"[{','.join(fixed)}]"
    defaults = {key: value for key, value in defaults.items() if key not in typed}
    return [f"{key}={value}" for key, value in {"hydra.sweeper.direction": direction, **defaults}.items()]


def _direction(config: LaunchConfig) -> str:
    """Of the dev score by which a run's best round is chosen."""
    name = config.first_evaluator
    if name is None or not config.evaluation.central or config.split.num_dev == 0:
        raise ConfigError(
            "hydra/sweeper=optuna: a job must have dev scores, but has none. It needs evaluators, "
            "evaluation.central=true and split.num_dev > 0."
        )
    if config.evaluation.best_by is BestBy.loss:
        return "minimize"
    measure = EVALUATORS.build(config.evaluators[name]).measure(config.task)
    return "minimize" if measure.lower_is_better else "maximize"


def _check_jobs(
    jobs: Sequence[Sequence[str]], words: Sequence[Override], *, known: Sequence[Problem], is_search: bool = False
) -> list[LaunchConfig]:
    """The settings of the jobs that are made of these words."""
    checked = _checked(jobs, words)
    lines = [each.text for each in known]
    for text in dict.fromkeys(each.text for _, found in checked for each in found if each not in known):
        where = [number for number, (_, found) in enumerate(checked) if text in {each.text for each in found}]
        lines.append(text if len(where) == len(jobs) else f"{_name(jobs, where)}: {text}")
    configs = [config for config, _ in checked if config is not None]
    if len(configs) == len(jobs):
        lines += [each.text for each in unused_problems(configs, own_words(words), is_search=is_search)]
    if lines:
        raise ConfigError(listed(lines))
    return [filled(config) for config in configs]


def _checked(
    jobs: Sequence[Sequence[str]], words: Sequence[Override]
) -> list[tuple[LaunchConfig | None, list[Problem]]]:
    """The settings and the problems of each job.

    To look for what is wrong takes compositions. The words that all jobs have are looked at once for all jobs of
    the same choices, on which it depends what settings there are.
    """
    common, groups = set(jobs[0]).intersection(*jobs), group_names(jobs[0])
    choices = {each.get_key_element() for each in words if each.key_or_group in groups}
    diagnosed: dict[tuple[str, ...], tuple[Sequence[str], list[Problem]]] = {}
    checked = []
    for job in jobs:
        shared = tuple(text for text in job if text in common or text.partition("=")[0] in choices)
        kept, refused = diagnosed.get(shared, (shared, []))
        own = [text for text in job if text in kept or text not in shared]
        config, found = check(own, parse_overrides(own)[0])
        checked.append((None if refused else config, [*refused, *others(found, refused=refused)]))
        if config is None and shared not in diagnosed:
            diagnosed[shared] = diagnose(shared)
    return checked


def _name(jobs: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    first = numbers[0]
    own = " ".join(text for text in jobs[first] if not all(text in job for job in jobs))
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"job {first} ({own}){more}"
