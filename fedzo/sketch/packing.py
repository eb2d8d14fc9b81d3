"""Codes of 2, 3 or 4 bits in bytes, and matrices decoded from them.

A row of codes is one stream of bits, the most significant first: 8 codes fill as many bytes as a code has bits, and a
row ends at a whole byte, filled up with zeros. So two 4-bit codes share a byte with the even column in its upper half,
as in the released checkpoints of SketchTune, and 3 bits take 3 bits, where those take 4.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import torch

from fedzo.errors import ConfigError
from fedzo.sketch.gpu import kernels_for

BITS = (2, 3, 4)
_DECODED_AT_ONCE = 1 << 22  # weights: bounds the int64 indices of torch's gather
_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # a look-up moves bits and never computes with them


def packed_width(num_columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return (num_columns * bits + 7) // 8


def columns_per_group(num_columns: int, groups_per_row: int, *, name: str) -> int:
    """Columns that share a table.

    Raises:
        ConfigError: The groups do not divide the row of the matrix ``name``.
    """
    if groups_per_row < 1 or num_columns % groups_per_row:
        raise ConfigError(
            f"sketch: the width of {name!r} must be a multiple of groups_per_row={groups_per_row}, got {num_columns} "
            "columns. Choose fewer groups, or leave the layer dense by skipping it."
        )
    return num_columns // groups_per_row


def check_bits(bits: int) -> None:
    """Refuse what is not a number of bits that codes have.

    Raises:
        ConfigError: ``bits`` is not 2, 3 or 4.
    """
    if bits not in BITS:
        raise ConfigError(f"sketch: bits must be 2, 3 or 4, got {bits}. Write --bits 4 for the best quality.")


def check_shapes(codes: torch.Tensor, tables: torch.Tensor, num_columns: int, *, name: str = "weight") -> None:
    """Refuse codes and tables that are not of one matrix with so many columns.

    Raises:
        ConfigError: Naming the matrix ``name``: its codes are cut short, resized or packed otherwise, or its tables are
            of another sketch.
    """
    rows, groups, k = tables.shape if tables.dim() == 3 else (0, 0, 0)
    if k not in (1 << bits for bits in BITS) or groups < 1 or num_columns % groups or not tables.is_floating_point():
        raise ConfigError(
            f"sketch: the tables of {name!r} must be floating point [rows, groups, 4, 8 or 16] with groups that divide "
            f"{num_columns} columns, got {tables.dtype} {list(tables.shape)}. Copy or build the sketch again."
        )
    expected = [rows, packed_width(num_columns, k.bit_length() - 1)]
    if codes.dtype != torch.uint8 or list(codes.shape) != expected:
        raise ConfigError(
            f"sketch: the codes of {name!r} must be uint8 {expected} for {num_columns} columns and {k} values a table, "
            f"got {codes.dtype} {list(codes.shape)}. Copy or build the sketch again."
        )


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes, uint8 [R, d] below 2^bits, into uint8 [R, ceil(d * bits / 8)]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % 8)).view(rows, -1, 8)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        words = words << bits | padded[:, :, i]
    data = torch.stack([(words >> 8 * (bits - 1 - i)).to(torch.uint8) for i in range(bits)], dim=-1)
    return data.view(rows, -1)[:, : packed_width(columns, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """The codes, uint8 [R, num_columns], that ``pack`` packed."""
    data = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(len(packed), -1, bits)
    words = torch.zeros(data.shape[:2], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words = words << 8 | data[:, :, i]
    mask = (1 << bits) - 1
    codes = torch.stack([(words >> bits * (7 - i) & mask).to(torch.uint8) for i in range(8)], dim=-1)
    return codes.view(len(packed), -1)[:, :num_columns].contiguous()


def decode(packed: torch.Tensor, tables: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The matrix of a sketch: ``out[r, c] = tables[r, group of c, code of (r, c)]`` (SpaLLM, arXiv 2410.06364).

    The table is rounded to the dtype of ``out`` first, so a decoded weight is a table's value, bit for bit.

    Args:
        packed: uint8 [R, packed_width(d, bits)].
        tables: Floating point [R, G, 2^bits].
        out: Contiguous [R, d], filled; its dtype is the matrix's.

    Returns:
        ``out``.

    Raises:
        ConfigError: The codes or the tables do not fit one another or ``out``.
    """
    check_shapes(packed, tables, out.shape[1])
    values = tables.detach().to(out.dtype).contiguous()
    bits = tables.shape[2].bit_length() - 1
    if (kernels := kernels_for(out, bits)) is not None:
        return kernels.decode(packed.contiguous(), values, out)
    values = values.view(_LANES[out.element_size()])
    places = out.view(values.dtype)
    if out.device.type == "cpu" and out.element_size() <= 4:
        _decode_rows(packed.numpy(), values.numpy(), places.numpy(), bits)
    else:
        _gather_rows(packed, values, places, bits)
    return out


def sum_by_code(packed: torch.Tensor, matrix: torch.Tensor, groups_per_row: int, bits: int) -> torch.Tensor:
    """The transpose of ``decode``: for each value of a table, the sum over the places that hold its code.

    It makes the gradient of the tables from that of the matrix: a sum, in SpaLLM's released code too. float32 is summed
    in float64, so that wide rows lose nothing, and no sum depends on the number of threads.

    Args:
        packed: uint8 [R, packed_width(d, bits)].
        matrix: [R, d], float32 or float64.
        groups_per_row: G.
        bits: Of a code.

    Returns:
        [R, G, 2^bits], of the matrix's dtype.
    """
    if (kernels := kernels_for(matrix, bits)) is not None:
        return kernels.sum_by_code(packed.contiguous(), matrix.contiguous(), groups_per_row, bits)
    codes = unpack(packed, bits, matrix.shape[1])
    parts, codes = (t.contiguous().view(len(packed), groups_per_row, -1) for t in (matrix, codes))
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32:
        sums = torch.zeros(*parts.shape[:2], 1 << bits, dtype=torch.float64)
        _sum_rows(codes.numpy(), parts.numpy(), sums.numpy())
        return sums.float()
    return torch.stack([parts.masked_fill(codes != code, 0).sum(dim=2) for code in range(1 << bits)], dim=2)


def _gather_rows(packed: torch.Tensor, values: torch.Tensor, places: torch.Tensor, bits: int) -> None:
    """``decode`` by torch alone, for any device and dtype."""
    rows, groups, _ = values.shape
    at_once = max(1, _DECODED_AT_ONCE // places.shape[1])
    for low in range(0, rows, at_once):
        part = slice(low, low + at_once)
        codes = unpack(packed[part], bits, places.shape[1]).long().view(-1, groups, places.shape[1] // groups)
        torch.gather(values[part], 2, codes, out=places[part].view(codes.shape))


@nb.njit(parallel=True, cache=True)
def _decode_rows(packed: Any, values: Any, places: Any, bits: Any) -> None:
    for row in nb.prange(places.shape[0]):
        width = places.shape[1] // values.shape[1]
        for group in range(values.shape[1]):
            _decode_span(packed[row], values[row, group], places[row], group * width, (group + 1) * width, bits)


@nb.njit(inline="always")
def _decode_span(packed: Any, table: Any, out: Any, start: Any, end: Any, bits: Any) -> None:
    """The columns from ``start`` to ``end``: eight at a time where they fill whole bytes, one by one at the edges."""
    first = min((start + 7) // 8 * 8, end)
    last = max(end // 8 * 8, first)
    for column in range(start, first):
        out[column] = table[_code(packed, column, bits)]
    if bits == 4:
        pairs, data = out[first:last], packed[first // 2 : last // 2]
        for i in range(data.size):
            pairs[2 * i], pairs[2 * i + 1] = table[data[i] >> 4], table[data[i] & 15]
    elif bits == 2:
        fours, data = out[first:last], packed[first // 4 : last // 4]
        for i in range(data.size):
            byte = data[i]
            fours[4 * i], fours[4 * i + 1] = table[byte >> 6], table[byte >> 4 & 3]
            fours[4 * i + 2], fours[4 * i + 3] = table[byte >> 2 & 3], table[byte & 3]
    else:
        for block in range(first // 8, last // 8):
            word = nb.uint32(packed[3 * block]) << 16 | nb.uint32(packed[3 * block + 1]) << 8 | packed[3 * block + 2]
            eight = out[8 * block : 8 * block + 8]
            for i in range(8):
                eight[i] = table[word >> (21 - 3 * i) & 7]
    for column in range(last, end):
        out[column] = table[_code(packed, column, bits)]


@nb.njit(inline="always")
def _code(packed: Any, column: Any, bits: Any) -> Any:
    """The code of one column, out of the byte that holds its last bit and, for 3 bits, perhaps the byte before."""
    end = (column + 1) * bits
    last = (end - 1) // 8
    word = nb.uint32(packed[last]) | nb.uint32(packed[last - 1]) << 8 if last else nb.uint32(packed[last])
    return word >> (8 * (last + 1) - end) & ((1 << bits) - 1)


@nb.njit(parallel=True, cache=True)
def _sum_rows(codes: Any, matrix: Any, sums: Any) -> None:
    for row in nb.prange(codes.shape[0]):
        for group in range(codes.shape[1]):
            own, values, names = sums[row, group], matrix[row, group], codes[row, group]
            for i in range(values.size):
                own[names[i]] += values[i]
