"""A federation without a model, as importable apps: clients fold a number, the server adds up in client order."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()
LOADED_BY = os.getpid()
_used = {"count": 0}


class ToyServerError(Exception):
    pass


def load_client_app() -> ClientApp:
    return client_app


def config_json(**changes: Any) -> str:
    return json.dumps({"rounds": 2, "clients": 2, "text": 'caf\u00e9 \\ "quoted" \n', **changes})


def _config(context: Context) -> dict[str, Any]:
    return json.loads(str(context.run_config.get("config") or os.environ["FEDZO_CONFIG"]))


@client_app.query("hello")
def hello(message: Message, context: Context) -> Message:
    me = {"text": _config(context)["text"], "pid": os.getpid()}
    return Message(RecordDict({"me": ConfigRecord(me)}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    request, config = message.content["request"], _config(context)
    client = int(request["client"])
    if config.get("fails") == client and request["round"] in config.get("fails_in", [request["round"]]):
        raise ValueError(f"client {client} fails on purpose")
    if config.get("hangs") == client and not Path(config["hung"]).exists():
        Path(config["hung"]).touch()
        time.sleep(600)
    seen = context.state.metric_records.get("seen", MetricRecord({"rounds": 0}))
    context.state["seen"] = MetricRecord({"rounds": int(seen["rounds"]) + 1})
    _used["count"] += 1
    value = float(request["value"]) / (client + 3) + 0.1 * int(seen["rounds"])
    answer = {"value": value, "pid": os.getpid(), "parent": os.getppid(), "used": _used["count"]}
    return Message(RecordDict({"answer": MetricRecord(answer)}), reply_to=message)


@server_app.main()
def main(grid: Any, context: Context) -> None:
    """Result in ``result.json``, after each round: the values so far, and who answered."""
    config, run_dir = _config(context), Path(str(context.run_config["run-dir"]))
    ends = time.monotonic() + 60
    while len(list(grid.get_node_ids())) < config["clients"]:
        assert time.monotonic() < ends
        time.sleep(0.1)
    greetings = [reply.content["me"] for reply in ask(grid, "query.hello", dict.fromkeys(grid.get_node_ids(), 0.0))]
    nodes = {grid.client_of(node): node for node in grid.get_node_ids()}
    assert sorted(nodes) == list(range(config["clients"]))
    value, history, replies, seconds = 1.0, [], [], []
    descendants = {process.pid: process.cmdline() for process in processes()}
    (run_dir / "descendants.json").write_text(json.dumps(descendants))
    if "waits_s" in config:
        time.sleep(config["waits_s"])
    for number in range(config["rounds"]):
        if config.get("server_fails_in") == number:
            raise ToyServerError("the server fails on purpose")
        if config.get("kills") and number == config.get("kills_in", 1):
            kill(config["kills"])
        started = time.monotonic()
        order = [nodes[client] for client in sorted(nodes)]
        deadline_s = config.get("deadlines_s", {}).get(str(number), config.get("deadline_s", 60.0))
        answers = ask(grid, "train", dict.fromkeys(order, value), number=number, deadline_s=deadline_s)
        seconds.append(time.monotonic() - started)
        good = [dict(answer.content["answer"]) for answer in answers if answer and answer.has_content()]
        replies.append([answer.error.reason if answer and answer.has_error() else None for answer in answers])
        value += sum(answer["value"] for answer in good)
        history.append({"value": value.hex(), "answers": len(good), "by": good})
        result = {
            "values": [entry["value"] for entry in history],
            "answers": [entry["answers"] for entry in history],
            "text": greetings[0]["text"],
            "by": [entry["by"] for entry in history],
            "errors": replies,
            "seconds": seconds,
            "server_pid": os.getpid(),
        }
        (run_dir / "result.json").write_text(json.dumps(result))


def processes() -> list[psutil.Process]:
    """The processes of this federation: those of this process, or where a server has one of its own, of its parent."""
    return psutil.Process(int(os.environ.get("TOY_ROOT", os.getpid()))).children(recursive=True)


def kill(words: str) -> None:
    """Kill the process of this federation with these words in its command line."""
    for process in processes():
        if words in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no process with {words!r}")


def ask(
    grid: Any, message_type: str, values: dict[int, float], *, number: int = 0, deadline_s: float = 60.0
) -> list[Any]:
    """Replies in the order of ``values``, ``None`` for those that are late."""
    messages = []
    for node, value in values.items():
        request = MetricRecord({"client": grid.client_of(node), "value": value, "round": number})
        messages.append(Message(RecordDict({"request": request}), dst_node_id=node, message_type=message_type))
    ids = list(grid.push_messages(messages))
    got: dict[str, Message] = {}
    ends = time.monotonic() + deadline_s
    while len(got) < len(ids) and time.monotonic() < ends:
        for reply in grid.pull_messages([each for each in ids if each not in got]):
            got[reply.metadata.reply_to_message_id] = reply
        time.sleep(0.02)
    return [got.get(each) for each in ids]
