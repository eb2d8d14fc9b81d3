"""The GPU kernels against torch's own indexing, products in float64 and autograd; skipped where triton is missing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from fedzo.sketch import decode, pack, sketched_linear
from fedzo.sketch.gpu import DECODE_TILE, FUSED_TOKENS, SUM_TILE, _check, product_tiles

ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # one unit in the last place
SHAPES = [  # rows, columns, groups, bits
    (5, 16, 1, 4),
    (1, 1, 1, 2),
    (37, 23, 1, 3),
    (9, 30, 2, 2),
    (66, 300, 4, 3),
    (20, 40, 8, 3),
    (19, 1031, 1, 4),
    (4, 2056, 8, 2),
    (3, 1800, 8, 3),
]
shapes = pytest.mark.parametrize(("rows", "columns", "groups", "bits"), SHAPES)


class Parts(NamedTuple):
    packed: torch.Tensor
    tables: torch.Tensor
    weight: torch.Tensor
    codes: torch.Tensor


def parts_of(rows: int, columns: int, groups: int, bits: int, device: torch.device, dtype: torch.dtype) -> Parts:
    """Tables and codes packed, the weight that torch makes of them, and its codes."""
    generator = torch.Generator().manual_seed(rows + columns)
    tables = torch.randn(rows, groups, 2**bits, generator=generator).to(dtype).to(device)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    packed = pack(codes.to(torch.uint8), bits).to(device)
    codes = codes.to(device)
    return Parts(packed, tables, tables.gather(2, codes.view(rows, groups, -1)).view(rows, columns), codes)


def skip_unless_it_multiplies(on_device: Any, dtype: torch.dtype, num_tokens: int) -> None:
    if on_device.device.type == "cpu" and dtype == torch.bfloat16 and num_tokens > 8:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices as integers")


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@shapes
def test_a_decoded_matrix_is_the_tables_values(
    rows: int, columns: int, groups: int, bits: int, dtype: torch.dtype, on_device: Any
) -> None:
    parts = parts_of(rows, columns, groups, bits, on_device.device, dtype)
    room = torch.full((rows * columns + 64,), 7.0, dtype=dtype, device=on_device.device)

    out = on_device.kernels.decode(parts.packed, parts.tables, room[: rows * columns].view(rows, columns))

    assert torch.equal(out, parts.weight)
    assert (room[rows * columns :] == 7).all()


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9, 65])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@shapes
def test_a_product_is_that_of_the_dense_matrix_rounded_once(
    rows: int,
    columns: int,
    groups: int,
    bits: int,
    dtype: torch.dtype,
    num_tokens: int,
    on_device: Any,
) -> None:
    skip_unless_it_multiplies(on_device, dtype, num_tokens)
    parts = parts_of(rows, columns, groups, bits, on_device.device, dtype)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, columns, generator=generator).to(dtype).to(on_device.device)
    bias = torch.randn(rows, generator=generator).to(dtype).to(on_device.device) if num_tokens % 2 else None

    y = on_device.kernels.product(x, parts.packed, parts.tables, bias)

    wide = parts.weight.double()
    exact = F.linear(x.double(), wide, None if bias is None else bias.double())
    summed = x.double().abs() @ wide.abs().T + 1  # bounds the error of float32 sums
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 1e-6 * summed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@shapes
def test_sums_by_code_are_those_of_scattering(
    rows: int, columns: int, groups: int, bits: int, dtype: torch.dtype, on_device: Any
) -> None:
    parts = parts_of(rows, columns, groups, bits, on_device.device, torch.float32)
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)).to(dtype).to(on_device.device)

    sums = on_device.kernels.sum_by_code(parts.packed, matrix, groups, bits)

    zeros = torch.zeros(rows, groups, 2**bits, dtype=torch.float64, device=on_device.device)
    exact = zeros.scatter_add(2, parts.codes.view(rows, groups, -1), matrix.double().view(rows, groups, -1))
    assert sums.dtype == dtype
    assert (sums - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_float32_sums_of_wide_rows_lose_nothing(on_device: Any) -> None:
    codes = pack(torch.zeros(1, 4097, dtype=torch.uint8), 2).to(on_device.device)
    matrix = torch.ones(1, 4097, device=on_device.device)
    matrix[0, 0] = 2.0**24  # to which float32 cannot add 1

    assert on_device.kernels.sum_by_code(codes, matrix, 1, 2)[0, 0].tolist() == [2.0**24 + 4096, 0, 0, 0]


def test_equal_calls_give_equal_bits(on_device: Any) -> None:
    parts = parts_of(8, 2100, 1, 4, on_device.device, torch.float32)
    x = torch.randn(4, 2100, generator=torch.Generator().manual_seed(5)).to(on_device.device)

    results = [on_device.kernels.product(x, parts.packed, parts.tables, None) for _ in range(3)]

    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_check_before_the_first_use_passes(dtype: torch.dtype, bits: int, on_device: Any) -> None:
    for num_columns in (69, 1029):
        _check(on_device.kernels, on_device.device, dtype, bits, num_columns)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4), (FUSED_TOKENS + 1,)], ids=str)
@pytest.mark.parametrize(("columns", "groups", "bits"), [(24, 1, 4), (23, 1, 3), (30, 2, 2), (72, 8, 3)])
def test_a_layer_on_the_kernels_has_the_outputs_and_gradients_of_the_dense_one(
    columns: int, groups: int, bits: int, leading: tuple[int, ...], on_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("linear", "packing"):
        monkeypatch.setattr(f"fedzo.sketch.{module}.kernels_for", lambda tensor, bits: on_device.kernels)
    parts = parts_of(6, columns, groups, bits, on_device.device, torch.float32)
    generator = torch.Generator().manual_seed(6)
    # transposed in memory, as attention's outputs are
    x = torch.randn(columns, *leading, generator=generator).to(on_device.device).movedim(0, -1)
    bias = torch.randn(6, generator=generator).to(on_device.device)
    seed = torch.randn(*leading, 6, generator=generator).to(on_device.device)
    ours = [t.detach().clone().requires_grad_() for t in (x, parts.tables, bias)]
    theirs = [t.detach().double().requires_grad_() for t in (x, parts.tables, bias)]

    y = sketched_linear(ours[0], ours[1], parts.packed, ours[2])
    (y.square() * seed).sum().backward()

    weight = theirs[1].gather(2, parts.codes.view(6, groups, -1)).view(6, columns)
    expected = F.linear(theirs[0], weight, theirs[2])
    (expected.square() * seed.double()).sum().backward()
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "arch"), [(2, 80), (3, 80), (4, 90)])
def test_the_kernels_compile_without_a_device(bits: int, arch: int) -> None:
    """The interpreter also runs what the compiler refuses."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 has no compiler")
    module = importlib.import_module("fedzo.sketch.triton_kernels")
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    for name, types, constants in variants():
        kernel = getattr(module, name)
        constants = {"BITS": bits, "GROUPS": 2, **constants}
        signature = {key: types.get(key, "constexpr" if key in constants else "i32") for key in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True})
        assert compiled.metadata.shared <= 100 << 10  # of a block, where it is least


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """A kernel's name, the types of its pointers, and what it is compiled for."""
    of_sums = {"packed": "*u8", "matrix": "*fp32", "out": "*fp32"}
    yield "sum_kernel", of_sums, dict(zip(("ROWS", "COLUMNS"), SUM_TILE, strict=True))
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"packed": "*u8", "tables": f"*{dtype}", "out": f"*{dtype}"}
        yield "decode_kernel", types, dict(zip(("ROWS", "COLUMNS"), DECODE_TILE, strict=True))
        types |= {"x": f"*{dtype}", "bias": f"*{dtype}"}
        for num_tokens in (1, 8, 64):
            tiles = product_tiles(num_tokens, 4096, 4096, processors=132)
            sizes = {"TOKENS": tiles.tokens, "ROWS": tiles.rows, "COLUMNS": tiles.columns}
            yield "product_kernel", types, {"HAS_BIAS": True, **sizes}


@pytest.mark.gpu
def test_offsets_beyond_32_bits_are_reached() -> None:
    """A matrix of more than 2^32 weights and 2^31 bytes of codes: its last rows alone against the CPU's."""
    rows, columns = (1 << 17) + 100, 1 << 15
    packed = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    tables = torch.randn(rows, 1, 16, device="cuda")
    x = torch.randn(2, columns, device="cuda", dtype=torch.bfloat16)

    out = decode(packed, tables, torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda"))
    y = sketched_linear(x, tables, packed)

    last = slice(rows - 5, rows)
    expected = decode(packed[last].cpu(), tables[last].cpu(), torch.empty(5, columns, dtype=torch.bfloat16))
    assert torch.equal(out[last].cpu(), expected)
    exact = x.cpu().double() @ expected.double().T
    assert (y[:, last].cpu().double() - exact).abs().max() <= 2.0**-7 * exact.abs().max()
