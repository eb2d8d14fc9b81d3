"""What comes before a run's first round: load the model, prepare the trainer, and fix what all peers agree on.

From then on ``run.json`` of the run folder holds that agreement, and nothing of it changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

from fedzo.config.plugins import plugin_name
from fedzo.config.schema import LaunchConfig, RunConfig, RunSettings, SiteConfig
from fedzo.config.travel import from_json, to_json
from fedzo.data.rows import RowSource, SimulatedRows
from fedzo.errors import ConfigError, shell
from fedzo.fl.log_store import RunStore
from fedzo.models.config import BaseConfig
from fedzo.models.loaded import LoadedModel
from fedzo.records.folder import RUN_FILE
from fedzo.records.texts import read_text, write_whole
from fedzo.registry import returned
from fedzo.report.sinks import phase
from fedzo.run.peer import Peer, check_format, open_model
from fedzo.run.process import Process, row_source
from fedzo.run.server_context import Launched
from fedzo.trainers import TRAINERS, Prepared, TrainerContext
from fedzo.trainers.artifacts import ARTIFACTS, Artifact


def open_run(
    launch: LaunchConfig,
    run_dir: Path,
    store: RunStore | None = None,
    load: Callable[[SiteConfig, int], LoadedModel] = open_model,
) -> Process:
    """A run on this machine, new or to be gone on with.

    Args:
        launch: The command line.
        run_dir: Its folder.
        store: Its logs, if it is to be run.
        load: As of ``open_process``.

    Raises:
        ConfigError: The model, the rows or the inputs are not what the run needs, or not those that it began with.
    """
    begun = read_begun(run_dir) if (run_dir / RUN_FILE).exists() else None
    if begun is not None:
        _check_settings(begun, launch, run_dir)
    source = row_source(launch, launch.site())
    if isinstance(source, SimulatedRows):
        _ = source.parts  # rows that cannot be used or dealt are refused here, before the model is loaded
    loaded = load(launch.site(), launch.task.max_length)
    check_format(launch, loaded)
    started = time.monotonic()
    prepared = prepare_trainer(launch, loaded, source, run_dir, resumed=begun is not None)
    prepare_seconds = time.monotonic() - started
    launch.step_policy.check_start(launch.fl, has_gradient=prepared.gradient is not None)
    run = launch.run(_base_of(launch, loaded), prepared.artifact.digest)
    if begun is None:
        write_whole(run_dir / RUN_FILE, to_json(run))
    else:
        check_base(begun, loaded, run_dir)
        check_artifact(begun, prepared.artifact, run_dir)
    return Process(
        Peer(begun or run, launch.site(), loaded),
        source,
        site_folder=run_dir,
        artifacts=run_dir / ARTIFACTS,
        launched=Launched(launch, prepared, store, prepare_seconds),
        asked_again=launch.runtime.traits.own_processes,
    )


def check_base(run: RunConfig, loaded: LoadedModel, run_dir: Path) -> None:
    """Refuse another model than the run's. Trained values alone may have the digest of the log on any base.

    Raises:
        ConfigError: Weights, config.json or tokenizer have another digest.
    """
    _must_be("the model's weights", run.base.weights_digest, loaded.base_digest, run_dir)
    _must_be("the model's config.json", run.base.architecture_digest, loaded.architecture_digest, run_dir)
    _must_be("the model's tokenizer", run.base.tokenizer_digest, loaded.tokenizer_digest, run_dir)


def check_artifact(run: RunConfig, artifact: Artifact, run_dir: Path) -> None:
    """Refuse another artifact than the run's.

    Raises:
        ConfigError: It has another digest.
    """
    _must_be("the trainer's artifact", run.artifact, artifact.digest, run_dir)


def read_begun(run_dir: Path) -> RunConfig:
    """What the peers agreed on when the run began.

    Raises:
        RunFolderError: It has not begun, or the file cannot be read.
        ConfigError: The file holds something else.
    """
    remedy = f"It ended before its first round; `{shell('fedzo resume', run_dir)}` begins it."
    try:
        return from_json(read_text(run_dir, RUN_FILE, remedy), RunConfig)
    except ConfigError as error:
        raise ConfigError(f"{run_dir / RUN_FILE}: {error}") from error


def _check_settings(begun: RunConfig, launch: LaunchConfig, run_dir: Path) -> None:
    names = [each.name for each in fields(RunSettings) if getattr(begun, each.name) != getattr(launch, each.name)]
    if names:
        raise ConfigError(
            f"run folder {run_dir}: config.json must have the settings with which the run began ({RUN_FILE}), but "
            f"differs in {', '.join(names)}. It was edited. Restore the file from a copy, or start a new run."
        )
    if begun.base.dtype not in (None, launch.model.dtype):
        raise ConfigError(
            f"run folder {run_dir}: model.dtype must be {begun.base.dtype}, in which the run's trained values are, got "
            f"{launch.model.dtype}. config.json was edited. Restore the file from a copy, or start a new run."
        )


def calibration_texts(source: RowSource) -> list[str]:
    """The prompts of all clients' training rows, for a trainer that is calibrated on them (a simulation only).

    Raises:
        ConfigError: They are the clients' own.
    """
    if not isinstance(source, SimulatedRows):
        raise ConfigError(
            "trainer: the server must have training rows for it to read, but with partition=own they are the clients'. "
            "Write settings with which the trainer needs none, or choose another trainer."
        )
    return source.prompts()


def prepare_trainer(
    launch: LaunchConfig, loaded: LoadedModel, source: RowSource, run_dir: Path, *, resumed: bool
) -> Prepared:
    """What the trainer of a run prepares at the server, with its progress shown."""
    title = f"preparing {plugin_name('trainer', launch.trainer)}"
    with phase(title, enabled=launch.report.progress) as advance:
        context = TrainerContext(
            folder=run_dir,
            seed=launch.seed,
            texts=partial(calibration_texts, source),
            advance=advance,
            inputs=launch.inputs,
            resumed=resumed,
        )
        trainer = TRAINERS.build(launch.trainer)
        return returned(trainer.prepare(loaded, context), Prepared, by=trainer, method="prepare")


def _base_of(launch: LaunchConfig, loaded: LoadedModel) -> BaseConfig:
    name = launch.model.name.replace("\\", "/").rstrip("/")
    return BaseConfig(
        label=name.rpartition("/")[2],
        weights_digest=loaded.base_digest,
        tokenizer_digest=loaded.tokenizer_digest,
        architecture_digest=loaded.architecture_digest,
        dtype=None if launch.trainer.traits.float32_master else launch.model.dtype,
    )


def _must_be(what: str, begun: str, now: str, run_dir: Path) -> None:
    if begun != now:
        raise ConfigError(
            f"run folder {run_dir}: {what} must have the SHA-256 {begun[:12]}..., with which the run began, got "
            f"{now[:12]}... Put the files of that time back, or start a new run."
        )
