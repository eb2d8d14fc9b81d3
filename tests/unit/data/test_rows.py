"""The order of rows: every row once an epoch, each client its own order, a function of the position alone."""

from __future__ import annotations

import pytest

from fedzo.data.rows import batch_rows


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
