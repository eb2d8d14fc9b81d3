"""Rows with tables of their own: each row computes what a model with just these tables does."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedzo.sketch import TableSpace, sketched_layers
from fedzo.testing.tiny_models import tiny_sketch

FAMILIES = ["llama", "gpt2", "opt", "mixtral"]
INDEX = np.array([2, 0, 1, 0, 2])
IDS = torch.randint(3, 500, (5, 12), generator=torch.Generator().manual_seed(0))


def space_of(model: Any) -> TableSpace:
    return TableSpace(list(sketched_layers(model).values()))


def offsets_of(space: TableSpace) -> list[npt.NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    return [0.03 * generator.standard_normal(space.size, dtype=np.float32) for _ in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_computes_at_its_own_tables(family: str) -> None:
    model = tiny_sketch(family)
    space = space_of(model)
    offsets, theta = offsets_of(space), space.values()
    own = space.row_weights(model)
    assert own is not None

    with torch.no_grad(), own:
        own.follow(map(torch.from_numpy, offsets), INDEX)
        together = model(IDS).logits
    alone = []
    for row, owner in enumerate(INDEX):
        space.load(theta + offsets[owner])
        with torch.no_grad():
            alone.append(model(IDS[row : row + 1]).logits[0])

    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.05
    space.load(theta)


def test_a_probe_moves_the_tables_of_every_row() -> None:
    model = tiny_sketch()
    space = space_of(model)
    offsets, theta = offsets_of(space), space.values()
    own = space.row_weights(model)
    assert own is not None

    with torch.no_grad(), space.probe(0.01, 7), own:
        probed = space_values(model)
        own.follow(map(torch.from_numpy, offsets), INDEX)
        together = model(IDS).logits
    space.load(probed + offsets[INDEX[0]])
    with torch.no_grad():
        alone = model(IDS[:1]).logits

    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(probed, theta)


def space_values(model: Any) -> npt.NDArray[np.float32]:
    return torch.cat([layer.tables.detach().reshape(-1) for layer in sketched_layers(model).values()]).numpy().copy()


def test_afterwards_the_model_is_its_own_again() -> None:
    model = tiny_sketch()
    space = space_of(model)
    with torch.no_grad():
        before = model(IDS).logits
    own = space.row_weights(model)
    assert own is not None

    with own:
        own.follow(map(torch.from_numpy, offsets_of(space)), INDEX)
        with pytest.raises(NotImplementedError, match="does not hold 5 rows"):
            model(IDS[:4])

    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
