"""Stand-ins for the services behind the commands, and Hydra's global state put back."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from fedzo.cli import main
from fedzo.config.schema import LaunchConfig
from fedzo.errors import ConfigError, NumericsError

Calls = list[tuple[Any, ...]]
DIVERGES, INTERRUPTED, BUG, REFUSED = 5, 6, 7, 8
"""Run seeds with which the stand-in of ``start_run`` fails."""


@pytest.fixture(autouse=True)
def hydra_is_left_clear() -> Iterator[None]:
    yield

    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is None
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system knows none, as Lustre may not."""

    def refused(opened: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The folder of a server that nobody has started."""
    assert main(["server", "init", str(tmp_path / "server"), "--host", "fed.example.org", "--port", "9443"]) == 0
    return tmp_path / "server"


class _Table:
    """A client's path as far as the command sees it."""

    def table(self) -> list[str]:
        return ["one", "two"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """What the commands asked of the services, in order; the working folder is ``tmp_path``."""
    made: Calls = []
    names = ("train", "resume", "replay", "evaluate", "generate", "export", "mask", "doctor")
    modules = {name: ModuleType(f"fedzo.commands.{name}") for name in names}
    modules |= {name: ModuleType(f"fedzo.report.{name}") for name in ("html", "sweep")}

    def start_run(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
        assert run_dir.is_dir()
        made.append(("start", config, run_dir, overrides))
        logging.getLogger("fedzo.somewhere").info("a line of the run")
        if config.seed == DIVERGES:
            raise NumericsError("round 3: the loss must be finite, got nan. Lower trainer.lr.")
        if config.seed == INTERRUPTED:
            raise KeyboardInterrupt
        if config.seed == BUG:
            raise RuntimeError("a bug")
        if config.seed == REFUSED:
            raise ConfigError("the model must fit the task, but does not.")

    def note(name: str, result: Any = None) -> Any:
        def service(*arguments: Any, **options: Any) -> Any:
            made.append((name, *arguments, options))
            return result

        return service

    services = {
        ("train", "start_run"): start_run,
        ("resume", "start_or_resume_run"): start_run,
        ("resume", "resume_run"): note("resume"),
        ("resume", "dev_objective"): lambda folder: 0.5,
        ("replay", "replay_run"): note("replay", {"rounds": 3, "digest": "ab"}),
        ("export", "export_run"): note("export", Path("out")),
        ("evaluate", "evaluate_run"): note("evaluate", {"value": 0.75}),
        ("generate", "generate_run"): note("generate", ["one", "two"]),
        ("mask", "make_mask"): note("mask", {"size": 7}),
        ("doctor", "doctor"): note("doctor", [("python", True, "3.11"), ("directions", False, "differs")]),
        ("html", "write_report"): note("report", Path("report.html")),
        ("sweep", "write_sweep_report"): note("sweep report", Path("report.html")),
        ("sweep", "write_comparison"): note("comparison", Path("report.html")),
        ("sweep", "unfinished_jobs"): lambda folder: [],
        ("replay", "replay_client"): note("replay client", _Table()),
    }
    for (room, name), service in services.items():
        setattr(modules[room], name, service)
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return made
