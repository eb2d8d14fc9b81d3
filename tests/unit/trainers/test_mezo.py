"""MeZO says when a model's dtype swallows its steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedzo.testing.tiny_models import tiny_loaded
from fedzo.trainers import TRAINERS, mezo
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


@pytest.mark.parametrize(
    ("whole", "free", "warned"), [(True, 34_976 * 4 - 1, True), (True, 34_976 * 4, False), (False, 0, False)]
)
def test_a_way_back_that_needs_a_second_model_is_warned_of_where_it_has_no_room(
    whole: bool, free: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mezo, "available_memory_bytes", lambda device: free)

    TRAINERS.build(MezoConfig()).build(
        replace(tiny_loaded(), reads_whole=whole), b"", distribution=Distribution.gaussian
    )

    assert ("'tiny-llama' is read again whole" in caplog.text) == warned
