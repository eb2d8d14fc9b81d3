"""Which client holds which training rows, and which of its rows a client keeps for scoring."""

from __future__ import annotations

from collections.abc import Sequence

from fedzo.data.config import PartitionConfig, TaskConfig
from fedzo.data.files import Row
from fedzo.data.partitioners import PARTITIONERS, too_few
from fedzo.errors import ConfigError
from fedzo.zo.directions import PURPOSE_HOLDOUT, permutation, stream_key


def partition(
    rows: Sequence[Row], config: PartitionConfig, *, num_clients: int, seed: int, task: TaskConfig
) -> list[list[int]]:
    """Deal rows to clients.

    Args:
        rows: The training rows.
        config: Chooses the way; see ``PARTITIONERS``.
        num_clients: How many clients.
        seed: Run seed (unsigned 64 bit); the same seed gives the same parts on every machine.
        task: Says which column is the label.

    Returns:
        Row numbers of each client: sorted, disjoint, together all rows.

    Raises:
        ConfigError: There are more clients than rows, a client gets fewer than ``config.min_rows``, or a column is
            missing.
    """
    if not 1 <= num_clients <= len(rows):
        raise ConfigError(
            f"fl.num_clients must be between 1 and the number of training rows ({len(rows)}), got {num_clients}. "
            "Lower it, or give more rows (data.num_train)."
        )
    parts = PARTITIONERS.build(config, rows=rows, num_clients=num_clients, seed=seed, task=task)
    short = {client: len(part) for client, part in enumerate(parts) if len(part) < config.min_rows}
    if short:
        raise ConfigError(too_few(short, config))
    return [sorted(part) for part in parts]


def holdout(indices: Sequence[int], share: float, *, seed: int, client: int) -> tuple[list[int], list[int]]:
    """Part a client's rows into those for training and those for scoring only.

    Args:
        indices: The client's row numbers.
        share: Share held out, rounded to whole rows; at least one row is held out unless it is 0 or the client has one
            row.
        seed: Run seed.
        client: Index of the client.

    Returns:
        Row numbers for training (never empty) and held out, both sorted.

    Raises:
        ConfigError: ``share`` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(
            f"partition.holdout must be >= 0 and < 1, got {share}. It is the share of rows kept from training."
        )
    wanted = max(1, round(share * len(indices))) if share > 0 else 0
    num_held = max(0, min(wanted, len(indices) - 1))
    ranked = permutation(stream_key(seed, round=0, owner=client), len(indices), purpose=PURPOSE_HOLDOUT).tolist()
    held = set(ranked[:num_held])
    return (
        sorted(row for at, row in enumerate(indices) if at not in held),
        sorted(indices[at] for at in held),
    )
