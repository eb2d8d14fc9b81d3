"""The files of a run folder that say what the run is, and the run rebuilt from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedzo.config.schema import LaunchConfig, RunConfig, first_evaluator
from fedzo.config.travel import from_json
from fedzo.errors import ConfigError, RunFolderError
from fedzo.fl.log_store import RunStore, best_round
from fedzo.fl.replica import Replica
from fedzo.records.log import CommittedLine
from fedzo.run.process import Process, open_process
from fedzo.run.start import RUN_FILE, check_base
from fedzo.trainers import Workplace

CONFIG, OVERRIDES, ENVIRONMENT = "config.json", "overrides.yaml", "environment.json"


def read_launch(run_dir: Path) -> LaunchConfig:
    """The command line of a run folder: the run's settings, and how it was launched on this machine."""
    return from_json(_text(run_dir, CONFIG, "Give the folder that `fedzo train` printed."), LaunchConfig)


def read_run(run_dir: Path) -> RunConfig:
    """What the peers of a run agreed on when it began."""
    read_launch(run_dir)  # says what is wrong with a folder of another version
    remedy = f"It ended before its first round; `fedzo resume {run_dir}` begins it."
    return from_json(_text(run_dir, RUN_FILE, remedy), RunConfig)


def _text(run_dir: Path, name: str, remedy: str) -> str:
    try:
        return (run_dir / name).read_text(encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{run_dir}: not a run folder (no {name}). {remedy}") from error


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A run's model after some of its rounds, rebuilt from base weights and log alone."""

    process: Process
    replica: Replica
    rounds: list[CommittedLine]


def rebuild(run_dir: Path, *, rounds: int | None = None) -> Rebuilt:
    """Rebuild the model after ``rounds`` rounds (by default the best round, or the last of an unfinished run).

    Raises:
        ConfigError: The model is not the one that the run began with.
        ProtocolError: The log does not lead to the states that it claims.
    """
    config, site = read_run(run_dir), read_launch(run_dir).site()
    with RunStore(run_dir) as store:
        best = best_round(store, by=config.evaluation.best_by, evaluator=first_evaluator(config))
        wanted = best if rounds is None else rounds
        if not 0 <= wanted <= len(store.records):
            raise ConfigError(f"rounds must be in 0..{len(store.records)} (the log's length), got {wanted}.")
        site = replace(site, model=replace(site.model, compile=False))  # this does not repay a compiler's minutes
        process = open_process(config, site)
        check_base(config, process.peer.loaded, run_dir)
        peer = process.peer  # without rows to measure on: a rebuilt model is held in float32 where the choice was open
        workplace = Workplace(
            folder=run_dir, seed=config.seed, texts=partial(_no_texts, run_dir), advance=lambda done, total: None
        )
        artifact = peer.trainer.prepare(peer.loaded, workplace).artifact
        replica = peer.workspace(artifact).replica
        for done in range(wanted):
            replica.advance([store.records[done]])
            replica.verify(store.rounds[done])
        return Rebuilt(process, replica, store.rounds[:wanted])


def _no_texts(folder: Path) -> list[str]:
    raise RunFolderError(
        f"run folder {folder}: mask.safetensors must exist. The mask "
        "was chosen on the clients' texts and cannot be made again. Restore the file from a copy."
    )
