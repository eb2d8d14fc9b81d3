"""Go on with a run that was stopped, or make it longer; and what a sweep asks of its jobs' runs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from fedzo.commands.run_folder import read_launch, read_run, write_settings
from fedzo.commands.train import alone, deploy, run_here, start_run, with_absolute_paths
from fedzo.config.rules import launch_problems
from fedzo.config.schema import LaunchConfig, with_rounds
from fedzo.config.travel import is_same_run, to_json
from fedzo.errors import ConfigError, RunFolderError, refuse, shell
from fedzo.fl.config import BestBy
from fedzo.fl.log_store import RunLog, RunStore, best_dev_score, has_begun
from fedzo.records.folder import CONFIG, CONFIG_YAML, OVERRIDES, RUN_FILE, read_file
from fedzo.records.metrics import Extension, Summary
from fedzo.records.texts import read_environment, read_overrides, write_whole
from fedzo.zo.server_optimizer import Schedule

log = logging.getLogger(__name__)


def resume_run(run_dir: Path, *, rounds: int | None = None, keeps_model: bool = False) -> None:
    """Go on with a run that was stopped, or make it longer; it ends as if it had been so from its beginning.

    Args:
        run_dir: The run folder.
        rounds: Another total, ``fl.rounds``, which makes the run longer; None for the present one.
        keeps_model: As of ``start_run``.

    Raises:
        ConfigError: The run cannot be made so long.
        RunFolderError: The folder cannot be read or written, or another process writes to it.
    """
    read_launch(run_dir)  # no run folder is made of another
    read_environment(run_dir)  # a spoilt one is refused before anything is loaded or written
    extension: _Extension | None = None
    with alone(run_dir):
        try:
            with RunStore(run_dir) as store:
                config, extension = _extended(read_launch(run_dir), store, rounds)
                if any(ended.rounds == config.fl.rounds for ended in store.metrics_of(Summary)):
                    longer = f"`{shell('fedzo resume', run_dir)} fl.rounds=N` makes the run longer."
                    log.warning("%s: all %d rounds are done, and only verified. %s", run_dir, config.fl.rounds, longer)
                if not config.runtime.traits.server_process:
                    return run_here(config, store, keeps_model)
            deploy(config, run_dir)
        except (ConfigError, RunFolderError):
            if extension:
                with RunStore(run_dir) as store:
                    extension.take_back(store)
            raise


def start_or_resume_run(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
    """A sweep's job: run it, or go on with what an interrupted sweep left of it; a finished run is left alone.

    What goes on does so as this command says: elsewhere, or told of otherwise. The model stays in this process for the
    next job.

    Raises:
        RunFolderError: The folder holds a run of other settings.
    """
    if not has_begun(run_dir):
        return start_run(config, run_dir, overrides=overrides, keeps_model=True)
    begun, store = read_launch(run_dir), config.rewriter.store
    config = with_absolute_paths(config)
    if store is None:  # that of the working folder may be another one, with none of the run's rewrites
        config.rewriter.store = begun.rewriter.store
    if not is_same_run(begun, config):
        raise RunFolderError(
            f"run folder {run_dir}: it holds a run of other settings. Choose another with hydra.sweep.dir=..., or name "
            "jobs by all that differs (hydra.sweep.subdir)."
        )
    if not any(ended.rounds == begun.fl.rounds for ended in RunLog(run_dir).metrics_of(Summary)):
        with alone(run_dir), RunStore(run_dir):  # nobody else has it, a server left over from a start neither
            write_settings(config, run_dir, overrides)
        resume_run(run_dir, keeps_model=True)


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
    refuse(launch_problems(with_rounds(config, rounds)))
