"""oneDNN multiplies float32 matrices only where its products are float32's; what rounds them is offered apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

from fedzo.models import products
from fedzo.models.products import (
    RoundedProducts,
    choose_product,
    default_product,
    product_is_chosen,
    rounded_products,
    use_products,
)

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
def test_a_library_that_rounds_what_it_multiplies_is_not_chosen_but_offered(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds_when_allowed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        allowed = torch.get_float32_matmul_precision() == "medium"
        narrow = [x.to(dtype).float() if allowed else x for x in (left, right)]
        return narrow[0] @ narrow[1].T

    monkeypatch.setattr(products.F, "linear", rounds_when_allowed)

    assert not choose_product(CPU)
    assert not product_is_chosen()
    assert rounded_products(CPU) == ("float32 with bfloat16 products", "medium")


def test_a_cpu_whose_products_are_float32s_has_no_rounded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.F, "linear", lambda left, right: (left[:, None] * right).sum(-1))

    assert rounded_products(CPU) is None
    assert choose_product(CPU)


def test_a_library_that_makes_no_numbers_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.F, "linear", lambda left, right: torch.full((len(left), len(right)), torch.nan))

    assert not choose_product(CPU)


@pytest.mark.parametrize(
    ("capability", "offered"), [((7, 5), None), ((8, 0), ("float32 with TF32 products", "high"))], ids=str
)
def test_gpus_offer_tf32_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], offered: tuple[str, str] | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert rounded_products(torch.device("cuda")) == offered


def test_on_a_gpu_products_stay_float32s() -> None:
    torch.set_float32_matmul_precision("medium")

    assert not choose_product(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_default_products_come_back_to_what_was_chosen() -> None:
    torch.set_float32_matmul_precision("medium")

    with default_product():
        assert not product_is_chosen()

    assert product_is_chosen()


def test_rounded_products_end_after_an_error_and_none_changes_nothing() -> None:
    torch.set_float32_matmul_precision("highest")
    seen = []

    for each in (RoundedProducts("", "high"), None):
        with suppress(RuntimeError), use_products(each):
            seen.append(torch.get_float32_matmul_precision())
            raise RuntimeError

    assert seen == ["high", "highest"]
    assert torch.get_float32_matmul_precision() == "highest"
