"""Which config class stands behind each option of a group: the one table that loading, travel and listing read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedzo.data.config import DataConfig, TaskConfig
from fedzo.fl.config import StrategyConfig
from fedzo.models.config import ModelConfig
from fedzo.registry import PluginConfig, load_plugins
from fedzo.report.config import ReportConfig
from fedzo.runtime.config import InlineConfig, LocalConfig, RayConfig

if TYPE_CHECKING:
    from fedzo.config.schema import RunConfig

PLAIN: dict[str, type] = {
    "model": ModelConfig,
    "task": TaskConfig,
    "data": DataConfig,
    "strategy": StrategyConfig,
    "report": ReportConfig,
}
"""Groups with one class; their options are presets in YAML."""

_CLOSED: dict[str, dict[str, type]] = {
    "runtime": {"inline": InlineConfig, "ray": RayConfig, "local": LocalConfig},
}


def list_classes() -> dict[str, dict[str, type]]:
    """Per group of which a run takes a list (``preprocess=[a,b]``): option name -> config class."""
    from fedzo.data.preprocess import STAGES

    load_plugins()
    return {"preprocess": dict(STAGES)}


def plugin_classes() -> dict[str, dict[str, type]]:
    """Per group whose options differ in class: option name -> config class, with installed third parties' plugins."""
    from fedzo.data.partitioners import PARTITIONERS
    from fedzo.fl.server.step_policy import STEP_POLICIES
    from fedzo.trainers import TRAINERS
    from fedzo.zo.estimator import ESTIMATORS
    from fedzo.zo.server_optimizer import SERVER_OPTIMIZERS

    load_plugins()
    return {
        "partition": dict(PARTITIONERS),
        "trainer": dict(TRAINERS),
        "estimator": dict(ESTIMATORS),
        "server_optimizer": dict(SERVER_OPTIMIZERS),
        "step_policy": dict(STEP_POLICIES),
        **_CLOSED,
    }


def chosen_plugins(config: RunConfig) -> Iterator[tuple[str, PluginConfig]]:
    """The plugins of a run, each with the prefix of its keys (``trainer``, ``preprocess.identity``)."""
    for group in plugin_classes():
        yield group, getattr(config, group)
    for group in list_classes():
        for name, plugin in getattr(config, group).items():
            yield f"{group}.{name}", plugin


def plugin_name(group: str, config: object) -> str | None:
    """Option name of a plugin's config, ``None`` if its class is not registered in this group."""
    return next((name for name, cls in plugin_classes()[group].items() if cls is type(config)), None)
