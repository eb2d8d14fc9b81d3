"""Which kernels a device has for a sketch, and the tiles that they work in.

The kernels are Triton's (``fedzo.sketch.triton_kernels``), which CUDA builds of torch bring. Where triton is missing,
or its kernels do not compile or do not make the right numbers, torch does the work.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from fedzo.system import is_out_of_memory

if TYPE_CHECKING:
    from fedzo.sketch.triton_kernels import Kernels

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels multiply and look up; torch does the rest."""
FUSED_TOKENS = 64
"""Up to so many tokens, the product decodes as it goes; above, the matrix is decoded first, and cuBLAS multiplies.
Not measured yet: ``experiments/spallm/gpu.py`` times both."""
DECODE_TILE = 8, 256
SUM_TILE = 4, 64
"""Rows and columns; columns are a multiple of 8, at which codes of all widths start a byte."""
_FEW_TOKENS = 8  # up to here a product waits for memory, and the tensor cores would have little to do


class Tiles(NamedTuple):
    """How a product of [tokens, columns] and [rows, columns] is divided.

    Attributes:
        tokens: Of a program; a power of two.
        rows: Of a program; a power of two.
        columns: That a program takes at once; a power of two.
        columns_a_part: Columns of a program, a multiple of ``columns``.
        grid: Number of programs by rows, tokens and parts of the columns.
    """

    tokens: int
    rows: int
    columns: int
    columns_a_part: int
    grid: tuple[int, int, int]


def product_tiles(num_tokens: int, num_rows: int, num_columns: int, *, processors: int) -> Tiles:
    """The tiles of a product. Columns are parted where rows and tokens alone would leave processors idle.

    Example:
        >>> product_tiles(1, 4096, 4096, processors=132)
        Tiles(tokens=1, rows=16, columns=256, columns_a_part=1024, grid=(256, 1, 4))
    """
    tokens = min(64, 1 << (num_tokens - 1).bit_length())
    if tokens <= _FEW_TOKENS:
        rows, columns, wanted = min(16, 32 // tokens), 256, 8 * processors
    else:
        tokens, rows, columns, wanted = max(16, tokens), 64, 64, 2 * processors
    across, down = _ceil(num_rows, rows), _ceil(num_tokens, tokens)
    steps = _ceil(num_columns, columns)
    parts = min(_ceil(wanted, across * down), _ceil(steps, 4))  # four steps at least, to be worth a sum of parts
    columns_a_part = _ceil(steps, parts) * columns
    return Tiles(tokens, rows, columns, columns_a_part, (across, down, _ceil(num_columns, columns_a_part)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def kernels_for(tensor: torch.Tensor, bits: int) -> Kernels | None:
    """The kernels for codes of so many bits where a tensor lies, or None: not on a GPU, another dtype, or a fault."""
    if tensor.device.type != "cuda" or tensor.dtype not in DTYPES:
        return None
    return _checked_kernels(tensor.device, tensor.dtype, bits)


@cache
def _checked_kernels(device: torch.device, dtype: torch.dtype, bits: int) -> Kernels | None:
    """The kernels of a device, unless something is wrong with them. Then a warning says what, once."""
    try:
        from fedzo.sketch.triton_kernels import Kernels

        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        kernels = Kernels(processors)
        for num_columns in (69, 1029):  # one part, which adds the bias itself, and several
            _check(kernels, device, dtype, bits, num_columns)
    except Exception as error:  # whatever a compiler or driver raises: torch's path is slower, not wrong
        if is_out_of_memory(error):
            raise  # it says nothing of the kernels, and is not remembered: who asks again may find room
        said = "the GPU kernels for sketches cannot be used on %s with %s and codes of %d bits: %s"
        log.warning(said, device, dtype, bits, error)
        return None
    return kernels


def _check(kernels: Kernels, device: torch.device, dtype: torch.dtype, bits: int, num_columns: int) -> None:
    """Compute with small whole numbers, which all dtypes and orders of summation make exactly.

    Neighbouring tables differ, no stretch of codes repeats, and no row ends where a byte ends.

    Raises:
        RuntimeError: A result is another.
    """
    from fedzo.sketch.packing import pack  # which imports this module

    num_rows = 9  # more than a tile has of decoding, and of sums
    codes = torch.arange(num_rows * num_columns, device=device).square().remainder(6007).remainder(1 << bits)
    tables = torch.arange(num_rows * 3 << bits, device=device).mul(7).remainder(17).sub(8).view(num_rows, 3, -1)
    weight = tables.gather(2, codes.view(num_rows, 3, -1)).view(num_rows, num_columns).to(dtype)
    packed, values = pack(codes.view_as(weight).to(torch.uint8), bits), tables.to(dtype)

    if not torch.equal(kernels.decode(packed, values, torch.empty_like(weight)), weight):
        raise RuntimeError("a decoded matrix is not the table's values")
    for num_tokens in (1, 17):
        x = torch.arange(num_tokens * num_columns, device=device).remainder(5).sub(2).view(num_tokens, -1)
        expected = x.double() @ weight.double().T + 1
        if not torch.equal(kernels.product(x.to(dtype), packed, values, weight.new_ones(num_rows)), expected.to(dtype)):
            raise RuntimeError(f"a product with {num_tokens} tokens is wrong")
    sums = torch.zeros(tables.shape, device=device)
    sums.scatter_add_(2, codes.view(num_rows, 3, -1), weight.float().view(num_rows, 3, -1))
    if not torch.equal(kernels.sum_by_code(packed, weight.float(), 3, bits), sums):
        raise RuntimeError("sums by code are wrong")
