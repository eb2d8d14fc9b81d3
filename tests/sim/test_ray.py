"""The toy federation on Flower's simulation engine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from fedzo.errors import ConfigError, ProtocolError
from fedzo.runtime.config import RayConfig
from fedzo.runtime.ray import _quiet_ray, run_ray

pytest.importorskip("ray")  # its import sets an environment variable for good
Play = Callable[..., dict[str, Any]]
pytestmark = [pytest.mark.sim, pytest.mark.timeout(180)]


@pytest.fixture
def play_on_ray(toy: ModuleType, tmp_path: Path) -> Play:
    def play(*, clients: int = 2, **changes: Any) -> dict[str, Any]:
        run_config = {"config": toy.config_json(clients=clients, **changes), "run-dir": str(tmp_path)}
        run_ray(toy.server_app, toy.load_client_app, num_clients=clients, run_config=run_config, config=RayConfig())
        return json.loads((tmp_path / "result.json").read_text())

    return play


def test_ray_gives_the_values_of_inline_with_warm_actors_and_leaves_nothing(
    play_on_ray: Play, play_inline: Play
) -> None:
    environment = dict(os.environ)

    on_ray = play_on_ray(clients=3, rounds=2)

    inline = play_inline(clients=3, rounds=2)
    assert on_ray["values"] == inline["values"]
    assert on_ray["text"] == inline["text"]
    pids = {answer["pid"] for answers in on_ray["by"] for answer in answers}
    assert len(pids) <= 2  # actors, not clients
    assert os.getpid() not in pids
    # an actor keeps its module between messages: the uses counted in each process are 1, 2, 3, ...
    uses = sorted(answer["used"] for answers in on_ray["by"] for answer in answers if answer["pid"] == min(pids))
    assert uses == list(range(1, len(uses) + 1))
    assert dict(os.environ) == environment
    _assert_gone(pids)


def test_error_of_the_server_reaches_the_caller_with_its_type(play_on_ray: Play, toy: ModuleType) -> None:
    with pytest.raises(toy.ToyServerError, match="on purpose"):
        play_on_ray(server_fails_in=1)


def test_client_that_still_works_when_the_server_is_done_is_not_waited_for(play_on_ray: Play, tmp_path: Path) -> None:
    started = time.monotonic()

    result = play_on_ray(rounds=1, hangs=1, hung=str(tmp_path / "hung"), deadline_s=3.0)

    assert result["answers"] == [1]
    assert time.monotonic() - started < 90  # the client would work for 600 s
    ends = time.monotonic() + 60
    while _children("ray"):  # those that have just been told to end are still seen for a moment
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_engine_that_ends_early_ends_the_run_with_its_reason(
    play_on_ray: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("on purpose")

    monkeypatch.setattr("flwr.simulation.run_simulation", crash)

    # the error keeps what Ray has left open: it goes before the next test looks for such files
    with _quiet_ray(), pytest.raises(ProtocolError, match=r"the engine must outlive .*on purpose.*num_actors"):
        play_on_ray()


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (Exception, "The current node timed out during startup.", r"timed out.*30 s.*busy"),
        (OSError, "AF_UNIX path length cannot exceed 107 bytes: /a/b", r"107 bytes.* set RAY_TMPDIR to a folder"),
    ],
)
def test_ray_that_does_not_start_says_why(
    kind: type[Exception], text: str, says: str, play_on_ray: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise kind(text)

    monkeypatch.setattr("ray.init", fail)

    with pytest.raises(ProtocolError, match=rf"runtime=ray: Ray must start on this machine.*{says}"):
        play_on_ray()


def test_a_sigterm_while_ray_starts_is_this_process_own(play_on_ray: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def start(*args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray's start does, before all else
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ray.init", start)
    try:
        with pytest.raises(KeyboardInterrupt):
            play_on_ray()
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_engine_that_fails_names_what_it_began_with(play_on_ray: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: Any, app: Any) -> None:
        raise MemoryError("on purpose")

    monkeypatch.setattr("flwr.server.superlink.fleet.vce.backend.raybackend.RayBackend.build", build)

    with _quiet_ray(), pytest.raises(ProtocolError, match=r"ended early \(MemoryError\('on purpose'\)\)"):
        play_on_ray()


def test_two_nodes_of_a_cluster_share_the_clients_and_a_dead_actor_is_replaced(
    toy: ModuleType, play_inline: Play, play_on_ray: Play, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 1 << 27}
    settings = toy.config_json(clients=4, rounds=3, kills="ray::ClientAppActor")
    run_config = {"config": settings, "run-dir": str(tmp_path)}
    with _quiet_ray():
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            cluster.add_node(**node)
            on_sigterm = signal.getsignal(signal.SIGTERM)
            config = RayConfig(address=cluster.address)
            run_ray(toy.server_app, toy.load_client_app, num_clients=4, run_config=run_config, config=config)
            assert len(cluster.list_all_nodes()) == 2  # the run leaves the cluster as it is
            result = json.loads((tmp_path / "result.json").read_text())

            alone = play_on_ray(fails=0)  # on a Ray of its own, beside the one that is up
            assert alone["answers"] == [1, 1]  # it goes on without the client that fails
            assert "client 0 fails on purpose" in alone["errors"][0][0]
            assert len(cluster.list_all_nodes()) == 2
            assert signal.getsignal(signal.SIGTERM) is on_sigterm  # a run's Ray would set its own
        finally:
            cluster.shutdown()
            del cluster

    assert result["values"] == play_inline(clients=4, rounds=3)["values"]
    before, _, after = ({answer["pid"] for answer in answers} for answers in result["by"])
    assert len({answer["parent"] for answer in result["by"][0]}) == 2  # an actor's parent is its node
    assert len(after - before) == 1
    assert len(after) == 2


def test_cluster_that_is_not_up_is_named(toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))  # another's on this machine may be up
    run_config = {"config": toy.config_json(), "run-dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"runtime\.address: a Ray cluster must be up at 'auto'.*ray start --head"):
        run_ray(
            toy.server_app,
            toy.load_client_app,
            num_clients=2,
            run_config=run_config,
            config=RayConfig(address="auto"),
        )


def _children(name: str) -> list[int]:
    """Processes of this one that run and have such a name; one may end while it is looked at."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(name) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
    return found


def _assert_gone(pids: set[int]) -> None:
    ends = time.monotonic() + 60
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < ends, alive
        time.sleep(0.1)
