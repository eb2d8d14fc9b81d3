"""Which client holds which training rows, and which of its rows a client keeps for scoring."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.errors import ConfigError, PluginError, Problem, at_least, problem
from fedzo.registry import PluginConfig, Registry
from fedzo.zo.directions import PURPOSE_DEAL, PURPOSE_HOLDOUT, permutation, stream_key

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

Parts = list[list[int]]
MAX_NAMED = 8
"""Clients or values that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionTraits:
    """What the rules on other parts of a run must know of a partition.

    Attributes:
        by_label: Whether rows are dealt by their labels, which not every task has.
        own_rows: Whether clients read rows of their own, so that the server has none.
    """

    by_label: bool = False
    own_rows: bool = False


@dataclass(kw_only=True, slots=True)
class PartitionConfig(PluginConfig):
    """How the training rows are split among the clients."""

    min_rows: int = 1
    """Fewest rows a client may have."""
    holdout: float = 0.1
    """Share of each client's different prompts whose rows are kept for federated evaluation. The client never trains on
    them, but another client that has a row with the same prompt may."""

    @property
    def traits(self) -> PartitionTraits:
        """What other parts of a run must know of this partition."""
        return PartitionTraits()

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("partition.min_rows", self.min_rows, 1, "Every client needs a row.")
        if not 0 <= self.holdout < 1:
            remedy = "The share of rows that are not trained on. 0 keeps none."
            yield problem("partition.holdout", "be >= 0 and < 1", self.holdout, remedy)


_PICTURES = "flwr_datasets.visualization"


def flower_partitioners() -> Any:
    """The module ``flwr_datasets.partitioner``.

    Its package imports what draws pictures as well, and with it seaborn and scipy: more than half of the seconds that
    this takes, in every process that deals rows. A stand-in imports that part when somebody asks for it.
    """
    if "flwr_datasets" not in sys.modules:
        pictures = ModuleType(_PICTURES)
        pictures.__getattr__ = _of_the_real_one  # type: ignore[method-assign]
        sys.modules[_PICTURES] = pictures
    from flwr_datasets import partitioner

    return partitioner


def _of_the_real_one(name: str) -> Any:
    if name.startswith("__"):  # what the import system asks of any module
        raise AttributeError(name)
    del sys.modules[_PICTURES]
    return getattr(importlib.import_module(_PICTURES), name)


PARTITIONERS: Registry[Parts] = Registry("partition", base=PartitionConfig)
"""Factories ``(config, *, rows, num_clients, seed, task) -> row numbers of each client``."""


def partition(
    rows: Sequence[Row], config: PartitionConfig, *, num_clients: int, seed: int, task: TaskConfig
) -> list[list[int]]:
    """Deal rows to clients.

    Args:
        rows: The training rows.
        config: Chooses the way; see ``PARTITIONERS``. Its rules are checked before (``problems``).
        num_clients: How many clients.
        seed: Run seed (unsigned 64 bit); the same seed gives the same parts on every machine that has the same
            versions of numpy and flwr-datasets, whose generator deals some of them (``by_label``).
        task: Says which column is the label.

    Returns:
        Row numbers of each client: sorted, disjoint, together all rows.

    Raises:
        ConfigError: There are more clients than rows, a client gets fewer than ``config.min_rows``, or a column is
            missing.
        PluginError: The parts are not those of all clients, or do not hold every row once.
    """
    if not 1 <= num_clients <= len(rows):
        raise ConfigError(
            f"fl.num_clients must be between 1 and the number of training rows ({len(rows)}), got {num_clients}. "
            "Lower it, or give more rows (split.num_train)."
        )
    parts = PARTITIONERS.build(config, rows=rows, num_clients=num_clients, seed=seed, task=task)
    if len(parts) != num_clients:
        raise _broken(config, f"a part for each of {num_clients} clients", f"{len(parts)} parts")
    dealt = Counter(row for part in parts for row in part)
    if dealt != Counter(range(len(rows))):
        odd = [row for row in {*dealt, *range(len(rows))} if dealt[row] != 1 or not 0 <= row < len(rows)]
        times = f"row {min(odd)} {dealt[min(odd)]} times ({len(odd)} such rows)"
        raise _broken(config, f"each of the rows 0 to {len(rows) - 1} to one client, once", times)
    short = {client: len(part) for client, part in enumerate(parts) if len(part) < config.min_rows}
    if short:
        raise ConfigError(too_few(short, config))
    return [sorted(part) for part in parts]


def partition_digest(parts: Parts) -> str:
    """SHA-256 of which client has which rows, for processes that deal the same rows each for itself."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(np.array([len(part), *part], dtype="<i8").tobytes())
    return sha.hexdigest()


def holdout(prompts: Sequence[str], share: float, *, seed: int, client: int) -> tuple[list[int], list[int]]:
    """Part a client's rows into those for training and those for scoring only.

    Rows with the same prompt go together: a client is never scored on a prompt that it trains on.

    Args:
        prompts: The prompt of each of the client's rows.
        share: Share of the different prompts whose rows are held out, in [0, 1), rounded to whole prompts; at least one
            is held out unless it is 0 or the client has one prompt.
        seed: Run seed.
        client: Index of the client.

    Returns:
        Row numbers for training (never empty), sorted, and held out, in an order that the seed draws: the first few
        are a random sample of them, also where the rows are sorted by label.
    """
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    groups = list(rows_of.values())
    wanted = max(1, round(share * len(groups))) if share > 0 else 0
    num_held = max(0, min(wanted, len(groups) - 1))
    ranked = permutation(stream_key(seed, round=0, owner=client), len(groups), purpose=PURPOSE_HOLDOUT).tolist()
    train = sorted(row for at in ranked[num_held:] for row in groups[at])
    held = [row for at in ranked[:num_held] for row in groups[at]]
    return train, held


def shuffled(num_rows: int, seed: int) -> list[int]:
    """Row numbers in an order that a seed draws, by Philox words: the same on every machine."""
    order: list[int] = permutation(stream_key(seed, round=0), num_rows, purpose=PURPOSE_DEAL).tolist()
    return order


def deal(
    partitioner: Any, order: Sequence[int], *, num_clients: int, keys: Sequence[int] | Sequence[str] = ()
) -> Parts:
    """Run a partitioner of flwr-datasets on rows in an order, without its warnings and progress bars.

    It works on a table of row numbers and keys in memory, and cuts rows in the order in which it finds them: shuffle
    them first.
    """
    from datasets import Dataset

    table = {"row": list(order), "key": list(keys) or [0] * len(order)}
    partitioner.dataset = Dataset.from_dict(table)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        # [:], or datasets would look each row up by itself
        return [list(partitioner.load_partition(client)["row"][:]) for client in range(num_clients)]


def _broken(config: PartitionConfig, rule: str, got: str) -> PluginError:
    return PluginError(f"partition={PARTITIONERS.name_of(config)} must give {rule}, got {got}. Correct the plugin.")


def too_few(short: dict[int, int], config: PartitionConfig) -> str:
    """Says which clients got fewer than ``min_rows`` rows, by their numbers of rows."""
    shown = ", ".join(f"{client} ({size} rows)" for client, size in sorted(short.items())[:MAX_NAMED])
    return (
        f"partition: every client must have at least partition.min_rows={config.min_rows} rows, these have fewer: "
        f"client {shown}{', ...' if len(short) > MAX_NAMED else ''}. "
        "Give more rows (split.num_train), or lower fl.num_clients or partition.min_rows."
    )
