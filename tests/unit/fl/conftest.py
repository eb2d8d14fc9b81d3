"""Messages of Flower outside a run of it, and a clock of the test's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@pytest.fixture(autouse=True)
def server_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower wants to know whose messages these are."""
    from flwr.supercore.task_identity import TaskIdentity

    for name, value in (("_task_id", 1), ("_run_id", 1), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@dataclass
class Clock:
    """In the place of the module ``time``: it goes on where fedzo sleeps, or when a test moves it."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What deadlines, retries and pauses of a round and of the registration go by."""
    from fedzo.fl import exchange
    from fedzo.fl.server import client_registry, registration, turnout

    made = Clock()
    for module in (exchange, client_registry, registration, turnout):
        monkeypatch.setattr(module, "time", made)
    return made
