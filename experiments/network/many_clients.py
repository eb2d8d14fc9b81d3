"""What a round of many clients costs the server: ``python experiments/network/many_clients.py``.

10,000 clients are registered and 200 sampled a round, on a grid without a network whose clients answer at once: what
is left is the server's own work, its log on the disk included. The time that the grid's clients take to read a request
and to make up a reply is not counted. The model is a toy of 1,000 numbers, so its replay takes no time. About a minute.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.app.message.message import make_message

from fedzo.bench.claims import Claims
from fedzo.config.schema import RunSettings
from fedzo.fl.config import FlConfig, StrategyConfig
from fedzo.fl.exchange import Grid
from fedzo.fl.log_store import RunStore
from fedzo.fl.messages import HelloReply, Identity, ScalarReply, TrainRequest, decode, encode, scalars_to_bytes
from fedzo.fl.replica import Replica
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.fl.server.rounds import Server
from fedzo.fl.server.scalar_aggregator import ScalarAggregator
from fedzo.fl.server.step_policy import STEP_POLICIES
from fedzo.records import decode as records
from fedzo.runtime._flower import one_federation, set_message_id
from fedzo.testing.vector_space import VectorSpace
from fedzo.trainers.artifacts import ArtifactStore
from fedzo.zo.server_optimizer import Sgd, SgdConfig

HERE = Path(__file__).parent
IDENTITY = Identity(config_hash="c" * 64, base_digest="b" * 64, tokenizer_digest="t" * 64, task_digest="k" * 64)
SIZE, FIRST_NODE = 1000, 1 << 40
MAX_S = 0.05


@dataclass(slots=True)
class AnsweringGrid:
    """A grid whose clients answer at once.

    Attributes:
        num_clients: All are connected.
        clients_s: Seconds that they have taken so far.
        clients_cpu_s: Seconds of CPU in them.
    """

    num_clients: int
    clients_s: float = 0.0
    clients_cpu_s: float = 0.0
    _replies: dict[str, Message] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def get_node_ids(self) -> list[int]:
        """Of all clients."""
        return list(range(FIRST_NODE, FIRST_NODE + self.num_clients))

    def client_of(self, node: int) -> int:
        """The client that a node plays."""
        return node - FIRST_NODE

    def registered(self, clients: set[int]) -> set[int]:
        """All of them."""
        return clients

    def wire_bytes(self) -> None:
        """There is no network."""

    def restarts(self) -> int:
        """Nothing is lost here."""
        return 0

    def lost(self, reply: Message) -> bool:
        """Never."""
        return False

    def unreachable(self, reply: Message) -> bool:
        """Never."""
        return False

    def limit_replies(self, number_bytes: int) -> None:
        """Replies are made here."""

    def push_messages(self, messages: list[Message]) -> list[str]:
        """Take questions; each is answered here."""
        began, began_cpu, names = time.perf_counter(), time.process_time(), []
        for message in messages:
            set_message_id(message, name := str(next(self._numbers)))
            content = encode(answer(message, self._random))
            metadata = Message(content, reply_to=message).metadata
            self._replies[name] = make_message(metadata=metadata, content=content)
            names.append(name)
        self.clients_s += time.perf_counter() - began
        self.clients_cpu_s += time.process_time() - began_cpu
        return names

    def pull_messages(self, names: list[str]) -> list[Message]:
        """The replies to these."""
        return [self._replies.pop(name) for name in names if name in self._replies]


def answer(message: Message, random: np.random.Generator) -> HelloReply | ScalarReply:
    """What a client answers, with scalars as small as a model's."""
    if message.metadata.message_type == "query.hello":
        return HelloReply(
            num_train=100,
            config_hash=IDENTITY.config_hash,
            base_digest=IDENTITY.base_digest,
            tokenizer_digest=IDENTITY.tokenizer_digest,
            task_digest=IDENTITY.task_digest,
        )
    steps = decode(TrainRequest, message.content).steps
    g, loss = random.standard_normal((2, steps, 1)).astype(np.float32)
    return ScalarReply(g=scalars_to_bytes(g), loss=scalars_to_bytes(np.abs(loss)), dropped=bytes(steps))


def main() -> None:
    """Measure, print and write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000, help="registered clients (default: 10000)")
    parser.add_argument("--sampled", type=int, default=200, help="clients a round (default: 200)")
    parser.add_argument(
        "--rounds", type=int, default=400, help="rounds, of which the second half counts (default: 400)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, one_federation(1), RunStore(Path(folder) / "run") as store:
        grid = AnsweringGrid(options.clients)
        server = make_server(
            grid, store, Path(folder), clients=options.clients, sampled=options.sampled, rounds=options.rounds
        )
        began = time.perf_counter()
        server.client_registry.wait(grid, timeout_s=600)
        register_s = time.perf_counter() - began
        rounds = [one_round(server, grid) for _ in range(options.rounds)]
        began = time.perf_counter()
        records.to_json(server.presence())
        presence_s = time.perf_counter() - began
    claims = Claims(command="python experiments/network/many_clients.py")
    what = f"{options.clients:,} registered clients, {options.sampled} a round, no network"
    wall, busy = (statistics.median(column) for column in zip(*rounds[options.rounds // 2 :], strict=True))
    claims.add(f"{what}: the server's own work, median seconds a round", wall, "s", at_most=MAX_S)
    claims.add(f"{what}: the same in seconds of CPU, whatever else the machine does", busy, "s", at_most=MAX_S)
    claims.add(f"{what}: seconds to register all of them", register_s, "s")
    claims.add(f"{what}: who is here, for `fedzo status`, every two seconds and after each round", presence_s, "s")
    claims.show()
    claims.write(HERE / "claims.json")


def make_server(grid: Grid, store: RunStore, folder: Path, *, clients: int, sampled: int, rounds: int) -> Server:
    """The real server of a toy model."""
    config = RunSettings(
        seed=1,
        fl=FlConfig(num_clients=clients, rounds=rounds),
        strategy=StrategyConfig(clients_per_round=sampled),
        server_optimizer=SgdConfig(lr=1e-3),
    )
    base = np.zeros(SIZE, np.float32)
    space = VectorSpace(base)
    replica = Replica(space, server_optimizer=Sgd(), reset=lambda: space.load(base), run_seed=1)
    return Server(
        grid=grid,
        client_registry=ClientRegistry(num_clients=clients, identity=IDENTITY),
        replica=replica,
        store=store,
        artifact=ArtifactStore(folder / "artifacts").put(b"mask"),
        config=config,
        aggregator=ScalarAggregator(space.distribution, config),
        step_policy=STEP_POLICIES.build(
            config.step_policy, num_clients=clients, local_steps=config.fl.local_steps, run_seed=1
        ),
        sink=store,
        elapsed=lambda: 0.0,
    )


def one_round(server: Server, grid: AnsweringGrid) -> tuple[float, float]:
    """Seconds of a round and seconds of CPU in it, both less those of its clients."""
    before = time.perf_counter() - grid.clients_s, time.process_time() - grid.clients_cpu_s
    server.run_round()
    after = time.perf_counter() - grid.clients_s, time.process_time() - grid.clients_cpu_s
    return after[0] - before[0], after[1] - before[1]


if __name__ == "__main__":
    main()
