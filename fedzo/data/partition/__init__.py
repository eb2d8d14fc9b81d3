"""Which client holds which training rows, and which of its rows a client keeps for scoring."""

from fedzo.data.partition import by_label, plain
from fedzo.data.partition.base import (
    PARTITIONERS,
    PartitionConfig,
    PartitionTraits,
    holdout,
    partition,
    partition_digest,
)

__all__ = [
    "PARTITIONERS",
    "PartitionConfig",
    "PartitionTraits",
    "partition",
    "partition_digest",
    "holdout",
    "by_label",
    "plain",
]
