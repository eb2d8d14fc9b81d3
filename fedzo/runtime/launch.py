"""Start a configured run on its runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedzo.apps import CONFIG_KEY, RUN_DIR_KEY, client_app, server_app
from fedzo.config.schema import RunConfig
from fedzo.registry import Registry
from fedzo.runtime.config import InlineConfig, LocalConfig, RayConfig, RuntimeConfig

Launcher = Callable[[RunConfig, dict[str, str]], None]
RUNTIMES: Registry[Launcher] = Registry("runtime", base=RuntimeConfig)


@RUNTIMES.register("inline", InlineConfig)
def inline(config: InlineConfig) -> Launcher:
    """This process."""
    from fedzo.runtime.inline import run_inline

    return lambda run, run_config: run_inline(
        server_app, client_app, num_clients=run.fl.num_clients, run_config=run_config
    )


@RUNTIMES.register("ray", RayConfig)
def ray(config: RayConfig) -> Launcher:
    """Flower's simulation engine."""
    from fedzo.runtime.ray import run_ray

    return lambda run, run_config: run_ray(
        server_app, client_app, num_clients=run.fl.num_clients, run_config=run_config, config=config
    )


@RUNTIMES.register("local", LocalConfig)
def local(config: LocalConfig) -> Launcher:
    """A SuperLink and SuperNodes on this machine."""
    from fedzo.runtime.local import run_local

    return lambda run, run_config: run_local(num_clients=run.fl.num_clients, run_config=run_config, config=config)


def launch(config: RunConfig, run_dir: Path, *, config_json: str) -> None:
    """Run the federation of ``config`` in ``run_dir`` and return when it has ended."""
    RUNTIMES.build(config.runtime)(config, {CONFIG_KEY: config_json, RUN_DIR_KEY: str(run_dir)})
