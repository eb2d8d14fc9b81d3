"""What every way to deal rows to clients must do."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.partition import PartitionConfig, partition
from fedzo.data.partition.base import Parts
from fedzo.errors import FedzoError
from fedzo.system import environment_variable
from fedzo.testing.conformance.bits import global_generators, must

SEEDS = (0, 2**64 - 1)
_HASH_SEED = "PYTHONHASHSEED"


def check_partition(config: PartitionConfig, rows: Sequence[Row], task: TaskConfig, *, num_clients: int) -> None:
    """Check that a partition keeps the contract of ``fedzo.data.partition.PARTITIONERS``.

    - It gives a part to each client, and each row to one of them.
    - No client has fewer than ``min_rows`` rows.
    - The same rows, clients and seed are dealt alike: when it is called again, and in another process.
    - It does not change the rows.
    - The global random generators are neither used nor needed.

    Args:
        config: Chooses the partition. Another process imports its class, and the factory with it, by their module.
        rows: Rows that differ, with several labels if the partition asks for them.
        task: What the rows are for.
        num_clients: How many clients.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """
    name = f"{type(config).__module__}.{type(config).__qualname__}"
    must("<locals>" not in name, f"{name} must be a class of a module, or no other process can import it")
    given = copy.deepcopy(list(rows))
    deal = partial(partition, given, config, num_clients=num_clients, task=task)
    try:
        first = [deal(seed=seed) for seed in SEEDS]  # what it imports may draw random numbers
        must(given == list(rows), "the rows that it is given must not be changed")
        for number in (1, 2):
            with global_generators(number):
                _must_agree([deal(seed=seed) for seed in SEEDS], first, "when it is called again")
        hash_seed = "1" if os.environ.get(_HASH_SEED) == "0" else "0"  # by which sets of text have another order
        with (
            environment_variable(_HASH_SEED, hash_seed),
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as another,
        ):
            there = [another.submit(deal, seed=seed) for seed in SEEDS]
            _must_agree([each.result() for each in there], first, "in another process")
    except FedzoError as error:
        raise AssertionError(str(error)) from error
    except BrokenProcessPool as error:
        raise AssertionError(
            f"another process must be able to import {name}, got: {error}. Define it in a module, and call the check "
            "of a script under `if __name__ == '__main__':`"
        ) from error


def _must_agree(found: list[Parts], expected: list[Parts], when: str) -> None:
    for seed, parts, others in zip(SEEDS, found, expected, strict=True):
        differ = [client for client, pair in enumerate(zip(parts, others, strict=True)) if pair[0] != pair[1]]
        must(
            not differ,
            f"the same rows, clients and seed must be dealt alike {when}, but by seed {seed} {len(differ)} of "
            f"{len(others)} clients have other rows. Take random numbers from fedzo.data.partition.base.shuffled.",
        )
