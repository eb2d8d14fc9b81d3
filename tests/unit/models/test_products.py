"""``choose_product``: oneDNN multiplies float32 matrices only where its products are float32's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fedzo.models import products
from fedzo.models.products import choose_product, default_product, product_is_chosen

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def error(product: torch.Tensor, exact: torch.Tensor) -> float:
    return float((product.double() - exact).norm() / exact.norm())


def test_whatever_is_chosen_products_are_float32s() -> None:
    chosen = choose_product(CPU)
    generator = torch.Generator().manual_seed(0)

    for rows, inner, columns in [(560, 576, 1536), (560, 1536, 576), (33, 2048, 49), (1, 576, 576)]:
        left, right = (torch.randn(size, inner, generator=generator) for size in (rows, columns))
        assert error(F.linear(left, right), left.double() @ right.double().T) < 1e-6

    assert product_is_chosen() == chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_library_that_rounds_what_it_multiplies_is_not_chosen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds_when_allowed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        allowed = torch.get_float32_matmul_precision() == "medium"
        narrow = [x.to(dtype).float() if allowed else x for x in (left, right)]
        return narrow[0] @ narrow[1].T

    monkeypatch.setattr(products.F, "linear", rounds_when_allowed)

    assert not choose_product(CPU)
    assert not product_is_chosen()


def test_on_a_gpu_products_stay_float32s() -> None:
    torch.set_float32_matmul_precision("medium")

    assert not choose_product(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_default_products_come_back_to_what_was_chosen() -> None:
    torch.set_float32_matmul_precision("medium")

    with default_product():
        assert not product_is_chosen()

    assert product_is_chosen()
