"""How float32 matrices are multiplied: which library does it on a CPU, and which devices can round what they multiply.

By default it is MKL, which keeps to half the width of AVX-512 on processors that Intel did not make. oneDNN, the other
one, is asked only where the precision "medium" allows it to round what it multiplies to bfloat16; where the processor
has no unit for that (AMX) it multiplies in float32 all the same, at full width. So the permission is given, and kept
where products turn out to be float32's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

_DEFAULT, _TF32, _ONEDNN = "highest", "high", "medium"
_FIRST_WITH_TF32 = (8, 0)  # compute capability: Ampere
_SHAPE = (64, 512, 256)
_LARGEST_ERROR = 4.0  # of the default's error: sums in another order come to 1.5, inputs in bfloat16 to 10,000


class RoundedProducts(NamedTuple):
    """Faster products of float32 matrices, whose factors are rounded.

    Attributes:
        name: What people call it.
        precision: The permission for ``torch.set_float32_matmul_precision``.
    """

    name: str
    precision: str


def choose_product(device: torch.device) -> bool:
    """Let oneDNN multiply float32 matrices in this process if it does so in float32; whether it does.

    On CPUs only: the same permission would take float32 from a GPU's products. The answer depends on the machine and
    the libraries alone, never on time, so that processes of one machine agree.
    """
    torch.set_float32_matmul_precision(_DEFAULT)
    chosen = device.type == "cpu" and not _onednn_rounds()
    if chosen:
        torch.set_float32_matmul_precision(_ONEDNN)
    return chosen


def rounded_products(device: torch.device) -> RoundedProducts | None:
    """What this device can do instead of float32 products: a GPU TF32, a CPU with AMX bfloat16; None for neither."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_WITH_TF32:
        return RoundedProducts("float32 with TF32 products", _TF32)
    if device.type == "cpu" and _onednn_rounds():
        return RoundedProducts("float32 with bfloat16 products", _ONEDNN)
    return None


def product_is_chosen() -> bool:
    """Whether ``choose_product`` took oneDNN in this process."""
    return torch.get_float32_matmul_precision() == _ONEDNN


def default_product() -> AbstractContextManager[None]:
    """Products as PyTorch makes them by itself, to compare with."""
    return _permission(_DEFAULT)


def use_products(products: RoundedProducts | None) -> AbstractContextManager[None]:
    """Rounded products within; ``None`` leaves them as they are."""
    return _permission(products.precision) if products else nullcontext()


@contextmanager
def _permission(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _onednn_rounds() -> bool:
    """Whether oneDNN, once it is permitted to, rounds what it multiplies."""
    rows, inner, columns = _SHAPE
    left, right = _matrix(rows, inner, 1009), _matrix(columns, inner, 2003)
    exact = left.double() @ right.double().T
    errors = []
    for precision in (_DEFAULT, _ONEDNN):
        with _permission(precision):
            errors.append(_error(F.linear(left, right), exact))
    return not errors[1] <= _LARGEST_ERROR * errors[0]  # nor is NaN float32's


def _matrix(rows: int, columns: int, modulus: int) -> torch.Tensor:
    """Numbers of mixed size and sign that bfloat16 does not hold: quadratic residues."""
    residues = torch.arange(rows * columns, dtype=torch.float64).square() % modulus
    return (residues / modulus - 0.5).float().view(rows, columns)


def _error(product: torch.Tensor, exact: torch.Tensor) -> float:
    return float((product.double() - exact).square().mean().sqrt())
