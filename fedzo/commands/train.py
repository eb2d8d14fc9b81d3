"""Start a run, or go on with one that was stopped."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzo.commands.run_folder import keep_environment, read_launch, read_run, write_settings
from fedzo.config.rules import launch_problems
from fedzo.config.schema import LaunchConfig, with_rounds
from fedzo.config.travel import config_hash, is_same_run, to_json
from fedzo.errors import ConfigError, RunFolderError, shell
from fedzo.fl.config import BestBy
from fedzo.fl.log_store import RunLog, RunStore, best_dev_score, has_begun
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
    read_file,
)
from fedzo.records.metrics import Extension, Summary
from fedzo.records.presence import OUTCOME
from fedzo.report.run_data import read_environment, read_overrides
from fedzo.report.trackers import missing_libraries
from fedzo.run.apps import run_config
from fedzo.run.client_context import STAGE_FOLDER
from fedzo.run.costs import warn_of_copies
from fedzo.run.process import Process, forget_process, keep_process
from fedzo.run.start import open_run, write_whole
from fedzo.runtime.config import RUNTIMES
from fedzo.system import SITE_ENV, SITE_LOG_ENV, command, environment, environment_variable
from fedzo.zo.server_optimizer import Schedule

log = logging.getLogger(__name__)
MAX_TOLD = 8  # of these at the end of a run


def start_run(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
    """Run a federation from its first round; everything it leaves is in ``run_dir``.

    Raises:
        RunFolderError: The folder holds a run already, or files that no run made, or cannot be written.
    """
    with _alone(run_dir):
        _refuse_files_of_others(run_dir)
        with RunStore(run_dir) as store:
            if has_begun(run_dir):
                start_again = "" if store.rounds else "; it has no round yet, so you may also remove the folder"
                raise RunFolderError(
                    f"run folder {run_dir}: it holds a run. Use `{shell('fedzo resume', run_dir)}`, or another folder"
                    f"{start_again}."
                )
            for left in (CONFIG, RUN_FILE, ENVIRONMENT):  # of a start that came to nothing, perhaps by other settings
                (run_dir / left).unlink(missing_ok=True)
            config = _with_absolute_paths(config)
            write_settings(config, run_dir, overrides)
            if not config.runtime.traits.server_process:
                return _run(config, store)
        _deploy(config, run_dir)


def _refuse_files_of_others(run_dir: Path) -> None:
    """A start replaces what an earlier one left, of which the overrides are the first; not what somebody else made."""
    found = [name for name in (CONFIG, CONFIG_YAML, RUN_FILE, ENVIRONMENT) if (run_dir / name).exists()]
    if found and not (run_dir / OVERRIDES).exists() and not has_begun(run_dir):
        raise RunFolderError(
            f"run folder {run_dir}: it must be empty or hold a run, but holds files that no run made "
            f"({', '.join(found)}). Choose another folder."
        )


def start_or_resume_run(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
    """A sweep's job: run it, or go on with what an interrupted sweep left of it; a finished run is left alone.

    What goes on does so as this command says: elsewhere, or told of otherwise.

    Raises:
        RunFolderError: The folder holds a run of other settings.
    """
    if not has_begun(run_dir):
        return start_run(config, run_dir, overrides=overrides)
    begun, store = read_launch(run_dir), config.rewriter.store
    config = _with_absolute_paths(config)
    if store is None:  # that of the working folder may be another one, with none of the run's rewrites
        config.rewriter.store = begun.rewriter.store
    if not is_same_run(begun, config):
        raise RunFolderError(
            f"run folder {run_dir}: it holds a run of other settings. Choose another with hydra.sweep.dir=..., or name "
            "jobs by all that differs (hydra.sweep.subdir)."
        )
    if not any(ended.rounds == begun.fl.rounds for ended in RunLog(run_dir).metrics_of(Summary)):
        with _alone(run_dir), RunStore(run_dir):  # nobody else has it, a server left over from a start neither
            write_settings(config, run_dir, overrides)
        resume_run(run_dir)


def dev_objective(run_dir: Path) -> float:
    """What a search over runs optimises: the dev score by which the best round was chosen, at that round.

    It is a loss or the evaluator's value, by ``evaluation.best_by``; not a number where nothing was scored.

    Raises:
        ConfigError: What was scored has no loss to search by.
    """
    config = read_launch(run_dir)
    by, score = config.evaluation.best_by, best_dev_score(RunLog(run_dir), config)
    number = None if score is None else score.loss if by is BestBy.loss else score.value
    if score is not None and number is None:
        where = f"evaluators.{score.evaluator}: for evaluation.best_by={by} its dev scores must have a finite loss"
        raise ConfigError(f"{where}, got none. Write evaluation.best_by=value.")
    return math.nan if number is None else number


def resume_run(run_dir: Path, *, rounds: int | None = None) -> None:
    """Go on with a run that was stopped, or make it longer; it ends as if it had been so from its beginning.

    Args:
        run_dir: The run folder.
        rounds: Another total, ``fl.rounds``, which makes the run longer; None for the present one.

    Raises:
        ConfigError: The run cannot be made so long.
        RunFolderError: The folder cannot be read or written, or another process writes to it.
    """
    read_launch(run_dir)  # no run folder is made of another
    read_environment(run_dir)  # a spoilt one is refused before anything is loaded or written
    extension: _Extension | None = None
    with _alone(run_dir):
        try:
            with RunStore(run_dir) as store:
                config, extension = _extended(read_launch(run_dir), store, rounds)
                if any(ended.rounds == config.fl.rounds for ended in store.metrics_of(Summary)):
                    longer = f"`{shell('fedzo resume', run_dir)} fl.rounds=N` makes the run longer."
                    log.warning("%s: all %d rounds are done, and only verified. %s", run_dir, config.fl.rounds, longer)
                if not config.runtime.traits.server_process:
                    return _run(config, store)
            _deploy(config, run_dir)
        except (ConfigError, RunFolderError):
            if extension:
                with RunStore(run_dir) as store:
                    extension.take_back(store)
            raise


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


@dataclass(frozen=True, slots=True)
class _Extension:
    """What made a run longer, and the files as they were before: a run that is then refused is as long as before."""

    record: Extension
    files: dict[str, bytes]

    def take_back(self, store: RunStore) -> None:
        """Undo it, unless the run has gone on; from its end, so that wherever a kill hits, the next resume mends it."""
        if len(store.records) == self.record.round:
            for name, content in reversed(self.files.items()):
                write_whole(store.folder / name, content.decode())
            store.take_back(self.record)


def _extended(config: LaunchConfig, store: RunStore, rounds: int | None) -> tuple[LaunchConfig, _Extension | None]:
    """The run's settings with its newest total, and what made it longer just now.

    The record in the log comes first, the files that tell of it follow.
    """
    before = max([config.fl.rounds, *(extension.rounds for extension in store.metrics_of(Extension))])
    total = before if rounds is None else rounds
    extension = None
    if total != before:
        _check_extension(config, total, before=before)
        read_run(store.folder)  # only what has begun can be made longer
        files = {name: read_file(store.folder, name) for name in (RUN_FILE, OVERRIDES, CONFIG_YAML, CONFIG)}
        seconds = max((record.seconds for record in store.metrics), default=0.0)
        record = Extension(seconds=seconds, round=len(store.records), before=before, rounds=total)
        store.write(record)
        extension = _Extension(record, files)
    if total == config.fl.rounds:
        return config, extension
    longer = with_rounds(config, total)
    write_whole(store.folder / RUN_FILE, to_json(with_rounds(read_run(store.folder), total)))
    overrides = [text for text in read_overrides(store.folder) if not text.startswith("fl.rounds=")]
    write_settings(longer, store.folder, [*overrides, f"fl.rounds={total}"])
    return longer, extension


def _check_extension(config: LaunchConfig, rounds: int, *, before: int) -> None:
    """Refuse a total that would have made the committed rounds otherwise: they must be those of the longer run, too.

    Of a run's parts only the schedule of the learning rate is told ``fl.rounds``.
    """
    if rounds < before:
        raise ConfigError(
            f"fl.rounds must be at least {before}, the run's present total, got {rounds}. A run can only be made "
            "longer. `fedzo export --rounds` gives an earlier state."
        )
    schedule = config.server_optimizer.schedule
    if schedule is not Schedule.constant:
        raise ConfigError(
            f"server_optimizer.schedule must be constant for a run to be made longer, got {schedule.value!r}: the "
            "learning rate of every round depends on fl.rounds. Start a new run."
        )
    if texts := [problem.text for problem in launch_problems(with_rounds(config, rounds))]:
        raise ConfigError("; ".join(texts))


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Have a run folder to oneself for as long as anything of the run is up.

    Where the server is a process of its own, it takes the lock of the log only once it has imported what it needs.
    """
    make_folder(run_dir)
    with folder_of_one_process(run_dir):
        yield


def _run(config: LaunchConfig, store: RunStore) -> None:
    """Run a federation whose server is this process."""
    run_dir = store.folder.resolve()
    with _opened(config, store) as process:
        launch(config, process, run_dir)


def _deploy(config: LaunchConfig, run_dir: Path) -> None:
    """Run a federation whose server is a process of its own, which opens the run."""
    run_dir = run_dir.resolve()
    write_whole(run_dir / SITE_FILE, to_json(config.site()))
    if not config.runtime.traits.has_sites:
        written, num_copies = config.trainer.traits.trains_base_weights, config.fl.num_clients + 1
        warn_of_copies(config.model, device=config.device, num_copies=num_copies, are_written=written)
    with _log_client_failures(run_dir):
        RUNTIMES.build(config.runtime, num_clients=config.fl.num_clients, run_dir=run_dir)


@contextmanager
def _opened(config: LaunchConfig, store: RunStore) -> Iterator[Process]:
    run_dir = store.folder.resolve()
    if missing := [*missing_libraries(config.trackers), *config.runtime.missing()]:
        raise ConfigError("\n".join(problem.text for problem in missing))
    for left in (STOP, PRESENCE, OUTCOME, FAILED):  # of an earlier start; from here on `fedzo stop` is heard
        (store.folder / left).unlink(missing_ok=True)
    forget_process()  # before another model is loaded
    try:
        process = open_run(config, run_dir, store)
        write_whole(run_dir / SITE_FILE, to_json(config.site()))
        if (done := len(store.records)) < config.fl.rounds:  # else nothing more is computed
            keep_environment(run_dir, _environment(process), round=done)
        yield process
    finally:
        forget_process()


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


def _with_absolute_paths(config: LaunchConfig) -> LaunchConfig:
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
