"""A federation of one client that only receives an artifact, as two programs that tests start.

As ``toy_serve.py``'s module it is the server, as a program the executor of the client.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path

import psutil
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzo.fl import artifact_transfer
from fedzo.fl.artifact_transfer import deliver, receive
from fedzo.fl.exchange import converse
from fedzo.fl.messages import ArtifactPiece, decode, encode
from fedzo.trainers.artifacts import Artifact, ArtifactStore

client_app = ClientApp()
server_app = ServerApp()
store = ArtifactStore(Path(os.environ["FLWR_HOME"]) / f"received-{os.getpid()}")


@client_app.query("artifact")
def artifact(message: Message, context: Context) -> Message:
    return Message(encode(receive(decode(ArtifactPiece, message.content), store)), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Where the artifact with the digest of the request lies."""
    found = store.find(str(message.content.config_records["request"]["digest"]))
    answer = ConfigRecord({"path": str(found.path) if found else "none"})
    return Message(RecordDict({"answer": answer}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Send the artifact twice over; result in ``result.json``."""
    run_dir, config = Path(str(context.run_config["run-dir"])), json.loads(str(context.run_config["config"]))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    artifact_transfer.log.addHandler(handler)
    sent: list[int] = []
    bytes_before: dict[str, int] = {}
    _watch_pieces(config["spoiled"], sent, bytes_before)
    held = ArtifactStore(run_dir / "artifacts").put(Path(config["file"]))
    ends = time.monotonic() + 60
    while not (nodes := list(grid.get_node_ids())):  # the server may be up before the client is
        assert time.monotonic() < ends
        time.sleep(0.1)
    (node,) = nodes
    seconds, refused = [], []
    for _ in range(2):
        started = time.monotonic()
        talks = {0: deliver(held, client=0)}
        answers = converse(grid, talks, nodes={0: node}, deadline_s=300.0)
        seconds.append(time.monotonic() - started)
        refused.append(answers.refused)
    request = RecordDict({"request": ConfigRecord({"digest": held.digest})})
    (reply,) = grid.send_and_receive([Message(request, dst_node_id=node, message_type="train")], timeout=60)
    result = {
        "digest": held.digest,
        "seconds": seconds,
        "refused": refused,
        "said": said,
        "sent": sent,
        "path": reply.content.config_records["answer"]["path"],
        "grown_bytes": {name: _peak_bytes(pid) - bytes_before[name] for name, pid in _processes().items()},
    }
    (run_dir / "result.json").write_text(json.dumps(result))


def _watch_pieces(spoiled: int, sent: list[int], bytes_before: dict[str, int]) -> None:
    """Flip a bit of the piece that starts at ``spoiled`` when it is sent first.

    ``sent`` gets the places of all pieces, ``bytes_before`` each process's resident size before the first one, when all
    of them have imported what they need; their peaks count from then on.
    """
    original = artifact_transfer._piece

    def piece(artifact: Artifact, offset: int, *, client: int) -> ArtifactPiece:
        if not sent:
            for name, pid in _processes().items():
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is now what is resident
                bytes_before[name] = _peak_bytes(pid)
        made = original(artifact, offset, client=client)
        if offset == spoiled and offset not in sent:
            made = dataclasses.replace(made, data=made.data[:-1] + bytes([made.data[-1] ^ 1]))
        sent.append(offset)
        return made

    artifact_transfer._piece = piece


def _processes() -> dict[str, int]:
    """Process ids of the federation by the parts that they play."""
    return {
        _name(process): process.pid for process in psutil.Process(int(os.environ["TOY_ROOT"])).children(recursive=True)
    }


def _name(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    names = {"daemons superlink": "superlink", "daemons supernode": "supernode", "--step-limit-s": "executor"}
    return next((name for mark, name in names.items() if mark in words), "server")


def _peak_bytes(pid: int) -> int:
    """Largest resident size that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    from fedzo.runtime.net.executor import main as serve

    serve(app=client_app)
