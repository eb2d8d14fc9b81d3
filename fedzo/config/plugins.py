"""Which config class stands behind each option of a group: the one table that loading, travel and listing read."""

from __future__ import annotations

from typing import Any

from fedzo.data.config import DataConfig, TaskConfig
from fedzo.data.partition import PARTITIONERS
from fedzo.data.preprocess import STAGES
from fedzo.evaluate import EVALUATORS
from fedzo.fl.config import StrategyConfig
from fedzo.fl.server.step_policy import STEP_POLICIES
from fedzo.models.config import ModelConfig
from fedzo.registry import Registry, load_plugins
from fedzo.report.config import ReportConfig
from fedzo.runtime.config import RUNTIMES
from fedzo.trainers import TRAINERS
from fedzo.zo.estimator import ESTIMATORS
from fedzo.zo.server_optimizer import SERVER_OPTIMIZERS

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
    "runtime": RUNTIMES,
}
"""Groups of which a run takes one plugin."""

LISTS: dict[str, Registry[Any]] = {"preprocess": STAGES, "evaluators": EVALUATORS}
"""Groups of which a run takes a list of plugins (``preprocess=[a,b]``)."""


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
