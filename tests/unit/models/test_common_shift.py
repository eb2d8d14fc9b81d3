"""``task.common_shift``: what the scores of a batch have in common counts less in the loss that is trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models.arithmetic import DIFFERENTIABLE
from fedzo.models.forwards import Planning
from fedzo.models.scoring import damp_common_shift, example_losses
from fedzo.testing.tiny_models import tiny_loaded, tiny_tokens
from fedzo.zo.directions import direction

MANY = 4096


ROWS = [Example(tiny_tokens(i, 5 + 3 * i), ((7,), (250,), (9,)), i % 3) for i in range(5)]
OWNERS = [4, 0, 4, 0, 9]


def losses(factor: float, owners: list[int] | None = OWNERS) -> np.ndarray:
    return example_losses(tiny_loaded(), ROWS, Planning(MANY), loss=Loss.candidates, common_shift=factor, owners=owners)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_half_of_a_batchs_mean_by_hand(kind: type) -> None:
    scores = kind([[0.0, 2.0], [1.0, 1.0], [4.0, 2.0]])

    damped = damp_common_shift(scores, [5, 7, 5], factor=0.5)

    assert damped.tolist() == [[-1.0, 1.0], [0.5, 0.5], [3.0, 1.0]]  # less half of (2, 2), of (1, 1), of (2, 2)


def test_whose_rows_are_whose_is_read_once_however_many_there_are() -> None:
    class Owners(list[int]):
        num_passes = 0

        def __iter__(self) -> Iterator[int]:
            self.num_passes += 1
            return super().__iter__()

    owners = Owners(range(9))

    damp_common_shift(np.zeros((9, 2)), owners, factor=0.5)

    assert owners.num_passes == 1


@given(st.floats(0.01, 1), st.lists(st.floats(-50, 50), min_size=3, max_size=3), st.integers(0, 2**32))
def test_a_shift_of_a_whole_batch_counts_by_the_factor(factor: float, shift: list[float], seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(5, 3))
    moved = scores + np.where(np.array(OWNERS)[:, None] == 4, shift, 0.0)

    change = damp_common_shift(moved, OWNERS, factor=factor) - damp_common_shift(scores, OWNERS, factor=factor)

    np.testing.assert_allclose(change[[0, 2]], [[factor * each for each in shift]] * 2, atol=1e-12)
    np.testing.assert_allclose(change[[1, 3, 4]], 0, atol=1e-12)


def test_losses_are_those_of_a_slow_twin() -> None:
    model, plain = tiny_loaded().model, []
    for row in ROWS:
        logits = model(torch.tensor([row.prompt])).logits[0, -1].double()
        of_answers = [float(logits[token]) for (token,) in row.candidates]
        total = math.log(sum(math.exp(each) for each in of_answers))
        plain.append([each - total for each in of_answers])
    want = []
    for i, row in enumerate(ROWS):
        batch = [plain[j] for j in range(5) if OWNERS[j] == OWNERS[i]]
        common = [sum(column) / len(batch) for column in zip(*batch, strict=True)]
        damped = [score - 0.7 * mean for score, mean in zip(plain[i], common, strict=True)]
        want.append(math.log(sum(math.exp(each) for each in damped)) - damped[row.label])

    np.testing.assert_allclose(losses(0.3), want, atol=1e-5)


def test_a_factor_of_one_changes_no_bit_and_less_leaves_a_batch_of_its_own_alone() -> None:
    assert np.array_equal(losses(1.0), example_losses(tiny_loaded(), ROWS, Planning(MANY), loss=Loss.candidates))
    assert np.abs(losses(0.3) - losses(1.0)).min() > 1e-4
    alone = example_losses(
        tiny_loaded(), ROWS[1::2], Planning(MANY), loss=Loss.candidates, common_shift=0.3, owners=[3, 3]
    )
    np.testing.assert_allclose(losses(0.3)[1::2], alone, atol=1e-5)
    np.testing.assert_array_equal(losses(0.3, None), losses(0.3, [1] * 5))


def test_backpropagation_takes_the_gradient_of_this_loss() -> None:
    loaded = tiny_loaded()
    weight = loaded.model.get_parameter("model.norm.weight").requires_grad_(True)
    planning = Planning(MANY, arithmetic=DIFFERENTIABLE)
    loss = example_losses(loaded, ROWS, planning, loss=Loss.candidates, common_shift=0.3).mean()
    loss.backward()
    assert weight.grad is not None
    z, eps, start = torch.from_numpy(direction(5, weight.numel())), 1e-2, weight.detach().clone()

    sides = []
    for sign in (1, -1):
        weight.data = start + sign * eps * z
        sides.append(float(losses_of(loaded).mean()))

    assert float(loss.detach()) == pytest.approx(float(losses(0.3, None).mean()), abs=1e-5)
    assert float(weight.grad @ z) == pytest.approx((sides[0] - sides[1]) / (2 * eps), rel=2e-2)


def losses_of(loaded: object) -> np.ndarray:
    return example_losses(loaded, ROWS, Planning(MANY), loss=Loss.candidates, common_shift=0.3)  # type: ignore[arg-type]


def test_rows_with_different_numbers_of_answers_are_refused() -> None:
    rows = [*ROWS, Example(tiny_tokens(9, 4), ((7,), (250,)), 0)]
    with pytest.raises(ConfigError, match=r"^task.common_shift must be 1 where rows have different numbers of answers"):
        example_losses(tiny_loaded(), rows, Planning(MANY), loss=Loss.candidates, common_shift=0.3)
