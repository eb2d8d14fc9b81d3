"""Partitions that do not look at labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.partition.base import (
    MOST_NAMED,
    PARTITIONERS,
    PartitionConfig,
    PartitionTraits,
    Parts,
    deal,
    flower_partitioners,
    shuffled,
)
from fedzo.data.tasks import is_missing
from fedzo.errors import ConfigError, Problem, problem

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class IidConfig(PartitionConfig):
    """Rows are split among the clients uniformly."""


@PARTITIONERS.register("iid", IidConfig)
def iid(config: IidConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig) -> Parts:
    """Shuffled rows in equal parts (sizes differ by at most one)."""
    partitioner = flower_partitioners().IidPartitioner(num_partitions=num_clients)
    return deal(partitioner, shuffled(len(rows), seed), num_clients=num_clients)


@dataclass(kw_only=True, slots=True)
class NaturalConfig(PartitionConfig):
    """One client per value of a column (a site, an author, a domain)."""

    column: str = ""
    """Name of the column; its number of values must be ``fl.num_clients``."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if not self.column:
            remedy = "Write partition.column=<column>."
            yield problem("partition.column", "name the column that tells clients apart", self.column, remedy)


@PARTITIONERS.register("natural", NaturalConfig)
def natural(config: NaturalConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig) -> Parts:
    """One client per value of a column, in the order of the sorted values (as text)."""
    for number, row in enumerate(rows):
        if is_missing(row.get(config.column)):
            there = ", ".join(map(str, row))
            seen = f"holds {row[config.column]!r} there" if config.column in row else f"has: {there}"
            raise ConfigError(
                f"partition.column must name a column that every training row fills, got {config.column!r}; "
                f"row {number} {seen}. Fill it, remove the row, or choose another column."
            )
    keys = [str(row[config.column]) for row in rows]
    values = Counter(keys)
    if len(values) != num_clients:
        shown = ", ".join(f"{value!r} ({count} rows)" for value, count in sorted(values.items())[:MOST_NAMED])
        raise ConfigError(
            f"partition.column={config.column!r} has {len(values)} values and fl.num_clients is {num_clients}, "
            f"they must be equal: {shown}{', ...' if len(values) > MOST_NAMED else ''}. "
            f"Write fl.num_clients={len(values)}, or choose another column."
        )
    partitioner = flower_partitioners().NaturalIdPartitioner(partition_by="key")
    return deal(partitioner, list(range(len(rows))), num_clients=num_clients, keys=keys)


@dataclass(kw_only=True, slots=True)
class OwnConfig(PartitionConfig):
    """No partition: every client reads its own file (``data.path``, in which ``{client}`` is the client's index)."""

    @property
    def traits(self) -> PartitionTraits:
        return PartitionTraits(own_rows=True)


@PARTITIONERS.register("own", OwnConfig)
def own(config: OwnConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig) -> Parts:
    """Nothing to deal: every client reads its own rows."""
    raise ConfigError("partition=own: every client must read its own rows, and no rows are split. Choose a partition.")
