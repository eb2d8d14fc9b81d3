"""Settings of every test: no hub, no telemetry, no home folder, one thread for tiny models."""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Before torch, flwr or transformers is imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "FLWR_HOME" not in os.environ:
    os.environ["FLWR_HOME"] = tempfile.mkdtemp(prefix="flwr-")
    atexit.register(shutil.rmtree, os.environ["FLWR_HOME"], ignore_errors=True)
if "RAY_TMPDIR" not in os.environ:  # Ray looks in its folder for clusters that others have started
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path must be short
    atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

import numba
import pytest
from absl import logging as absl_logging
from hypothesis import settings

collect_ignore = ["third_party"]  # its import registers plugins

# TensorBoard's absl closes its stream when logging is set up anew, unless it is a standard stream of that moment. It
# would take pytest's own, of the test that imports it first.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("FEDZO_TEST_EXAMPLES", "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Network tests that may take longest begin first: one that began last would leave the other worker idle."""
    items.sort(key=lambda item: -_limit_s(item) if item.get_closest_marker("net") else 0.0)


def _limit_s(item: pytest.Item) -> float:
    limit = item.get_closest_marker("timeout")
    return float(limit.args[0]) if limit else 0.0


@pytest.fixture(autouse=True)
def logging_is_left_as_it_was() -> Iterator[None]:
    """Commands that run in a test's process log into a run's folder, and Hydra sets the handlers of the process."""
    loggers = [logging.getLogger(), logging.getLogger("flwr")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]

    yield

    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(autouse=True)
def threads_are_those_of_the_machine() -> None:
    """A run sets the threads of its process, and the next test would have its kernels on one."""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


@pytest.fixture
def given_by_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[Path]]:
    """Root works in a folder of another user: call it, and it gives what in there has been given to that user."""
    is_root, give = os.geteuid() == 0, os.fchown
    inodes: set[int] = set()
    if is_root:
        os.chown(tmp_path, 1001, 1002)
    owner = tmp_path.stat().st_uid, tmp_path.stat().st_gid

    def gives(opened: int, *to: int) -> None:
        if to == owner:
            inodes.add(os.fstat(opened).st_ino)
        if is_root:
            give(opened, *to)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", gives)
    return lambda: {path for path in tmp_path.rglob("*") if path.stat().st_ino in inodes}


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the place of CUDA graphs, work that is done again, its result where the first one was; what was recorded."""
    from functools import partial

    from fedzo.models.captured import capture
    from fedzo.run import peer

    recorded: list[str] = []

    class Again:
        def capture(self, work: Callable[[], Any]) -> Any:
            recorded.append("a graph")
            self._work, self._output = work, work()
            return self._output

        def replay(self) -> None:
            self._output.copy_(self._work())

    monkeypatch.setattr(peer, "can_capture", lambda device: True)
    monkeypatch.setattr(peer, "capture", partial(capture, new_graph=Again))
    return recorded


@pytest.fixture(scope="session")
def script() -> Callable[[Path], ModuleType]:
    """Import a file that is in no package; another folder may have one of its name."""

    def load(file: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def toy() -> Iterator[ModuleType]:
    """The toy federation of the runtime tests as an importable module."""
    folder = str(Path(__file__).parent / "unit" / "runtime")
    sys.path.insert(0, folder)
    import toy_federation

    yield toy_federation
    sys.path.remove(folder)


@pytest.fixture
def play_inline(toy: ModuleType, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Play the toy federation in process and return its result."""
    from fedzo.runtime.inline import run_inline

    def play(*, clients: int = 2, **changes: Any) -> dict[str, Any]:
        run_config = {"config": toy.config_json(clients=clients, **changes), "run-dir": str(tmp_path)}
        run_inline(toy.server_app, toy.client_app, num_clients=clients, run_config=run_config)
        return json.loads((tmp_path / "result.json").read_text())

    return play
