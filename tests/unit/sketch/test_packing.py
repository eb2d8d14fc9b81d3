"""Packed codes against the same bits written as text, and decoding against indexing one weight at a time."""

from __future__ import annotations

import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.sketch.packing import (
    _gather_rows,
    check_bits,
    check_shapes,
    columns_per_group,
    decode,
    pack,
    packed_width,
    unpack,
)

WIDTHS = [1, 2, 5, 7, 8, 9, 16, 23, 64, 100]


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns + bits)
    return torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", WIDTHS)
def test_a_row_is_the_stream_of_its_bits_and_comes_back(bits: int, columns: int) -> None:
    codes = random_codes(3, columns, bits)

    packed = pack(codes, bits)

    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (3, packed_width(columns, bits)))
    for row, of_row in zip(packed.tolist(), codes.tolist(), strict=True):
        text = "".join(f"{code:0{bits}b}" for code in of_row)
        assert "".join(f"{byte:08b}" for byte in row) == text.ljust(8 * len(row), "0")
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_an_even_column_is_the_upper_half_of_a_4_bit_byte() -> None:
    assert pack(torch.tensor([[0xA, 0x3, 0x5]], dtype=torch.uint8), 4).tolist() == [[0xA3, 0x50]]


@pytest.mark.parametrize(("bits", "num_bytes"), [(2, 144), (3, 216), (4, 288)])
def test_a_row_takes_exactly_its_bits(bits: int, num_bytes: int) -> None:
    assert packed_width(576, bits) == num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (23, 1), (64, 4), (30, 2), (40, 8), (63, 9), (14, 7)])
def test_a_decoded_weight_is_the_value_of_its_groups_table(
    columns: int, groups: int, bits: int, dtype: torch.dtype
) -> None:
    codes = random_codes(4, columns, bits)
    tables = torch.randn(4, groups, 2**bits, generator=torch.Generator().manual_seed(1))
    out, again = torch.full((4, columns), torch.nan, dtype=dtype), torch.full((4, columns), torch.nan, dtype=dtype)
    packed = pack(codes, bits)

    assert decode(packed, tables, out) is out

    width = columns // groups
    for r in range(4):
        for c in range(columns):
            assert out[r, c] == tables[r, c // width, int(codes[r, c])].to(dtype)
    lanes = {2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()]
    _gather_rows(packed, tables.to(dtype).view(lanes), again.view(lanes), bits)
    assert torch.equal(again, out)


def test_many_rows_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.sketch.packing._DECODED_AT_ONCE", 20)
    codes = random_codes(7, 9, 3)
    tables = torch.arange(7 * 8, dtype=torch.int32).view(7, 1, 8)
    out = torch.empty(7, 9, dtype=torch.int32)

    _gather_rows(pack(codes, 3), tables, out, 3)

    assert torch.equal(out, codes + 8 * torch.arange(7)[:, None])


def test_groups_that_do_not_divide_a_width_are_refused_with_the_layer() -> None:
    assert columns_per_group(576, 8, name="q") == 72

    with pytest.raises(
        ConfigError, match=r"'layers\.0\.q_proj' must be a multiple of groups_per_row=8, got 36 columns"
    ):
        columns_per_group(36, 8, name="layers.0.q_proj")


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"bits must be 2, 3 or 4, got {bits}"):
        check_bits(bits)


@pytest.mark.parametrize(
    ("codes", "tables", "message"),
    [
        (
            torch.zeros(4, 11, dtype=torch.uint8),
            torch.zeros(4, 1, 16),
            r"codes of 'q' must be uint8 \[4, 12\] .* \[4, 11\]",
        ),
        (
            torch.zeros(3, 12, dtype=torch.uint8),
            torch.zeros(4, 1, 16),
            r"codes of 'q' must be uint8 \[4, 12\] .* \[3, 12\]",
        ),
        (torch.zeros(4, 12, dtype=torch.int8), torch.zeros(4, 1, 16), r"codes of 'q' must be uint8 .* got torch.int8"),
        (
            torch.zeros(4, 12, dtype=torch.uint8),
            torch.zeros(4, 1, 8),
            r"codes of 'q' must be uint8 \[4, 9\] .* 8 values",
        ),
        (
            torch.zeros(4, 12, dtype=torch.uint8),
            torch.zeros(4, 16),
            r"tables of 'q' must be .* got torch.float32 \[4, 16\]",
        ),
        (torch.zeros(4, 12, dtype=torch.uint8), torch.zeros(4, 1, 15), r"tables of 'q' must be floating point"),
        (torch.zeros(4, 12, dtype=torch.uint8), torch.zeros(4, 5, 16), r"tables of 'q' must be .* divide 24 columns"),
        (torch.zeros(4, 12, dtype=torch.uint8), torch.zeros(4, 1, 16).int(), r"tables of 'q' must be floating point"),
    ],
)
def test_codes_and_tables_that_do_not_fit_are_refused(codes: torch.Tensor, tables: torch.Tensor, message: str) -> None:
    check_shapes(torch.zeros(4, 12, dtype=torch.uint8), torch.zeros(4, 3, 16), 24, name="q")

    with pytest.raises(ConfigError, match=message):
        check_shapes(codes, tables, 24, name="q")
    with pytest.raises(ConfigError, match="must be"):
        decode(codes, tables, torch.empty(4, 24))
