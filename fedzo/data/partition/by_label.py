"""Partitions by label: clients differ in the mix of labels that they see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.partition.base import (
    PARTITIONERS,
    PartitionConfig,
    PartitionTraits,
    Parts,
    deal,
    flower_partitioners,
    shuffled,
    too_few,
)
from fedzo.data.tasks import label_index
from fedzo.errors import ConfigError, Problem, at_least, positive, problem

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class ByLabelConfig(PartitionConfig):
    """A partition that goes by the rows' labels."""

    @property
    def traits(self) -> PartitionTraits:
        return PartitionTraits(by_label=True)


@dataclass(kw_only=True, slots=True)
class DirichletConfig(ByLabelConfig):
    """The rows of each class are split among the clients by shares drawn from Dirichlet(alpha)."""

    alpha: float = 0.5
    """Concentration. A smaller value makes clients less alike."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from positive("partition.alpha", self.alpha, "Smaller makes clients less alike. 0.5 is usual.")


@PARTITIONERS.register("dirichlet", DirichletConfig)
def dirichlet(config: DirichletConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig) -> Parts:
    """Label skew: class by class, the clients' shares of its rows are one draw of Dirichlet(alpha, ..., alpha).

    The dimension of the draw is the number of clients; class sizes play no part, and client sizes follow (they are not
    balanced). This is the variant of Yurochkin et al. (arXiv 1905.12022) without their balancing, as in
    ``flwr_datasets``; it is not the one that draws each client's class mix from Dirichlet(alpha * class prior). If a
    client gets fewer than ``min_rows`` rows, all shares are drawn again, at most ten times.
    """
    order = shuffled(len(rows), seed)
    labels = [_label(rows[row], row, task) for row in order]

    def draw(min_rows: int) -> Parts:
        partitioner = flower_partitioners().DirichletPartitioner(
            num_partitions=num_clients,
            partition_by="key",
            alpha=float(config.alpha),
            min_partition_size=min_rows,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
        return deal(partitioner, order, num_clients=num_clients, keys=labels)

    try:
        return draw(config.min_rows)
    except ValueError as error:
        sizes = [len(part) for part in draw(0)]  # the first draw, to name the clients
        short = {client: size for client, size in enumerate(sizes) if size < config.min_rows}
        advice = "Raise partition.alpha or split.num_train, lower fl.num_clients, or try another seed."
        raise ConfigError(f"{too_few(short, config)} Ten more draws gave the same result. {advice}") from error


@dataclass(kw_only=True, slots=True)
class DirichletEqualConfig(ByLabelConfig):
    """Clients have equal sizes. The label mix of each client is drawn from Dirichlet(alpha)."""

    alpha: float = 0.5
    """Concentration; smaller is less IID."""
    num_extreme: int = 0
    """Number of clients (the last indices) with rows of a single label."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from _num_extreme(self.num_extreme, run)
        yield from positive("partition.alpha", self.alpha, "Smaller makes clients less alike. 0.5 is usual.")


@PARTITIONERS.register("dirichlet_equal", DirichletEqualConfig)
def dirichlet_equal(
    config: DirichletEqualConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig
) -> Parts:
    """Label skew at equal sizes: each client's label mix is a draw of Dirichlet(alpha, ..., alpha) over the classes.

    The variant of FedDyn (arXiv 2111.04263), as in ``flwr_datasets``: rows are dealt one by one to random clients, and
    a class that is used up leaves the mixes of those that still want rows. So the joint mix is that of all rows, which
    ``dirichlet`` with a plain mean over unequal clients does not give. The last ``num_extreme`` clients hold rows of
    one label each, chosen before the others' as by ``extreme``.
    """
    single, rest = _single_label(rows, config, num_clients=num_clients, seed=seed, task=task)
    if not rest:
        return single
    num_mixed = num_clients - config.num_extreme
    labels = [_label(rows[row], row, task) for row in rest]
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    sizes = [(len(rest) + client) // num_mixed for client in range(num_mixed)]
    partitioner = flower_partitioners().InnerDirichletPartitioner(
        partition_sizes=sizes, partition_by="key", alpha=float(config.alpha), shuffle=False, seed=seed
    )
    try:
        return deal(partitioner, rest, num_clients=num_mixed, keys=[numbers[label] for label in labels]) + single
    except ValueError as error:  # a mix is zero, to float64's precision, for every class that is left
        raise ConfigError(
            f"partition.alpha = {config.alpha} is too small to split all rows into label mixes. Raise it, or use "
            "partition=extreme for clients of one label."
        ) from error


@dataclass(kw_only=True, slots=True)
class ShardsConfig(ByLabelConfig):
    """Rows are sorted by label and cut into shards. Each client gets some shards."""

    shards_per_client: int = 2
    """Number of shards of a client."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("partition.shards_per_client", self.shards_per_client, 1, "2 is usual.")


@PARTITIONERS.register("shards", ShardsConfig)
def shards(config: ShardsConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig) -> Parts:
    """Rows sorted by label and cut into shards, ``shards_per_client`` random ones a client (McMahan et al., 2017).

    A shard has ``ceil(rows / (clients * shards_per_client))`` rows, so that none is left over; the last one may be
    smaller, and where the rows are few some clients (the last ones) get a shard less.
    """
    labels = [_label(row, number, task) for number, row in enumerate(rows)]
    order = sorted(shuffled(len(rows), seed), key=labels.__getitem__)
    partitioner = flower_partitioners().ShardPartitioner(
        num_partitions=num_clients,
        partition_by="key",
        shard_size=-(-len(rows) // (num_clients * config.shards_per_client)),
        keep_incomplete_shard=True,
        shuffle=False,
        seed=seed,
    )
    try:
        return deal(partitioner, order, num_clients=num_clients, keys=[labels[row] for row in order])
    except ValueError as error:
        raise ConfigError(
            f"partition=shards: {len(rows)} rows do not make a shard for each of {num_clients} clients. "
            "Lower fl.num_clients, raise partition.shards_per_client, or give more rows."
        ) from error


@dataclass(kw_only=True, slots=True)
class ExtremeConfig(ByLabelConfig):
    """Some clients hold a single label, the others are IID."""

    num_extreme: int = 2
    """How many clients (the last indices) hold rows of one label only."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from _num_extreme(self.num_extreme, run)


@PARTITIONERS.register("extreme", ExtremeConfig)
def extreme(config: ExtremeConfig, *, rows: Sequence[Row], num_clients: int, seed: int, task: TaskConfig) -> Parts:
    """The last ``num_extreme`` clients hold rows of one label each (labels in turn), the others share the rest IID.

    An extreme client has ``rows // clients`` rows, or fewer where its label is rare: the IID clients together keep at
    least as many rows of a label as one extreme client gets. If all clients are extreme, each label's rows are split
    evenly over its clients.
    """
    single, rest = _single_label(rows, config, num_clients=num_clients, seed=seed, task=task)
    num_iid = num_clients - config.num_extreme
    return [rest[client::num_iid] for client in range(num_iid)] + single


def _num_extreme(num_extreme: int, run: RunSettings) -> Iterator[Problem]:
    if not 0 <= num_extreme <= run.fl.num_clients:
        rule = f"be between 0 and fl.num_clients ({run.fl.num_clients})"
        yield problem("partition.num_extreme", rule, num_extreme, "Lower it or add clients.")


def _single_label(
    rows: Sequence[Row],
    config: ExtremeConfig | DirichletEqualConfig,
    *,
    num_clients: int,
    seed: int,
    task: TaskConfig,
) -> tuple[Parts, list[int]]:
    """The parts of the extreme clients, one label each in turn, and the rows left for the others, shuffled."""
    num_extreme = config.num_extreme
    order = shuffled(len(rows), seed)
    left: dict[int, list[int]] = {}
    for row in order:
        left.setdefault(_label(rows[row], row, task), []).append(row)
    labels = sorted(left)
    if num_extreme == num_clients < len(labels):
        raise ConfigError(
            f"partition.num_extreme={num_extreme} leaves rows of {len(labels) - num_clients} labels without a client. "
            f"Lower it below fl.num_clients, or have at least {len(labels)} clients."
        )
    owners = {label: list(range(turn, num_extreme, len(labels))) for turn, label in enumerate(labels)}
    single: Parts = [[] for _ in range(num_extreme)]
    for label, clients in owners.items():
        total = len(left[label])
        for turn, client in enumerate(clients):
            size = (total + turn) // len(clients)
            if num_extreme < num_clients:
                size = min(len(rows) // num_clients, total // (len(clients) + 1))
            single[client], left[label] = left[label][:size], left[label][size:]
    rest = set().union(*left.values())
    return single, [row for row in order if row in rest]


def _label(row: Row, number: int, task: TaskConfig) -> int:
    try:
        return label_index(row, task)
    except ConfigError as error:
        raise ConfigError(f"row {number}: {error}") from error
