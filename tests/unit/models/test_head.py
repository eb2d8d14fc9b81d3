"""The head applied apart, and models for which that is not right."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedzo.models.checks import mismatch
from fedzo.models.head import check_head, hidden_at, own_logits_at, project
from fedzo.testing.tiny_models import FAMILIES, tiny_model

IDS = torch.arange(24).view(2, 12) * 11 % 256
ROWS, COLUMNS = torch.tensor([0, 1, 1]), torch.tensor([11, 0, 7])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_positions_equal_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    own = model(IDS).logits[ROWS, COLUMNS]
    some = torch.tensor([5, 200, 5, 0])

    hidden = hidden_at(model, IDS, ROWS, COLUMNS)

    assert torch.allclose(project(model, hidden), own, atol=1e-5)
    assert torch.allclose(project(model, hidden, vocabulary=some), own[:, some], atol=1e-5)
    assert torch.equal(own_logits_at(model, IDS, ROWS, COLUMNS), own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_passes_the_check_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    assert check_head(tiny_model(family, dtype=dtype))


def test_the_cap_of_gemma_matters_here() -> None:
    model = tiny_model("gemma2")
    hidden = hidden_at(model, IDS, ROWS, COLUMNS)
    capped = project(model, hidden)

    model.config.final_logit_softcapping = None

    assert (project(model, hidden) - capped).abs().max() > 1e-3


def test_the_cap_of_a_composite_config_is_that_of_its_text() -> None:
    model = tiny_model("gemma2")
    hidden = hidden_at(model, IDS, ROWS, COLUMNS)
    capped = project(model, hidden)

    model.config = SimpleNamespace(get_text_config=lambda text=model.config: text)

    assert torch.equal(project(model, hidden), capped)


def test_a_habit_that_is_not_known_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(512) * 1e-2
        return output

    model.forward = shifted

    with caplog.at_level(logging.WARNING):
        assert not check_head(model)
    assert "its LM head is applied at all positions" in caplog.text


def test_a_model_without_a_named_head_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.get_output_embeddings = lambda: None

    with caplog.at_level(logging.WARNING):
        assert not check_head(model)
    assert "names no output embeddings" in caplog.text


def test_a_wrapped_head_is_called_and_not_read() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, None

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(hidden)

    model = tiny_model("llama")
    hidden = hidden_at(model, IDS, ROWS, COLUMNS)
    plain = project(model, hidden)
    model.lm_head = Doubled(model.lm_head)

    some = project(model, hidden, vocabulary=torch.tensor([3, 4]))

    assert torch.allclose(some, 2 * plain[:, [3, 4]], atol=1e-6)
    assert check_head(model)


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        ([1.0, -2.0], ""),
        ([1.0, -2.0001], ""),
        ([1.0, -2.25], "off by 0.25, more than 0.0002"),
        ([1.0, float("nan")], "off by nan, more than 0.0002"),
        ([1.0, -2.0, 0.0], "of shape (3,) instead of (2,)"),
    ],
)
def test_two_computations_differ_by_their_rounding_at_most(ours: list[float], told: str) -> None:
    own = torch.tensor([1.0, -2.0])

    assert mismatch(torch.tensor(ours), own) == told
    assert not mismatch(own + 0.05, own, dtype=torch.bfloat16)


def test_nan_in_the_same_place_is_no_difference_where_one_says_so() -> None:
    states = torch.tensor([1.0, float("nan")])

    assert "nan" in mismatch(states, states)
    assert not mismatch(states, states, equal_nan=True)
    assert mismatch(states.nan_to_num(), states, equal_nan=True)
