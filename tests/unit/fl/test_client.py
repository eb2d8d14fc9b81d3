"""What a client's process keeps between requests."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedzo.data.config import TaskConfig
from fedzo.fl.client.worker import ClientWorker, Identity
from fedzo.fl.replica import Replica
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.log import RoundRecord
from fedzo.zo.server_optimizer import Sgd

BASE = np.linspace(-1, 1, 5).astype(np.float32)


def test_another_space_is_built_on_the_base_weights_and_not_where_the_last_run_left_them() -> None:
    weights = VectorSpace(BASE.copy())
    seen = []

    def build(artifact: bytes) -> Replica:
        seen.append(weights.values())
        return Replica(weights, rule=Sgd(), reset=lambda: weights.load(BASE), run_seed=1)

    unused: Any = None
    worker = ClientWorker(Identity("c", "b", "t", "k"), unused, task=TaskConfig(), data_of=unused, build=build)
    first = worker.build(b"one mask")
    first.advance([RoundRecord(round=0, lr=0.5, owners=(0xFFFFFFFF,), coefficients=np.ones((1, 1, 1), np.float32))])
    assert not np.array_equal(weights.values(), BASE)
    assert worker.build(b"one mask") is first

    worker.build(b"another mask")

    assert np.array_equal(seen[1], BASE)
