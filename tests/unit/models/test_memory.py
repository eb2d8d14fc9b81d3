"""Estimates of memory and time."""

from __future__ import annotations

import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.models.memory import (
    available_memory_bytes,
    estimate_step_memory_bytes,
    fit_tokens_per_batch,
    seconds_per_token,
    weights_bytes,
)
from fedzo.testing.tiny_models import FAMILIES, tiny_loaded, tiny_model


def test_tied_weights_count_once() -> None:
    assert weights_bytes(tiny_model("llama")) == 34_976 * 4
    assert weights_bytes(tiny_model("llama", dtype=torch.bfloat16)) == 34_976 * 2


def test_the_formula_by_hand() -> None:
    model = tiny_model("llama")
    weights, activations = 34_976 * 4, 100 * 4 * (6 * 32 + 3 * 64)

    masked = estimate_step_memory_bytes(model, batch_tokens=100, space="masked", space_size=35, head_rows=7)
    full = estimate_step_memory_bytes(model, batch_tokens=100, space="full")
    longer = estimate_step_memory_bytes(model, batch_tokens=100, space="full", local_steps=2)

    assert masked == weights + activations + 7 * 512 * 8 + 35 * 20
    assert full == weights + activations + 3 * 4 * 512 * 32
    assert longer == full + weights


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_estimate_that_grows_with_the_batch(family: str) -> None:
    model = tiny_model(family)
    small, large = (estimate_step_memory_bytes(model, batch_tokens=n, space="masked") for n in (64, 640))

    assert weights_bytes(model) < small < large


def test_batches_are_halved_until_they_fit() -> None:
    model = tiny_model("llama")

    def fit(available: int) -> int:
        return fit_tokens_per_batch(model, wanted=4096, longest=100, available_bytes=available, space="masked")

    def needed(tokens: int) -> int:
        return estimate_step_memory_bytes(model, batch_tokens=tokens, space="masked") - weights_bytes(model)

    assert fit(1 << 40) == 4096
    assert fit(int(needed(1024) / 0.9) + 1) == 1024
    assert fit(int(needed(1024) / 0.9) - 9) == 512
    assert fit(int(needed(100) / 0.9) + 1) == 100


def test_a_sequence_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"one sequence of 100 tokens needs .* Lower model\.max_length"):
        fit_tokens_per_batch(tiny_model("llama"), wanted=4096, longest=100, available_bytes=1000, space="full")


def test_the_machine_has_some_memory_and_a_token_takes_some_time() -> None:
    assert available_memory_bytes(torch.device("cpu")) > 1 << 20
    assert 0 < seconds_per_token(tiny_loaded(), num_tokens=64) < 1
