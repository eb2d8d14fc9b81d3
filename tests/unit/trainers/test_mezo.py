"""MeZO says when a model's dtype swallows its steps."""

from __future__ import annotations

import pytest
import torch

from fedzo.testing.tiny_models import tiny_loaded
from fedzo.trainers import TRAINERS
from fedzo.trainers.mezo import MezoConfig
from fedzo.zo.config import Distribution, Rounding


@pytest.mark.parametrize(
    ("dtype", "rounding", "times"),
    [
        (torch.bfloat16, Rounding.nearest, 1),
        (torch.float16, Rounding.nearest, 1),
        (torch.bfloat16, Rounding.stochastic, 0),
        (torch.float32, Rounding.nearest, 0),
    ],
)
def test_a_16_bit_model_rounded_to_nearest_is_warned_of_once(
    dtype: torch.dtype, rounding: Rounding, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = TRAINERS.build(MezoConfig(rounding=rounding))

    trainer.build(tiny_loaded(dtype=dtype), b"", distribution=Distribution.gaussian)

    said = [record.getMessage() for record in caplog.records if "trainer.rounding=stochastic" in record.getMessage()]
    assert len(said) == times
    assert all("model.dtype=float32" in text and str(dtype).removeprefix("torch.") in text for text in said)
