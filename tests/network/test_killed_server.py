"""A run's server that is killed at random instants: sites stay up, and the run ends as one that was never killed."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from fedzo.commands.replay import replay_run
from fedzo.runtime.net import processes

KILLS, ROUNDS, SEED = 20, 40, 18


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_run_whose_server_is_killed_ends_as_one_that_never_was(
    federation: Callable[..., Any],
) -> None:
    """Whole public logs are compared: attendance, scalars, and the hash chain over both."""
    at, chance = federation(2), random.Random(SEED)
    settings = ["fl.num_clients=2", f"fl.rounds={ROUNDS}", "strategy.deadline_s=60"]
    for site in at.sites:
        site.start()
    began = time.monotonic()
    whole = at.train("whole", *settings)
    at.wait_for_round("whole", 1)
    start_s = time.monotonic() - began
    assert whole.wait(120) == 0
    round_s = statistics.median(at.round_seconds("whole"))
    before = [site.pids for site in at.sites]

    command = at.train("broken", *settings)
    for number in range(KILLS):
        done, place = len(at.rounds("broken")), chance.random()
        pid = at.server_pid()
        if number % 4 == 0:  # while it starts
            time.sleep(place * start_s)
        else:
            at.wait_for_round("broken", min(done + 1, ROUNDS - 1))
            time.sleep(place * round_s)
        os.kill(pid, signal.SIGKILL)
        assert command.wait(120) == 1
        assert "then `fedzo resume" in at.said("broken")
        assert at.rounds("broken") == at.rounds("whole")[: len(at.rounds("broken"))]
        command = at.fedzo("resume", str(at.folder / "broken"), output="broken")
    assert command.wait(120) == 0

    assert at.rounds("broken") == at.rounds("whole")
    assert len(at.rounds("broken")) == ROUNDS
    assert [site.pids for site in at.sites] == before
    assert replay_run(at.folder / "broken") == replay_run(at.folder / "whole")


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_superlink_that_is_killed_takes_no_answer_with_it(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it carried at that instant is asked again, so that each round has both clients and none its deadline."""
    monkeypatch.setattr(processes, "STEADY_S", 0.0)  # started again at once each time
    at, chance = federation(2), random.Random(SEED)
    for site in at.sites:
        site.start()
    training = at.train("run", "fl.num_clients=2", "fl.rounds=10000", "strategy.deadline_s=60")
    at.wait_for_round("run", 2)
    round_s = statistics.median(at.round_seconds("run")[1:])

    for _ in range(KILLS):
        done = len(at.wait_for_round("run", len(at.rounds("run")) + 1, seconds=100))
        time.sleep(chance.random() * round_s)
        os.kill(at.processes.pids["superlink"], signal.SIGKILL)
        at.wait_for_round("run", done + 2, seconds=100)

    assert at.fedzo("stop", str(at.folder / "run"), output="stop").wait(120) == 0
    assert training.wait(120) == 130  # stopped
    assert [line["attendance"] for line in at.rounds("run")] == [[0, 1]] * len(at.rounds("run"))
    assert max(at.round_seconds("run")) < 30
    assert replay_run(at.folder / "run")["rounds"] == len(at.rounds("run"))
