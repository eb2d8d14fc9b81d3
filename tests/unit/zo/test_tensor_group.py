"""How many kernels the spaces start on a GPU: one for each group of tensors, however many tensors that has.

The kernels run on the CPU (``conftest``); the same space on the CPU's own path is the twin to be met bit for bit.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.zo.config import Distribution, Rounding
from fedzo.zo.directions import direction
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace
from fedzo.zo.tensor_group import TensorGroup

LAW = Distribution.gaussian


def model(layers: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 12), *(nn.Linear(12, 12) for _ in range(layers))).to(dtype)


def full(trained: nn.Module) -> Space:
    return FullSpace(trained, distribution=LAW)


def upper(trained: nn.Module) -> Space:
    """A part of the weights, the last of them."""
    named = list(trained.named_parameters())[-2:]
    return FullSpace(trained, parameters=dict(named), distribution=LAW)


def full_stochastic(trained: nn.Module) -> Space:
    return FullSpace(trained, distribution=LAW, rounding=Rounding.stochastic)


def masked(trained: nn.Module) -> Space:
    if trained[1].weight.is_contiguous():  # make it lie as a Conv1D's, seen from a linear layer
        trained[1].weight.data = trained[1].weight.data.T
    places = {name: torch.arange(1, p.numel(), 5) for name, p in trained.named_parameters()}
    return MaskedSpace(trained, places, distribution=LAW)


def dense(trained: nn.Module) -> Space:
    return DenseSpace(list(trained.float().parameters()), distribution=LAW)


def work(space: Space, trained: nn.Module) -> torch.Tensor:
    """A probe's outputs, between two steps."""
    ids = torch.tensor([[3, 1, 3], [0, 10, 3]])
    space.step(0.1, 7)
    with space.probe(0.5, 8):
        found = trained(ids)
    space.step(-0.2, 9)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "launches"),
    [
        (full, ["add", "add", "add_rows", "add"]),  # a step; small tensors and rows of the embedding; a step
        (full_stochastic, ["add", "add", "add_rows", "add"]),
        (upper, ["add"] * 3),  # a step; small tensors; a step
        (masked, ["scatter"] * 4),  # a step, a probe, its end, a step
        (dense, ["add"] * 3),
    ],
)
@pytest.mark.parametrize("layers", [1, 9])
def test_launches_do_not_grow_with_the_number_of_tensors(
    layers: int,
    make: Callable[[nn.Module], Space],
    launches: list[str],
    dtype: torch.dtype,
    as_on_a_gpu: Callable[[], list[str]],
) -> None:
    here, there = model(layers, dtype), model(layers, dtype)
    want = work(make(here), here)
    launched = as_on_a_gpu()

    found = work(make(there), there)

    assert launched == launches
    assert torch.equal(found, want)
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))


@pytest.mark.parametrize(("group_bytes", "probe"), [(1 << 20, 1), (2 * 4 * 144, 3), (4 * 143, 5)])
def test_a_probe_makes_neighbours_together_in_any_order(
    group_bytes: int, probe: int, as_on_a_gpu: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = model(5, torch.float32)
    twin = deepcopy(trained)
    with FullSpace(twin).probe(0.5, 8):
        want = [layer(torch.ones(12)) for layer in twin[1:]]
    launched = as_on_a_gpu()
    monkeypatch.setattr("fedzo.zo.tensor_group._SMALL", 12)
    monkeypatch.setattr("fedzo.zo.tensor_group._GROUP_BYTES", group_bytes)
    space = FullSpace(trained)

    for order in (range(5), (4, 0, 2, 1, 3, 0, 4, 2)):
        launched.clear()
        with space.probe(0.5, 8):
            for i in order:
                assert torch.equal(trained[1 + i](torch.ones(12)), want[i])
        if len(order) == 5:
            assert launched == ["add"] * (1 + probe)


@pytest.mark.parametrize("layers", [12, 24])
@pytest.mark.parametrize(("a_group", "larger"), [(4, 0), (100, 0), (4, 3)])
def test_a_probe_takes_a_launch_for_as_many_weights_as_fill_a_group(
    layers: int, a_group: int, larger: int, as_on_a_gpu: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one for each weight that is larger than a group, which is made alone when it is read."""
    trained = model(layers, torch.float32)
    for _ in range(larger):
        trained.append(nn.Linear(12, 60))
    launched = as_on_a_gpu()
    monkeypatch.setattr("fedzo.zo.tensor_group._SMALL", 60)
    monkeypatch.setattr("fedzo.zo.tensor_group._GROUP_BYTES", a_group * 4 * 144)
    space = FullSpace(trained)

    launched.clear()
    with space.probe(0.5, 8):
        for layer in trained[1:]:
            layer(torch.ones(12))

    groups = -(-layers // a_group)
    assert launched == ["add"] * (1 + groups + larger)  # the small ones are biases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_is_taken_by_its_number_is_made_as_a_weight_of_its_own(
    dtype: torch.dtype, as_on_a_gpu: Callable[[], list[str]]
) -> None:
    """By all of the card and without its number on it; out of range it is refused as an unperturbed weight refuses."""
    torch.manual_seed(0)
    trained = nn.ParameterList([torch.randn(7), torch.randn(3, 5, 11)]).to(dtype)
    _, experts = trained
    with FullSpace(trained).probe(0.5, 8):
        want = experts * 1
    launched = as_on_a_gpu()
    space = FullSpace(trained)

    with space.probe(0.5, 8):
        launched.clear()
        found = [experts[i] for i in (0, 1, -1)]
        assert launched == ["add"] * 3
        with pytest.raises(IndexError):
            experts[3]

    assert all(torch.equal(part, want[i]) for part, i in zip(found, (0, 1, -1), strict=True))
    assert experts[1].shape == (5, 11)


def test_what_a_probe_made_is_freed_at_its_end(
    as_on_a_gpu: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu()
    monkeypatch.setattr("fedzo.zo.tensor_group._SMALL", 12)
    trained = model(3, torch.float32)
    space = FullSpace(trained)
    made: list[weakref.ref[torch.Tensor]] = []
    own = TensorGroup.moved

    def watched(group: TensorGroup, *args: Any, **how: Any) -> dict[int, torch.Tensor]:
        values = own(group, *args, **how)
        made.extend(weakref.ref(value) for value in values.values())
        return values

    monkeypatch.setattr(TensorGroup, "moved", watched)
    gc.disable()  # a GPU's memory must not wait for it
    try:
        with space.probe(0.5, 8):
            trained[1:](torch.ones(12))

        assert made
        assert [value() for value in made] == [None] * len(made)
    finally:
        gc.enable()


def test_a_dtype_more_is_a_launch_more(as_on_a_gpu: Callable[[], list[str]]) -> None:
    launched = as_on_a_gpu()
    mixed = model(4, torch.float32)
    mixed[2].bfloat16(), mixed[3].half()

    FullSpace(mixed).step(0.1, 7)

    assert launched == ["add"] * 3


def test_weights_that_were_moved_are_found_again(as_on_a_gpu: Callable[[], list[str]]) -> None:
    as_on_a_gpu()
    trained = model(2, torch.float32)
    for make in (full, masked):
        space = make(trained)
        space.step(0.1, 7)
        twin, twins_space = (copied := deepcopy(trained)), make(copied)
        for parameter in trained.parameters():
            parameter.data = parameter.data.clone()

        space.step(0.1, 8)
        twins_space.step(0.1, 8)

        assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), twin.parameters(), strict=True))


def uncounted(space: Space) -> list[str]:
    """Ways to move the trained values after which torch does not count one more write to each parameter."""
    moves = {
        "step": lambda: space.step(0.1, 7),
        "scale_by": lambda: space.scale_by(0.5),
        "load": lambda: space.load(space.values() + np.float32(0.5)),
        "rewind": space.rewind,
    }
    space.mark()
    found = []
    for name, move in moves.items():
        before = [parameter._version for parameter in space.parameters]
        move()
        if not all(each._version > old for each, old in zip(space.parameters, before, strict=True)):
            found.append(name)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [full, full_stochastic, upper, masked, dense])
def test_torch_counts_what_moves_the_trained_values(make: Callable[[nn.Module], Space], dtype: torch.dtype) -> None:
    """The count tells whoever keeps what the weights gave (``fedzo.models.kept_rows``) that they are others."""
    assert uncounted(make(model(2, dtype))) == []


@pytest.mark.parametrize("make", [full, full_stochastic, upper, masked, dense])
def test_torch_counts_what_kernels_of_a_gpu_move(
    make: Callable[[nn.Module], Space], as_on_a_gpu: Callable[[], list[str]]
) -> None:
    as_on_a_gpu()

    assert uncounted(make(model(2, torch.float32))) == []


def test_tensors_of_inference_mode_which_have_no_count_are_moved() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(5)

    TensorGroup([tensor], [0]).add(7, scale=0.5, distribution=LAW)

    assert torch.equal(tensor, 0.5 * torch.from_numpy(direction(7, 5)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [full, full_stochastic, masked])
def test_cuda_steps_and_probes_have_the_cpus_bits(make: Callable[[nn.Module], Space], dtype: torch.dtype) -> None:
    here = nn.Sequential(nn.Embedding(1001, 96), nn.Linear(96, 4097), nn.Linear(4097, 300), nn.LayerNorm(300)).to(dtype)
    there = deepcopy(here).cuda()
    spaces = make(here), make(there)
    for s, key in ((0.1, 7), (-0.2, 8), (3e-4, 2**64 - 3)):
        for space in spaces:
            space.step(s, key)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.parameters(), there.parameters(), strict=True))
    assert spaces[0].digest() == spaces[1].digest()

    with spaces[0].probe(0.5, 8), spaces[1].probe(0.5, 8):
        pass
    with spaces[0].probe(0.5, 8):
        want = [parameter * 1 for parameter in here.parameters()] + [here[0](torch.tensor([5, 1000, 5]))]
        want.append(here[1].weight[-1])
    with spaces[1].probe(0.5, 8):
        found = [parameter * 1 for parameter in there.parameters()] + [there[0](torch.tensor([5, 1000, 5]).cuda())]
        found.append(there[1].weight[-1])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(want, found, strict=True))
    assert spaces[0].digest() == spaces[1].digest()
