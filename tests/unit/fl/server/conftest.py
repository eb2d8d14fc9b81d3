"""A server with scripted clients, on a clock of the test's own: no test waits, or hangs on how long anything takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import ARTIFACT, IDENTITY, Client, Federation, Grid, Kept, new_replica

from fedzo.config.schema import RunSettings
from fedzo.fl.config import FlConfig, StrategyConfig
from fedzo.fl.log_store import RunStore
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.fl.server.rounds import Server
from fedzo.fl.server.scalar_aggregator import ScalarAggregator
from fedzo.fl.server.step_policy import STEP_POLICIES
from fedzo.fl.server.step_policy.baselines import NoStepPolicyConfig
from fedzo.fl.server.step_policy.plan import StepPolicyConfig
from fedzo.trainers.artifacts import ArtifactStore
from fedzo.zo.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizerConfig, SgdConfig


@pytest.fixture
def federation(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, clock: Any) -> Iterator[Federation]:
    """Starts a server and its clients, each time on the same folder; its sink is a ``Kept``."""
    stores = []
    artifact = ArtifactStore(tmp_path_factory.mktemp("artifacts")).put(ARTIFACT)

    def make(num_clients: int = 3, **strategy: Any) -> tuple[Server, list[Client], Grid]:
        server_optimizer: ServerOptimizerConfig = strategy.pop("server_optimizer", SgdConfig(lr=0.5))
        rule = SERVER_OPTIMIZERS.build(server_optimizer, local_steps=1)
        clients = [Client(index, rule) for index in range(num_clients)]
        grid = Grid(clients)
        settings = {name: strategy.pop(name) for name in ("transport", "directions") if name in strategy}
        gradient = strategy.pop("gradient", None)
        step_policy: StepPolicyConfig = strategy.pop("step_policy", NoStepPolicyConfig())
        stores.append(RunStore(tmp_path))
        replica = new_replica(rule)
        config = RunSettings(
            seed=1,
            fl=FlConfig(num_clients=num_clients, rounds=5, local_steps=2, hash_every=2, **settings),
            strategy=StrategyConfig(**{"deadline_s": 0.2, "startup_s": 1.0, **strategy}),
            server_optimizer=server_optimizer,
            step_policy=step_policy,
        )
        server = Server(
            grid=grid,
            client_registry=ClientRegistry(num_clients=num_clients, identity=IDENTITY),
            replica=replica,
            store=stores[-1],
            artifact=artifact,
            config=config,
            aggregator=ScalarAggregator(replica.space.distribution, config, gradient),
            step_policy=STEP_POLICIES.build(step_policy, num_clients=num_clients, local_steps=2, run_seed=1),
            sink=Kept(),
            elapsed=lambda: 0.0,
        )
        server.client_registry.wait(grid, timeout_s=1.0)
        return server, clients, grid

    yield make
    for store in stores:
        store.close()
