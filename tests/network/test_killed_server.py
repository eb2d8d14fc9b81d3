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

from fedzo.commands.trained import replay_run

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
    at.wait_for_round("whole", 1, seconds=120)
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
            at.wait_for_round("broken", min(done + 1, ROUNDS - 1), seconds=120)
            time.sleep(place * round_s)
        os.kill(pid, signal.SIGKILL)
        assert command.wait(30) == 1
        assert "go on with `fedzo resume" in at.said("broken")
        assert at.rounds("broken") == at.rounds("whole")[: len(at.rounds("broken"))]
        command = at.fedzo("resume", str(at.folder / "broken"), output="broken")
    assert command.wait(120) == 0

    assert at.rounds("broken") == at.rounds("whole")
    assert len(at.rounds("broken")) == ROUNDS
    assert [site.pids for site in at.sites] == before
    assert replay_run(at.folder / "broken") == replay_run(at.folder / "whole")
