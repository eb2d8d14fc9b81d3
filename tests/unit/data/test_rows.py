"""The order of rows, every one once an epoch, is a function of the position alone; and what a client holds out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedzo.data.config import DataConfig, SplitConfig, TaskConfig
from fedzo.data.partition import partition_digest
from fedzo.data.partition.plain import IidConfig
from fedzo.data.rows import OwnRows, RowSource, SimulatedRows, batch_rows, client_rows
from fedzo.zo.directions import permutation


def rows(client: int, used: int, *, batch_size: int = 3, num_rows: int = 10, run_seed: int = 5) -> list[int]:
    return batch_rows(run_seed=run_seed, client=client, used=used, batch_size=batch_size, num_rows=num_rows)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_every_row_comes_once_an_epoch(batch_size: int) -> None:
    stream = [row for used in range(40) for row in rows(0, used, batch_size=batch_size)]

    for epoch in range(len(stream) // 10):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_epochs_and_clients_and_seeds_do_not_share_an_order() -> None:
    orders = {
        tuple(rows(client, epoch, batch_size=50, num_rows=50, run_seed=seed))
        for client in range(10)
        for epoch in range(5)
        for seed in range(4)
    }

    assert len(orders) == 10 * 5 * 4


def test_a_step_is_a_function_of_its_position_alone() -> None:
    forwards = [rows(2, used) for used in range(20)]
    backwards = [rows(2, used) for used in reversed(range(20))]

    assert forwards == backwards[::-1]


def test_the_order_of_an_epoch_is_drawn_once_for_all_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(key: int, n: int, *, purpose: int) -> npt.NDArray[np.int64]:
        drawn.append(n)
        return permutation(key, n, purpose=purpose)

    monkeypatch.setattr("fedzo.data.rows.permutation", counted)

    for used in range(5):
        rows(0, used, batch_size=2, run_seed=404)

    assert drawn == [10]


@pytest.mark.parametrize("of_its_own", [False, True])
def test_the_first_held_out_rows_are_of_all_labels_however_a_file_is_sorted(of_its_own: bool, tmp_path: Path) -> None:
    """As many as a client scores; by their order in the file all of them would be of label 0."""
    made = [{"text": f"row {number}", "label": number // 100} for number in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    task = TaskConfig(template="{text}", candidates=["a", "b"])
    data, split = DataConfig(path=str(tmp_path)), SplitConfig(num_dev=0, num_test=0)
    source: RowSource = SimulatedRows(data, split, task, IidConfig(), num_clients=1, seed=0)
    if of_its_own:
        source = OwnRows(str(tmp_path), task)

    heldout = client_rows(source, 0, share=0.5, seed=0).heldout

    assert len(heldout) == 100
    assert 4 <= sum(row["label"] for row in heldout[:20]) <= 16
    assert heldout == client_rows(source, 0, share=0.5, seed=0).heldout


def test_a_digest_says_who_has_which_rows_of_one_set_and_nothing_of_files_of_ones_own(tmp_path: Path) -> None:
    made = [{"text": f"row {number}", "label": 0} for number in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    task = TaskConfig(template="{text}", candidates=["a", "b"])
    data, split = DataConfig(path=str(tmp_path)), SplitConfig(num_dev=0, num_test=0)
    one, same, other = (SimulatedRows(data, split, task, IidConfig(), num_clients=3, seed=seed) for seed in (0, 0, 1))

    assert one.partition_digest == same.partition_digest == partition_digest(one.parts)
    assert other.partition_digest != one.partition_digest
    assert OwnRows(str(tmp_path), task).partition_digest == ""


def test_no_prompt_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    """Each row stands in the file twice, the second time beside another column."""
    made = [{"text": f"row {number % 40}", "label": 0, "site": number // 40} for number in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    source = OwnRows(str(tmp_path), TaskConfig(template="{text}", candidates=["a", "b"]))

    found = client_rows(source, 0, share=0.1, seed=0)

    assert (len(found.train), len(found.heldout)) == (72, 8)
    assert not {row["text"] for row in found.train} & {row["text"] for row in found.heldout}


def test_own_rows_may_lie_in_a_folder_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text('{"text": "x", "label": 0}\n')
    monkeypatch.setenv("HOME", str(tmp_path))

    source = OwnRows("~/mine", TaskConfig(template="{text}", candidates=["a", "b"]))

    assert source.rows_for(0) == [{"text": "x", "label": 0}]
