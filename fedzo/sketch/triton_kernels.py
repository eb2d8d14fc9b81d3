"""The kernels of a sketch on a GPU, in Triton: a matrix decoded, multiplied or summed by code, tile by tile.

Import it where triton is installed; ``fedzo.sketch.gpu`` does so, and chooses. A tile of the weight is decoded into
registers: its codes are read once, and its values come out of the row's table, which a cache line or two hold. Every
sum has one order, which follows from the shapes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fedzo.sketch.gpu import DECODE_TILE, SUM_TILE, product_tiles


@triton.jit
def _codes(
    packed,
    rows,
    valid,
    first,
    packed_width,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The codes int32 [ROWS, COLUMNS] from column ``first``, a multiple of 8, on; zeros outside the matrix."""
    UNIT: tl.constexpr = 3 if BITS == 3 else 1  # bytes that whole codes fill
    CODES: tl.constexpr = 8 * UNIT // BITS
    units = first // CODES + tl.arange(0, COLUMNS // CODES)
    start = packed + rows.to(tl.int64)[:, None] * packed_width
    words = tl.zeros((ROWS, COLUMNS // CODES), tl.int32)
    for i in tl.static_range(UNIT):
        at = UNIT * units + i
        data = tl.load(start + at[None, :], mask=valid[:, None] & (at < packed_width)[None, :], other=0)
        words = (words << 8) | data.to(tl.int32)
    shifts = BITS * (CODES - 1 - tl.arange(0, CODES))
    codes = (words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (ROWS, COLUMNS))


@triton.jit
def _weights(
    packed,
    tables,
    rows,
    num_rows,
    first,
    num_columns,
    packed_width,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The weights [ROWS, COLUMNS] from column ``first`` on; zeros outside the matrix."""
    valid = rows < num_rows
    codes = _codes(packed, rows, valid, first, packed_width, BITS, ROWS, COLUMNS)
    columns = first + tl.arange(0, COLUMNS)
    groups = columns // (num_columns // GROUPS)
    table = tables + rows.to(tl.int64)[:, None] * (GROUPS << BITS)
    inside = valid[:, None] & (columns < num_columns)[None, :]
    return tl.load(table + ((groups << BITS)[None, :] + codes), mask=inside, other=0)


@triton.jit
def decode_kernel(
    packed,
    tables,
    out,
    num_rows,
    num_columns,
    packed_width,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``fedzo.sketch.decode``: one program a tile."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    weights = _weights(packed, tables, rows, num_rows, first, num_columns, packed_width, BITS, GROUPS, ROWS, COLUMNS)
    columns = first + tl.arange(0, COLUMNS)
    places = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(places, weights, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def product_kernel(
    x,
    packed,
    tables,
    bias,
    out,
    num_tokens,
    num_rows,
    num_columns,
    packed_width,
    columns_a_part,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x W^T (+ bias) of one part of the columns, [parts, tokens, rows]; summed in float32.

    A program has ``TOKENS`` tokens, ``ROWS`` rows and one part. From 16 tokens on it uses the tensor cores, which a
    few tokens would leave idle: these are multiplied and added in place, and the sums meet at the end.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.program_id(2) * columns_a_part
    end = tl.minimum(begin + columns_a_part, num_columns)
    x_rows = x + tokens.to(tl.int64)[:, None] * num_columns
    if TOKENS < 16:
        products = tl.zeros((TOKENS, ROWS, COLUMNS), tl.float32)
    else:
        sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        known = (tokens < num_tokens)[:, None] & (columns < num_columns)[None, :]
        inputs = tl.load(x_rows + columns[None, :], mask=known, other=0)
        weights = _weights(
            packed, tables, rows, num_rows, first, num_columns, packed_width, BITS, GROUPS, ROWS, COLUMNS
        )
        if TOKENS < 16:
            products += inputs.to(tl.float32)[:, None, :] * weights.to(tl.float32)[None, :, :]
        else:
            sums = tl.dot(inputs, tl.trans(weights), sums, input_precision="ieee")
    if TOKENS < 16:
        sums = tl.sum(products, axis=2)
    if HAS_BIAS:
        sums += tl.load(bias + rows, mask=rows < num_rows, other=0).to(tl.float32)[None, :]
    places = out + (tl.program_id(2).to(tl.int64) * num_tokens + tokens)[:, None] * num_rows + rows[None, :]
    known = (tokens < num_tokens)[:, None] & (rows < num_rows)[None, :]
    tl.store(places, sums.to(out.dtype.element_ty), mask=known)


@triton.jit
def sum_kernel(
    packed,
    matrix,
    out,
    num_rows,
    num_columns,
    packed_width,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``fedzo.sketch.packing.sum_by_code``: one program for some rows of a group, summed in float64."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    group = tl.program_id(1)
    begin, end = group * (num_columns // GROUPS), (group + 1) * (num_columns // GROUPS)
    names = tl.arange(0, 1 << BITS)
    start = matrix + rows.to(tl.int64)[:, None] * num_columns
    sums = tl.zeros((ROWS, 1 << BITS, COLUMNS), tl.float64)
    for first in range(begin // 8 * 8, end, COLUMNS):
        codes = _codes(packed, rows, valid, first, packed_width, BITS, ROWS, COLUMNS)
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns >= begin) & (columns < end)
        values = tl.load(start + columns[None, :], mask=valid[:, None] & inside[None, :], other=0).to(tl.float64)
        own = codes[:, None, :] == names[None, :, None]
        sums += tl.where(own, values[:, None, :], 0.0)
    places = out + (rows.to(tl.int64) * GROUPS + group)[:, None] * (1 << BITS) + names[None, :]
    tl.store(places, tl.sum(sums, axis=2).to(out.dtype.element_ty), mask=valid[:, None])


class Kernels:
    """The kernels on one device. Tensors are contiguous and have shapes that fit, which the caller has checked.

    Args:
        processors: Of the device.
    """

    def __init__(self, processors: int) -> None:
        self._processors = processors

    def decode(self, packed: torch.Tensor, tables: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``fedzo.sketch.decode``, with tables of the dtype of ``out``."""
        num_rows, num_columns = out.shape
        rows, columns = DECODE_TILE
        grid = triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns)
        arguments = packed, tables, out, num_rows, num_columns, packed.shape[1]
        with torch.cuda.device(out.get_device()):
            decode_kernel[grid](*arguments, **_options(tables), ROWS=rows, COLUMNS=columns)
        return out

    def product(
        self, x: torch.Tensor, packed: torch.Tensor, tables: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x W^T + bias.

        Args:
            x: [tokens, d], float32, bfloat16 or float16; at least one token.
            packed: uint8 [R, packed_width(d, bits)].
            tables: [R, G, 2^bits], of x's dtype.
            bias: [R].

        Returns:
            [tokens, R], of x's dtype, rounded once.
        """
        num_tokens, num_columns = x.shape
        num_rows = len(packed)
        tiles = product_tiles(num_tokens, num_rows, num_columns, processors=self._processors)
        parts = tiles.grid[2]
        out = x.new_empty(parts, num_tokens, num_rows, dtype=x.dtype if parts == 1 else torch.float32)
        shapes = num_tokens, num_rows, num_columns, packed.shape[1], tiles.columns_a_part
        sizes = {"TOKENS": tiles.tokens, "ROWS": tiles.rows, "COLUMNS": tiles.columns}
        adds = bias is not None and parts == 1
        with torch.cuda.device(x.get_device()):
            product_kernel[tiles.grid](
                x, packed, tables, bias, out, *shapes, HAS_BIAS=adds, **_options(tables), **sizes
            )
        if parts == 1:
            return out[0]
        total = out.sum(dim=0)
        return (total if bias is None else total.add_(bias)).to(x.dtype)

    def sum_by_code(self, packed: torch.Tensor, matrix: torch.Tensor, groups_per_row: int, bits: int) -> torch.Tensor:
        """``fedzo.sketch.packing.sum_by_code``, summed in float64."""
        num_rows, num_columns = matrix.shape
        rows, columns = SUM_TILE
        out = matrix.new_empty(num_rows, groups_per_row, 1 << bits)
        arguments = packed, matrix, out, num_rows, num_columns, packed.shape[1]
        with torch.cuda.device(matrix.get_device()):
            sum_kernel[triton.cdiv(num_rows, rows), groups_per_row](
                *arguments, **_options(out), ROWS=rows, COLUMNS=columns
            )
        return out


def _options(tables: torch.Tensor) -> dict[str, Any]:
    """What all kernels are compiled for; and that products may fuse with sums, of which Triton wants to be told."""
    return {"BITS": tables.shape[2].bit_length() - 1, "GROUPS": tables.shape[1], "enable_fp_fusion": True}
