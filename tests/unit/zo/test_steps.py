"""Steps along directions, against steps written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.config import Distribution
from fedzo.zo.directions import SHARED, direction, stream_key
from fedzo.zo.log import ScalarRecord
from fedzo.zo.spaces.base import MasterSpace, Values
from fedzo.zo.steps import apply_record, apply_steps, local_step

SEED = 11


def record(round: int, c: object, *, lr: float = 0.5, owners: tuple[int, ...] = (SHARED,)) -> ScalarRecord:
    return ScalarRecord(round=round, lr=float(np.float32(lr)), owners=owners, coefficients=np.asarray(c, np.float32))


def test_replay_is_the_steps_written_out_by_hand() -> None:
    theta = np.array([1, 2, 3], np.float32)
    space = VectorSpace(theta)
    first = record(0, [[[0.5], [-1.0]], [[2.0], [0.25]]])
    second = record(1, [[[1.5, -0.5]]], owners=(2, 5), lr=0.125)

    for each in (first, second):
        apply_record(space, each, run_seed=SEED)

    expected = theta.copy()
    for t, p, c in ((0, 0, 0.5), (0, 1, -1.0), (1, 0, 2.0), (1, 1, 0.25)):
        z = direction(stream_key(SEED, round=0, step=t, probe=p), 3)
        expected = expected - np.float32(0.5 * c) * z
    for owner, c in ((2, 1.5), (5, -0.5)):
        expected = expected - np.float32(0.125 * c) * direction(stream_key(SEED, round=1, owner=owner), 3)
    assert np.array_equal(space.theta, expected)


class Written(MasterSpace):
    """Counts how often its values enter a model."""

    num_writes = 0

    def write(self, values: torch.Tensor) -> None:
        self.num_writes += 1


def written(theta: Values) -> Written:
    return Written(torch.from_numpy(theta.copy()), Distribution.gaussian)


def test_a_replayed_round_enters_the_model_once_after_its_last_step() -> None:
    theta = direction(3, 40)
    space, twin = written(theta), VectorSpace(theta)
    ten_steps = record(0, np.arange(-4, 16).reshape(10, 2, 1), lr=0.01)

    for each in (space, twin):
        apply_record(each, ten_steps, run_seed=SEED)

    assert space.num_writes == 1
    assert space.values().tobytes() == twin.values().tobytes()


def test_all_probes_of_a_local_step_enter_the_model_once() -> None:
    theta = direction(3, 40)
    space, twin = written(theta), VectorSpace(theta)

    for each in (space, twin):
        local_step(each, lr=0.5, c=np.array([1.0, 0.0, -2.0], np.float32), keys=[1, 2, 3])

    assert space.num_writes == 1
    assert space.values().tobytes() == twin.values().tobytes()


def test_a_round_without_a_step_is_not_written_at_all() -> None:
    space = written(direction(3, 40))

    apply_record(space, record(0, np.zeros((2, 2, 1))), run_seed=SEED)

    assert space.num_writes == 0


def test_lr_times_c_is_rounded_to_float32_once_before_the_product() -> None:
    space = VectorSpace(np.array([1.0], np.float32))
    lr, c = np.float32(1.1e-4), np.float32(3.3333333)

    apply_steps(space, [(c, 1)], lr=float(lr))

    s = np.float32(lr * c)
    assert space.theta[0] == np.float32(1) - np.float32(s * direction(1, 1)[0])


@pytest.mark.parametrize(("lr", "c"), [(0.0, 3.0), (0.5, 0.0), (0.5, -0.0)])
def test_a_zero_step_keeps_even_the_sign_of_zero(lr: float, c: float) -> None:
    space = VectorSpace(np.array([-0.0, 0.0], np.float32))

    apply_record(space, record(0, [[[c]]], lr=lr), run_seed=SEED)

    assert np.signbit(space.theta).tolist() == [True, False]
