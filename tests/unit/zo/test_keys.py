"""Whose directions a scalar lies along: the three policies, and the pool's law."""

from __future__ import annotations

import numpy as np
import pytest

from fedzo.zo.directions import SHARED, philox, stream_key
from fedzo.zo.keys import OWN, POOL_OWNER, pool_slot, step_key

AT = {"round": 3, "step": 1, "probe": 2}


def test_own_and_shared_directions_are_those_of_the_specification() -> None:
    assert step_key(9, **AT, owner=4) == stream_key(9, **AT, owner=4)
    assert step_key(9, **AT, owner=SHARED, directions=OWN) == stream_key(9, **AT)
    assert step_key(9, **AT, owner=4, directions=SHARED) == stream_key(9, **AT)


def test_a_pool_s_slot_is_the_scaled_word_of_the_probe_s_own_stream() -> None:
    seed = 2**40 + 7
    key = stream_key(seed, **AT, owner=4)
    words = philox((0, 0, 7, 0), (key & 0xFFFFFFFF, key >> 32))
    slot = (words[0] + 2**32 * words[1]) * 4096 // 2**64

    assert pool_slot(seed, **AT, owner=4, pool_size=4096) == slot
    assert step_key(seed, **AT, owner=4, directions=4096) == stream_key(seed, round=slot, owner=POOL_OWNER)


def test_a_pool_of_directions_holds_no_more_than_its_size_and_draws_them_evenly() -> None:
    size, draws = 50, 20_000
    slots = [
        pool_slot(1, round=i // 400, step=i // 20 % 20, probe=i % 2, owner=i // 2 % 10, pool_size=size)
        for i in range(draws)
    ]

    counts = np.bincount(slots, minlength=size)
    assert len(counts) == size
    chi_square = float(((counts - draws / size) ** 2 / (draws / size)).sum())
    assert abs(chi_square - (size - 1)) < 5 * np.sqrt(2 * (size - 1))  # mean and variance of the law are f and 2 f


def test_clients_rounds_steps_and_probes_draw_apart() -> None:
    base = {"round": 0, "step": 0, "probe": 0, "owner": 0}
    rows = [[pool_slot(1, **{**base, name: i}, pool_size=2**20) for i in range(1, 200)] for name in base]

    assert len({slot for row in rows for slot in row}) > 4 * 199 - 10


@pytest.mark.parametrize("owner", [0, 7, SHARED])
def test_pool_directions_are_nobody_s_own(owner: int) -> None:
    pool = {stream_key(0, round=slot, owner=POOL_OWNER) for slot in range(100)}

    assert not pool & {stream_key(0, round=r, owner=owner) for r in range(100)}
