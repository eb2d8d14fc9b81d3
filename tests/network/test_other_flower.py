"""Two Flowers in one federation: the server's and the sites' differ by a minor version, and a run notices nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import flwr
import psutil
import pytest

from fedzo.commands.replay import replay_run

OTHER = "FEDZO_OTHER_FLOWER"
pytestmark = [pytest.mark.net, pytest.mark.timeout(300)]


@pytest.mark.parametrize("here", ["server", "sites"])
def test_a_server_and_sites_of_two_flowers_train_and_replay(federation: Callable[..., Any], here: str) -> None:
    """The other Flower is ``here``, and this environment's on the other side."""
    folder = os.environ.get(OTHER)
    if not folder:
        pytest.skip(f"needs a second Flower: pip install --no-deps --target DIR flwr==1.42.0, and {OTHER}=DIR")
    other = flower_of(folder)
    assert other.split(".")[:2] != flwr.__version__.split(".")[:2]
    at = federation(2, **{"server_path" if here == "server" else "site_path": folder})
    for site in at.sites:
        site.start()
    training = at.train("run", "fl.num_clients=2", "fl.rounds=1000", "strategy.deadline_s=30")
    at.wait_for_round("run", 6)

    # --- each side has the Flower that it is meant to have
    servers = [at.processes.pids["superlink"], at.server_pid()]
    sites = [pid for site in at.sites for pid in site.pids.values()]
    expected = {"server": (other, flwr.__version__), "sites": (flwr.__version__, other)}[here]
    assert {flower_of(psutil.Process(pid).environ()["PYTHONPATH"]) for pid in servers} == {expected[0]}
    assert {flower_of(psutil.Process(pid).environ()["PYTHONPATH"]) for pid in sites} == {expected[1]}

    assert at.fedzo("stop", str(at.folder / "run"), output="stop").wait(120) == 0
    assert training.wait(120) == 130
    lines = at.rounds("run")
    assert [line["attendance"] for line in lines] == [[0, 1]] * len(lines)
    assert replay_run(at.folder / "run")["rounds"] == len(lines)


@cache
def flower_of(path: str) -> str:
    """The version of Flower that a process with this PYTHONPATH imports."""
    told = subprocess.run(
        [sys.executable, "-P", "-c", "import flwr; print(flwr.__version__)"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return told.stdout.strip()
