"""Which kernels a device has for a sketch, and the tiles that they work in.

The kernels are Triton's (``fedzo.sketch.triton_kernels``), which CUDA builds of torch bring. Where triton is missing,
or its kernels do not compile or do not make the right numbers, torch does the work.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

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


def kernels_for(*tensors: torch.Tensor) -> Kernels | None:
    """The kernels that serve these tensors, or None: they lie elsewhere, or have another dtype, or nothing compiles."""
    first = tensors[0]
    if first.device.type != "cuda" or any(tensor.dtype not in DTYPES for tensor in tensors):
        return None
    return _checked_kernels(first.device, first.dtype)


@cache
def _checked_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels of a device, unless something is wrong with them. Then a warning says what, once."""
    try:
        from fedzo.sketch.triton_kernels import Kernels

        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        kernels = Kernels(processors)
        _check(kernels, device, dtype)
    except Exception as error:  # whatever a compiler or driver raises: torch's path is slower, not wrong
        log.warning("the GPU kernels for sketches cannot be used on %s with %s: %s", device, dtype, error)
        return None
    return kernels


def _check(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Compute with small whole numbers, which all dtypes and orders of summation make exactly.

    Raises:
        RuntimeError: A result is another.
    """
    data = torch.arange(36, device=device).mul(83).remainder(256).view(3, 12)
    codes = torch.stack([data >> 4, data & 15], dim=2).view(3, 2, 12)
    tables = torch.arange(96, device=device).mul(7).remainder(16).sub(8).view(3, 2, 16)
    weight = tables.gather(2, codes).view(3, 24).to(dtype)
    packed, values = data.to(torch.uint8), tables.to(dtype)

    if not torch.equal(kernels.decode(packed, values, torch.empty_like(weight)), weight):
        raise RuntimeError("a decoded matrix is not the table's values")
    for num_tokens in (1, 17):
        x = torch.arange(24 * num_tokens, device=device).remainder(3).sub(1).view(num_tokens, 24)
        expected = x.double() @ weight.double().T + 1
        if not torch.equal(kernels.product(x.to(dtype), packed, values, weight.new_ones(3)), expected.to(dtype)):
            raise RuntimeError(f"a product with {num_tokens} tokens is wrong")
    sums = torch.zeros(3, 2, 16, device=device).scatter_add_(2, codes, weight.float().view(3, 2, 12))
    if not torch.equal(kernels.sum_by_code(packed, weight.float(), 2, 4), sums):
        raise RuntimeError("sums by code are wrong")
