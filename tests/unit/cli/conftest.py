"""Stand-ins for the services behind the commands, and Hydra's global state put back."""

from __future__ import annotations

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

from fedzo.config.schema import RunConfig
from fedzo.errors import NumericsError

Calls = list[tuple[Any, ...]]
DIVERGES, INTERRUPTED, BUG = 5, 6, 7
"""Run seeds with which the stand-in of ``start_run`` fails."""


@pytest.fixture(autouse=True)
def hydra_and_logging_are_left_clear() -> Iterator[None]:
    root, flwr = logging.getLogger(), logging.getLogger("flwr")
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in (root, flwr)]

    yield

    for logger, handlers, level, propagate in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is None
    assert "HYDRA_FULL_ERROR" not in os.environ


class _Table:
    """A client's path as far as the command sees it."""

    def table(self) -> list[str]:
        return ["one", "two"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """What the commands asked of the services, in order; the working folder is ``tmp_path``."""
    made: Calls = []
    names = ("fedzo.commands.runs", "fedzo.report.html", "fedzo.report.sweep", "fedzo.commands.client_path")
    runs, html, sweep, client_path = (ModuleType(name) for name in names)

    def start_run(config: RunConfig, run_dir: Path, *, overrides: list[str]) -> None:
        assert run_dir.is_dir()
        made.append(("start", config, run_dir, overrides))
        logging.getLogger("fedzo.somewhere").info("a line of the run")
        if config.seed == DIVERGES:
            raise NumericsError("round 3: the loss must be finite, got nan. Lower trainer.lr.")
        if config.seed == INTERRUPTED:
            raise KeyboardInterrupt
        if config.seed == BUG:
            raise RuntimeError("a bug")

    def note(name: str, result: Any = None) -> Any:
        def service(*arguments: Any, **options: Any) -> Any:
            made.append((name, *arguments, options))
            return result

        return service

    services = {
        "start_run": start_run,
        "start_or_resume_run": start_run,
        "resume_run": note("resume"),
        "replay_run": note("replay", {"rounds": 3, "digest": "ab"}),
        "export_run": note("export", Path("out")),
        "evaluate_run": note("evaluate", {"value": 0.75}),
        "generate_run": note("generate", ["one", "two"]),
        "make_mask": note("mask", {"size": 7}),
        "doctor": note("doctor", [("python", True, "3.11"), ("directions", False, "differs")]),
    }
    for name, service in services.items():
        setattr(runs, name, service)
    setattr(html, "write_report", note("report", Path("report.html")))  # noqa: B010
    setattr(sweep, "write_sweep_report", note("sweep report", Path("report.html")))  # noqa: B010
    setattr(client_path, "replay_client", note("replay client", _Table()))  # noqa: B010
    for module in (runs, html, sweep, client_path):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return made
