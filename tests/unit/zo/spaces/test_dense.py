"""The dense space against parameters that are moved by plain tensor expressions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.steps import take_steps

SHAPES = [(3, 5), (7,), (2, 3, 4)]
SIZE = 15 + 7 + 24


def parameters() -> list[nn.Parameter]:
    start = torch.linspace(-2, 3, SIZE).split([15, 7, 24])
    return [nn.Parameter(part.clone().view(shape)) for part, shape in zip(start, SHAPES, strict=True)]


def flat(tensors: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class Halves(DenseSpace):
    """Somebody's space, whose steps are others."""

    def step(self, s: float, key: int) -> None:
        super().step(s / 2, key)


def test_several_steps_are_those_of_the_space_itself() -> None:
    one, other = (Halves([nn.Parameter(torch.ones(7))]) for _ in range(2))
    steps = [(0.5, 1), (0.25, 2), (-1.0, 3)]

    take_steps(one, steps)
    for s, key in steps:
        other.step(s, key)

    assert one.digest() == other.digest()
    assert torch.equal(one.parameters[0], other.parameters[0])


@pytest.mark.parametrize("law", list(Distribution))
def test_a_probe_is_one_product_and_one_sum_and_leaves_every_bit(law: Distribution) -> None:
    trained = parameters()
    before = flat(trained)
    space = DenseSpace(trained, distribution=law)
    z = torch.from_numpy(direction(3, SIZE, distribution=law))

    with space.probe(0.3, key=3):
        during = flat(trained)
    with pytest.raises(RuntimeError, match="boom"), space.probe(-0.3, key=3):
        raise RuntimeError("boom")

    assert torch.equal(during, before + z * torch.tensor(0.3))
    assert torch.equal(flat(trained), before)
    assert [tuple(tensor.shape) for tensor in trained] == SHAPES


def test_only_float32_parameters_are_taken() -> None:
    with pytest.raises(ValueError, match="float32 parameters, got none"):
        DenseSpace([])
    with pytest.raises(ValueError, match=r"got \['torch.bfloat16', 'torch.float32'\]"):
        DenseSpace([*parameters(), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])


def test_parameters_come_from_any_iterator_and_each_once() -> None:
    """As for an optimizer of torch. One that is there twice would have values that are in no model."""
    layer = nn.Linear(3, 2)
    before = flat([layer.weight, layer.bias])

    assert DenseSpace(layer.parameters()).values().tolist() == before.tolist()
    with pytest.raises(ValueError, match="each parameter once, got 1 of 3 again"):
        DenseSpace([layer.weight, layer.bias, layer.weight])
