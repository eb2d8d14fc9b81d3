"""Which of PyTorch's libraries multiplies float32 matrices on a CPU.

By default it is MKL, which keeps to half the width of AVX-512 on processors that Intel did not make. oneDNN, the other
one, is asked only where the precision "medium" allows it to round what it multiplies to bfloat16; where the processor
has no unit for that (AMX) it multiplies in float32 all the same, at full width. So the permission is given, and kept
where products turn out to be float32's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

_DEFAULT, _ONEDNN = "highest", "medium"
_SHAPE = (64, 512, 256)
_LARGEST_ERROR = 4.0  # of the default's error: sums in another order come to 1.5, inputs in bfloat16 to 10,000


def choose_product(device: torch.device) -> bool:
    """Let oneDNN multiply float32 matrices in this process if it does so in float32; whether it does.

    On CPUs only: the same permission would take float32 from a GPU's products. The answer depends on the machine and
    the libraries alone, never on time, so that processes of one machine agree.
    """
    torch.set_float32_matmul_precision(_DEFAULT)
    if device.type != "cpu":
        return False
    rows, inner, columns = _SHAPE
    left, right = _matrix(rows, inner, 1009), _matrix(columns, inner, 2003)
    exact = left.double() @ right.double().T
    default = _error(F.linear(left, right), exact)
    torch.set_float32_matmul_precision(_ONEDNN)
    chosen = _error(F.linear(left, right), exact) <= _LARGEST_ERROR * default
    if not chosen:
        torch.set_float32_matmul_precision(_DEFAULT)
    return chosen


def product_is_chosen() -> bool:
    """Whether ``choose_product`` took oneDNN in this process."""
    return torch.get_float32_matmul_precision() == _ONEDNN


@contextmanager
def default_product() -> Iterator[None]:
    """Products as PyTorch makes them by itself, to compare with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_DEFAULT)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _matrix(rows: int, columns: int, modulus: int) -> torch.Tensor:
    """Numbers of mixed size and sign that bfloat16 does not hold: quadratic residues."""
    residues = torch.arange(rows * columns, dtype=torch.float64).square() % modulus
    return (residues / modulus - 0.5).float().view(rows, columns)


def _error(product: torch.Tensor, exact: torch.Tensor) -> float:
    return float((product.double() - exact).square().mean().sqrt())
