"""Start a run where its command line says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedzo.config.schema import LaunchConfig
from fedzo.run.apps import CONFIG_KEY, RUN_DIR_KEY
from fedzo.run.process import SITE_ENV, Process, keep_process
from fedzo.runtime.config import RUNTIMES


def launch(config: LaunchConfig, process: Process, run_dir: Path, *, site_file: Path) -> None:
    """Run a federation to its end on the runtime of its command line.

    Args:
        config: The command line.
        process: The run, opened in this process, which plays the server.
        run_dir: The run folder, where the server writes.
        site_file: This machine's own configuration, for clients in processes of their own.

    Raises:
        ConfigError: The runtime cannot be used here.
        ProtocolError: Clients or the parts in between failed.
    """
    run_config = {CONFIG_KEY: keep_process(process), RUN_DIR_KEY: str(run_dir)}
    with _inherited(SITE_ENV, str(site_file)):
        RUNTIMES.build(config.runtime, num_clients=config.fl.num_clients, run_config=run_config)


@contextmanager
def _inherited(variable: str, value: str) -> Iterator[None]:
    """Set for the processes that start meanwhile."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
