"""The in-process grid, with apps made for each question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from fedzo.errors import ConfigError
from fedzo.runtime.inline import run_inline

Main = Callable[[Grid, Context], None]


def play(client: Callable[[Message, Context], Message], main: Main, *, num_clients: int = 3) -> None:
    client_app, server_app = ClientApp(), ServerApp()
    client_app.query()(client)
    server_app.main()(main)
    run_inline(server_app, client_app, num_clients=num_clients, run_config={"config": "{}"})


def request(node: int, **values: Any) -> Message:
    return Message(RecordDict({"values": ConfigRecord(values)}), dst_node_id=node, message_type="query")


def reply(message: Message, **values: Any) -> Message:
    return Message(RecordDict({"values": ConfigRecord(values)}), reply_to=message)


def ask(grid: Any, messages: list[Message]) -> list[Message]:
    """Push, and pull until all have answered."""
    ids = grid.push_messages(messages)
    replies: list[Message] = []
    while got := grid.pull_messages(ids):
        replies += got
    return replies


def echo(message: Message, context: Context) -> Message:
    return reply(message, asked=message.content["values"]["number"])


def test_the_grid_says_which_client_a_node_is() -> None:
    def main(grid: Any, context: Context) -> None:
        assert [grid.client_of(node) for node in grid.get_node_ids()] == [0, 1, 2]
        assert grid.client_of(99) is None
        assert grid.registered({0, 2}) == {0, 2}

    play(echo, main)


def test_one_client_works_at_each_pull_in_the_order_of_pushing() -> None:
    worked: list[int] = []
    pulled: list[list[int]] = []

    def client(message: Message, context: Context) -> Message:
        worked.append(int(message.content["values"]["number"]))
        return echo(message, context)

    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        ids = list(grid.push_messages([request(nodes[client], number=client) for client in (2, 0, 1)]))
        assert worked == []  # nothing is computed before somebody waits for it
        for _ in range(4):
            pulled.append([int(each.content["values"]["asked"]) for each in grid.pull_messages(reversed(ids))])

    play(client, main)

    assert worked == [2, 0, 1]
    assert pulled == [[2], [0], [1], []]


def test_reply_names_the_message_that_it_answers() -> None:
    def main(grid: Grid, context: Context) -> None:
        node = next(iter(grid.get_node_ids()))
        first, second = grid.push_messages([request(node, number=1), request(node, number=2)])
        (answer,) = grid.pull_messages([second])
        assert answer.metadata.reply_to_message_id == second != first
        assert answer.content["values"]["asked"] == 2

    play(echo, main)


def test_error_of_a_client_is_a_reply_in_flowers_form_and_the_others_go_on() -> None:
    def client(message: Message, context: Context) -> Message:
        if message.content["values"]["number"] == 1:
            raise ZeroDivisionError("on purpose")
        return reply(message)

    def main(grid: Grid, context: Context) -> None:
        asked = [request(node, number=number) for number, node in enumerate(grid.get_node_ids())]
        answers = ask(grid, asked)
        assert [answer.has_error() for answer in answers] == [False, True, False]
        assert answers[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert answers[1].error.reason == "<class 'ZeroDivisionError'>:<'on purpose'>"

    play(client, main)


def test_neither_side_sees_what_the_other_does_to_a_message_later() -> None:
    kept: list[Message] = []

    def client(message: Message, context: Context) -> Message:
        message.content["values"]["numbers"].append(666)
        message.content["new"] = MetricRecord({"x": 1})
        answer = Message(RecordDict({"values": MetricRecord({"list": [1.0, 2.0]})}), reply_to=message)
        kept.append(answer)
        return answer

    def main(grid: Grid, context: Context) -> None:
        shared = RecordDict({"values": ConfigRecord({"numbers": [1, 2]}), "weights": ArrayRecord([np.ones(3)])})
        messages = [Message(shared, dst_node_id=node, message_type="query") for node in grid.get_node_ids()]
        ids = list(grid.push_messages(messages))
        shared["values"]["numbers"][0] = -1  # after pushing: must not reach a client that works later
        first, second = [next(iter(grid.pull_messages(ids))) for _ in range(2)]
        first.content["values"]["list"].append(3.0)
        assert shared["values"]["numbers"] == [-1, 2]
        assert "new" not in shared
        assert second.content["values"]["list"] == [1.0, 2.0]
        assert kept[0].content["values"]["list"] == [1.0, 2.0]

    play(client, main)


def test_a_client_receives_the_values_of_the_moment_of_pushing() -> None:
    def client(message: Message, context: Context) -> Message:
        return reply(message, got=list(message.content["values"]["numbers"]))

    def main(grid: Grid, context: Context) -> None:
        message = request(next(iter(grid.get_node_ids())), numbers=[1, 2])
        ids = list(grid.push_messages([message]))
        message.content["values"]["numbers"][0] = -1
        (answer,) = grid.pull_messages(ids)
        assert answer.content["values"]["got"] == [1, 2]

    play(client, main)


def test_state_of_a_client_lasts_from_message_to_message_and_is_its_own() -> None:
    def client(message: Message, context: Context) -> Message:
        count = int(context.state.metric_records.get("count", MetricRecord({"n": 0}))["n"]) + 1
        context.state["count"] = MetricRecord({"n": count})
        return reply(message, count=count)

    def main(grid: Grid, context: Context) -> None:
        first, second, _ = grid.get_node_ids()
        answers = ask(grid, [request(node) for node in (first, first, second, first)])
        assert [answer.content["values"]["count"] for answer in answers] == [1, 2, 1, 3]

    play(client, main)


def test_error_of_the_server_reaches_the_caller_with_its_type() -> None:
    def main(grid: Grid, context: Context) -> None:
        raise LookupError("on purpose")

    with pytest.raises(LookupError, match="on purpose"):
        play(echo, main)


def test_interrupt_in_a_client_is_not_taken_for_its_failure() -> None:
    def client(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(client, lambda grid, context: ask(grid, [request(2)]))


def test_second_federation_in_a_running_one_is_refused_and_the_next_one_is_not() -> None:
    def main(grid: Grid, context: Context) -> None:
        with pytest.raises(ConfigError, match=r"one federation at a time .* hydra/launcher=joblib"):
            play(echo, lambda grid, context: None)

    play(echo, main)
    play(echo, lambda grid, context: None)


def test_toy_federation_gives_the_values_of_a_plain_loop(toy: ModuleType, tmp_path: Path) -> None:
    run_config = {"config": toy.config_json(rounds=3, clients=4), "run-dir": str(tmp_path)}

    run_inline(toy.server_app, toy.client_app, num_clients=4, run_config=run_config)

    value, expected = 1.0, []
    for number in range(3):
        value += sum(value / (client + 3) + 0.1 * number for client in range(4))
        expected.append(value.hex())
    assert json.loads((tmp_path / "result.json").read_text())["values"] == expected
