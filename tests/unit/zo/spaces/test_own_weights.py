"""Rows with weights of their own against as many models, each with its row's weights written into it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedzo.testing.tiny_models import FAMILIES, tiny_model
from fedzo.zo.spaces import own_weights
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace
from fedzo.zo.spaces.own_weights import OwnWeights

IDS = torch.arange(36).reshape(3, 12) * 7 % 256
SUPPORTED = {"llama", "opt", "qwen3", "gemma2"}


def masked(model: nn.Module) -> MaskedSpace:
    """Every 17th weight of each matrix that is not an embedding."""
    matrices = {
        name: torch.arange(3, parameter.numel(), 17)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and "embed" not in name and "wte" not in name and "wpe" not in name
    }
    return MaskedSpace(model, matrices)


def offsets_of(space: MaskedSpace, rows: int) -> torch.Tensor:
    return 0.3 * torch.randn(rows, space.size, generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=["host", "device"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the few products are made: a CPU's compiled loops, or the operations of a GPU, here on a CPU."""
    if request.param == "device":
        monkeypatch.setattr(own_weights, "_HostProducts", own_weights._DeviceProducts)
    return str(request.param)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_computes_what_a_model_with_its_weights_computes(family: str) -> None:
    model = tiny_model(family)
    space = masked(model)
    own = space.row_weights(model)
    if own is None:
        assert family not in SUPPORTED
        return
    start, offsets = space.values(), offsets_of(space, 2)

    with space.probe(0.0625, key=5):
        unmoved = logits(model, IDS)
        with own:
            own.follow(offsets, np.array([0, 1, 0]))
            together = logits(model, IDS)
            own.follow(offsets[:1], np.zeros(3, int))
            alike = logits(model, IDS)
    torch.testing.assert_close(alike[[0, 2]], together[[0, 2]], rtol=0, atol=2e-4)
    for row, owner in enumerate((0, 1, 0)):
        space.load(start + offsets[owner].numpy())
        with space.probe(0.0625, key=5):
            alone = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-4)
        assert (alone[0] - unmoved[row]).abs().max() > 1e-2


def test_products_in_parts_have_the_bits_of_those_at_once_and_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_weights, "_HostProducts", own_weights._DeviceProducts)
    seen: list[torch.Size] = []
    reduce = torch.segment_reduce

    def counted(data: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(data.shape)  # [values, tokens]
        return reduce(data, *args, **kwargs)

    def outputs(most: int) -> torch.Tensor:
        monkeypatch.setattr(own_weights, "_PRODUCTS", most)
        model = tiny_model("llama")
        space = masked(model)
        own = space.row_weights(model)
        assert own is not None
        seen.clear()
        with own:
            own.follow(offsets_of(space, 2), np.array([0, 1, 0]))
            return logits(model, IDS)

    monkeypatch.setattr(torch, "segment_reduce", counted)
    whole = outputs(1 << 26)
    assert {shape[1] for shape in seen} == {IDS.numel()}

    assert torch.equal(outputs(300), whole)  # less than a row of 12 tokens has
    assert max(shape.numel() for shape in seen) <= 300
    assert max(shape[1] for shape in seen) > 1
    assert torch.equal(outputs(1), whole)
    assert {shape[1] for shape in seen} == {1}


def test_a_gpu_is_not_given_all_offsets_before_it_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would hold them twice."""
    monkeypatch.setattr(own_weights, "_HostProducts", own_weights._DeviceProducts)
    space = MaskedSpace(nn.Linear(4, 3), {"weight": torch.arange(12)})
    given: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def offsets() -> Iterator[torch.Tensor]:
        for _ in range(5):
            alive.append(sum(each() is not None for each in given))
            offset = torch.ones(space.size)
            given.append(weakref.ref(offset))
            yield offset
            del offset

    OwnWeights(space.places).follow(offsets(), np.array([0, 1, 2, 3, 4, 0]))

    assert len(given) == 5
    assert max(alive) <= 1


def test_what_is_supported() -> None:
    """On a CPU float32 matrices of linear layers; GPT-2 multiplies otherwise, and a full space has no places."""
    assert {family for family in FAMILIES if masked(m := tiny_model(family)).row_weights(m)} == SUPPORTED
    gpt2, half = tiny_model("gpt2"), tiny_model("llama").bfloat16()
    assert masked(gpt2).row_weights(gpt2) is None
    assert masked(half).row_weights(half) is None
    assert FullSpace(model := tiny_model("llama")).row_weights(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_on_a_gpu_16_bits_are_supported_too(device: str, dtype: torch.dtype) -> None:
    layer: Any = nn.Linear(2, 2)
    del layer.weight
    layer.weight = SimpleNamespace(device=torch.device(device), dtype=dtype)

    found = OwnWeights.supports([(layer.weight, torch.arange(4))], layer)

    assert found is (device == "cuda" or (device == "cpu" and dtype == torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_are_summed_in_float32_and_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_weights, "_HostProducts", own_weights._DeviceProducts)
    torch.manual_seed(1)
    layer = nn.Linear(7, 5, bias=False).to(dtype)
    flat = torch.tensor([1, 3, 4, 6, 14, 17, 33])
    space = MaskedSpace(layer, {"weight": flat})
    offsets, index, x = offsets_of(space, 3), np.array([2, 0, 2, 1]), torch.randn(4, 6, 7).to(dtype)

    with torch.inference_mode(), OwnWeights(space.places) as own:
        own.follow(offsets, index)
        found = layer(x)

    shared = F.linear(x, layer.weight.detach())
    sums = torch.zeros(4, 6, 5)
    for row, owner in enumerate(index):
        for place, at in enumerate(flat.tolist()):
            sums[row, :, at // 7] += x[row, :, at % 7].float() * offsets[owner, place]
    assert found.dtype == dtype
    assert torch.equal(found, (shared.float() + sums).to(dtype))


def test_rows_of_a_16_bit_model_come_near_to_models_with_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer than an eighth of what their weights change."""
    monkeypatch.setattr(own_weights, "_HostProducts", own_weights._DeviceProducts)
    narrow = tiny_model("llama").bfloat16()
    exact = tiny_model("llama")
    exact.load_state_dict({name: each.float() for name, each in narrow.state_dict().items()})
    space, twin = masked(narrow), masked(exact)
    offsets = offsets_of(space, 2)

    with OwnWeights(space.places) as own:
        own.follow(offsets, np.array([0, 1, 0]))
        together = logits(narrow, IDS).float()

    unmoved, start = logits(exact, IDS), twin.values()
    for row, owner in enumerate((0, 1, 0)):
        twin.load(start + offsets[owner].numpy())
        alone = logits(exact, IDS[row : row + 1])[0]
        assert (together[row] - alone).abs().max() < (alone - unmoved[row]).abs().max() / 8


def test_sums_are_added_in_the_order_of_the_places(products: str) -> None:
    """Bit for bit those of a loop, so that no thread's turn can show."""
    torch.manual_seed(1)
    layer = nn.Linear(7, 5, bias=False)
    flat = torch.tensor([1, 3, 4, 6, 14, 17, 33])  # four in the first output, two in the third, one in the last
    space = MaskedSpace(layer, {"weight": flat})
    offsets, index, x = offsets_of(space, 3), np.array([2, 0, 2, 1]), torch.randn(4, 6, 7)

    with torch.inference_mode(), OwnWeights(space.places) as own:
        own.follow(offsets, index)
        found = layer(x)

    shared = F.linear(x, layer.weight.detach())
    sums = torch.zeros_like(shared) if products == "device" else shared.clone()
    for row, owner in enumerate(index):
        for place, at in enumerate(flat.tolist()):
            sums[row, :, at // 7] += x[row, :, at % 7] * offsets[owner, place]
    assert torch.equal(found, shared + sums if products == "device" else sums)
    assert torch.equal(found[..., [1, 3]], shared[..., [1, 3]])


@pytest.mark.usefixtures("products")
def test_a_matrix_without_trained_values_is_left_alone() -> None:
    layer = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    space = MaskedSpace(layer, {"0.weight": torch.tensor([], dtype=torch.int64), "1.weight": torch.tensor([4])})
    x = torch.randn(2, 3)

    with torch.inference_mode(), OwnWeights(space.places) as own:
        own.follow(torch.tensor([[0.0], [2.0]]), np.arange(2))
        found = layer(x)

    hidden = layer[0](x)
    expected = layer[1](hidden)
    expected[1, 1] += 2 * hidden[1, 1]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("products")
def test_other_uses_of_a_masked_matrix_are_refused() -> None:
    layer = nn.Linear(6, 4)
    space = MaskedSpace(layer, {"weight": torch.arange(0, 24, 5)})
    with torch.inference_mode(), OwnWeights(space.places) as own:
        own.follow(offsets_of(space, 2), np.arange(2))
        assert layer.weight.shape == (4, 6)
        with pytest.raises(NotImplementedError, match="of a masked matrix is not known"):
            torch.matmul(torch.ones(2, 6), layer.weight.T)
        with pytest.raises(NotImplementedError, match=r"shape \(3, 6\) does not hold 2 rows"):
            F.linear(torch.ones(3, 6), layer.weight)
        with pytest.raises(NotImplementedError, match=r"shape \(4, 1, 6\) does not hold 2 rows"):
            layer(torch.ones(4, 1, 6))
