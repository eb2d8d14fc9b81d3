"""The files of a run folder that say what the run is, and the run rebuilt from them."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedzo.config.schema import LaunchConfig, RunConfig, uncompiled
from fedzo.config.travel import from_json, to_json, to_yaml
from fedzo.errors import ConfigError, RunFolderError, printable
from fedzo.fl.log_store import RunLog, best_round, has_begun
from fedzo.fl.replica import Replica, Workspace
from fedzo.records.folder import CONFIG, CONFIG_YAML, ENVIRONMENT, OVERRIDES, read_file
from fedzo.records.texts import read_environment, read_text, write_whole
from fedzo.report.run_data import computed_with
from fedzo.report.sinks import phase, replaying
from fedzo.run.peer import Peer
from fedzo.run.process import Process, open_process
from fedzo.run.start import check_artifact, check_base, read_begun
from fedzo.trainers import TrainerContext
from fedzo.trainers.artifacts import ARTIFACTS, Artifact, ArtifactStore

log = logging.getLogger(__name__)


def read_launch(run_dir: Path) -> LaunchConfig:
    """The command line of a run folder: the run's settings, and how it was launched on this machine."""
    text = read_text(run_dir, CONFIG, "Give the folder that `fedzo train` printed.")
    if '"model_type"' in text and not has_begun(run_dir):
        raise RunFolderError(
            f"{run_dir}: it must be the folder of a run, but is that of a model. Give the folder that `fedzo train` "
            "printed. For the model itself: `fedzo generate --model`, or transformers."
        )
    try:
        return from_json(text, LaunchConfig)
    except ConfigError as error:
        raise ConfigError(f"{run_dir / CONFIG}: {error}") from error


def write_settings(config: LaunchConfig, run_dir: Path, overrides: list[str]) -> None:
    """Write a command line into its run folder, which nobody else writes to meanwhile.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    # the first: a later start knows by it that the others are of a start
    write_whole(run_dir / OVERRIDES, "".join(f"- {json.dumps(item)}\n" for item in overrides))
    write_whole(run_dir / CONFIG_YAML, to_yaml(config))
    write_whole(run_dir / CONFIG, to_json(config))  # the last: without it the folder holds no run


def keep_environment(run_dir: Path, now: Mapping[str, Any], *, round: int) -> None:
    """Write down what a run is computed with. Where it goes on with something else, that is said, and kept beside it.

    Args:
        run_dir: The run folder.
        now: The ``system.environment`` of this process, perhaps with more.
        round: The first that is computed with it.

    Raises:
        RunFolderError: The file holds something else, or cannot be written.
    """
    if told := read_environment(run_dir):
        (*_, before), later = computed_with(told), told.get("later", [])
        changed = {name: value for name, value in next(computed_with(now)).items() if value != before.get(name)}
        if not changed:
            return
        words = ", ".join(f"{name} {value} (before {before.get(name)})" for name, value in changed.items())
        text = "run folder %s: from round %d on, the run is computed with %s. %s keeps both."
        log.warning(text, run_dir, round, printable(words, most=1000), ENVIRONMENT)
        now = {**told, "later": [*later, {"round": round, **changed}]}
    write_whole(run_dir / ENVIRONMENT, json.dumps(now, indent=2))


def read_run(run_dir: Path) -> RunConfig:
    """What the peers of a run agreed on when it began."""
    read_launch(run_dir)  # says what is wrong with a folder of another version
    return read_begun(run_dir)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A run's model after some of its rounds, rebuilt from base weights and log alone."""

    process: Process
    workspace: Workspace

    @property
    def replica(self) -> Replica:
        """The trained values."""
        return self.workspace.replica


def rebuild(run_dir: Path, *, rounds: int | None = None) -> Rebuilt:
    """Rebuild the model after ``rounds`` rounds (by default the best round, or the last of an unfinished run).

    Raises:
        ConfigError: The model is not the one that the run began with.
        ProtocolError: The log does not lead to the states that it claims.
    """
    config, site = read_run(run_dir), uncompiled(read_launch(run_dir).site())
    log = RunLog(run_dir)
    if rounds is None:
        rounds = best_round(log, config)
    if not 0 <= rounds <= len(log.records):
        raise ConfigError(f"--rounds must be 0 to {len(log.records)}, the rounds done, got {rounds}.")
    process = open_process(config, site, site_folder=run_dir, artifacts=run_dir / ARTIFACTS)
    check_base(config, process.peer.loaded, run_dir)
    # without rows to measure on: a rebuilt model is held in float32 where the choice was open
    workspace = process.peer.workspace(_artifact(config, process.peer, run_dir))
    replica = workspace.replica
    with phase(replaying(rounds), stderr=True, enabled=rounds > 0) as advance:
        for record, line in zip(log.records[:rounds], log.public, strict=False):
            replica.advance([record])
            replica.verify(line)
            advance(replica.position, rounds)
    return Rebuilt(process, workspace)


def _artifact(config: RunConfig, peer: Peer, run_dir: Path) -> Artifact:
    """The run's artifact: from the folder, or prepared again elsewhere from what the trainer kept there."""
    if kept := ArtifactStore(run_dir / ARTIFACTS).find(config.artifact):
        return kept
    folder = Path(tempfile.mkdtemp(prefix="fedzo-artifacts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in run_dir.iterdir():
        if file.is_file() and file.suffix not in (".jsonl", ".log"):
            (folder / file.name).write_bytes(read_file(run_dir, file.name))
    context = TrainerContext(folder=folder, seed=config.seed, texts=partial(_no_texts, run_dir))
    artifact = peer.trainer.prepare(peer.loaded, context).artifact
    check_artifact(config, artifact, run_dir)
    return artifact


def _no_texts(folder: Path) -> list[str]:
    raise RunFolderError(
        f"run folder {folder}: what the server prepared before the first round (such as mask.safetensors) must be "
        "there, since it was made from the clients' texts and cannot be made again. Restore the file from a copy."
    )
