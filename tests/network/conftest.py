from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedzo.runtime.inline import run_inline

Play = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def toy() -> Iterator[ModuleType]:
    """The toy federation as an importable module."""
    folder = str(Path(__file__).parents[1] / "unit" / "runtime")
    sys.path.insert(0, folder)
    import toy_federation

    yield toy_federation
    sys.path.remove(folder)


@pytest.fixture
def play_inline(toy: ModuleType, tmp_path: Path) -> Play:
    """Play the toy federation in process and return its result."""

    def play(*, clients: int = 2, **changes: Any) -> dict[str, Any]:
        run_config = {"config": toy.config_json(clients=clients, **changes), "run-dir": str(tmp_path)}
        run_inline(toy.server_app, toy.client_app, num_clients=clients, run_config=run_config)
        return json.loads((tmp_path / "result.json").read_text())

    return play
