"""What can be chosen: the config class behind each option of a group, and the presets."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fedzo.data.config import DataConfig, TaskConfig
from fedzo.data.partition import PARTITIONERS
from fedzo.data.preprocess import STAGES
from fedzo.data.preprocess.backend import REWRITERS
from fedzo.errors import ConfigError
from fedzo.evaluate import EVALUATORS
from fedzo.fl.config import StrategyConfig
from fedzo.fl.server.step_policy import STEP_POLICIES
from fedzo.models.config import ModelConfig
from fedzo.registry import Registry, load_plugins
from fedzo.report import ReportConfig
from fedzo.report.trackers import TRACKERS
from fedzo.runtime.config import RUNTIMES
from fedzo.trainers import TRAINERS
from fedzo.zo.estimator import ESTIMATORS
from fedzo.zo.server_optimizer import SERVER_OPTIMIZERS

_PACKAGE = Path(__file__).resolve().parent.parent

PLAIN: dict[str, type] = {
    "model": ModelConfig,
    "task": TaskConfig,
    "data": DataConfig,
    "strategy": StrategyConfig,
    "report": ReportConfig,
}
"""Groups with one class; their options are presets in YAML."""

REGISTRIES: dict[str, Registry[Any]] = {
    "partition": PARTITIONERS,
    "trainer": TRAINERS,
    "estimator": ESTIMATORS,
    "server_optimizer": SERVER_OPTIMIZERS,
    "step_policy": STEP_POLICIES,
    "rewriter": REWRITERS,
    "runtime": RUNTIMES,
}
"""Groups of which a run takes one plugin."""

LISTS: dict[str, Registry[Any]] = {"preprocess": STAGES, "evaluators": EVALUATORS, "trackers": TRACKERS}
"""Groups of which a run takes a list of plugins (``preprocess=[a,b]``)."""
NO_PLUGIN = "none"
"""The option of these groups that is the empty list, as other groups have one by this name."""


def plugin_classes() -> dict[str, dict[str, type]]:
    """Per group of which a run takes one plugin: option name -> config class, with installed third parties' plugins."""
    load_plugins()
    return {group: dict(registry) for group, registry in REGISTRIES.items()}


def list_classes() -> dict[str, dict[str, type]]:
    """Per group of which a run takes a list: option name -> config class, with installed third parties' plugins."""
    load_plugins()
    return {group: dict(registry) for group, registry in LISTS.items()}


def plugin_name(group: str, config: object) -> str | None:
    """Option name of a plugin's config, ``None`` if its class is not registered in this group."""
    return REGISTRIES[group].name_of(config)


def option_of(config: object, group: str) -> str:
    """What a config has of a group, as an override would choose it: ``trainer=lora``."""
    return f"{group}={plugin_name(group, getattr(config, group))}"


def conf_dir() -> Path:
    """The folder with ``config.yaml``: ``fedzo/_conf`` of a wheel, ``conf`` of a checkout.

    Raises:
        ConfigError: neither folder is there.
    """
    candidates = (_PACKAGE / "_conf", _PACKAGE.parent / "conf")
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder
    looked = " or ".join(str(folder) for folder in candidates)
    raise ConfigError(f"conf must hold config.yaml, found none in {looked}. Reinstall fedzo.")


def list_groups() -> dict[str, dict[str, str]]:
    """Per group: option name -> summary, from a plugin's docstring or the first comment of its YAML file."""
    conf = conf_dir()
    groups = {
        folder.name: {path.stem: _first_comment(path) for path in sorted(folder.glob("*.yaml"))}
        for folder in sorted(conf.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }
    for group, options in {**plugin_classes(), **list_classes()}.items():
        summaries = {
            name: (inspect.getdoc(cls) or "").split("\n")[0].replace("``", "") for name, cls in options.items()
        }
        if group in LISTS:
            summaries[NO_PLUGIN] = "The empty list."
        groups[group] = dict(sorted({**groups.get(group, {}), **summaries}.items()))
    return dict(sorted(groups.items()))


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""
