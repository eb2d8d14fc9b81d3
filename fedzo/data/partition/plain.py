"""Partitions that do not look at labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.partition.base import (
    MAX_NAMED,
    PARTITIONERS,
    PartitionConfig,
    PartitionTraits,
    Parts,
    shuffled,
)
from fedzo.data.tasks import beginning, is_missing, render
from fedzo.errors import ConfigError, Problem, problem

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class IidConfig(PartitionConfig):
    """Rows are split among the clients uniformly."""


@PARTITIONERS.register("iid", IidConfig)
def iid(config: IidConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig) -> Parts:
    """Shuffled rows in equal parts (sizes differ by at most one)."""
    return [part.tolist() for part in np.array_split(shuffled(len(rows), seed), num_clients)]


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
    """One client per value of a column (as text, without outer blanks), in the order of the sorted values."""
    rows_of: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if is_missing(row.get(config.column), may_be_word=False):
            there = ", ".join(map(str, row))
            seen = f"holds {row[config.column]!r} there" if config.column in row else f"has: {there}"
            raise ConfigError(
                f"partition.column must name a column that every training row fills, got {config.column!r}; "
                f"the row {beginning(render(row, task).prompt)} {seen}. "
                "Fill it, remove the row, or choose another column."
            )
        rows_of.setdefault(str(row[config.column]).strip(), []).append(number)
    if len(rows_of) != num_clients:
        shown = ", ".join(f"{value!r} ({len(part)} rows)" for value, part in sorted(rows_of.items())[:MAX_NAMED])
        raise ConfigError(
            f"partition.column={config.column!r} has {len(rows_of)} values and fl.num_clients is {num_clients}, "
            f"they must be equal: {shown}{', ...' if len(rows_of) > MAX_NAMED else ''}. "
            f"Write fl.num_clients={len(rows_of)}, or choose another column."
        )
    return [rows_of[value] for value in sorted(rows_of)]


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
