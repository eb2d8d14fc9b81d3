"""Start a run, or go on with one that was stopped."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from fedzo.commands.run_folder import CONFIG, ENVIRONMENT, OVERRIDES, read_launch
from fedzo.config.schema import LaunchConfig
from fedzo.config.travel import config_hash, is_same_run, save_yaml, to_json
from fedzo.errors import RunFolderError
from fedzo.fl.log_store import PUBLIC, RunStore
from fedzo.records.metrics import Summary
from fedzo.run.apps import CONFIG_KEY, RUN_DIR_KEY
from fedzo.run.process import SITE_ENV, SITE_LOG_ENV, Process, forget_process, keep_process
from fedzo.run.start import RUN_FILE, SITE_FILE, open_run, write_whole
from fedzo.runtime.config import RUNTIMES
from fedzo.system import environment

log = logging.getLogger(__name__)
CLIENTS_LOG = "logs/clients.log"
"""Where clients in processes of their own write their failures, in a run folder."""
MOST_TOLD = 8  # of these at the end of a run


def start_run(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
    """Run a federation from its first round; everything it leaves is in ``run_dir``.

    Raises:
        RunFolderError: The folder holds a run already, or cannot be written.
    """
    if (run_dir / PUBLIC).exists():
        begun = (run_dir / PUBLIC).stat().st_size > 0
        start_again = "" if begun else "; the run has no round yet, so you may also remove the folder and start again"
        raise RunFolderError(
            f"run folder {run_dir}: it already holds a run. `fedzo resume {run_dir}`, or choose another{start_again}."
        )
    config = _with_absolute_paths(config)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for left in (RUN_FILE, ENVIRONMENT):  # of a start that came to nothing, perhaps by other settings
            (run_dir / left).unlink(missing_ok=True)
        (run_dir / CONFIG).write_text(to_json(config), encoding="utf-8")
        save_yaml(config, run_dir / "config.yaml")
        (run_dir / OVERRIDES).write_text("".join(f"- {json.dumps(item)}\n" for item in overrides), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"run folder {run_dir}: cannot write ({error.strerror}). Choose another with hydra.run.dir=..."
        ) from error
    _run(config, run_dir)


def start_or_resume_run(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
    """A sweep's job: run it, or go on with what an interrupted sweep left of it; a finished run is left alone.

    Raises:
        RunFolderError: The folder holds a run of other settings.
    """
    if not (run_dir / PUBLIC).exists():
        return start_run(config, run_dir, overrides=overrides)
    if not is_same_run(read_launch(run_dir), _with_absolute_paths(config)):
        raise RunFolderError(
            f"run folder {run_dir}: it holds a run of other settings. Choose another with hydra.sweep.dir=..."
        )
    with RunStore(run_dir) as store:
        finished = bool(store.told(Summary))
    if not finished:
        resume_run(run_dir)


def resume_run(run_dir: Path) -> None:
    """Go on with a run that was stopped; it ends as if it had never been."""
    _run(read_launch(run_dir), run_dir)


def _run(config: LaunchConfig, run_dir: Path) -> None:
    run_dir = run_dir.resolve()
    forget_process()  # before another model is loaded
    try:
        process = open_run(config, run_dir)
        write_whole(run_dir / SITE_FILE, to_json(config.site()))
        if not (run_dir / ENVIRONMENT).exists():
            write_whole(run_dir / ENVIRONMENT, json.dumps(_environment(process), indent=2))
        launch(config, process, run_dir, site_file=run_dir / SITE_FILE)
    finally:
        forget_process()


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
    site_log = run_dir / CLIENTS_LOG
    site_log.parent.mkdir(exist_ok=True)
    size = site_log.stat().st_size if site_log.exists() else 0
    with _inherited(SITE_ENV, str(site_file)), _inherited(SITE_LOG_ENV, str(site_log)):
        try:
            RUNTIMES.build(config.runtime, num_clients=config.fl.num_clients, run_config=run_config)
        finally:
            _tell_of_clients(site_log, after=size)


def _tell_of_clients(site_log: Path, *, after: int) -> None:
    """What clients in processes of their own, on this machine, wrote of failures: the server was told a sentence."""
    if not site_log.exists():
        return
    with site_log.open(encoding="utf-8", errors="replace") as file:
        file.seek(after)
        told = dict.fromkeys(line for line in file.read().splitlines() if line.startswith("client "))
    for line in list(told)[-MOST_TOLD:]:
        log.error("%s (%s)", line, site_log)


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


def _environment(process: Process) -> dict[str, Any]:
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {**environment(), "config_hash": config_hash(process.peer.config), "command": command}


def _with_absolute_paths(config: LaunchConfig) -> LaunchConfig:
    """Paths that every process of the run, and a later resume, can follow from anywhere."""
    config = deepcopy(config)
    for section, key in ((config.data, "path"), (config.inputs, "artifact"), (config.inputs, "calibration")):
        if path := getattr(section, key):
            setattr(section, key, str(Path(path).expanduser().resolve()))
    if Path(config.model.name).expanduser().is_dir():
        config.model.name = str(Path(config.model.name).expanduser().resolve())
    return config
