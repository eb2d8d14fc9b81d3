"""Start a run, and launch it: in this process, or with a server that is a process of its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from fedzo.commands.run_folder import keep_environment, read_launch, write_settings
from fedzo.config.schema import LaunchConfig
from fedzo.config.travel import config_hash, to_json
from fedzo.errors import RunFolderError, refuse, shell
from fedzo.fl.log_files import writing_logs
from fedzo.fl.log_store import RunStore, has_begun
from fedzo.models.config import EMBEDDED_NAME
from fedzo.records.folder import (
    CLIENTS_LOG,
    CONFIG,
    CONFIG_YAML,
    ENVIRONMENT,
    FAILED,
    OVERRIDES,
    PRESENCE,
    RUN_FILE,
    SITE_FILE,
    STOP,
    folder_of_one_process,
    make_folder,
)
from fedzo.records.presence import OUTCOME
from fedzo.records.texts import write_whole
from fedzo.report.trackers import missing_libraries
from fedzo.run.apps import run_config
from fedzo.run.client_context import STAGE_FOLDER
from fedzo.run.costs import warn_of_copies
from fedzo.run.peer import open_model
from fedzo.run.process import Process, forget_process, keep_process, kept_model
from fedzo.run.start import open_run
from fedzo.runtime.config import RUNTIMES
from fedzo.system import SITE_ENV, SITE_LOG_ENV, command, environment, environment_variable

log = logging.getLogger(__name__)
MAX_TOLD = 8  # of these at the end of a run


def start_run(config: LaunchConfig, run_dir: Path, *, overrides: list[str], keeps_model: bool = False) -> None:
    """Run a federation from its first round; everything it leaves is in ``run_dir``.

    Args:
        config: The command line.
        run_dir: The run folder.
        overrides: The words of the command line.
        keeps_model: Whether this process has the model from the run before, and keeps it for the next one, where both
            need the same and it is as it was loaded.

    Raises:
        RunFolderError: The folder holds a run already, or files that no run made, or cannot be written.
    """
    _refuse_files_of_others(run_dir)
    with alone(run_dir):
        with RunStore(run_dir) as store:
            if has_begun(run_dir):
                start_again = "" if store.public else "; it has no round yet, so you may also remove the folder"
                raise RunFolderError(
                    f"run folder {run_dir}: it holds a run. Use `{shell('fedzo resume', run_dir)}`, or another folder"
                    f"{start_again}."
                )
            for left in (CONFIG, RUN_FILE, ENVIRONMENT):  # of a start that came to nothing, perhaps by other settings
                (run_dir / left).unlink(missing_ok=True)
            config = with_absolute_paths(config)
            write_settings(config, run_dir, overrides)
            if not config.runtime.traits.server_process:
                return run_here(config, store, keeps_model)
        deploy(config, run_dir)


def _refuse_files_of_others(run_dir: Path) -> None:
    """A start replaces what an earlier one left, of which the overrides are the first; not what somebody else made."""
    found = [name for name in (CONFIG, CONFIG_YAML, RUN_FILE, ENVIRONMENT) if (run_dir / name).exists()]
    if found and not (run_dir / OVERRIDES).exists() and not has_begun(run_dir):
        raise RunFolderError(
            f"run folder {run_dir}: it must be empty or hold a run, but holds files that no run made "
            f"({', '.join(found)}). Choose another folder."
        )


def serve_run(run_dir: Path, server_dir: Path) -> None:
    """Be the server of a run in a process of its own: open the run, and go on with it at a SuperLink of this machine.

    Args:
        run_dir: The run folder, whose settings whoever started this process has written.
        server_dir: The server's folder.

    Raises:
        ConfigError: The server serves another run.
    """
    from fedzo.run.apps import server_app
    from fedzo.runtime.net.serve import serve
    from fedzo.runtime.net.server_folder import ServerFolder

    folder = ServerFolder(server_dir)
    with (
        folder.serving(str(run_dir.resolve())),
        RunStore(run_dir) as store,
        _opened(config := read_launch(run_dir), store) as process,
    ):
        settings = run_config(keep_process(process), store.folder.resolve())
        serve(server_app, folder=folder, run_config=settings, startup_s=config.runtime.traits.startup_s)


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Have a run folder to oneself for as long as anything of the run is up.

    Where the server is a process of its own, it takes the lock of the log only once it has imported what it needs.
    """
    make_folder(run_dir)
    with ExitStack() as held:
        with writing_logs(run_dir):
            held.enter_context(folder_of_one_process(run_dir))
        yield


def run_here(config: LaunchConfig, store: RunStore, keeps_model: bool = False) -> None:
    """Run a federation whose server is this process; ``keeps_model`` as of ``start_run``."""
    run_dir = store.folder.resolve()
    with _opened(config, store, keeps_model) as process:
        launch(config, process, run_dir)


def deploy(config: LaunchConfig, run_dir: Path) -> None:
    """Run a federation whose server is a process of its own, which opens the run."""
    forget_process()  # the model of a sweep's job before: server and clients load their own
    run_dir = run_dir.resolve()
    write_whole(run_dir / SITE_FILE, to_json(config.site()))
    if not config.runtime.traits.has_sites:
        written, num_copies = config.trainer.traits.trains_base_weights, config.fl.num_clients + 1
        warn_of_copies(config.model, device=config.device, num_copies=num_copies, are_written=written)
    with _log_client_failures(run_dir):
        RUNTIMES.build(config.runtime, num_clients=config.fl.num_clients, run_dir=run_dir)


@contextmanager
def _opened(config: LaunchConfig, store: RunStore, keeps_model: bool = False) -> Iterator[Process]:
    run_dir = store.folder.resolve()
    refuse([*missing_libraries(config.trackers), *config.runtime.missing()])
    for left in (STOP, PRESENCE, OUTCOME, FAILED):  # of an earlier start; from here on `fedzo stop` is heard
        (store.folder / left).unlink(missing_ok=True)
    forget_process(keep_model=keeps_model)  # before another model is loaded
    try:
        process = open_run(config, run_dir, store, kept_model if keeps_model else open_model)
        write_whole(run_dir / SITE_FILE, to_json(config.site()))
        if (done := len(store.records)) < config.fl.rounds:  # else nothing more is computed
            keep_environment(run_dir, _environment(process), round=done)
        yield process
    except BaseException:  # who knows what is left of its model
        forget_process()
        raise
    forget_process(keep_model=keeps_model)


def launch(config: LaunchConfig, process: Process, run_dir: Path) -> None:
    """Run a federation to its end on the runtime of its command line.

    Args:
        config: The command line.
        process: The run, opened in this process, which plays the server.
        run_dir: The run folder, where the server writes; clients in processes of their own find their site in it.

    Raises:
        ConfigError: The runtime cannot be used here.
        ProtocolError: Clients or the parts in between failed.
    """
    run_json = keep_process(process)
    if not config.runtime.traits.takes_turns:  # else clients are in this very process
        make_folder((run_dir / CLIENTS_LOG).parent)
    with (
        _log_client_failures(run_dir) as site_log,
        environment_variable(SITE_ENV, str(run_dir / SITE_FILE)),
        environment_variable(SITE_LOG_ENV, str(site_log)),
    ):
        RUNTIMES.build(config.runtime, num_clients=config.fl.num_clients, run_dir=run_dir, run_json=run_json)


@contextmanager
def _log_client_failures(run_dir: Path) -> Iterator[Path]:
    """At the end, what clients in processes of their own, on this machine, wrote of failures into their log."""
    site_log = run_dir / CLIENTS_LOG
    site_log.unlink(missing_ok=True)  # of an earlier start
    try:
        yield site_log
    finally:
        if site_log.exists():
            text = site_log.read_text(encoding="utf-8", errors="replace")
            told = dict.fromkeys(re.findall(r"^[\d-]+ [\d:,]+ (client .*)", text, re.MULTILINE))  # without the time
            for line in list(told)[-MAX_TOLD:]:
                log.error("%s (%s)", line, site_log)


def _environment(process: Process) -> dict[str, Any]:
    peer, machine = process.peer, environment(process.peer.loaded.device)
    return {**machine, "run_id": peer.run_id, "config_hash": config_hash(peer.config), "command": command()}


def with_absolute_paths(config: LaunchConfig) -> LaunchConfig:
    """Paths that every process of the run, and a later resume, can follow from anywhere."""
    config = deepcopy(config)
    if config.preprocess and config.rewriter.store is None:
        config.rewriter.store = STAGE_FOLDER  # of the working folder, so that the next run finds it
    paths: list[tuple[Any, str]] = [(config.data, "path"), (config.inputs, "artifact"), (config.inputs, "calibration")]
    paths += [(config.rewriter, key) for key in config.rewriter.paths if getattr(config.rewriter, key) != EMBEDDED_NAME]
    paths += [(config.runtime, key) for key in config.runtime.paths]
    for section, key in paths:
        if path := getattr(section, key):
            setattr(section, key, str(Path(path).expanduser().resolve()))
    if Path(config.model.name).expanduser().is_dir():
        config.model.name = str(Path(config.model.name).expanduser().resolve())
    return config
