"""Private names of Flower: what fedzo takes for granted about them. Fails loudly when the pinned Flower changes."""

from __future__ import annotations

import ast
import inspect
from typing import Any, cast

import flwr
import pytest
from flwr.app import Message, RecordDict

from fedzo.errors import ConfigError
from fedzo.runtime import _flower


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_flower_is_the_version_whose_private_names_were_read() -> None:
    assert flwr.__version__.startswith("1.41.")


@pytest.mark.parametrize("version", ["1.40.9", "1.42.0", "1.410.0", "2.0"])
def test_another_flower_is_refused_with_the_command_that_installs_the_right_one(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"1\.41\.\*, got {version}.*pip install 'flwr>=1\.41,<1\.42'"):
        _flower.check_version(version)


def test_message_takes_run_and_sender_from_the_identity_of_the_process() -> None:
    with _flower.one_federation(run_id=77):
        message = Message(RecordDict(), dst_node_id=5, message_type="query")

    assert (message.metadata.run_id, message.metadata.src_node_id) == (77, _flower.SUPERLINK_NODE_ID)


def test_message_can_be_numbered_and_its_reply_refers_to_the_number() -> None:
    with _flower.one_federation(run_id=77):
        message = Message(RecordDict(), dst_node_id=5, message_type="query")
        _flower.set_message_id(message, "abc")

    assert message.metadata.message_id == "abc"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "abc"


class Nodes:
    """As much of a grid as tells who is there."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self.nodes


def test_a_registered_grid_is_the_grid_and_knows_its_clients() -> None:
    grid: Any = _flower.RegisteredGrid(cast(Any, Nodes(7, 8)), {7: 2}.get)

    assert grid.get_node_ids() == [7, 8]
    assert (grid.client_of(7), grid.client_of(8)) == (2, None)


def test_nodes_that_are_all_alike_are_numbered_by_their_ids_and_a_free_number_goes_to_the_next() -> None:
    grid = Nodes(30, 10, 20)
    client_of = _flower.in_order(cast(Any, grid), 3)

    assert [client_of(node) for node in (20, 30, 10)] == [1, 2, 0]
    grid.nodes = [30, 10, 20, 5]
    assert client_of(5) is None
    grid.nodes = [30, 10, 5, 20]
    assert [client_of(node) for node in (5, 10, 20, 30)] == [None, 0, 1, 2]
    grid.nodes = [30, 10, 5]
    assert [client_of(node) for node in (5, 10, 30)] == [1, 0, 2]
    assert client_of(99) is None


def test_nodes_that_come_one_by_one_keep_their_numbers() -> None:
    """Flower's engine starts the server before it registers its nodes."""
    grid = Nodes(20)
    client_of = _flower.in_order(cast(Any, grid), 2)

    assert client_of(20) == 0
    grid.nodes = [10, 20]
    assert [client_of(node) for node in (10, 20)] == [1, 0]


def test_flower_says_nothing_to_the_outside() -> None:
    from flwr.supercore import telemetry

    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    assert 'FLWR_TELEMETRY_ENABLED == "1"' in inspect.getsource(telemetry)


@pytest.mark.slow
def test_supernode_pauses_by_the_name_that_is_replaced() -> None:
    from flwr.supernode import start_client_internal

    tree = ast.parse(inspect.getsource(start_client_internal))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    assert used == {"sleep"}


@pytest.mark.slow
def test_supernode_pauses_shorter_once_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import start_client_internal

    from fedzo.runtime.net import _flower_http

    slept: list[float] = []
    monkeypatch.setattr(start_client_internal, "time", start_client_internal.time)  # put back at the end
    monkeypatch.setattr(_flower_http.time, "sleep", slept.append)

    _flower_http.poll_often(0.1)
    start_client_internal.time.sleep(3)
    start_client_internal.time.sleep(0.05)

    assert slept == [0.1, 0.05]


@pytest.mark.slow
def test_names_of_the_network_parts_have_the_shape_that_is_used() -> None:
    from flwr.simulation import run_simulation
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.superexec import run_superexec
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from fedzo.runtime.net import _flower_http

    assert {_flower_http._ACQUIRE} == run_superexec._SUPEREXEC_AUTH_METHODS
    assert parameters(_flower_http.pull_task_input) == ["client"]
    assert parameters(_flower_http.push_message) == ["client", "message", "context"]
    assert parameters(_flower_http.push_task_output) == ["client", "context", "sub_status", "details"]
    assert {"runtime_api_address", "insecure", "token"} <= set(parameters(_flower_http.HttpGrid))
    assert isinstance(inspect.getattr_static(_flower_http.HttpGrid, "_runtime_client"), property)
    grid = _flower_http.HttpGrid("127.0.0.1:1", insecure=True, token="x")
    assert {"max_tries", "max_time"} <= vars(grid._retry_invoker).keys()
    assert vars(make_simple_http_retry_invoker()).keys() == vars(grid._retry_invoker).keys()
    assert {"start", "stop", "is_running"} <= set(dir(_flower_http.HeartbeatSender))
    assert {"server_app", "client_app", "num_supernodes", "backend_config"} <= set(parameters(run_simulation))
    assert parameters(flower_superlink) == parameters(flower_supernode) == []
