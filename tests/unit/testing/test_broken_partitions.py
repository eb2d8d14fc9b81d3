"""The check of partitions refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from fedzo.data.config import TaskConfig
from fedzo.data.partition import PARTITIONERS, PartitionConfig
from fedzo.testing import check_partition

ROWS = [{"text": f"Review {i}", "label": i % 2, "site": f"site {i}"} for i in range(12)]
TASK = TaskConfig(name="mine", template="{text}", candidates=["a", "b"])
THEIRS = '''
"""A partition with the fault that its config names, in a module, so that another process can import it."""

import random
from dataclasses import dataclass

import numpy as np

from fedzo.data.partition import PARTITIONERS, PartitionConfig

calls = []


@dataclass(kw_only=True, slots=True)
class TheirConfig(PartitionConfig):
    """Theirs."""

    fault: str = ""


@PARTITIONERS.register("theirs", TheirConfig)
def theirs(config, *, rows, num_clients, seed, task):
    order = [(row * 5 + seed) % len(rows) for row in range(len(rows))]  # every row, since 12 and 5 have no divisor
    calls.append(seed)
    if config.fault == "misses a row":
        order.pop()
    if config.fault == "gives a row twice":
        order.append(0)
    if config.fault == "leaves a client out":
        num_clients -= 1
    if config.fault == "leaves a client empty":
        return [[], order, *[[]] * (num_clients - 2)]
    if config.fault == "counts its calls":
        order = order[len(calls) % 12:] + order[: len(calls) % 12]
    if config.fault == "draws by no seed":
        random.SystemRandom().shuffle(order)
    if config.fault == "draws from numpy":
        np.random.shuffle(order)
    if config.fault == "seeds numpy":
        np.random.seed(seed % 2**32)
        np.random.shuffle(order)
    if config.fault == "changes rows":
        rows[0]["text"] = "other"
    if config.fault == "goes by a set":
        sites = list({row["site"] for row in rows})
        order.sort(key=lambda row: sites.index(rows[row]["site"]))
    return [order[client::num_clients] for client in range(num_clients)]
'''


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "dealt_by_others.py").write_text(THEIRS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for table in ("_configs", "_factories"):
        monkeypatch.setattr(PARTITIONERS, table, dict(getattr(PARTITIONERS, table)))
    yield importlib.import_module("dealt_by_others")
    del sys.modules["dealt_by_others"]


@pytest.mark.slow
def test_without_a_fault_it_passes(theirs: ModuleType) -> None:
    check_partition(theirs.TheirConfig(), ROWS, TASK, num_clients=3)


@pytest.mark.slow
def test_what_goes_by_the_order_of_a_set_is_dealt_otherwise_in_another_process(theirs: ModuleType) -> None:
    with pytest.raises(AssertionError, match=r"dealt alike in another process, but by seed 0 \d of 3 clients"):
        check_partition(theirs.TheirConfig(fault="goes by a set"), ROWS, TASK, num_clients=3)


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("misses a row", r"must give each of the rows 0 to 11 to one client, once, got row \d+ 0 times"),
        ("gives a row twice", r"must give each of the rows 0 to 11 to one client, once, got row 0 2 times"),
        ("leaves a client out", r"must give a part for each of 3 clients, got 2 parts"),
        ("leaves a client empty", r"at least partition\.min_rows=1 rows, these have fewer: client 0 \(0 rows\), 2"),
        ("counts its calls", r"dealt alike when it is called again, but by seed 0 3 of 3 clients have other rows"),
        ("draws by no seed", r"must be dealt alike when it is called again"),
        ("draws from numpy", r"must be dealt alike when it is called again|global generators must be left alone"),
        ("seeds numpy", r"global generators must be left alone, but numpy's was used"),
        ("changes rows", r"the rows that it is given must not be changed"),
    ],
)
def test_broken_partitions(theirs: ModuleType, fault: str, rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_partition(theirs.TheirConfig(fault=fault), ROWS, TASK, num_clients=3)


def test_a_class_that_no_other_process_can_import_is_refused() -> None:
    @dataclass(kw_only=True, slots=True)
    class HereConfig(PartitionConfig):
        """Of a function."""

    with pytest.raises(AssertionError, match=r"<locals>\.HereConfig must be a class of a module"):
        check_partition(HereConfig(), ROWS, TASK, num_clients=3)
