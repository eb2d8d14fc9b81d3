"""Parts that are apart, whole, reproducible, and as skewed as promised."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.data.config import TaskConfig, TaskKind
from fedzo.data.partition import PARTITIONERS, PartitionConfig, base, holdout, partition, partition_digest
from fedzo.data.partition.by_label import DirichletConfig, DirichletEqualConfig, ExtremeConfig, ShardsConfig
from fedzo.data.partition.plain import IidConfig, NaturalConfig
from fedzo.errors import ConfigError, PluginError

TASK = TaskConfig(name="mine", template="{text}", candidates=["a", "b", "c"])
WRITTEN = TaskConfig(name="squad", kind=TaskKind.generation, template="{text}", answer="{text}")
ROWS: list[dict[str, Any]] = [{"text": str(i), "label": i * i % 3, "site": f"s{i % 4}"} for i in range(120)]
WAYS: list[PartitionConfig] = [
    IidConfig(),
    DirichletConfig(alpha=1.0),
    DirichletEqualConfig(alpha=1.0),
    ShardsConfig(),
    ExtremeConfig(),
    NaturalConfig(column="site"),
]


def deal(
    config: PartitionConfig, *, num_clients: int = 4, seed: int = 0, rows: Sequence[Any] = ROWS
) -> list[list[int]]:
    return partition(rows, config, num_clients=num_clients, seed=seed, task=TASK)


def labels_of(part: list[int]) -> Counter[int]:
    return Counter(ROWS[row]["label"] for row in part)


def skew(parts: list[list[int]]) -> float:
    """Mean share of the commonest label."""
    return float(np.mean([max(labels_of(part).values()) / len(part) for part in parts]))


@pytest.mark.parametrize("config", WAYS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_parts_are_sorted_apart_and_together_all_rows(config: PartitionConfig, seed: int) -> None:
    parts = deal(config, seed=seed)

    assert len(parts) == 4
    assert all(part == sorted(part) and part for part in parts)
    assert sorted(chain(*parts)) == list(range(len(ROWS)))
    assert all(type(row) is int for part in parts for row in part)


@pytest.mark.parametrize("config", WAYS[:4], ids=lambda config: type(config).__name__)
def test_the_seed_decides(config: PartitionConfig) -> None:
    assert deal(config) == deal(config)
    assert deal(config) != deal(config, seed=1)


def test_every_partitioner_has_a_test() -> None:
    dealt = {config_class for name, config_class in PARTITIONERS if name != "own"}  # whose rows are not dealt
    assert {type(config) for config in WAYS} == dealt


GOLDEN = {
    "IidConfig": "4,6,7,16,17|3,10,13,15,19|0,1,2,5,9|8,11,12,14,18",
    "DirichletConfig": "6|3,4,7,10,13,15,16,17,19|0,9|1,2,5,8,11,12,14,18",
    "DirichletEqualConfig": "3,9,10,14,19|2,7,11,12,18|0,1,6,15,16|4,5,8,13,17",
    "ShardsConfig": "1,2,3,6,11,15|4,8,14,16,18|0,5,9,10,12,13|7,17,19",
    "ExtremeConfig": "0,5,8,9,10,11|1,2,12,13,14,18|3,6,15|4,7,16,17,19",
    "NaturalConfig": "0,4,8,12,16|1,5,9,13,17|2,6,10,14,18|3,7,11,15,19",
}
DEALT_OTHERWISE = (
    "numpy's generator deals the rows of dirichlet, dirichlet_equal and shards, through flwr-datasets. If fedzo is as "
    "it was, numpy or flwr-datasets deals rows otherwise: a run repeats, and processes agree, with one version only."
)


@pytest.mark.parametrize("config", WAYS, ids=lambda config: type(config).__name__)
def test_the_parts_are_the_same_on_every_machine(config: PartitionConfig) -> None:
    parts = deal(config, seed=7, rows=ROWS[:20])

    assert "|".join(",".join(map(str, part)) for part in parts) == GOLDEN[type(config).__name__], DEALT_OTHERWISE


def test_the_default_partition_deals_as_the_versions_that_it_was_recorded_with() -> None:
    """Recorded with numpy 2.4.6 and flwr-datasets 0.6.1, whose generator no specification of fedzo covers."""
    parts = deal(DirichletEqualConfig(), num_clients=8, rows=ROWS[:64])

    first = "11,32,38|2,8,21|3,13,22|4,5,10|0,9,24|17,19,20|1,12,14|6,7,18"
    assert [len(part) for part in parts] == [8] * 8, DEALT_OTHERWISE
    assert "|".join(",".join(map(str, part[:3])) for part in parts) == first, DEALT_OTHERWISE


def test_iid_sizes_differ_by_one_at_most_and_labels_are_mixed() -> None:
    parts = deal(IidConfig(), num_clients=7)

    assert {len(part) for part in parts} == {17, 18}
    assert all(len(labels_of(part)) == 2 for part in parts)  # squares are never 2 modulo 3


@pytest.mark.parametrize(("num_rows", "num_clients"), [(120, 7), (9, 9), (11, 4), (5, 1)])
def test_iid_parts_are_those_of_flower(num_rows: int, num_clients: int) -> None:
    partitioner = base.flower_partitioners().IidPartitioner(num_partitions=num_clients)
    expected = base.deal(partitioner, base.shuffled(num_rows, 3), num_clients=num_clients)

    parts = deal(IidConfig(), num_clients=num_clients, seed=3, rows=ROWS[:num_rows])

    assert parts == [sorted(part) for part in expected]


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    skews = [
        np.mean([skew(deal(DirichletConfig(alpha=alpha), seed=seed)) for seed in range(5)]) for alpha in (100, 1, 0.1)
    ]

    assert skews == sorted(skews)
    assert skews[0] < 0.75 < 0.85 < skews[2]


@pytest.mark.slow
def test_dirichlet_shares_are_drawn_class_by_class_over_clients() -> None:
    # Dirichlet(alpha, ...) over K clients: a client's share of a class is Beta(alpha, (K - 1) alpha)
    rows = [{"text": "x", "label": label} for label in (0, 1) for _ in range(400)]
    alpha, num_clients = 2.0, 4
    shares = []
    for seed in range(60):
        parts = deal(DirichletConfig(alpha=alpha, min_rows=0), num_clients=num_clients, seed=seed, rows=rows)
        shares += [sum(rows[row]["label"] == label for row in part) / 400 for part in parts for label in (0, 1)]

    expected = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    squares = (np.array(shares) - 1 / num_clients) ** 2
    error = squares.std() / np.sqrt(len(squares) / num_clients)  # the clients of one draw hang together
    assert abs(squares.mean() - expected) < 4 * error
    assert error < expected / 3


def test_equal_dirichlet_clients_are_equal_and_their_mixes_are_those_drawn() -> None:
    """Over two labels a client's share of one is Beta(1, 1), of variance 1 / 12; ten rows of it add (1 / 6) / 10.

    The label that is used up first takes a few rows of the wish of others away: a tenth of the variance is let by.
    """
    rows = [{"text": "x", "label": label} for label in (0, 2) for _ in range(200)]
    sizes, shares = set(), []
    for seed in range(40):
        parts = deal(DirichletEqualConfig(alpha=1.0), num_clients=40, seed=seed, rows=rows)
        sizes |= {len(part) for part in parts}
        shares += [sum(rows[row]["label"] == 2 for row in part) / 10 for part in parts]

    assert sizes == {10}
    assert np.mean(shares) == pytest.approx(0.5)  # all rows are dealt
    squares = (np.array(shares) - 0.5) ** 2
    error = squares.std() / np.sqrt(len(squares))
    assert 0.09 - 4 * error < squares.mean() < 0.1 + 4 * error
    assert error < 0.003


def test_equal_dirichlet_skew_grows_as_alpha_falls() -> None:
    skews = [
        np.mean([skew(deal(DirichletEqualConfig(alpha=alpha), seed=seed)) for seed in range(5)])
        for alpha in (100, 1, 0.3)
    ]

    assert skews == sorted(skews)
    assert skews[0] + 0.1 < skews[2]


def test_shards_give_few_labels_and_no_row_is_left_over() -> None:
    rows = [{"text": "x", "label": label} for label in (0, 1, 2) for _ in range(43)]

    parts = deal(ShardsConfig(shards_per_client=1), num_clients=3, rows=rows)

    assert [len(part) for part in parts] == [43, 43, 43]
    assert all(len({rows[row]["label"] for row in part}) == 1 for part in parts)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(9, 60))
def test_shards_lose_no_row_for_any_sizes(num_clients: int, shards: int, num_rows: int) -> None:
    config = ShardsConfig(shards_per_client=shards)
    size = math.ceil(num_rows / (num_clients * shards))
    if math.ceil(num_rows / size) < num_clients:
        with pytest.raises(ConfigError, match="do not make a shard for each"):
            deal(config, num_clients=num_clients, rows=ROWS[:num_rows])
        return

    parts = deal(config, num_clients=num_clients, rows=ROWS[:num_rows])

    assert sorted(chain(*parts)) == list(range(num_rows))


@pytest.mark.parametrize(("num_extreme", "sizes"), [(1, [20]), (2, [20, 24]), (3, [13, 24, 13])])
def test_extreme_clients_are_the_last_and_hold_one_label_in_turn(num_extreme: int, sizes: list[int]) -> None:
    parts = deal(ExtremeConfig(num_extreme=num_extreme), num_clients=5)

    assert [set(labels_of(part)) for part in parts[-num_extreme:]] == [{0}, {1}, {0}][:num_extreme]
    assert [len(part) for part in parts[-num_extreme:]] == sizes  # 120 / 5, but label 0 has 40 rows only
    assert all(len(labels_of(part)) == 2 for part in parts[:-num_extreme])


def test_extreme_clients_alone_share_their_labels_evenly() -> None:
    parts = deal(ExtremeConfig(num_extreme=4))

    assert [dict(labels_of(part)) for part in parts] == [{0: 20}, {1: 40}, {0: 20}, {1: 40}]


def test_no_extreme_clients_is_iid() -> None:
    assert {len(part) for part in deal(ExtremeConfig(num_extreme=0))} == {30}


def test_natural_parts_are_the_values_of_the_column_in_order() -> None:
    rows = [{"text": "x", "label": 0, "site": site} for site in ["b", "a", 10, "b", 9]]

    assert deal(NaturalConfig(column="site"), rows=rows) == [[2], [4], [1], [0, 3]]


def test_outer_blanks_make_no_client_of_their_own() -> None:
    rows = [{"text": "x", "label": 0, "site": site} for site in ["b", "a ", "a", " b"]]

    assert deal(NaturalConfig(column="site"), rows=rows, num_clients=2) == [[1, 2], [0, 3]]


@pytest.mark.parametrize("config", [IidConfig(), NaturalConfig(column="site")], ids=["iid", "natural"])
def test_a_task_without_labels_can_be_dealt(config: PartitionConfig) -> None:
    parts = partition(ROWS, config, num_clients=4, seed=0, task=WRITTEN)

    assert sorted(chain(*parts)) == list(range(120))


@pytest.mark.parametrize("num_clients", [0, 121])
def test_more_clients_than_rows_are_refused(num_clients: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"number of training rows \(120\), got {num_clients}. Lower it, or give more rows"
    ):
        deal(IidConfig(), num_clients=num_clients)


def test_too_small_parts_are_refused_by_client_and_size() -> None:
    with pytest.raises(
        ConfigError, match=r"min_rows=2 rows, these have fewer: client 1 \(1 rows\), 2 \(1 rows\)\. Give more"
    ):
        deal(IidConfig(min_rows=2), num_clients=3, rows=ROWS[:4])


def test_extreme_clients_can_stand_among_dirichlet_ones() -> None:
    parts = deal(DirichletEqualConfig(alpha=1.0, num_extreme=2), num_clients=6)

    assert sorted(chain(*parts)) == list(range(120))
    assert [len(labels_of(part)) for part in parts[4:]] == [1, 1]
    assert labels_of(parts[4]).keys() != labels_of(parts[5]).keys()
    assert max(map(len, parts[:4])) - min(map(len, parts[:4])) <= 1
    assert sum(len(labels_of(part)) for part in parts[:4]) > 4, "others hold several labels"


def test_a_dirichlet_draw_that_leaves_clients_empty_is_refused_by_client() -> None:
    with pytest.raises(
        ConfigError, match=r"these have fewer: client \d+ \(0 rows\), .*Raise partition.alpha or split.num_train"
    ):
        deal(DirichletConfig(alpha=0.001), num_clients=12)


def test_dirichlet_draws_again_until_no_client_is_short() -> None:
    # alpha and clients such that the first draw of this seed leaves a client empty
    config = DirichletConfig(alpha=0.2)

    first, final = deal(replace(config, min_rows=0), num_clients=6, seed=0), deal(config, num_clients=6, seed=0)

    assert min(map(len, first)) == 0
    assert min(map(len, final)) >= 1


@pytest.mark.parametrize(
    "value", [None, "", " ", "NaN", float("nan"), "<NA>", "NA", " NA", "None", "null", "#N/A", "n/a"]
)
def test_a_row_that_nobody_placed_makes_no_client_of_its_own(value: object) -> None:
    rows = [*ROWS[:8], {**ROWS[8], "site": value}]

    with pytest.raises(ConfigError, match=r"got 'site'; the row '8' holds .* there. Fill it, remove the row"):
        partition(rows, NaturalConfig(column="site"), num_clients=5, seed=0, task=TASK)


@pytest.mark.parametrize(
    ("config", "num_clients", "message"),
    [
        (DirichletEqualConfig(alpha=1e-9), 4, "partition.alpha = 1e-09 is too small to split all rows"),
        (ShardsConfig(shards_per_client=1), 100, "120 rows do not make a shard for each of 100 clients"),
        (ExtremeConfig(num_extreme=1), 1, "num_extreme=1 leaves rows of 1 labels without a client"),
        (NaturalConfig(column="author"), 4, "got 'author'; the row '0' has: text, label, site"),
        (NaturalConfig(column=""), 4, "partition.column must name a column"),
        (NaturalConfig(column="site"), 3, r"has 4 values and fl.num_clients is 3.*'s0' \(30 rows\).*fl.num_clients=4"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: PartitionConfig, num_clients: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deal(config, num_clients=num_clients)


def test_a_label_that_is_no_candidate_is_refused_with_its_row() -> None:
    rows = [*ROWS[:8], {"text": "x", "label": 9}]

    with pytest.raises(ConfigError, match=r"row 8: column 'label' must hold an index \(0 to 2\)"):
        deal(ShardsConfig(), rows=rows)


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ([[0, 1], [2, 3, 4, 5]], "a part for each of 3 clients, got 2 parts"),
        ([[0, 1], [2, 3], [4]], r"each of the rows 0 to 5 to one client, once, got row 5 0 times \(1 such rows\)"),
        ([[0, 1], [2, 3], [3, 4, 5]], "each of the rows 0 to 5 to one client, once, got row 3 2 times"),
        ([[0, 1], [2, 3], [4, 5, 6]], "each of the rows 0 to 5 to one client, once, got row 6 1 times"),
    ],
)
def test_a_third_partys_partition_must_deal_every_row_once(
    monkeypatch: pytest.MonkeyPatch, parts: list[list[int]], rule: str
) -> None:
    @dataclass(kw_only=True, slots=True)
    class TheirConfig(PartitionConfig):
        """Theirs."""

    monkeypatch.setattr(PARTITIONERS, "_configs", dict(PARTITIONERS._configs))
    monkeypatch.setattr(PARTITIONERS, "_factories", dict(PARTITIONERS._factories))
    PARTITIONERS.register("theirs", TheirConfig)(lambda config, **run: parts)

    with pytest.raises(PluginError, match=f"partition=theirs must give {rule}"):
        deal(TheirConfig(), num_clients=3, rows=ROWS[:6])


def test_the_digest_of_a_partition_says_which_client_has_which_rows() -> None:
    numbers = struct.pack("<8q", 2, 0, 3, 1, 1, 2, 2, 4)  # of each client how many rows, and which

    assert partition_digest([[0, 3], [1], [2, 4]]) == hashlib.sha256(numbers).hexdigest()
    assert partition_digest([[0, 3], [2, 4], [1]]) != partition_digest([[0, 3], [1], [2, 4]])
    assert partition_digest([[0, 3], [1, 2], [4]]) != partition_digest([[0, 3], [1], [2, 4]])


def test_an_unregistered_partition_lists_those_there_are() -> None:
    @dataclass(kw_only=True, slots=True)
    class OtherConfig(PartitionConfig):
        """Not registered."""

    with pytest.raises(
        ConfigError,
        match=r"nothing is registered for OtherConfig. Registered: dirichlet, dirichlet_equal, extreme, iid",
    ):
        deal(OtherConfig())


def test_the_rows_of_a_client_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    def one_by_one(dataset: Any) -> Any:
        raise AssertionError("rows are read one by one")

    monkeypatch.setattr(Dataset, "__iter__", one_by_one)

    partitioner = base.flower_partitioners().IidPartitioner(num_partitions=4)

    assert sum(map(len, base.deal(partitioner, range(len(ROWS)), num_clients=4))) == len(ROWS)


@pytest.mark.slow
def test_dealing_writes_no_file_prints_nothing_and_is_imported_lazily(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from fedzo.data import partition as p\n"
        "assert not {'flwr_datasets', 'datasets'} & set(sys.modules)\n"
        "from fedzo.data.config import TaskConfig\n"
        "from fedzo.data.partition.by_label import DirichletConfig, ExtremeConfig, ShardsConfig\n"
        "from fedzo.data.partition.plain import IidConfig, NaturalConfig\n"
        "task = TaskConfig(template='{text}', candidates=['a', 'b'])\n"
        "rows = [{'text': 'x', 'label': i % 2, 'site': i % 4} for i in range(40)]\n"
        "site = NaturalConfig(column='site')\n"
        "def deal(*configs):\n"
        "    for config in configs:\n"
        "        p.partition(rows, config, num_clients=4, seed=0, task=task)\n"
        "deal(IidConfig(), ExtremeConfig(), site)\n"
        "assert not {'flwr_datasets', 'datasets'} & set(sys.modules)\n"
        "deal(DirichletConfig(), ShardsConfig())\n"
        "assert not {'seaborn', 'scipy.stats', 'matplotlib'} & set(sys.modules)\n"  # more than all the rest
        "import flwr_datasets\n"
        "assert flwr_datasets.visualization.plot_label_distributions.__module__.startswith('flwr_datasets.')\n"
        "from flwr_datasets.visualization import plot_comparison_label_distribution\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path)}
    environment |= {"MPLCONFIGDIR": str(tmp_path.parent), "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("num_rows", "share", "num_held"),
    [(10, 0.1, 1), (10, 0.25, 2), (10, 0.0, 0), (1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (100, 0.5, 50)],
)
def test_a_share_of_rows_is_held_out(num_rows: int, share: float, num_held: int) -> None:
    prompts = [f"row {row}" for row in range(num_rows)]

    train, held = holdout(prompts, share, seed=0, client=0)

    assert len(held) == num_held
    assert sorted(train + held) == list(range(num_rows))
    assert train == sorted(train)


def test_the_held_out_rows_hang_on_seed_and_client_only() -> None:
    prompts = [f"row {row}" for row in range(50)]

    held = [holdout(prompts, 0.2, seed=seed, client=client)[1] for seed, client in [(0, 0), (0, 0), (0, 1), (1, 0)]]

    assert held[0] == held[1]
    assert held[0] not in (held[2], held[3])
    assert sorted(held[0]) == [0, 1, 8, 14, 25, 33, 41, 43, 46, 49]


def test_rows_with_the_same_prompt_are_held_out_together() -> None:
    prompts = [f"row {row % 100}" for row in range(200)]

    train, held = holdout(prompts, 0.1, seed=0, client=0)

    assert sorted(train + held) == list(range(200))
    assert not {prompts[row] for row in train} & {prompts[row] for row in held}
    assert sorted({row % 100 for row in held}) == sorted(holdout(prompts[:100], 0.1, seed=0, client=0)[1])


def test_rows_with_one_prompt_are_all_trained_on() -> None:
    assert holdout(["same"] * 5, 0.5, seed=0, client=0) == ([0, 1, 2, 3, 4], [])
