"""SketchLinear against the dense layer that torch's own indexing and autograd make of the same tables and codes."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedzo.errors import ConfigError
from fedzo.sketch import SketchLinear, SketchSettings, pack, sketch_matrix, sketched_linear
from fedzo.sketch.packing import sum_by_code

SHAPES = [(16, 1, 4), (23, 1, 3), (30, 2, 2), (9, 3, 4), (40, 8, 3)]  # columns, groups, bits


def random_parts(columns: int, groups: int, bits: int, *, rows: int = 5, dtype: Any = torch.float32) -> Any:
    """Tables, codes not packed, a bias, and x [2, 7, d]."""
    generator = torch.Generator().manual_seed(columns)
    tables = torch.randn(rows, groups, 2**bits, generator=generator, dtype=torch.float64)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 7, columns, generator=generator, dtype=torch.float64)
    return tables.to(dtype), codes, bias.to(dtype), x.to(dtype)


def dense_weight(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return tables.gather(2, codes.view(*tables.shape[:2], -1)).view(codes.shape)


def layer_of(tables: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None = None) -> SketchLinear:
    rows, groups, k = tables.shape
    bits = k.bit_length() - 1
    layer = SketchLinear(codes.shape[1], rows, bits=bits, groups_per_row=groups, bias=bias is not None)
    state = {"tables": tables, "codes": pack(codes.to(torch.uint8), bits)}
    layer.load_state_dict(state if bias is None else state | {"bias": bias})
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("columns", "groups", "bits"), SHAPES)
def test_forward_is_the_dense_layers(columns: int, groups: int, bits: int, with_bias: bool, dtype: torch.dtype) -> None:
    tables, codes, bias, x = random_parts(columns, groups, bits)
    layer = layer_of(tables, codes, bias if with_bias else None).to(dtype)
    x = x.to(dtype)

    expected = F.linear(x, dense_weight(tables, codes).to(dtype), bias.to(dtype) if with_bias else None)

    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[0, 0]), F.linear(x[0, 0], dense_weight(tables, codes).to(dtype), layer.bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("columns", "groups", "bits"), [*SHAPES, (512, 1, 4)])
def test_gradients_are_those_of_autograd(
    columns: int, groups: int, bits: int, dtype: torch.dtype, tolerance: float
) -> None:
    tables, codes, bias, x = random_parts(columns, groups, bits, dtype=dtype)
    seed = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = [t.clone().requires_grad_() for t in (x, tables, bias)]
    theirs = [t.double().requires_grad_() for t in (x, tables, bias)]

    y = sketched_linear(ours[0], ours[1], pack(codes.to(torch.uint8), bits), ours[2])
    (y.square() * seed).sum().backward()

    (F.linear(theirs[0], dense_weight(theirs[1], codes), theirs[2]).square() * seed.double()).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_tables_are_summed_in_float32_for_16_bit_inputs(dtype: torch.dtype) -> None:
    tables, codes, _, x = random_parts(64, 2, 3)
    layer, x = layer_of(tables, codes), x.to(dtype).requires_grad_()
    seed = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)

    layer(x).backward(seed)

    weight = tables.double().requires_grad_()
    F.linear(x.detach().double(), dense_weight(weight, codes)).backward(seed.double())
    assert layer.tables.grad is not None
    assert weight.grad is not None
    assert layer.tables.grad.dtype == torch.float32
    assert (layer.tables.grad - weight.grad).abs().max() <= 1e-5 * weight.grad.abs().max()
    assert torch.equal(x.grad, seed @ dense_weight(tables, codes).to(dtype))


def test_a_value_without_a_code_gets_no_gradient() -> None:
    tables, codes, _, x = random_parts(16, 1, 2)
    codes[codes == 3] = 0
    layer = layer_of(tables, codes)

    layer(x).sum().backward()

    assert layer.tables.grad is not None
    assert not layer.tables.grad[:, :, 3].any()


def test_float32_sums_of_wide_rows_lose_nothing() -> None:
    codes = pack(torch.zeros(1, 4097, dtype=torch.uint8), 2)
    matrix = torch.ones(1, 4097)
    matrix[0, 0] = 2.0**24  # to which float32 cannot add 1

    assert sum_by_code(codes, matrix, 1, 2)[0, 0].tolist() == [2.0**24 + 4096, 0, 0, 0]


def test_backward_keeps_tables_codes_and_inputs_but_no_dense_weight() -> None:
    tables, codes, _, x = random_parts(64, 1, 4, rows=32)
    layers = nn.Sequential(layer_of(tables, codes), layer_of(tables, codes[:, :32]))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        between = layers[0](x)
        layers[1](between)

    ours = [x, between, *(t for layer in layers for t in (layer.tables, layer.codes))]
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in ours}


def test_layers_of_all_sizes_and_dtypes_share_one_scratch() -> None:
    small, large = (random_parts(columns, 1, 4, rows=columns) for columns in (16, 48))
    layers = [layer_of(*parts[:2]) for parts in (small, large, small)]

    for dtype in (torch.float32, torch.bfloat16):
        for layer, (tables, codes, _, x) in zip(layers, (small, large, small), strict=True):
            expected = F.linear(x.to(dtype), dense_weight(tables, codes).to(dtype))
            assert torch.equal(layer(x.to(dtype)), expected)


def test_inference_mode_first_and_training_after_it() -> None:
    failures: list[BaseException] = []

    def infer_and_train() -> None:  # in a thread, which has no scratch yet
        try:
            tables, codes, _, x = random_parts(16, 1, 4)
            layer = layer_of(tables, codes)
            with torch.inference_mode():
                layer(x)
            layer(x.requires_grad_()).sum().backward()
            assert layer.tables.grad is not None
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=infer_and_train)
    thread.start()
    thread.join()

    assert failures == []


def test_tables_changed_between_forward_and_backward_are_noticed() -> None:
    tables, codes, _, x = random_parts(16, 1, 4)
    layer = layer_of(tables, codes)
    y = layer(x).sum()
    with torch.no_grad():
        layer.tables.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
    ],
)
def test_a_change_of_dtype_leaves_tables_and_codes_alone(convert: Any) -> None:
    tables, codes, bias, x = random_parts(16, 1, 4)
    model = nn.Sequential(layer_of(tables / 3, codes, bias))
    model(x).sum().backward()
    layer = model[0]
    before = layer.tables.detach().clone(), layer.codes.clone(), layer.tables.grad.clone()

    convert(model)

    for now, was in zip((layer.tables, layer.codes, layer.tables.grad), before, strict=True):
        assert now.dtype == was.dtype
        assert torch.equal(now, was)
    assert layer.bias.dtype not in (torch.float32, torch.uint8)
    assert model(x.to(layer.bias.dtype)).dtype == layer.bias.dtype


def test_a_layer_on_the_meta_device_has_the_shapes_and_no_numbers() -> None:
    layer = SketchLinear(576, 1536, bits=3, groups_per_row=2, bias=True, device="meta", dtype=torch.bfloat16)

    shapes = {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()}

    assert shapes == {
        "tables": ((1536, 2, 8), torch.float32),
        "codes": ((1536, 216), torch.uint8),
        "bias": ((1536,), torch.bfloat16),
    }
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["tables"]
    assert layer(torch.empty(2, 576, dtype=torch.bfloat16, device="meta")).shape == (2, 1536)
    assert layer.to_empty(device="cpu").tables.device.type == "cpu"


def test_a_layer_of_a_sketch_computes_with_it_and_copies_itself_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 40, generator=generator), torch.randn(6, generator=generator)
    inputs = torch.randn(64, 40, generator=generator)
    sketch = sketch_matrix(weight, inputs.T @ inputs / 32, SketchSettings(bits=3, groups_per_row=2))

    layer = SketchLinear.of(sketch.codes, sketch.tables, 40, bias).requires_grad_(False)

    change, outputs = layer(inputs) - F.linear(inputs, weight, bias), F.linear(inputs, weight)
    assert float(change.square().sum() / outputs.square().sum()) == pytest.approx(sketch.relative_error, rel=1e-4)
    assert torch.equal(copy.deepcopy(layer)(inputs), layer(inputs))
    assert "in_features=40, out_features=6, bits=3, groups_per_row=2, bias=True" in repr(layer)


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits must be 2, 3 or 4, got 8"):
        SketchLinear(16, 4, bits=8)
    with pytest.raises(ConfigError, match="multiple of groups_per_row=3, got 16"):
        SketchLinear(16, 4, bits=4, groups_per_row=3)
