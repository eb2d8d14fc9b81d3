"""Which rows a client has, from a partition of one set (a simulation) or from its own files; and which a step uses.

A row's way: source -> rows of a client -> holdout -> preprocess stages (training rows only) -> tokens -> batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedzo.data.config import DataConfig, SplitConfig, TaskConfig
from fedzo.data.files import Row, refuse_marked
from fedzo.data.partition import PartitionConfig, holdout, partition, partition_digest
from fedzo.data.preprocess import Stage, preprocess, summaries
from fedzo.data.sources import Splits, load_own, load_splits
from fedzo.data.tasks import has_labels, label_index, render
from fedzo.system import OnProgress, no_progress
from fedzo.zo.directions import PURPOSE_DATA, permutation, stream_key


class RowSource(Protocol):
    """Where the rows of clients come from."""

    @property
    def task(self) -> TaskConfig:
        """What the rows are for."""
        ...

    @property
    def partition_digest(self) -> str:
        """Of which client has which rows of one set; empty where each has a set of its own."""
        ...

    def rows_for(self, client: int) -> list[Row]:
        """All rows of a client, those that it will hold out among them."""
        ...


@dataclass
class SimulatedRows:
    """One set of rows, parted into train, dev and test, whose training rows are dealt to all clients of a run."""

    data: DataConfig
    split: SplitConfig
    task: TaskConfig
    partition: PartitionConfig
    num_clients: int
    seed: int

    @cached_property
    def splits(self) -> Splits:
        """Train, dev and test rows."""
        return load_splits(self.data, self.split, self.task)

    @cached_property
    def parts(self) -> list[list[int]]:
        """Numbers of the training rows of each client."""
        return partition(
            self.splits.train, self.partition, num_clients=self.num_clients, seed=self.seed, task=self.task
        )

    @property
    def partition_digest(self) -> str:
        return partition_digest(self.parts)

    def rows_for(self, client: int) -> list[Row]:
        return [self.splits.train[row] for row in self.parts[client]]

    def prompts(self) -> list[str]:
        """The prompts of all training rows, without labels."""
        return [render(row, self.task).prompt for row in self.splits.train]


@dataclass(frozen=True, slots=True)
class OwnRows:
    """The rows of a site's own file. A path with ``{client}`` names a file a client."""

    path: str
    task: TaskConfig

    @property
    def is_one_set(self) -> bool:
        """Whether every client that the site plays would have the same rows."""
        return "{client}" not in self.path

    @property
    def partition_digest(self) -> str:
        return ""

    def rows_for(self, client: int) -> list[Row]:
        return load_own(Path(self.path.replace("{client}", str(client))), self.task)


@dataclass(frozen=True, slots=True)
class ClientRows:
    """A client's rows.

    Attributes:
        train: What it trains on, after all stages.
        heldout: What it is scored on, in an order that the run's seed draws: any first part of them is a random sample.
        figures: What the stages tell of ``train``.
    """

    train: list[Row]
    heldout: list[Row]
    figures: Mapping[str, float] = field(default_factory=dict)

    def label_counts(self, task: TaskConfig) -> Mapping[str, int]:
        """Number of training rows of each label; empty for a task without labels."""
        if not has_labels(task):
            return {}
        counts = Counter(label_index(row, task) for row in self.train)
        return {str(label): counts[label] for label in sorted(counts)}


def client_rows(
    source: RowSource,
    client: int,
    *,
    share: float,
    seed: int,
    stages: Mapping[str, Stage] | None = None,
    on_progress: OnProgress = no_progress,
) -> ClientRows:
    """A client's rows, parted, those to train on as the stages make them.

    Args:
        source: Gives all its rows.
        client: Index of the client.
        share: Share that is held out (``partition.holdout``).
        seed: Run seed.
        stages: What may change its training rows, in order.
        on_progress: Told how far the stages are.
    """
    rows = source.rows_for(client)
    prompts = [render(row, source.task).prompt for row in rows]
    train, heldout = holdout(prompts, share, seed=seed, client=client)
    refuse_marked((rows[row] for row in heldout), what="rows that a client holds out")
    return ClientRows(
        train=preprocess([rows[row] for row in train], stages or {}, client=client, on_progress=on_progress),
        heldout=[rows[row] for row in heldout],
        figures=summaries(stages or {}, client=client),
    )


def batch_rows(*, run_seed: int, client: int, used: int, batch_size: int, num_rows: int) -> list[int]:
    """Row numbers (0..num_rows-1) of a client's step number ``used``: resume and absence change nothing.

    The client's rows are read one permutation (epoch) after another; a batch may span two of them. Each epoch's
    permutation is drawn from the client's own stream, so no two clients share an order.
    """
    first = used * batch_size
    rows = []
    for at in range(first, first + batch_size):
        epoch, offset = divmod(at, num_rows)
        rows.append(int(_order(run_seed, client, epoch, num_rows)[offset]))
    return rows


@lru_cache(maxsize=64)  # of many rows, drawing it takes longer than a step
def _order(run_seed: int, client: int, epoch: int, num_rows: int) -> npt.NDArray[np.int64]:
    """In which order a client's rows are read in one epoch."""
    order = permutation(stream_key(run_seed, round=epoch, owner=client), num_rows, purpose=PURPOSE_DATA)
    order.setflags(write=False)
    return order
