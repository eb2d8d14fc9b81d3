"""A federation of scalars as an app of Flower alone: two forwards a client and round, and their losses' difference.

The model is kept in the client's process, as an author would; Flower starts a process a message.
"""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel

ROWS, TOKENS = 2, 32
client_app = ClientApp()
server_app = ServerApp()


@cache
def model() -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(ModelConfig(), device="cpu")


@client_app.query("scalar")
def scalar(message: Message, context: Context) -> Message:
    loaded, generator = model(), torch.Generator().manual_seed(int(message.content["settings"]["round"]))
    ids = torch.randint(loaded.model.config.vocab_size, (ROWS, TOKENS), generator=generator)
    with torch.inference_mode():
        plus, minus = (loaded.model(ids).logits[:, -1].logsumexp(-1).mean() for _ in range(2))
    return Message(RecordDict({"reply": MetricRecord({"g": float(plus - minus)})}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    settings, seconds = context.run_config, []
    while len(nodes := list(grid.get_node_ids())) < int(settings["clients"]):
        time.sleep(0.2)
    for number in range(int(settings["rounds"])):
        began = time.monotonic()
        content = RecordDict({"settings": ConfigRecord({"round": number})})
        replies = list(grid.send_and_receive([Message(content, node, "query.scalar") for node in nodes]))
        if len(replies) < len(nodes) or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"a client failed: {[reply.error for reply in replies if reply.has_error()]}")
        seconds.append(time.monotonic() - began)
    Path(str(settings["out"])).write_text(json.dumps(seconds))
