"""How a run's server ends at a real SuperLink, without sites."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import ServerApp
from flwr.supercore import heartbeat

from fedzo.errors import ProtocolError
from fedzo.runtime.net.addresses import free_ports
from fedzo.runtime.net.launch import control, environment, start_superlink, wait_for_superlink
from fedzo.runtime.net.processes import Processes
from fedzo.runtime.net.serve import serve
from fedzo.runtime.net.server_folder import Listening, ServerFolder

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerFolder]:
    """A server's folder, whose SuperLink is up."""
    public, reserved = (f"127.0.0.1:{port}" for port in free_ports(2))
    listening = Listening(address=public, listen=public, control=reserved)
    folder = ServerFolder.make(tmp_path / "server", listening, names=["127.0.0.1"], days=30)
    with Processes(tmp_path / "logs", environment=environment() | {"FLWR_HOME": str(tmp_path / "flower")}) as processes:
        start_superlink(processes, folder, restarts=0)
        wait_for_superlink(processes, folder, timeout_s=60.0)
        yield folder


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The Ctrl-Cs that this process was sent; meanwhile its tasks say all the time that they live."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_DEFAULT_INTERVAL", heartbeat.HEARTBEAT_CALL_TIMEOUT)
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    yield told
    signal.signal(signal.SIGINT, before)


def played(work: Callable[[Any], None]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        work(grid)

    return app


def test_a_run_that_ends_is_not_taken_for_one_that_was_interrupted(server: ServerFolder, interrupts: list[int]) -> None:
    for _ in range(5):
        serve(played(lambda grid: time.sleep(0.2)), folder=server, run_config={})

    assert interrupts == []


def test_a_run_that_somebody_stops_ends_with_that_as_its_error(server: ServerFolder, interrupts: list[int]) -> None:
    def stop(grid: Any) -> None:
        with control(server.endpoint) as flower:
            for run in flower.running():
                flower.stop_run(run)
        time.sleep(0.5)  # it beats meanwhile
        began = time.monotonic()
        try:
            grid.get_node_ids()
        finally:
            took.append(time.monotonic() - began)

    took: list[float] = []

    with pytest.raises(ProtocolError, match="the run must be running, but somebody has stopped it, or its server was"):
        serve(played(stop), folder=server, run_config={})

    assert interrupts == []
    assert took[0] < 5.0  # Flower itself sleeps for 6 s
