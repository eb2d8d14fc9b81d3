"""The way to the GPU kernels, without one: tiles that cover a product once, and torch wherever kernels cannot serve."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedzo.errors import ConfigError
from fedzo.sketch import SketchLinear, decode, pack
from fedzo.sketch.gpu import FUSED_TOKENS, _checked_kernels, kernels_for, product_tiles

CPU = torch.device("cpu")


class SlowTwin:
    """What the kernels compute, one weight at a time; it keeps the names of what was called."""

    def __init__(self, fault: str | None = None) -> None:
        self.fault = fault
        self.called: list[str] = []

    def decode(self, packed: torch.Tensor, tables: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.called.append("decode")
        assert tables.dtype == out.dtype
        if self.fault == "compiler":
            raise RuntimeError("Failed to find C compiler")
        codes = codes_of(packed, tables.shape[2].bit_length() - 1, out.shape[1])
        if self.fault == "end" and codes.shape[1] % 8:
            codes[:, -1] = 0
        out.copy_(tables.gather(2, codes.view(*tables.shape[:2], -1)).view(out.shape))
        if self.fault == "decode" or (self.fault == "3 bits" and tables.shape[2] == 8):
            out[2, 23] = 9
        return out

    def product(self, x: torch.Tensor, packed: torch.Tensor, tables: torch.Tensor, bias: Any) -> torch.Tensor:
        assert x.is_contiguous()
        weight = self.decode(packed, tables, x.new_empty(len(packed), x.shape[1]))
        self.called[-1] = "product"
        if self.fault == "part":
            weight[:, 768:] = 0
        y = F.linear(x, weight, bias)
        return y + 1 if self.fault == "product" and len(x) > 1 else y

    def sum_by_code(self, packed: torch.Tensor, matrix: torch.Tensor, groups: int, bits: int) -> torch.Tensor:
        self.called.append("sum_by_code")
        parts, codes = (t.view(len(packed), groups, -1) for t in (matrix, codes_of(packed, bits, matrix.shape[1])))
        sums = torch.zeros(len(packed), groups, 2**bits).scatter_add(2, codes, parts)
        return sums + 1 if self.fault == "sum" else sums


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> SlowTwin:
    """Every layer takes the path of a GPU."""
    twin = SlowTwin()
    for module in ("linear", "packing"):
        monkeypatch.setattr(f"fedzo.sketch.{module}.kernels_for", lambda tensor, bits: twin)
    return twin


def codes_of(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes, int64, of NumPy's bits."""
    digits = np.unpackbits(packed.numpy(), axis=1)[:, : bits * columns].reshape(len(packed), columns, bits)
    return torch.from_numpy(digits @ 2 ** np.arange(bits)[::-1])


def weight_of(layer: SketchLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    codes = codes_of(layer.codes, layer.bits, layer.in_features)
    tables = layer.tables.detach().to(dtype)
    return tables.gather(2, codes.view(*tables.shape[:2], -1)).view(codes.shape)


def layer_of(columns: int, rows: int, *, bits: int = 4, groups: int = 1, bias: bool = True) -> SketchLinear:
    generator = torch.Generator().manual_seed(columns)
    layer = SketchLinear(columns, rows, bits=bits, groups_per_row=groups, bias=bias)
    with torch.no_grad():
        layer.tables.copy_(torch.randn(layer.tables.shape, generator=generator))
        codes = torch.randint(2**bits, (rows, columns), generator=generator)
        layer.codes.copy_(pack(codes.to(torch.uint8), bits))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(rows, generator=generator))
    return layer


@given(
    num_tokens=st.integers(1, 5000),
    num_rows=st.integers(1, 20_000),
    num_columns=st.integers(1, 20_000),
    processors=st.integers(1, 200),
)
def test_tiles_cover_a_product_once_and_none_is_empty(
    num_tokens: int, num_rows: int, num_columns: int, processors: int
) -> None:
    tiles = product_tiles(num_tokens, num_rows, num_columns, processors=processors)

    sizes = zip((tiles.rows, tiles.tokens, tiles.columns_a_part), (num_rows, num_tokens, num_columns), strict=True)
    for number, (size, of) in zip(tiles.grid, sizes, strict=True):
        assert (number - 1) * size < of <= number * size
    for size in tiles[:3]:
        assert size & (size - 1) == 0
    assert tiles.columns_a_part % tiles.columns == 0
    assert tiles.columns % 8 == 0  # where codes of every width start a byte
    if tiles.tokens > 8:  # the least that the tensor cores take
        assert min(tiles[:3]) >= 16
    else:
        assert tiles.tokens * tiles.rows * tiles.columns <= 1 << 13  # float32 sums in the registers of 128 threads


@pytest.mark.parametrize(
    ("shape", "tiles", "grid"),
    [
        ((1, 4096, 4096), (1, 16, 256, 1024), (256, 1, 4)),
        ((8, 11008, 4096), (8, 4, 256, 4096), (2752, 1, 1)),
        ((64, 4096, 11008), (64, 64, 64, 2240), (64, 1, 5)),
        ((65, 576, 576), (64, 64, 64, 192), (9, 2, 3)),
        ((17, 5, 23), (32, 64, 64, 64), (1, 1, 1)),
    ],
)
def test_columns_are_parted_where_processors_would_idle(shape: Any, tiles: Any, grid: Any) -> None:
    found = product_tiles(*shape, processors=132)

    assert (found[:4], found.grid) == (tiles, grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_devices_and_dtypes_have_no_kernels(dtype: torch.dtype) -> None:
    assert kernels_for(torch.empty(2, dtype=dtype), 4) is None
    assert kernels_for(torch.empty(2, dtype=dtype, device="meta"), 4) is None


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, None),
        ("compiler", "cannot be used on cpu with torch.float32 and codes of {} bits: Failed to find C compiler"),
        ("decode", "a decoded matrix is not the table's values"),
        ("3 bits", "a decoded matrix is not the table's values"),
        ("end", "a decoded matrix is not the table's values"),
        ("product", "a product with 17 tokens is wrong"),
        ("part", "a product with 1 tokens is wrong"),
        ("sum", "sums by code are wrong"),
    ],
)
def test_kernels_are_used_only_if_they_make_the_right_numbers(
    fault: str | None, message: str | None, bits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "3 bits" and bits != 3:
        fault, message = None, None
    module: Any = type(sys)("triton_kernels")
    module.Kernels = lambda processors: SlowTwin(fault)
    monkeypatch.setitem(sys.modules, "fedzo.sketch.triton_kernels", module)

    found = _checked_kernels.__wrapped__(CPU, torch.float32, bits)

    assert (found is None) == (fault is not None)
    assert len(caplog.records) == (fault is not None)
    assert (message or "").format(bits) in caplog.text


def test_a_moment_without_memory_is_no_fault_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")]

    def made(processors: int) -> SlowTwin:
        if errors:
            raise errors.pop()
        return SlowTwin(None)

    module: Any = type(sys)("triton_kernels")
    module.Kernels = made
    monkeypatch.setitem(sys.modules, "fedzo.sketch.triton_kernels", module)
    checked = cache(_checked_kernels.__wrapped__)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            checked(CPU, torch.float32, 4)

    assert isinstance(checked(CPU, torch.float32, 4), SlowTwin)
    assert not caplog.records


def test_without_triton_there_are_no_kernels_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fedzo.sketch.triton_kernels", raising=False)

    assert _checked_kernels.__wrapped__(CPU, torch.float32, 4) is None
    told = "the GPU kernels for sketches cannot be used on cpu with torch.float32 and codes of 4 bits: import of triton"
    assert told in caplog.text


@pytest.mark.parametrize("leading", [(1,), (3, 4), (FUSED_TOKENS,), (2, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_take_the_fused_product(leading: tuple[int, ...], dtype: torch.dtype, twin: SlowTwin) -> None:
    layer = layer_of(24, 5, groups=2).to(dtype)
    x = torch.randn(*leading, 24, generator=torch.Generator().manual_seed(2)).to(dtype)

    y = layer(x)

    torch.testing.assert_close(y, F.linear(x, weight_of(layer, dtype), layer.bias))
    assert twin.called == ["product"]


@pytest.mark.parametrize("leading", [(FUSED_TOKENS + 1,), (13, 5), (0,), (3, 0)])
def test_many_tokens_and_none_take_a_decoded_matrix(leading: tuple[int, ...], twin: SlowTwin) -> None:
    layer = layer_of(24, 5)
    x = torch.randn(*leading, 24, generator=torch.Generator().manual_seed(2))

    y = layer(x)

    assert twin.called == ["decode"]
    assert torch.equal(y, F.linear(x, weight_of(layer), layer.bias))


def test_a_backward_decodes_once_and_sums_by_code(twin: SlowTwin) -> None:
    layer = layer_of(24, 5, bits=3, groups=2)
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    seed = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))

    layer(x).backward(seed)

    assert twin.called == ["product", "decode", "sum_by_code"]
    torch.testing.assert_close(x.grad, seed @ weight_of(layer))
    assert layer.tables.grad is not None
    of_weight = seed.view(6, 5).T @ x.detach().view(6, 24)
    torch.testing.assert_close(layer.tables.grad, SlowTwin().sum_by_code(layer.codes, of_weight, 2, 3))


def test_kernels_get_contiguous_tensors_of_the_inputs_dtype(twin: SlowTwin) -> None:
    layer = layer_of(16, 6)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(2)).T

    torch.testing.assert_close(layer(x), F.linear(x, weight_of(layer), layer.bias))
    assert decode(layer.codes, layer.tables.double(), torch.empty(6, 16)).dtype == torch.float32


def test_codes_cut_short_are_refused_before_a_kernel_reads_them(twin: SlowTwin) -> None:
    layer = layer_of(16, 6)
    layer.codes = layer.codes[:, :7]

    with pytest.raises(ConfigError, match=r"codes of 'weight' must be uint8 \[6, 8\] .* \[6, 7\]"):
        layer(torch.ones(2, 16))
    assert twin.called == []
