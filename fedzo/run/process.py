"""What one process holds of a run, once, however many parts it plays and however many messages come."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

from fedzo.config.plugins import plugin_name
from fedzo.config.rules import rows_problems, site_problems, stage_problems
from fedzo.config.schema import RunConfig, RunSettings, SiteConfig, SiteFile
from fedzo.config.travel import config_hash, from_json, load_site, to_json
from fedzo.data.encode import task_digest
from fedzo.data.kept_digests import KEPT_ROWS, KeptDigests
from fedzo.data.rows import OwnRows, RowSource, SimulatedRows
from fedzo.errors import ConfigError, printable, refuse
from fedzo.fl.client.worker import part
from fedzo.fl.messages import Identity, Refusal
from fedzo.fl.site_limits import SiteError, check_base, check_run
from fedzo.models.loaded import LoadedModel
from fedzo.records.folder import RUN_FILE, make_folder, open_file, raised_as, replace_file
from fedzo.run.client_context import ClientContext
from fedzo.run.peer import Peer, check_format, open_model
from fedzo.run.server_context import Launched, ServerContext
from fedzo.run.site_model import SiteModel
from fedzo.system import SITE_ARTIFACTS_ENV, SITE_ENV, SITE_LOG_ENV
from fedzo.trainers.artifacts import ARTIFACTS, ArtifactStore

RUNS = "runs"
"""Folder beside a site's file with the settings of each run that it took part in, for its people: fedzo reads none."""


@dataclass
class Process:
    """One process's model and rows, shared by the parts that it plays.

    Attributes:
        peer: The model.
        source: Where rows of clients come from.
        site_folder: Where this machine keeps what it must remember of a run.
        artifacts: Folder of artifacts that clients have or receive.
        launched: What this process knows of a run that it launched.
        asked_again: Whether a client that is asked again is asked here. Else a greeting waits until its rows are ready.
    """

    peer: Peer
    source: RowSource
    site_folder: Path
    artifacts: Path
    launched: Launched | None = None
    asked_again: bool = True

    @property
    def kept(self) -> KeptDigests:
        """What this site remembers of its rows in the run."""
        return KeptDigests(self.site_folder / KEPT_ROWS, self.peer.run_id)

    @cached_property
    def identity(self) -> Identity:
        """Digests of what all peers must hold alike. Rows of one set are dealt for it."""
        config, loaded = self.peer.config, self.peer.loaded
        return Identity(
            config_hash=config_hash(config),
            base_digest=loaded.base_digest,
            tokenizer_digest=loaded.tokenizer_digest,
            task_digest=task_digest(config.task),
            architecture_digest=loaded.architecture_digest,
            partition_digest=self.source.partition_digest,
        )

    @cached_property
    def client(self) -> ClientContext:
        """For the clients of this process."""
        return ClientContext(self)

    @cached_property
    def server(self) -> ServerContext:
        """For the server, if this process plays it."""
        return ServerContext(self)

    def stop(self) -> None:
        """Let what works for its clients in the background end, and let go of both parts, which hold this process.

        So what the run has taken is free at once, not when Python looks for cycles: the next run measures memory.
        """
        if "client" in vars(self):
            self.client.stop()
            del self.client
        vars(self).pop("server", None)


def open_process(
    run: RunConfig,
    site: SiteFile,
    *,
    site_folder: Path,
    artifacts: Path,
    plays_clients: bool = False,
    asked_again: bool = True,
    load: Callable[[SiteConfig, int], LoadedModel] = open_model,
) -> Process:
    """Load this site's model for a run; rows are read when they are first asked for.

    Args:
        run: What the peers of the run agree on.
        site: This machine's own.
        site_folder: As of ``Process``.
        artifacts: As of ``Process``.
        plays_clients: Whether it needs rows.
        asked_again: As of ``Process``.
        load: Gives the site's model, for texts of at most so many tokens.

    Raises:
        SiteError: The site's limits rule the run out.
        ConfigError: The site cannot take part in this run, or its model cannot be loaded.
    """
    trainer, estimator = plugin_name("trainer", run.trainer), plugin_name("estimator", run.estimator)
    check_run(site.limits, run, trainer=trainer, estimator=estimator)
    if plays_clients and (lacks := [problem.text for problem in stage_problems(site, run)]):
        raise SiteError(Refusal.stage, "; ".join(lacks))
    rows = rows_problems(site, run) if plays_clients else ()
    refuse((*site_problems(site, run), *rows))
    loaded = load(site, run.task.max_length)
    check_base(site.limits, loaded.base_digest, whose=f"the model {site.model.name}")
    check_format(run, loaded)
    return Process(Peer(run, site, loaded), row_source(run, site), site_folder, artifacts, asked_again=asked_again)


def row_source(run: RunSettings, site: SiteConfig) -> RowSource:
    """Where this machine's clients have their rows from."""
    if run.partition.traits.own_rows:
        return OwnRows(site.data.path or "", run.task)
    return SimulatedRows(site.data, run.split, run.task, run.partition, run.fl.num_clients, run.seed)


_model = SiteModel()


@dataclass
class _Open:
    """The run that is open in this process, and the text by which its apps ask for it."""

    run_json: str
    process: Process
    flower_run: int | None = None


_open: _Open | None = None


def kept_model(site: SiteConfig, max_length: int) -> LoadedModel:
    """The model of the site, or of the sweep, that this process works for: loaded where it does not keep it.

    Raises:
        ConfigError: It cannot be loaded, or used for texts of so many tokens.
    """
    return _model.open(site, max_length)


def load_ahead() -> None:
    """Load the model of this process's site before a run asks for it."""
    _write_site_log()
    with contextlib.suppress(ConfigError):  # it is told to the run that asks
        _model.load_ahead(load_site(Path(_site_file())))


def keep_process(process: Process) -> str:
    """Let this process's apps find a run that is open already; returns what travels of it."""
    global _open
    _end_run()
    _model.lend()
    _open = _Open(to_json(process.peer.config), process)
    return _open.run_json


def this_process(run_json: str, *, flower_run: int | None = None, artifacts: Path | None = None) -> Process:
    """What this process holds of the run; the run before it is let go, its model kept if it is this run's, too.

    A run that is not open is opened with the site's own file, whose path is in ``FEDZO_SITE``.

    Args:
        run_json: What the peers of the run agree on.
        flower_run: Flower's number of the run (``leave_other``).
        artifacts: As of ``Process``; None for the site's own: in ``FEDZO_SITE_ARTIFACTS``, or else beside its file.
    """
    global _open
    if _open is None or _open.run_json != run_json:
        forget_process(keep_model=True)
        _write_site_log()
        file = Path(_site_file())
        run, site = from_json(run_json, RunConfig), load_site(file)
        own = os.environ.get(SITE_ARTIFACTS_ENV)
        process = open_process(
            run,
            site,
            site_folder=file.parent,
            artifacts=artifacts or Path(own or file.parent / ARTIFACTS),
            plays_clients=True,
            asked_again=artifacts is None,  # else an actor: the client's next greeting may reach another one
            load=kept_model,
        )
        if own:
            with contextlib.suppress(OSError):  # what is of no use any more may stay
                ArtifactStore(Path(own)).keep_only(run.artifact)
        _keep_settings(process)
        _model.lend()
        _open = _Open(run_json, process)
    if _open.process.launched is None:
        _open.flower_run = flower_run
    return _open.process


def leave_other(flower_run: int) -> None:
    """Before a run begins: let a site's process go that is of another start, maybe with the same agreement.

    Its file and its rows are then read anew. A run that goes on keeps the process, whatever Flower calls it.
    """
    if _open is not None and _open.flower_run not in (None, flower_run):
        forget_process(keep_model=True)


def read_anew() -> None:
    """Let the rows be read anew when the run asks again, and all else where the site's file, or its model, has changed.

    Where neither has, the model stays, and what stages have spent of their budget stays spent.
    """
    if _open is None or _open.process.launched is not None:
        return
    with contextlib.suppress(ConfigError, OSError):  # of files that are being written
        site = load_site(Path(_site_file()))
        if site == _open.process.peer.site and _model.is_as_lent(site):
            _open.process.client.forget_rows()
            return
    forget_process(keep_model=True)


def _keep_settings(process: Process) -> None:
    """Let a site know and keep what it takes part in, before any of its rows is read.

    In a simulation the settings of the run lie beside the site's file anyway.
    """
    folder, peer = process.site_folder, process.peer
    if (folder / RUN_FILE).exists():
        return
    kept = folder / RUNS / f"{peer.run_id}.json"
    with raised_as(ConfigError, f"{kept}: the settings of the run must be kept there", "Make the folder writable."):
        make_folder(kept.parent, mode=0o700)
        replace_file(kept, to_json(peer.config))
    task, trainer = printable(peer.config.task.name), plugin_name("trainer", peer.config.trainer)
    said = "run %s: task %s, trainer %s, %d rounds; its settings are in %s"
    part.info(said, peer.run_id, task, trainer, peer.config.fl.rounds, kept)


class _SiteLog(WatchedFileHandler):
    """A new file belongs to the owner of its folder, also where root makes it; logrotate may rename it."""

    def _open(self) -> TextIOWrapper:
        file = Path(self.baseFilename)
        if not os.path.lexists(file):
            os.close(open_file(file.parent, file.name, os.O_WRONLY | os.O_CREAT))
        return super()._open()


def _write_site_log() -> None:
    """Write what a site should know to its log, too, if it has one: other output may be kept elsewhere.

    These are errors, and what the site is told of its part in a run.
    """
    file, logger = os.environ.get(SITE_LOG_ENV), logging.getLogger("fedzo")
    if file and not any(isinstance(handler, logging.FileHandler) for handler in logger.handlers):
        handler = _SiteLog(file, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        handler.addFilter(lambda record: record.levelno >= logging.ERROR or record.name == part.name)
        logger.addHandler(handler)
        part.setLevel(logging.INFO)


def _site_file() -> str:
    if not (file := os.environ.get(SITE_ENV)):
        raise ConfigError(f"{SITE_ENV} must name the file with this site's configuration, got nothing. Set it.")
    return file


def forget_process(*, keep_model: bool = False) -> None:
    """Let the run go that is open in this process, so that the next one finds nothing of it, and its memory free.

    Args:
        keep_model: Whether the next run may have the model, if that is as it was loaded. Else it goes, too.
    """
    process = _end_run()
    if not keep_model:
        _model.forget()
    elif process is not None:
        _model.take_back(process.peer)


def _end_run() -> Process | None:
    """End what works for the run that is open, if one is; returns its process, which nobody finds any more."""
    global _open
    ended, _open = _open, None
    if ended is None:
        return None
    ended.process.stop()
    return ended.process
