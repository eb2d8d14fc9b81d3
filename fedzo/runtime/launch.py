"""Start a run where its configuration says."""

from __future__ import annotations

from pathlib import Path

from fedzo.config.schema import RunConfig
from fedzo.run.apps import CONFIG_KEY, RUN_DIR_KEY
from fedzo.runtime.config import RUNTIMES


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
