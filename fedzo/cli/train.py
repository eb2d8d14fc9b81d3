"""``fedzo train``: one run, or with ``-m`` a Hydra sweep whose jobs are all checked before the first one starts."""

from __future__ import annotations

import functools
import json
import logging
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedzo.config.compose import CONFIG_NAME, VERSION_BASE, register_schemas, session, with_models
from fedzo.config.diagnose import reason
from fedzo.config.load import checked, load
from fedzo.config.overrides import in_shell, with_config_dir
from fedzo.config.plugins import conf_dir
from fedzo.config.sweep import is_sweep, plan_sweep
from fedzo.errors import ConfigError, FedzoError, FolderInUseError, RunFolderError, printable, shell, without_escapes
from fedzo.records.folder import LOG, MULTIRUN, REPORT
from fedzo.system import environment_variable, quiet_libraries, warn_once

log = logging.getLogger(__name__)


class SearchEndedError(BaseException):
    """A search has nothing to search by. Sweepers that search go on after an ``Exception``, as of one bad setting."""


def train(arguments: Sequence[str]) -> None:
    """Run what ``fedzo train`` was given: overrides and Hydra's own flags.

    Raises:
        ConfigError: the settings of the run, or of any job of the sweep, are wrong; nothing has been started.
        FedzoError: a run failed; a sweep raises after its other jobs have run.
    """
    parser = _hydra_parser()
    parser.prog = "fedzo train"
    flags = parser.parse_args(list(arguments))
    for name in ("config_name", "config_path", "experimental_rerun"):
        if getattr(flags, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is not supported. Use --config-dir DIR and experiment=<name>.")
    _check_flags(flags)
    flags.overrides = with_config_dir(flags.overrides, flags.config_dir)
    flags.config_dir = None
    with session():
        flags.overrides = with_models(flags.overrides)
    if flags.help or flags.hydra_help or flags.cfg or flags.info is not None or flags.shell_completion:
        _hydra(flags, job)
    elif flags.multirun or is_sweep(flags.overrides):
        _sweep(flags)
    else:
        _single(flags)


def _check_flags(flags: Namespace) -> None:
    """Refuse Hydra's flags that do not go together; Hydra itself ends with a traceback, or ignores one of them."""
    if flags.resolve and not (flags.cfg or flags.help):
        raise ConfigError("--resolve must be given with --cfg or --help, got neither. Add --cfg job.")
    if flags.package is not None and not flags.cfg:
        raise ConfigError("--package must be given with --cfg, which shows it. Add --cfg job.")
    if flags.help or flags.hydra_help:
        return
    choices = {
        "--run": flags.run,
        "--multirun": flags.multirun,
        "--cfg": flags.cfg is not None,
        "--info": flags.info is not None,
        "--shell-completion": flags.shell_completion,
    }
    given = [option for option, is_given in choices.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"fedzo train must be given at most one of {', '.join(choices)}, got {' '.join(given)}.")


def job(composed: DictConfig) -> float | None:
    """One run, in the folder that Hydra made for it; in a worker process for the joblib launcher.

    Returns:
        What a sweeper that searches optimises; None where nobody asks for it.

    Raises:
        SearchEndedError: The first run of a search has nothing to optimise.
    """
    quiet_libraries()  # in a worker process, too
    warn_once.cache_clear()  # what the job before was told belongs into this one's log, too
    from fedzo.commands.resume import start_or_resume_run
    from fedzo.commands.train import start_run
    from fedzo.report.jobs import noted_failure

    hydra = HydraConfig.get()
    folder, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
    in_sweep = hydra.mode == RunMode.MULTIRUN
    is_searched = in_sweep and not str(hydra.sweeper.get("_target_")).endswith(".BasicSweeper")  # which reads no score
    start = start_or_resume_run if in_sweep else start_run
    try:
        with noted_failure(folder, overrides) if in_sweep else nullcontext():
            start(checked(composed), folder, overrides=overrides)
        show_result(folder)
        return _objective(folder, is_first=hydra.job.num == 0) if is_searched else None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(shell("fedzo resume", folder)) from None
    except Exception as error:
        if in_sweep:  # Hydra raises the first job's error only, when all have run
            if isinstance(error, FolderInUseError):  # the folder's log belongs to the process that has it
                print(f"fedzo: {without_escapes(error)}", file=sys.stderr)
            elif isinstance(error, FedzoError):
                log.error("%s: %s", folder, without_escapes(error))
            else:
                log.exception("%s: the job failed", folder)
            _let_frames_go(error)
        raise


def _let_frames_go(error: BaseException) -> None:
    """Empty the frames of an error that Hydra keeps until all jobs have run: the job's model is in them."""
    found: list[BaseException | None] = [error]
    for each in found:  # which grows by what is behind it
        if each is not None:
            traceback.clear_frames(each.__traceback__)  # those that still run stay as they are
            found += [other for other in (each.__cause__, each.__context__) if other not in found]


def _objective(folder: Path, *, is_first: bool) -> float:
    from fedzo.commands.resume import dev_objective

    try:
        return dev_objective(folder)
    except ConfigError as error:
        if is_first:  # else other jobs may well have a score: it is the fault of this one's settings
            raise SearchEndedError(str(error)) from error
        raise


def show_result(folder: Path) -> None:
    """Say where a finished run is."""
    print(f"run folder: {folder}")
    if (folder / REPORT).exists():
        print(f"report:     {folder / REPORT}")


def _show_sweep(folder: Path, page: Path | None) -> None:
    """Say where a sweep of which a job has begun is, and the page over its jobs."""
    if page is not None:
        print(f"sweep folder: {folder}")
        print(f"report:       {page}")


def log_to(folder: Path) -> None:
    """Log to the terminal and a run folder's ``fedzo.log``, as Hydra does for a new run.

    Beside the handlers that are there: ``logging.config`` would close them, and they may be somebody else's.
    """
    settings: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "hydra" / "job_logging" / "fedzo.yaml"))
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING)
    file = logging.FileHandler(
        folder / LOG,
        encoding="utf-8",
        errors="backslashreplace",
        delay=True,  # no file without a line
    )
    for handler, form in ((console, "plain"), (file, "full")):
        handler.setFormatter(logging.Formatter(settings["formatters"][form]["format"]))
    root, flower = logging.getLogger(), logging.getLogger("flwr")
    for logger in (root, flower):
        logger.setLevel(logging.INFO)
    flower.handlers, flower.propagate = [console, file], False
    for handler in (console, file):
        root.addHandler(handler)


def _refuse_folder(overrides: Sequence[str], key: str, *, use: str, of: str) -> None:
    """Refuse the key of a folder that nobody would read; a file may have it, for it serves runs and sweeps."""
    for word in overrides:
        name, _, folder = word.lstrip("+").partition("=")
        if name == key:
            raise ConfigError(f"{key} must be left out of {of}, got {word}. Write {use}={folder}.")


def _single(flags: Namespace) -> None:
    _refuse_folder(flags.overrides, "hydra.sweep.dir", use="hydra.run.dir", of="a single run (without -m)")
    load(flags.overrides)
    failures: list[Exception] = []

    @functools.wraps(job)
    def keep_failure(composed: DictConfig) -> float | None:
        try:
            return job(composed)
        except Exception as error:  # raised below, without Hydra's lines around it
            failures.append(error)
            return None

    with _folder_errors("hydra.run.dir"):
        _hydra(flags, keep_failure)
    if failures:
        raise failures[0]


def _sweep(flags: Namespace) -> None:
    from fedzo.records.folder import folder_of_one_process
    from fedzo.report.sweep import unfinished_jobs, write_sweep_report

    _refuse_folder(flags.overrides, "hydra.run.dir", use="hydra.sweep.dir", of="a sweep (-m)")
    sweep = plan_sweep(flags.overrides)
    words = "".join(f"- {json.dumps(word)}\n" for word in sweep.overrides)
    flags.overrides, flags.run, flags.multirun = sweep.overrides, False, True
    again = in_shell("hydra.sweep.dir", str(sweep.folder))
    with ExitStack() as held:
        with _folder_errors("hydra.sweep.dir"):
            sweep.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(folder_of_one_process(sweep.folder))
            # by this file `fedzo report` knows a sweep; not all sweepers write it
            (sweep.folder / MULTIRUN).write_text(words, encoding="utf-8")
        try:
            with _folder_errors("hydra.sweep.dir", below=sweep.folder), _model_of_jobs():
                _hydra(flags, job)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command with {again}") from None
        except (Exception, SearchEndedError) as failure:  # other jobs have run: show what they found
            try:
                _show_sweep(sweep.folder, write_sweep_report(sweep.folder))
            except FedzoError as error:
                log.warning("%s: no sweep report: %s", sweep.folder, error)
            if isinstance(failure, BrokenExecutor):
                raise FedzoError(
                    f"sweep {sweep.folder}: the process of a job was ended from outside, perhaps for lack of memory. "
                    f"Lower hydra.launcher.n_jobs, and repeat the command with {again}."
                ) from failure
            if type(failure).__module__.startswith("submitit."):  # whose launcher then waits for no other job
                raise FedzoError(
                    f"sweep {sweep.folder}: a job gave no result. Others may still run: wait for them, and repeat the "
                    f"command with {again}. Submitit says: {printable(str(failure))}"
                ) from failure
            if isinstance(failure, SearchEndedError):
                raise FedzoError(f"sweep {sweep.folder}: the search ended with its first job: {failure}") from None
            if sweep.searches and not isinstance(failure, FedzoError):  # such as that no job has a score
                raise FedzoError(
                    f"sweep {sweep.folder}: the search failed: {failure} Where jobs failed, the lines above say why."
                ) from failure
            if isinstance(failure, ConfigError) and any(path.is_dir() for path in sweep.folder.iterdir()):
                raise FedzoError(str(failure)) from failure  # a ConfigError says that nothing was started
            raise
        _show_sweep(sweep.folder, write_sweep_report(sweep.folder))
        if sweep.searches and (failed := unfinished_jobs(sweep.folder)):  # the search went on without them
            raise FedzoError(f"sweep {sweep.folder}: {len(failed)} jobs failed, the others ran: {', '.join(failed)}")


def _hydra_parser() -> ArgumentParser:
    """The parser of Hydra's flags. One of its help texts is no text, which Python 3.14 refuses in every parser."""
    with patch.object(ArgumentParser, "_check_help", lambda parser, action: None, create=True):
        return get_args_parser()


def _hydra(flags: Namespace, task: TaskFunction) -> None:
    """What ``@hydra.main`` does, on parsed flags instead of ``sys.argv``."""
    version.setbase(VERSION_BASE)
    register_schemas()
    before = HydraConfig.instance().cfg
    try:
        with environment_variable("HYDRA_FULL_ERROR", "1"):  # a job's error is raised, not printed
            _run_hydra(
                args=flags,
                args_parser=_hydra_parser(),
                task_function=task,
                config_path=str(conf_dir()),
                config_name=CONFIG_NAME,
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(reason(error)) from error
    finally:
        HydraConfig.instance().cfg = before  # --help and --cfg leave theirs


@contextmanager
def _folder_errors(key: str, *, below: Path | None = None) -> Iterator[None]:
    """The error of a folder that cannot be made, or whose log file cannot be opened, as fedzo's own.

    With ``below``, only of what lies in this folder: what a job raised of other files is its own.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__  # logging wraps it in a ValueError
        if isinstance(error, FedzoError) or not isinstance(cause, OSError):
            raise
        if below and (isinstance(cause, FileNotFoundError) or not _is_below(cause.filename, below)):
            raise
        where = f"run folder {cause.filename}: it must be writable, got {cause.strerror!r}"
        raise RunFolderError(f"{where}. Choose another with {key}=<folder>.") from error


@contextmanager
def _model_of_jobs() -> Iterator[None]:
    """Let the model that the jobs of this process have shared go, when the last of them has ended."""
    try:
        yield
    finally:
        if "fedzo.run.process" in sys.modules:  # else they ran in other processes, which end with the sweep
            from fedzo.run.process import forget_process

            forget_process()


def _is_below(file: object, folder: Path) -> bool:
    """Whether an error names a file in a folder, or deeper."""
    return file is not None and folder.resolve() in Path(str(file)).resolve().parents
