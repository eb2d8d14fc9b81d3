"""What Ray is told; the runs themselves are in tests/sim."""

from __future__ import annotations

import os

import pytest

from fedzo.runtime.config import RayConfig
from fedzo.runtime.ray import _backend_config, _environment, _machine


@pytest.mark.parametrize("num_actors", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("cpus", [0.25, 0.3, 1.0, 1.5, 2.0])
def test_as_many_actors_fit_as_asked_for(num_actors: int, cpus: float) -> None:
    config = RayConfig(num_actors=num_actors, num_cpus_per_client=cpus)

    # Flower's own rule: how often a client's share goes into the machine
    assert int(_machine(config)[0] / _backend_config(config)["client_resources"]["num_cpus"]) == num_actors


def test_gpus_are_shared_as_asked_for() -> None:
    config = RayConfig(num_actors=4, num_gpus_per_client=0.5)

    assert _machine(config)[1] == 2
    assert _backend_config(config)["client_resources"]["num_gpus"] == 0.5


def test_environment_for_actors_is_put_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    environment = dict(os.environ)

    with _environment({"config": "{}", "run-dir": "/run"}):
        assert (os.environ["FEDZO_CONFIG"], os.environ["FEDZO_RUN_DIR"]) == ("{}", "/run")
        os.environ["PYTHONPATH"] = "as Flower changes it"

    assert dict(os.environ) == environment
