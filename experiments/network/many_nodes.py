"""Two hundred clients over Flower: ``python experiments/network/many_nodes.py``.

A real SuperLink with its registry, TLS and keys, and the real server of a toy model. The nodes are threads of one other
process: each has its own key, connection and heartbeat, signs each request, asks for work as a SuperNode does, and
makes up its replies. So a round's seconds are those of the SuperLink, the server and the protocol. About ten minutes.
Where a process ends early, or nothing happens for long, this ends with the last lines of the SuperLink and the nodes.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Message
from flwr.app.message.message import make_message
from flwr.serverapp import ServerApp
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supernode.fleet_http_connection import http_request_response
from many_clients import answer, make_server

from fedzo.bench.claims import Claims
from fedzo.errors import ProtocolError
from fedzo.fl.exchange import Grid
from fedzo.fl.log_store import RunStore
from fedzo.fl.messages import encode
from fedzo.runtime._flower import one_federation
from fedzo.runtime.net._flower_daemons import quicken
from fedzo.runtime.net._flower_http import RunNotRunningException
from fedzo.runtime.net.addresses import free_ports
from fedzo.runtime.net.client_folder import KEY, ClientFolder, Invitation
from fedzo.runtime.net.daemons import NODE_LEASE_S, SUPERNODE_POLL_S
from fedzo.runtime.net.launch import environment, register_clients, start_superlink, wait_for_superlink
from fedzo.runtime.net.processes import Processes, watch_parent
from fedzo.runtime.net.serve import serve
from fedzo.runtime.net.server_folder import Listening, ServerFolder

HERE = Path(__file__).parent
SPREAD_S = 0.05
"""Between the starts of two nodes."""
STALLED_S = 300.0
"""Without a round that ends, or until all nodes have registered, this gives up."""


def main() -> None:
    """Measure, print and write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=200, help="nodes, all of them in each round (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--play", type=Path, help="be the nodes of the server in this folder")
    options = parser.parse_args()
    if options.play:
        play(options.play, options.nodes)
        return
    with tempfile.TemporaryDirectory() as made:
        seconds, attended, superlink_s, register_s = run(Path(made), options.nodes, options.rounds)
    claims = Claims(command="python experiments/network/many_nodes.py")
    what = f"{options.nodes} nodes over Flower, all of them in each round"
    claims.add(f"{what}: median seconds a round", statistics.median(seconds), "s")
    claims.add(f"{what}: most seconds a round", max(seconds), "s")
    claims.add(
        f"{what}: replies that came / asked for", attended / (options.nodes * options.rounds), "share", at_least=1
    )
    claims.add(f"{what}: the SuperLink's seconds of CPU a round", superlink_s, "s")
    claims.add(f"{what}: seconds until all had registered", register_s, "s")
    claims.show()
    claims.write(HERE / "claims.json")


def run(folder: Path, nodes: int, rounds: int) -> tuple[list[float], int, float, float]:
    """Seconds of each round, replies in all, seconds of CPU of the SuperLink a round, and those of registering."""
    public, control = free_ports(2)
    listening = Listening(address=f"127.0.0.1:{public}", listen=f"127.0.0.1:{public}", control=f"127.0.0.1:{control}")
    server = ServerFolder.make(folder / "server", listening, names=["127.0.0.1"], days=30)
    invitation = Invitation(address=listening.address, authority=server.file("ca.crt").read_text())
    for index in range(nodes):
        node = ClientFolder.make(folder / f"node-{index}", address=listening.address, site="", invitation=invitation)
        server.registry.add(f"node-{index}", index=index, key=node.public_key)
    seconds: list[float] = []
    told: dict[str, float] = {}
    app = ServerApp()

    @app.main()
    def serve_rounds(grid: Any, context: Context) -> None:
        superlink = psutil.Process(processes.pids["superlink"])
        with RunStore(folder / "run") as store:
            real = make_server(cast(Grid, grid), store, folder, clients=nodes, sampled=nodes, rounds=rounds)
            began = time.monotonic()
            real.client_registry.wait(cast(Grid, grid), timeout_s=STALLED_S)
            told["register"] = time.monotonic() - began
            print(f"{nodes} nodes have registered in {told['register']:.1f} s", flush=True)
            before = sum(superlink.cpu_times()[:2])
            for _ in range(rounds):
                began = time.monotonic()
                real.run_round()
                seconds.append(time.monotonic() - began)
                print(f"round {len(seconds)} of {rounds}: {seconds[-1]:.2f} s", flush=True)
            told["superlink"] = (sum(superlink.cpu_times()[:2]) - before) / rounds
            told["attended"] = sum(len(line.attendance) for line in store.public)

    with Processes(folder / "logs", environment=environment() | {"FLWR_HOME": str(folder / "flower")}) as processes:
        start_superlink(processes, server, restarts=0)
        wait_for_superlink(processes, server, timeout_s=60)
        register_clients(server)
        command = [sys.executable, __file__, "--play", str(folder), "--nodes", str(nodes)]
        processes.start("nodes", command)
        with watched(processes, progress=lambda: len(seconds) + len(told)):
            serve(app, folder=server, run_config={})
    return seconds, int(told["attended"]), told["superlink"], told["register"]


@contextmanager
def watched(processes: Processes, *, progress: Callable[[], int]) -> Iterator[None]:
    """Ends what this process does when another has ended, or when nothing was done for long, with what they said."""
    done, since = -1, 0.0

    def look(*_: object) -> None:
        nonlocal done, since
        try:
            processes.check()
            if progress() != done:
                done, since = progress(), time.monotonic()
            elif time.monotonic() - since > STALLED_S + 60.0:
                raise ProtocolError(f"nothing was done for {STALLED_S:g} s")
        except ProtocolError:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            raise

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    except ProtocolError:
        for name in processes.pids:
            print(f"The end of {name}.log:", processes.tail(name), sep="\n", file=sys.stderr)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def play(folder: Path, nodes: int) -> None:
    """Be all nodes until this process is killed; the first that ends before ends all."""
    watch_parent(os.getppid())
    quicken(SUPERNODE_POLL_S, NODE_LEASE_S)
    with one_federation(1):
        for index in range(nodes):
            threading.Thread(target=be_node_for_ever, args=(folder / f"node-{index}", index), daemon=True).start()
            time.sleep(SPREAD_S)
        threading.Event().wait()


def be_node_for_ever(folder: Path, index: int) -> None:
    """End this process when a node ends, which says before why it does."""
    try:
        be_node(folder, index)
    finally:
        print(f"node {index} has ended", file=sys.stderr, flush=True)
        os._exit(1)


def be_node(folder: Path, index: int) -> None:
    """Connect, and answer what is asked."""
    client, random = ClientFolder(folder), np.random.default_rng(index)
    private: Any = load_ssh_private_key(client.file(KEY).read_bytes(), None)
    authority = client.endpoint.authority.read_bytes()
    keys = private, private.public_key()
    with http_request_response(client.endpoint.address, False, authority, keys) as connection:
        _, receive, send, _, _, pull_object, push_object, confirm = connection
        while True:
            try:
                if (got := receive()) is None:
                    time.sleep(SUPERNODE_POLL_S)
                    continue
                question, tree = got
                run_id, name = question.metadata.run_id, question.metadata.message_id
                parts = [part.object_id for part in iterate_object_tree(tree)]
                contents = pull_objects(parts, lambda part, run_id=run_id: pull_object(run_id, part))
                confirm(run_id, name)
                question = cast(Message, inflate_object_from_contents(name, contents))
                question.metadata.__dict__["_message_id"] = name
                push(answered(question, random), send, push_object)
            except RunNotRunningException:
                continue


def answered(question: Message, random: np.random.Generator) -> Message:
    """The reply to a question, from the node that was asked."""
    content = encode(answer(question, random))
    metadata = Message(content, reply_to=question).metadata
    metadata.__dict__["_src_node_id"] = question.metadata.dst_node_id
    metadata.__dict__["_run_id"] = question.metadata.run_id
    return make_message(metadata=metadata, content=content)


def push(reply: Message, send: Any, push_object: Any) -> None:
    """Send a reply and its parts."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        wanted, session = send(reply, get_object_tree(reply), 0.0)
        push_objects(
            get_all_nested_objects(reply),
            lambda part, content: push_object(reply.metadata.run_id, session, part, content),
            object_ids_to_push=wanted,
        )


if __name__ == "__main__":
    main()
