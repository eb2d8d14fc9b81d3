"""What a process measures with, as its run's metrics tell it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedzo.fl.replica import Workspace
from fedzo.models.products import RoundedProducts
from fedzo.records.metrics import Forwards


@pytest.mark.parametrize(
    ("dtype", "products", "expected"),
    [
        (torch.bfloat16, None, Forwards(dtype="bfloat16", products="", tokens_per_batch=7)),
        (
            torch.float32,
            RoundedProducts("float32 with TF32 products", "high"),
            Forwards(dtype="float32", products="float32 with TF32 products", tokens_per_batch=7),
        ),
    ],
)
def test_what_decides_the_bits_of_forwards_is_told(
    dtype: torch.dtype, products: RoundedProducts | None, expected: Forwards
) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)  # codes come first
    loaded: Any = SimpleNamespace(model=model.to(dtype))
    unused: Any = None

    at = Workspace(loaded, unused, tokens_per_batch=7, forward_cost_tokens=1, products=products)

    assert at.forwards == expected
