"""From overrides to a checked ``RunConfig``. The only door: strict, and every problem in one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedzo.config.diagnose import diagnose
from fedzo.config.overrides import rewrite_model, split_jobs
from fedzo.config.paths import conf_dir
from fedzo.config.schema import RunConfig
from fedzo.config.store import register_schemas
from fedzo.config.validate import Problem, missing_files, problems
from fedzo.errors import ConfigError

CONFIG_NAME = "config"
VERSION_BASE = "1.3"


def load(overrides: Sequence[str]) -> RunConfig:
    """Compose, resolve and check one run.

    Args:
        overrides: Hydra overrides, such as ``["trainer=mezo", "fl.rounds=3"]``; ``model=`` also takes a hub name or
            a local folder.

    Raises:
        ConfigError: unknown keys and options, wrong types and broken rules, all of them in one message.
    """
    with session():
        config, found = check(with_known_model(overrides))
    if config is None or found:
        raise ConfigError(message(found))
    return config


def load_sweep(overrides: Sequence[str]) -> list[RunConfig]:
    """Compose and check every job of a sweep before the first one runs.

    Raises:
        ConfigError: the problems of all jobs; a problem that all jobs share is named once.
    """
    with session():
        jobs = split_jobs(with_known_model(overrides))
        checked = [check(job) for job in jobs]
    found = [[problem.text for problem in problems_of_job] for _, problems_of_job in checked]
    shared = [text for text in found[0] if all(text in texts for texts in found)]
    lines = [Problem("", text) for text in shared]
    for number, (job, texts) in enumerate(zip(jobs, found, strict=True)):
        lines += [Problem("", f"job {number} ({' '.join(job)}): {text}") for text in texts if text not in shared]
    if lines:
        raise ConfigError(message(lines))
    return [config for config, _ in checked if config is not None]


@contextmanager
def session() -> Iterator[None]:
    """Hydra, initialised on fedzo's ``conf`` and schemas; what was initialised before is put back."""
    register_schemas()
    with initialize_config_dir(str(conf_dir()), job_name="fedzo", version_base=VERSION_BASE):
        yield


def with_known_model(overrides: Sequence[str]) -> list[str]:
    """``rewrite_model`` against the options that this session's search path offers."""
    searchpath = [text for text in overrides if text.startswith("hydra.searchpath=")]
    loader = GlobalHydra.instance().config_loader()
    try:
        options = loader.get_group_options("model", config_name=CONFIG_NAME, overrides=searchpath)
    except HydraException as error:
        raise ConfigError(f"hydra.searchpath cannot be used: {error}") from error
    return rewrite_model(overrides, options)


def check(overrides: Sequence[str]) -> tuple[RunConfig | None, list[Problem]]:
    """One job's config and its problems; needs a ``session``."""
    try:
        config = to_config(compose(CONFIG_NAME, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException, ConfigError):
        return None, _all_problems(overrides)
    return config, problems(config) + missing_files(config)


def _all_problems(overrides: Sequence[str]) -> list[Problem]:
    """Hydra stops at its first problem, so look at each override alone, and at the rules with those that are left."""
    kept, found = diagnose(overrides, _try)
    try:
        config = _try(kept)
    except (HydraException, OmegaConfBaseException, ConfigError):  # found has it
        return found
    # A rule that reads a setting which was dropped just now would report the default in its place.
    dropped = [problem.key for problem in found]
    broken = problems(config) + missing_files(config)
    return found + [problem for problem in broken if not any(key and key in problem.text for key in dropped)]


def _try(overrides: Sequence[str]) -> RunConfig:
    return to_config(compose(CONFIG_NAME, overrides=list(overrides)))


def to_config(composed: DictConfig) -> RunConfig:
    """The typed config of a composed one: interpolations resolved, nothing missing.

    Raises:
        ConfigError: settings that must be given were not.
        OmegaConfBaseException: an interpolation or a type is wrong.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, got nothing. Write {missing[0]}=<value>.")
    OmegaConf.resolve(composed)
    return cast(RunConfig, OmegaConf.to_object(composed))


def message(found: Sequence[Problem]) -> str:
    """One message for all problems."""
    if len(found) == 1:
        return found[0].text
    return "\n".join([f"{len(found)} problems in the configuration:", *(f"  - {problem.text}" for problem in found)])
