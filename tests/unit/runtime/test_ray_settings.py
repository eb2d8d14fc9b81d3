"""What Ray is told, and who the nodes of its grid are; the runs themselves are in tests/sim."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fedzo.commands.resume import resume_run
from fedzo.config.load import load
from fedzo.config.travel import to_json
from fedzo.errors import ConfigError, ProtocolError
from fedzo.runtime.config import RayConfig
from fedzo.runtime.ray import RayGrid, _backend_config, _environment, _machine


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


def test_missing_ray_is_named_with_the_command_that_installs_it_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_run(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("fedzo.commands.train.open_run", open_run)
    monkeypatch.setattr("fedzo.runtime.config.package_version", lambda name: None)
    (tmp_path / "config.json").write_text(to_json(replace(load([]), runtime=RayConfig())))

    message = r"^runtime=ray: Ray must be installed.*pip install 'fedzo\[ray\]'$"
    with pytest.raises(ConfigError, match=message):
        load(["runtime=ray"])
    with pytest.raises(ConfigError, match=message):
        resume_run(tmp_path)
    assert load(["runtime=local"]).runtime.traits.own_processes


class Nodes:
    """As much of Flower's grid as tells who is there."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self.nodes


def grid_of(nodes: Nodes, num_clients: int, *ended: ProtocolError) -> RayGrid:
    """The grid of an engine that is up, or has ``ended``."""

    def check() -> None:
        for error in ended:
            raise error

    return RayGrid(cast(Any, nodes), num_clients=num_clients, check=check)


def test_nodes_that_are_all_alike_are_numbered_by_their_ids_and_a_free_number_goes_to_the_next() -> None:
    nodes = Nodes(30, 10, 20)
    grid = grid_of(nodes, 3)

    assert grid.get_node_ids() == [30, 10, 20]
    assert [grid.client_of(node) for node in (20, 30, 10)] == [1, 2, 0]
    nodes.nodes = [30, 10, 20, 5]
    assert grid.client_of(5) is None
    nodes.nodes = [30, 10, 5, 20]
    assert [grid.client_of(node) for node in (5, 10, 20, 30)] == [None, 0, 1, 2]
    nodes.nodes = [30, 10, 5]
    assert [grid.client_of(node) for node in (5, 10, 30)] == [1, 0, 2]
    assert grid.client_of(99) is None


def test_nodes_that_come_one_by_one_keep_their_numbers() -> None:
    """Flower's engine starts the server before it registers its nodes."""
    nodes = Nodes(20)
    grid = grid_of(nodes, 2)

    assert grid.client_of(20) == 0
    nodes.nodes = [10, 20]
    assert [grid.client_of(node) for node in (10, 20)] == [1, 0]


def test_nobody_is_asked_of_an_engine_that_has_ended() -> None:
    grid = grid_of(Nodes(7), 1, ProtocolError("it ended"))

    with pytest.raises(ProtocolError, match="it ended"):
        grid.get_node_ids()
    with pytest.raises(ProtocolError, match="it ended"):
        grid.client_of(7)
