"""Start a run where its configuration says: one table of runtimes, each imported only when it is used."""

from __future__ import annotations

from pathlib import Path

from flwr.clientapp import ClientApp

from fedzo.config.schema import RunConfig
from fedzo.registry import Registry
from fedzo.run.apps import CONFIG_KEY, RUN_DIR_KEY, client_app, look_ahead, server_app
from fedzo.runtime.config import InlineConfig, LocalConfig, RayConfig, RuntimeConfig

RUNTIMES: Registry[None] = Registry("runtime", base=RuntimeConfig)
"""Factories ``(config, *, num_clients, run_config)`` that return when the federation has ended."""


def launch(config: RunConfig, run_dir: Path, *, config_json: str) -> None:
    """Run a federation to its end on the runtime of its configuration.

    Args:
        config: The run's configuration.
        run_dir: The run folder, where the server writes.
        config_json: The same configuration as text, for the apps.

    Raises:
        ConfigError: The runtime cannot be used here.
        ProtocolError: Clients or the parts in between failed.
    """
    run_config = {CONFIG_KEY: config_json, RUN_DIR_KEY: str(run_dir)}
    RUNTIMES.build(config.runtime, num_clients=config.fl.num_clients, run_config=run_config)


@RUNTIMES.register("inline", InlineConfig)
def _inline(config: InlineConfig, *, num_clients: int, run_config: dict[str, str]) -> None:
    from fedzo.runtime.inline import run_inline

    ahead = look_ahead if config.batch_clients else None
    run_inline(server_app, client_app, num_clients=num_clients, run_config=run_config, look_ahead=ahead)


@RUNTIMES.register("ray", RayConfig)
def _ray(config: RayConfig, *, num_clients: int, run_config: dict[str, str]) -> None:
    from fedzo.runtime.ray import run_ray

    run_ray(server_app, _installed_client_app, num_clients=num_clients, run_config=run_config, config=config)


@RUNTIMES.register("local", LocalConfig)
def _local(config: LocalConfig, *, num_clients: int, run_config: dict[str, str]) -> None:
    from fedzo.runtime.local import run_local

    run_local(server_app, num_clients=num_clients, run_config=run_config, config=config)


def _installed_client_app() -> ClientApp:
    return client_app
